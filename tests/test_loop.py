"""Runs of every network and method go on, and are read, from a checkpoint of any stage."""

import contextlib
import functools
import itertools
import json
import re
import shutil
import time

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from tests import own
from tests.cases import mostly_further, mostly_slow, timeless
from tests.conftest import _settings as settings
from tests.test_checkpoints import snapshot
from tests.test_main import refused
from train import __main__ as cli
from train import experiment, imagenet_models, loop, models, products, states
from train.checkpoints import Checkpoints, read
from train.config import Config, Quantize
from train.course import Progress
from train.data import Dataset, Images

pytestmark = pytest.mark.usefixtures("cached")

METHODS = ("slq", "mlq", "inq", "qcnn", "none", "softly")  # softly: straight through
LIKE_OTHERS = {
    "mlq",
    "inq",
    "googlenet",
    "resnet18",
    "resnet32",
    "resnet44",
    "resnet56",
}  # left to --run-slow


def quick(names):
    return mostly_slow(names, *(name for name in names if name not in LIKE_OTHERS))


@pytest.fixture(scope="module")
def cached(cache_folder):
    """Runs of the same experiment share their compiled programs, which are not optimized."""
    with settings(
        jax_compilation_cache_dir=str(cache_folder),
        jax_persistent_cache_min_compile_time_secs=0.0,
    ):
        yield


