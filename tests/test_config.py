"""Configs: files, overrides by name, one clear line for what is wrong."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

from jaxquant import LayerRule
from tests import own
from train import config
from train.config import Config, Data, Fit, Plots, Quantize

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_to_run_it(path):
    loaded = config.load(path)
    assert loaded and all(isinstance(value, Config) for value in loaded.values())
    assert f"--config configs/{path.name}" in path.read_text()


def test_overrides_reach_nested_fields_of_every_type():
    overrides = [
        "seed=3",
        "init=a=b.npz",
        "fit.learning_rate=1e-3",
        "retrain.epochs=1,2",
        "retrain.epochs=(4,)",
        "quantize.reverse=True",
        "quantize.shares=0.5,1",
    ]
    made = Config()
    for override in overrides:
        made = config.override_field(made, override)
    assert made.seed == 3 and made.init == "a=b.npz" and made.fit.learning_rate == 1e-3
    assert made.retrain.epochs == (4,) and made.quantize.reverse is True
    assert made.quantize.shares == (0.5, 1.0)
    assert made.data == Config().data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", r"--config.sed: expected one of data, model, task, init, .* got 'sed'"),
        ("fit.lr=3", r"--config.fit.lr: expected one of epochs, optimizer, learning_rate"),
        ("fit=3", r"--config.fit: expected one of its fields: fit.epochs, "),
        ("seed.x=3", r"--config.seed.x: expected seed to have fields"),
        ("seed=three", r"--config.seed: expected a valid integer, .*, got 'three'"),
        ("seed=1.5", r"--config.seed: expected a valid integer, .*, got '1.5'"),
        ("fit.learning_rate=", r"--config.fit.learning_rate: expected a valid number, .* got ''"),
        ("retrain.epochs=1,x", r"--config.retrain.epochs.1: expected a valid integer, .* got 'x'"),
        (
            "quantize.zero=maybe",
            r"--config.quantize.zero: expected a valid boolean, .* got 'maybe'",
        ),
        ("quantize.method=ptq", r"--config.quantize.method: expected one of 'slq', 'mlq', "),
        ("quantize.rules=x", r"--config.quantize.rules: set this in the config's file"),
        ("seed", r"--config.seed: expected --config.NAME=VALUE"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        config.override_field(Config(), override)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            Config(quantize=Quantize(method="ptq")),
            "quantize.method: expected one of 'slq', 'mlq', 'inq', 'qcnn' or 'none', got 'ptq'",
        ),
        (Config(quantize=Quantize(sensitivity="x")), "quantize.sensitivity: expected one of"),
        (
            Config(quantize=Quantize(method="inq"), retrain=Fit(centroid_rate=0.1)),
            "retrain.centroid_rate: expected 0, trained centroids leave powers of two",
        ),
        (Config(quantize=Quantize(words=257)), "quantize.words: expected at most 256, got 257"),
        (Config(quantize=Quantize(length=0)), "quantize.length: expected at least 1, got 0"),
        (
            Config(quantize=Quantize(moment_batches=-1)),
            "quantize.moment_batches: expected at least",
        ),
        (
            Config(quantize=Quantize(method="inq", moment_batches=8)),
            "quantize.moment_batches: expected 0 for inq, got 8",
        ),
        (Config(batch_size=0), "batch_size: expected at least 1, got 0"),
        (Config(seed=2**32), "seed: expected less than 4294967296, got 4294967296"),
        (Config(fit=Fit(epochs=(1, 2))), "fit.epochs: expected one number"),
        (Config(fit=Fit(epochs=(1,), distill_weight=0.5)), "fit.distill_weight: expected 0"),
        (Config(fit=Fit(epochs=(1,), feature_weight=0.5)), "fit.feature_weight: expected 0"),
        (
            Config(fit=Fit(epochs=(1,), mirrored_teacher=True)),
            "fit.mirrored_teacher: expected false, the float network",
        ),
        (
            Config(retrain=Fit(mirrored_teacher=True)),
            "retrain.mirrored_teacher: expected distill_weight or feature_weight above 0",
        ),
        (
            Config(quantize=Quantize(method="mlq"), retrain=Fit(straight_through=True)),
            "retrain.straight_through: expected quantize.method slq with one round",
        ),
        (
            Config(quantize=Quantize(rounds=(2, 3)), retrain=Fit(straight_through=True)),
            r"which gives the codebooks, got slq with rounds \(2, 3\)",
        ),
        (
            Config(
                quantize=Quantize(rounds=(3,)),
                retrain=Fit(straight_through=True),
                one_program=True,
            ),
            "one_program: expected false with retrain.straight_through",
        ),
        (
            Config(
                quantize=Quantize(
                    rounds=(3,), rules=(LayerRule("a/.*", k=3, centroid_dtype="int8", scaled=True),)
                ),
                retrain=Fit(straight_through=True, centroid_rate=1.0),
            ),
            "retrain.centroid_rate: expected 0, centroids of 'a/.\\*' are int8",
        ),
        (
            Config(retrain=Fit(warmest=0.5)),
            "retrain.warmest: expected 0 without retrain.straight_through, got 0.5",
        ),
        (Config(retrain=Fit(coolest=0.0)), "retrain.coolest: expected more than 0"),
        (
            Config(fit=Fit(epochs=(1,), straight_through=True)),
            "fit.straight_through: expected false, the float network",
        ),
        (Config(retrain=Fit(feature_weight=-1.0)), "retrain.feature_weight: expected at least 0"),
        (Config(retrain=Fit(distill_weight=2.0)), "retrain.distill_weight: expected at most 1"),
        (Config(retrain=Fit(temperature=0.0)), "retrain.temperature: expected more than 0"),
        (Config(retrain=Fit(learning_rate=float("nan"))), "retrain.learning_rate: expected a fin"),
        (Config(save_seconds=float("inf")), "save_seconds: expected a finite number, got inf"),
        (Config(retrain=Fit(epochs=(2, -1))), "retrain.epochs.1: expected at least 0, got -1"),
        (Config(retrain=Fit(epochs=())), "retrain.epochs: expected at least one number"),
        (
            Config(retrain=Fit(epochs=(10**30,))),
            "retrain.epochs.0: expected at most 1000000, got 10000",
        ),
    ],
)
def test_values_that_no_run_could_use_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        config.validate(wrong)


RULE = LayerRule(".*", axis=0)
object.__setattr__(RULE, "axis", "0")  # whatever made it so


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Config(seed=1.5), "seed: expected a valid integer, got 1.5"),
        (Config(seed=True), "seed: expected a valid integer, got True"),
        (Config(seed=None), "seed: expected a valid integer, got None"),
        (Config(plots=Plots(draw=1)), "plots.draw: expected a valid boolean, got 1"),
        (Config(plots=False), "plots: expected an instance of Plots, got False"),
        (Config(model=b"x"), "model: expected a valid string, a class or a function, got b'x'"),
        (Config(save_seconds=False), "save_seconds: expected a valid number, got False"),
        (Config(fit=Fit(learning_rate="0.1")), "fit.learning_rate: expected a valid number, "),
        (Config(retrain=Fit(epochs=1)), "retrain.epochs: expected a valid tuple, got 1"),
        (Config(retrain=Fit(epochs=("1",))), "retrain.epochs.0: expected a valid integer, got '1'"),
        (Config(quantize=Quantize(shares=(0.5, True))), "quantize.shares.1: expected a valid num"),
        (Config(data="digits"), "data: expected an instance of Data, got 'digits'"),
        (Config(data=Data), "data: expected an instance of Data, got <class"),
        (Config(data={"name": "digits"}), "data: expected an instance of Data, got {"),
        (Config(quantize=Quantize(rules=(".*",))), "quantize.rules.0: expected an instance of"),
        (Config(quantize=Quantize(rules=RULE)), "quantize.rules: expected a valid tuple, got Lay"),
        (Config(quantize=Quantize(rules=(RULE,))), "quantize.rules.0.axis: expected a valid int"),
    ],
)
def test_values_of_another_type_are_named(wrong, message):
    with pytest.raises(ValueError) as caught:
        config.validate(wrong)
    assert str(caught.value).startswith(message)


def test_whole_numbers_and_lists_become_what_the_field_holds():
    lists = Fit(epochs=[1, 2], learning_rate=1)
    rules = [LayerRule(".*kernel")]
    checked = config.validate(Config(retrain=lists, quantize=Quantize(rules=rules)))
    assert checked.retrain.epochs == (1, 2) and type(checked.retrain.learning_rate) is float
    assert checked.quantize.rules == tuple(rules)
    assert hash(checked.retrain) == hash(Fit(epochs=(1, 2), learning_rate=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a config file, got no such file"),
        ("x = (", "SyntaxError"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config(): return 3", "expected get_config() to be a Config"),
        ("", "AttributeError"),
        ("def get_configs(): return {}", "expected get_configs() to return configs by name"),
        ("def get_configs(): return {'a': 3}", "expected get_configs()['a'] to be a Config"),
        (
            "from train.config import Config\ndef get_configs(): return {'../a': Config()}",
            "expected names that can be folders, got '../a'",
        ),
        (
            "from train.config import Config\ndef get_configs(): return {3: Config()}",
            "expected names that can be folders, got 3",
        ),
        (
            "from train.config import Config\ndef get_configs(): return {'a': Config(seed=-1)}",
            "c.py: a: seed: expected at least 0",
        ),
        (
            "from train.config import Config, Fit\n"
            "def get_config(): return Config(fit=Fit(epochs=1))",
            "c.py: fit.epochs: expected a valid tuple, got 1",
        ),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_gives_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "c.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        config.load(path)


def test_overrides_reach_every_config_of_a_study(tmp_path):
    path = tmp_path / "study.py"
    path.write_text(
        "from train.config import Config\n"
        "def get_configs(): return {'a': Config(seed=1), 'b': Config(model='lenet5')}"
    )
    loaded = config.load(path, ["batch_size=7"])
    assert [(name, value.batch_size) for name, value in loaded.items()] == [("a", 7), ("b", 7)]
    assert loaded["a"].seed == 1
    assert loaded["b"].model == "lenet5"


def test_classes_and_functions_are_saved_by_their_names():
    given = Config(
        data=Data(name=own.arrays),
        model=own.Linen,
        fit=Fit(epochs=(1,), optimizer=functools.partial(own.clipped, weight_decay=0.1)),
    )
    given = config.validate(given)
    assert given.model is own.Linen
    saved = json.loads(config.to_json(given))
    assert saved["data"]["name"] == "tests.own:arrays"
    assert saved["fit"]["optimizer"] == "tests.own:clipped(weight_decay=0.1)"
    named = config.override_field(given, "model=tests.own:Linen")
    named = config.override_field(named, "data.name=tests.own:arrays")
    assert config.difference(config.to_json(given), config.to_json(named)) == ""
    assert hash(given.data) != hash(Data())


def test_difference_names_the_fields_that_changed():
    old = Config()
    new = dataclasses.replace(old, seed=1, fit=dataclasses.replace(old.fit, momentum=0.5))
    text = config.difference(config.to_json(old), config.to_json(new))
    assert text == "fit.momentum: 0.9 -> 0.5, seed: 0 -> 1"
    assert config.difference(config.to_json(old), config.to_json(old)) == ""


def test_a_field_that_an_old_config_lacks_had_its_default():
    full = json.loads(config.to_json(Config()))
    del full["data"]["image_size"], full["batch_size"]
    old = json.dumps(full)
    assert config.difference(old, config.to_json(Config())) == ""
    other = dataclasses.replace(Config(), data=Data(image_size=64))
    assert config.difference(old, config.to_json(other)) == "data.image_size: 224 -> 64"
    full["plots"] = True  # as it was
    assert config.difference(json.dumps(full), config.to_json(Config())) == ""
    full["forgotten"] = 3
    changed = config.difference(json.dumps(full), config.to_json(Config()))
    assert changed == "forgotten: 3 -> None"
