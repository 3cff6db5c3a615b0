"""Configs: files, overrides by name, one clear line for what is wrong."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from train import config
from train.config import Config, Data, Fit, Quantize

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
        ("sed=3", r"--config.sed: expected one of data, model, init, .* got 'sed'"),
        ("fit.lr=3", r"--config.fit.lr: expected one of epochs, learning_rate"),
        ("fit=3", r"--config.fit: expected one of its fields: fit.epochs, "),
        ("seed.x=3", r"--config.seed.x: expected seed to have fields"),
        ("seed=three", r"--config.seed: expected int, got 'three'"),
        ("fit.learning_rate=", r"--config.fit.learning_rate: expected float, got ''"),
        ("retrain.epochs=1,x", r"--config.retrain.epochs: expected int, got 'x'"),
        ("quantize.zero=1", r"--config.quantize.zero: expected true or false, got '1'"),
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
            "quantize.method: expected one of slq, mlq, inq, qcnn, none",
        ),
        (Config(quantize=Quantize(sensitivity="x")), "quantize.sensitivity: expected one of"),
        (
            Config(quantize=Quantize(method="inq"), retrain=Fit(centroid_rate=0.1)),
            "retrain.centroid_rate: expected 0, trained centroids leave powers of two",
        ),
        (Config(quantize=Quantize(words=257)), "quantize.words: expected 1 to 256, got 257"),
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
        (Config(retrain=Fit(feature_weight=-1.0)), "retrain.feature_weight: expected at least 0"),
        (Config(retrain=Fit(distill_weight=2.0)), "retrain.distill_weight: expected 0 to 1"),
        (Config(retrain=Fit(temperature=0.0)), "retrain.temperature: expected more than 0"),
        (Config(retrain=Fit(learning_rate=float("nan"))), "retrain.learning_rate: expected at"),
        (Config(retrain=Fit(epochs=(-1,))), "retrain.epochs: expected at least 0, got -1"),
    ],
)
def test_values_that_no_run_could_use_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        config.validate(wrong)


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
            "from train.config import Config\ndef get_configs(): return {'a': Config(seed=-1)}",
            "a: seed: expected at least 0",
        ),
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
    full["forgotten"] = 3
    changed = config.difference(json.dumps(full), config.to_json(Config()))
    assert changed == "forgotten: 3 -> None"
