"""The command line: each mistake is one line and exit code 2, and leaves no trace."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from train import __main__ as cli
from train import config as configs
from train import loop, models, pretrained, states
from train.logs import to_json

pytestmark = pytest.mark.usefixtures("experiments")

DIGITS = ["--config", "configs/digits_slq.py"]


def no_run(*_, **__):
    raise AssertionError("it started to run")


def refused(capsys, *arguments):
    """Return the one line that a command ends in."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    _, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def write_config(path, body):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"from train.config import Config, Data, Fit, Plots, Quantize, vary\n{body}\n")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["foo"],
        ["--confg=x"],
        ["--config"],
        [*DIGITS, "--config.seed", "3"],
        [*DIGITS, "--format=onnx"],
        ["export", *DIGITS, "--workdir", "w", "--output", "w.npz"],
        [*DIGITS, "--workdir", "w", "--config.data.name=\x1b[2Jdigits\r\n"],
        [*DIGITS, "--workdir", "w", f"--config.init={'x' * 100_000}.npz"],
        [*DIGITS, "--workdir", "a\0b"],
        [*DIGITS, "--workdir", "w", "--config.data.name=mnist", "--config.data.dir=~nobody-here/x"],
    ],
)
def test_mistakes_are_one_printable_line_of_bounded_length(arguments, capsys, monkeypatch):
    monkeypatch.setattr(loop, "run", no_run)
    error = refused(capsys, *arguments)
    assert error[:-1].isprintable() and len(error) < 3000


@pytest.mark.parametrize("verb", ["train", "eval", "export", "compare"])
@pytest.mark.parametrize("flags", ["comma", "twice"])
@pytest.mark.parametrize("other", ["file", "study"])
def test_two_configs_of_one_name_are_refused(tmp_path, capsys, monkeypatch, verb, flags, other):
    monkeypatch.setattr(loop, "run", no_run)
    first = write_config(tmp_path / "a" / "base.py", "def get_config(): return Config()")
    name, body = {
        "file": ("base.py", "def get_config(): return Config(seed=1)"),
        "study": ("s.py", "def get_configs(): return {'base': Config(seed=1)}"),
    }[other]
    second = write_config(tmp_path / "b" / name, body)
    both = {"comma": [f"{first},{second}"], "twice": [first, "--config", second]}[flags]
    error = refused(capsys, verb, "--config", *both, "--workdir", tmp_path / "w")
    assert f"got base of {first} and of {second}" in error
    assert not (tmp_path / "w").exists()


def test_files_given_one_by_one_are_all_taken(tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(loop, "run_all", lambda jobs: ran.extend(jobs))
    for name in ("a", "b"):
        write_config(tmp_path / f"{name}.py", "def get_config(): return Config()")
    files = ["--config", str(tmp_path / "a.py"), "--config", str(tmp_path / "b.py")]
    assert cli.main([*files, "--workdir", str(tmp_path / "w")]) == 0
    assert ran == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_config(): return Config(fit=Fit(epochs=1))", "fit.epochs: expected"),
        ("def get_config(): return Config(data='digits')", "data: expected an instance of Data"),
        ("def get_config(): return Config(seed=1.5)", "seed: expected a valid integer, got 1.5"),
        (
            "def get_configs(): return {'a': Config(), 'b': vary(Config(), fit={'momentum': 'x'})}",
            "b: fit.momentum: expected a valid number, got 'x'",
        ),
        ("def get_config(): return Config(model='a.b:C')", "model: expected a module a.b that can"),
        (
            "def get_config(): return Config(model=dict)",
            "model: expected builtins:dict to give a m",
        ),
        (
            "def get_config(): return Config(data=Data(name='a.npz'))",
            "data.name: a.npz: expected a f",
        ),
        (
            "def get_config(): return Config(fit=Fit(epochs=(1,), optimizer='optax:clip'))",
            "fit.optimizer: expected optax",
        ),
        (
            "def get_config(): return vary(Config(model='tests.own:Linen'), "
            "retrain=dict(feature_weight=1))",
            "retrain.feature_weight: expected 0, tests.own:Linen gives no features",
        ),
        (
            "def get_config(): return Config(model='tests.own:Nnx', quantize=Quantize('qcnn'))",
            "quantize.method: expected a network of Flax Linen for qcnn",
        ),
        (
            "def get_configs(): return {'a': Config(), 'b': Config(batch_size=5000)}",
            "batch_size: expected at most 1442",
        ),
    ],
)
def test_no_workdir_is_claimed_before_all_configs_are_right(tmp_path, capsys, body, message):
    path = write_config(tmp_path / "c.py", body)
    for workdir in (tmp_path / "w", tmp_path / "w"):  # the same again, and nothing else
        assert message in refused(capsys, "--config", path, "--workdir", workdir)
        assert not workdir.exists()