def make_dataset(side, channels):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 24).astype(np.int32)
    noise = rng.integers(0, 60, (24, side, side, channels))
    train = Images((noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels)
    return Dataset(
        "toy", train, train.part(0, 12), 3, (0.5,) * channels, (0.25,) * channels, 0, False
    )


@pytest.fixture
def traced_once(monkeypatch):
    """Runs of the same experiment share their functions, as those of one command do."""
    engines, build = {}, states.functions

    def functions(job):
        key = repr(job.config)
        if key not in engines:
            engines[key] = build(job)
        return engines[key]

    monkeypatch.setattr(states, "functions", functions)
    monkeypatch.setattr(products, "_programs", functools.cache(products._programs))


@pytest.fixture
def toy(tmp_path, monkeypatch, traced_once):
    """The flags of a short run of LeNet-5, which has no batch norm, with a row for each method."""
    monkeypatch.setattr(experiment, "_load_data", lambda _: make_dataset(16, 1))
    study = tmp_path / "study.py"
    study.write_text(
        "from dataclasses import replace\n"
        "from jaxquant import LayerRule\n"
        "from train.config import Config, Data, Fit, Plots, Quantize\n"
        "def config(method):\n"
        "    softly = method == 'softly'\n"
        "    quantize = Quantize(method='slq' if softly else method, bits=2,\n"
        "                        rounds=(3,) if softly else (2, 3), groups=1,\n"
        "                        rules=(LayerRule('conv1/kernel'),), calibration_images=8,\n"
        "                        shares=(0.5, 1.0) if method == 'inq' else ())\n"
        "    fit = Fit(epochs=(1,), learning_rate=0.01)\n"
        "    retrain = replace(fit, epochs=(2,), straight_through=True, warmest=0.5,\n"
        "                      centroid_rate=1.0) if softly else fit\n"
        "    return Config(data=Data(name='toy'), model='lenet5', batch_size=8, fit=fit,\n"
        "                  quantize=quantize, retrain=retrain, save_seconds=0,\n"
        "                  plots=Plots(draw=False))\n"
        "def get_configs():\n"
        f"    return {{method: config(method) for method in {METHODS}}}\n"
    )
    return ["--config", str(study), "--workdir", str(tmp_path / "runs"), "--only"]


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Where copies of a run's workdir go, as it is after each of its saves."""
    folder = tmp_path / "stages"
    save = loop._Keeper.save

    def save_and_copy(self, state, progress):
        save(self, state, progress)
        self.checkpoints.wait()
        if folder.parent.joinpath("copying").exists():
            shutil.copytree(tmp_path / "runs", folder / f"{progress.units}.{progress.steps}")

    monkeypatch.setattr(loop._Keeper, "save", save_and_copy)
    (tmp_path / "copying").touch()
    return folder


@pytest.fixture
def some_of(request):
    """Of many stages, one in the middle of a re-training, or by `--all` each."""
    return lambda wanted: wanted if request.config.option.all else wanted[len(wanted) // 2 :][:1]


@pytest.mark.parametrize("method", mostly_further(quick(METHODS), "slq", "softly"))
def test_a_run_goes_on_and_is_read_from_every_stage(method, toy, stages, some_of, tmp_path, capsys):
    runs, rounds = tmp_path / "runs", 0 if method in ("qcnn", "none") else 2
    # In the float training, at its end, in the first re-training, after it, at the end.
    wanted = ["0.1", "1.0", "1.2", "2.0", "3.0"][: 5 if rounds else 2]
    goes_on([*toy, method], runs, runs / method, stages, wanted, some_of, capsys)


def goes_on(command, runs, run, stages, wanted, some_of, capsys):
    """Check that a run is read, and ends alike, from what it is after some of its saves."""
    assert cli.main(command) == 0
    runs.with_name("copying").unlink()
    names = ("report.json", "metrics.jsonl", "model.safetensors")
    whole = {name: timeless(run / name) for name in names if (run / name).is_file()}
    count = int(wanted[-1].partition(".")[0])
    assert set(wanted) <= {path.name for path in stages.iterdir()}
    for stage in some_of(wanted):
        shutil.rmtree(runs)
        shutil.copytree(stages / stage, runs)
        (run / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()  # being written
        before = snapshot(runs)
        assert cli.main(["eval", *command]) == 0
        export = ["export", *command, "--output", str(runs.with_name("a.safetensors"))]
        assert cli.main([*export, "--format", "pytorch"]) == 0
        assert cli.main(["report", "--workdir", str(runs)]) == 2
        assert snapshot(runs) == before
        capsys.readouterr()
        assert cli.main(command) == 0
        units, steps = stage.split(".")
        steps = f" and {steps} steps of the next" * (steps != "0")
        assert f"continuing after {units} of {count} epochs{steps}" in capsys.readouterr().out
        assert {name: timeless(run / name) for name in whole} == whole


def test_an_epoch_is_a_line_and_what_took_time_is_reported(toy, tmp_path, capsys):
    started = time.monotonic()
    assert cli.main([*toy, "slq"]) == 0
    whole, run = time.monotonic() - started, tmp_path / "runs" / "slq"
    line = r"{}, epoch 1/1: loss \d\.\d{{4}}, accuracy \d+\.\d\d% in training, [\d,]+ images/s{}\n"
    out = capsys.readouterr().out
    for stage, left in (("float", r", \d+ s left"), ("round 1", r", \d+ s left"), ("round 2", "")):
        assert len(re.findall(line.format(stage, left), out)) == 1, stage
    events = [json.loads(event) for event in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(event["seconds"] > 0 for event in events)
    assert [event["epoch"] for event in events] == [0, 0, 1, 1, 1, 2, 2, 2]
    report = json.loads((run / "report.json").read_text())
    assert report["seconds"] == pytest.approx(sum(event["seconds"] for event in events))
    assert 0.1 * whole < report["seconds"] < whole
    for row in report["rounds"]:
        of_round = [event["seconds"] for event in events if event.get("round") == row["round"]]
        assert len(of_round) == 3 and row["seconds"] == pytest.approx(sum(of_round))


@pytest.mark.parametrize("model", mostly_further(["Linen", "Nnx"], "Linen"))
def test_a_run_of_your_own_goes_on_and_is_read_from_every_stage(
    model, stages, some_of, traced_once, tmp_path, capsys
):
    """Its stages have optimizers of different state."""
    np.savez(tmp_path / "own.npz", **own.arrays())
    data = {"Linen": str(tmp_path / "own.npz"), "Nnx": "tests.own:arrays"}[model]
    config = tmp_path / "own.py"
    config.write_text(
        "from train.config import *\ndef get_config(): return Config(quantize=Quantize("
        "bits=2, rounds=(2, 3), recalibrate_batches=2), batch_size=16, save_seconds=0, "
        "plots=Plots(draw=False), "
        "fit=Fit(epochs=(1,), learning_rate=0.01, optimizer='optax:adamw'), retrain=Fit("
        "learning_rate=0.01, optimizer='tests.own:clipped', distill_weight=0.5))"
    )
    runs = tmp_path / "runs"
    command = ["--config", str(config), f"--config.model=tests.own:{model}"]
    command += [f"--config.data.name={data}", "--workdir", str(runs)]
    goes_on(command, runs, runs, stages, ["0.1", "1.0", "1.2", "2.0", "3.0"], some_of, capsys)
    saved = json.loads((runs / "config.json").read_text())
    assert (saved["model"], saved["data"]["name"]) == (f"tests.own:{model}", data)
    assert "got retrain.optimizer: 'tests.own:clipped' -> 'optax:lion'" in refused(
        capsys, *command, "--config.retrain.optimizer=optax:lion"
    )


@pytest.mark.slow
def test_a_finished_run_of_products_is_read_with_them(toy, tmp_path, capsys):
    """No checkpoint holds them: they come after the last one."""
    run, toy = tmp_path / "runs" / "qcnn", ["--config.quantize.words=1", *toy]
    assert cli.main([*toy, "qcnn"]) == 0
    report = json.loads((run / "report.json").read_text())
    accuracies = [report[stage]["accuracy"] for stage in ("quantized", "float")]
    assert accuracies[0] != accuracies[1]
    capsys.readouterr()
    assert cli.main(["eval", *toy, "qcnn"]) == 0
    assert f"accuracy {accuracies[0]:.2%}" in capsys.readouterr().out
    outputs = {form: tmp_path / f"{form}.safetensors" for form in ("packed", "pytorch")}
    for form, output in outputs.items():
        export = ["export", *toy, "qcnn", "--format", form, "--output", str(output)]
        assert cli.main(export) == 0
    assert outputs["packed"].read_bytes() == (run / "model.safetensors").read_bytes()
    kernel = load_file(outputs["pytorch"])["conv1.weight"]
    assert len(np.unique(kernel)) <= kernel[0].size < kernel.size  # a word for each place
    (run / "model.safetensors").unlink()
    assert cli.main(["eval", *toy, "qcnn"]) == 0
    assert f"accuracy {accuracies[1]:.2%}" in capsys.readouterr().out
    assert cli.main(["export", *toy, "qcnn", "--output", str(outputs["packed"])]) == 2
    assert "expected a finished run to pack, got one under way" in capsys.readouterr().err


@pytest.mark.parametrize("form", mostly_further(["pytorch", "packed"], "packed"))
def test_a_run_is_read_whatever_it_started_from(form, toy, tmp_path, capsys):
    start = tmp_path / "start.safetensors"
    assert cli.main([*toy, "none"]) == 0
    assert cli.main(["export", *toy, "none", "--format", form, "--output", str(start)]) == 0
    toy = [f"--config.init={start}", "--config.fit.epochs=0", *toy]
    assert cli.main([*toy, "slq"]) == 0
    report = json.loads((tmp_path / "runs" / "slq" / "report.json").read_text())
    assert report["quantized"]["accuracy"] != report["float"]["accuracy"]
    start.unlink()
    capsys.readouterr()
    assert cli.main(["eval", *toy, "slq"]) == 0
    assert f"accuracy {report['quantized']['accuracy']:.2%}" in capsys.readouterr().out


def test_a_run_of_another_config_is_not_read_and_not_touched(toy, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert cli.main([*toy, "none"]) == 0
    before = snapshot(runs)
    capsys.readouterr()
    export = ["export", "--format", "pytorch", "--output", str(tmp_path / "a.safetensors")]
    verbs = (["eval"], export, ["train"])
    other = ["--config.seed=1", "--config.model=resnet20", *toy, "none"]
    for verb in verbs:
        assert cli.main([*verb, *other]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "none: expected the config it was started with, got model: 'lenet5' -> " in error
        assert "'resnet20', seed: 0 -> 1" in error
    assert snapshot(runs) == before
    assert cli.main(["eval", "--config.eval_batch_size=5", *toy, "none"]) == 0
    path = runs / "none" / "config.json"  # only the arrays tell then
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 1, "model": "resnet20"}))
    assert cli.main(["eval", *other]) == 2
    assert "checkpoints/2: expected the arrays of this config" in capsys.readouterr().err
    assert [path.name for path in (runs / "none").glob("checkpoints*")] == ["checkpoints"]


@pytest.fixture
def narrow(monkeypatch):
    """Networks whose wide layers before the last one are narrow: they have the same leaves."""
    dense = imagenet_models._dense
    monkeypatch.setattr(imagenet_models, "_dense", lambda n, name: dense(min(n, 16), name))


def save_as_before(folder, state, record):
    """Save as earlier versions did: without checksums, batch norm's collection only if there is."""
    reference = state.reference
    if not reference["batch_stats"]:
        reference = {"params": reference["params"]}
    arguments = ocp.args.Composite(
        arrays=ocp.args.StandardSave(state._replace(reference=reference)),
        progress=ocp.args.JsonSave(record),
    )
    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=arguments)


def a_state(name, monkeypatch):
    """Return the shapes of a network's states, one of them, and the record beside it."""
    monkeypatch.setattr(experiment, "_load_data", lambda _: make_dataset(64, 3))
    job = experiment.check(Config(model=name, quantize=Quantize(rounds=(17,)), batch_size=8))
    shapes = states.shapes(job, states.functions(job))
    numbers = itertools.cycle(range(100))
    state = jax.tree.map(lambda x: np.full(x.shape, next(numbers), x.dtype), shapes)
    return shapes, state, {"progress": Progress(units=1)._asdict(), "events": []}


@pytest.mark.parametrize("name", mostly_further(quick(models.NAMES), "small_cnn", "vgg16"))
def test_a_checkpoint_of_every_network_is_restored(name, tmp_path, monkeypatch, narrow):
    shapes, state, record = a_state(name, monkeypatch)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, record)
    restored = read(tmp_path, shapes)
    assert restored is not None and restored[1] == record
    chex.assert_trees_all_equal(restored[0], state)


@pytest.mark.parametrize(
    "name", mostly_further(["small_cnn", "lenet5", "alexnet", "vgg16"], "small_cnn", "lenet5")
)
def test_a_checkpoint_of_an_earlier_version_is_restored(name, tmp_path, monkeypatch, narrow):
    shapes, state, record = a_state(name, monkeypatch)
    save_as_before(tmp_path, state, record)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        restored = checkpoints.restore(shapes)
    assert restored is not None and restored[1] == record
    chex.assert_trees_all_equal(restored[0], state)


@pytest.mark.parametrize("name", mostly_further(["lenet5", "small_cnn"], "small_cnn"))
def test_all_states_of_a_run_have_the_shapes_that_are_restored(name, monkeypatch):
    monkeypatch.setattr(experiment, "_load_data", lambda _: make_dataset(16, 1))
    job = experiment.check(Config(model=name, quantize=Quantize(rounds=(17,)), batch_size=8))
    functions = states.functions(job)
    expected = states.shapes(job, functions)
    fresh = states.fresh(job, functions)
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, expected)
    assert jax.tree.map(lambda x: x.sharding, fresh) == jax.tree.map(lambda x: x.sharding, expected)
    batch = jax.tree.map(lambda x: x[None, :8], job.dataset.train)
    trained = jax.eval_shape(
        functions.train,
        fresh.train,
        fresh.quant,
        fresh.reference,
        batch,
        np.int32(0),
        np.zeros(2, np.uint32),
        np.ones(1, np.float32),
        distill=False,
        move_centroids=False,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(trained[:2], expected[:2])
