"""The command line's verbs and flags, and their help, which cannot fall behind the code."""

import json
import re

import pytest

from jaxquant.clustering.options import STARTS
from train import __main__ as cli
from train import arguments, config, data, models
from train.config import Config

FIELDS = {field.name: field for field in config.describe()}
LEAVES = {name: field for name, field in FIELDS.items() if field.default is not None}


def page(capsys, *words):
    """Return what a command prints that ends well."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def test_every_field_has_a_meaning_a_default_and_a_place_on_the_page(capsys):
    out = page(capsys, "help", "config")
    assert set(LEAVES) == set(config._flatten(json.loads(config.to_json(Config()))))
    for name, field in FIELDS.items():
        assert len(field.meaning.split()) >= 2, name
        assert field.meaning.split()[0] in out
    for name, field in LEAVES.items():
        assert f"  {name}={field.default}\n" in out
    assert len(out.splitlines()) < 250 and max(map(len, out.splitlines())) <= 100
    assert page(capsys, "--help-config") == out == page(capsys, "eval", "--help-config")


def test_defaults_are_as_overrides_take_them():
    for name, field in LEAVES.items():
        if name != "quantize.rules":  # for files alone
            assert config.override_field(Config(), f"{name}={field.default}") == Config(), name


def test_meanings_name_all_that_a_field_may_be():
    for name, words in {
        "model": models.NAMES,
        "data.name": data.NAMES,
        "quantize.init": STARTS,
        "quantize.partition": ("loss", "magnitude", "index", "random"),
    }.items():
        assert set(words) <= set(re.findall(r"\w+", FIELDS[name].meaning)), name
    assert (FIELDS["mesh.fsdp"].default, FIELDS["retrain.epochs"].default) == ("false", "2")
    assert FIELDS["quantize.method"].choices == ("slq", "mlq", "inq", "qcnn", "none")


@pytest.mark.parametrize("verb", arguments.VERBS)
def test_every_verb_has_a_page_of_its_own_flags(verb, capsys):
    out = page(capsys, verb, "--help")
    assert out == page(capsys, "help", verb)
    assert arguments.VERBS[verb].page.split()[0] in out
    flags = {name: names[0] for name, (names, _) in arguments._FLAGS.items()}
    for name, flag in flags.items():
        there = re.search(rf"^  {flag}\b", out, re.MULTILINE) is not None
        assert there == (name in arguments.VERBS[verb].flags), flag
    assert len(out.splitlines()) <= 50


def test_the_usual_page_lists_the_verbs(capsys):
    out = page(capsys, "--help")
    assert out == page(capsys, "help") == page(capsys, "train", "-h")
    for name, verb in arguments.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.short)}$", out, re.MULTILINE)


def test_flags_have_the_defaults_of_a_plain_run():
    options, overrides = arguments.parse(["--config", "a.py", "--config.seed=3", "--workdir=w"])
    assert overrides == ["seed=3"]
    assert (options.verb, options.config, str(options.workdir)) == ("train", ["a.py"], "w")
    assert (options.only, options.distributed) == ("*", None)
    options, _ = arguments.parse(["eval", "--config", "a.py"])
    assert not options.mirrored
    assert arguments.parse(["export"])[0].format == "packed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["foo"], "expected one of train, eval, export, report, compare or help, got 'foo'"),
        (["help", "foo"], "help: expected one of train, eval, export, report, compare, config, go"),
        (["help", "eval", "report"], "got 'eval report'"),
        (["eval", "report"], "unrecognized arguments: report"),
        (["eval", "--distributed"], "unrecognized arguments: --distributed"),
        (["report", "--mirrored"], "unrecognized arguments: --mirrored"),
        (["--work=a"], "unrecognized arguments: --work=a"),
        (["export", "--format=onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_what_no_verb_takes_is_named(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments.parse(words)