def test_no_row_is_claimed_where_another_one_is_refused(tmp_path, capsys):
    body = "def get_configs(): return {'a': Config(), 'b': Config()}"
    path = write_config(tmp_path / "c.py", body)
    other = tmp_path / "w" / "b"
    other.mkdir(parents=True)
    (other / "config.json").write_text(configs.to_json(configs.Config(seed=1)))
    assert "got seed: 1 -> 0" in refused(capsys, "--config", path, "--workdir", tmp_path / "w")
    assert not (tmp_path / "w" / "a").exists()


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    body = "def get_configs(): return {'float': Config()}"
    path = write_config(tmp_path / "c.py", body)
    arguments = ["compare", "--config", path, "--workdir", tmp_path / "w"]
    assert "expected other names than float" in refused(capsys, *arguments)
    write_config(path, "def get_configs(): return {'a': Config(quantize=Quantize(method='none'))}")
    assert "a: expected a quantize.method" in refused(capsys, *arguments)


DAMAGED = ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 10_000, "1" * 5000, "\x80"]


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:3])
def test_damaged_files_of_a_workdir_are_named(tmp_path, capsys, text):
    (tmp_path / "report.json").write_text(text, "latin1")
    error = refused(capsys, "report", "--workdir", tmp_path)
    assert f"{tmp_path / 'report.json'}: expected " in error
    (tmp_path / "config.json").write_text(text, "latin1")
    error = refused(capsys, *DIGITS, "--workdir", tmp_path)
    assert f"{tmp_path / 'config.json'}: expected " in error


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{}", "float: expected to be there, got {}"),
        ('{"float": 3}', "float: expected an object, got 3"),
        ('{"float": {"accuracy": NaN}}', "float.accuracy: expected a finite number, got nan"),
        ('{"float": {"accuracy": "1"}}', "float.accuracy: expected a valid number, got '1'"),
        ('{"float": {"accuracy": 1}, "quantized": {}}', "quantized.accuracy: expected to be"),
        ('{"float": {"accuracy": 1}, "rounds": [{}]}', "rounds.0.accuracy: expected to be there"),
    ],
)
def test_other_json_is_no_report(tmp_path, capsys, report, message):
    (tmp_path / "report.json").write_text(report)
    error = refused(capsys, "report", "--workdir", tmp_path)
    assert error.startswith(f"error: {tmp_path / 'report.json'}: {message}")


@pytest.mark.parametrize("what", ["checkpoints", "report.json"])
def test_a_run_whose_config_is_gone_is_not_given_another(tmp_path, capsys, monkeypatch, what):
    monkeypatch.setattr(loop, "run", no_run)
    (tmp_path / what).mkdir()
    error = refused(capsys, *DIGITS, "--workdir", tmp_path)
    assert f"{tmp_path}: expected the config.json of what ran here beside {what}" in error
    assert not (tmp_path / "config.json").exists()


def test_without_a_device_there_is_one_line(capsys, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize\nbackend 'foo'")

    monkeypatch.setenv("JAX_PLATFORMS", "foo")
    monkeypatch.setattr(jax, "devices", none)
    error = refused(capsys, *DIGITS, "--workdir", "w")
    assert "JAX_PLATFORMS='foo': expected a device, got Unable to initialize backend" in error


# Numbers that are none ----------------------------------------------------------------------------

ONE_STEP = [
    *("--config", "configs/digits_slq.py", "--config.batch_size=1442"),
    *("--config.fit.epochs=1", "--config.retrain.epochs=1", "--config.quantize.rounds=17"),
    *("--config.plots.draw=false", "--config.tensorboard=false"),
]


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        pytest.param("none", "fit", marks=pytest.mark.slow),
        pytest.param("qcnn", "fit", marks=pytest.mark.slow),
        ("slq", "fit"),
        pytest.param("slq", "retrain", marks=pytest.mark.slow),
    ],
)
def test_what_diverges_at_the_very_last_update_is_no_success(tmp_path, capsys, method, stage):
    more = [f"--config.quantize.method={method}", f"--config.{stage}.learning_rate=1e30"]
    error = refused(capsys, *ONE_STEP, *more, "--workdir", tmp_path)
    assert "training diverged, the loss is " in error
    for name in ("report.json", "report.md", "model.safetensors"):
        assert not (tmp_path / name).exists()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_run)


@pytest.mark.slow
def test_what_diverges_within_an_epoch_is_not_saved(tmp_path, capsys, monkeypatch):
    saved = []
    monkeypatch.setattr(loop._Keeper, "save", lambda *rest: saved.append(rest[-1].loss))
    more = ["--config.quantize.method=none", "--config.save_seconds=0", "--config.fit.momentum=0"]
    arguments = [*DIGITS, *more, "--config.fit.learning_rate=1e30", "--config.fit.warmup_epochs=0"]
    assert "float: training diverged" in refused(capsys, *arguments, "--workdir", tmp_path)
    assert saved and np.isfinite(saved).all()


def test_values_that_no_loss_shows_are_found_too():
    good, bad = {"a": jnp.ones(3)}, {"b": {"c": jnp.array([1.0, -jnp.inf])}}
    states.check_finite("x", good, {"codes": np.arange(3)})
    with pytest.raises(FloatingPointError, match=r"^x: NaN or infinite values in b/c$"):
        states.check_finite("x", good, bad)


def variables(change):
    """Return a small network's variables with a change of one leaf."""
    module = models.build("small_cnn", num_classes=10)
    made = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    made["params"]["linear"]["bias"] = change(made["params"]["linear"]["bias"])
    return made


@pytest.mark.slow
def test_eval_of_nan_is_no_success(tmp_path, capsys):
    broken = variables(lambda bias: bias.at[3].set(jnp.nan))
    packed = tmp_path / "packed.safetensors"
    jq.save(packed, jax.tree.map(np.asarray, broken))
    error = refused(capsys, "eval", *DIGITS, f"--config.init={packed}")
    assert f"{packed}: params/linear/bias: expected finite values, got 1 NaN" in error
    plain = tmp_path / "plain.safetensors"
    pretrained.save(broken, plain)
    assert "linear.bias: expected finite" in refused(
        capsys, "eval", *DIGITS, f"--config.init={plain}"
    )
    pretrained.save(variables(lambda bias: jnp.array([3e38, -3e38] * 5)), plain)
    error = refused(capsys, "eval", *DIGITS, f"--config.init={plain}")
    assert "expected a finite loss, got inf" in error


def test_json_has_no_nan():
    event = {"loss": float("nan"), "counts": [1, float("-inf")], "in": ({"x": 2.5},)}
    line = to_json(event)
    assert line == '{"loss": null, "counts": [1, null], "in": [{"x": 2.5}]}\n'


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_a_whole_study(tmp_path, capsys, monkeypatch):
    """Told while a run saves for the last time, it ends that run and those after it."""
    body = (
        "def get_configs(): return {x: Config(fit=Fit(epochs=(1,)), plots=Plots(draw=False), "
        "quantize=Quantize(method='none')) for x in 'ab'}"
    )
    path = write_config(tmp_path / "c.py", body)
    save = loop._Keeper.save

    def interrupted(self, *rest):
        save(self, *rest)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Keeper, "save", interrupted)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--config", str(path), "--workdir", str(tmp_path / "w")])
    assert stopped.value.code == 130
    assert "stopped by SIGINT, all is saved: the same command cont" in capsys.readouterr().out
    assert not (tmp_path / "w" / "a" / "report.json").exists()
    assert not (tmp_path / "w" / "b" / "checkpoints").exists()
    assert cli.main(["--config", str(path), "--workdir", str(tmp_path / "w")]) == 0
    assert "a: continuing after 1 of 1 epochs" in capsys.readouterr().out
