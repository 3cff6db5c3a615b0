"""Several devices, several processes: the same run, with its arrays in parts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train import __main__ as cli
from train import config as configs
from train import experiment, layout, loop, states
from train.checkpoints import read
from train.config import Config, Mesh

pytestmark = pytest.mark.usefixtures("experiments")

# A fit of a minute's fraction, and ternary weights in one round.
TERNARY = [
    "--config.fit.epochs=2",
    "--config.retrain.epochs=1",
    "--config.retrain.distill_weight=0.5",
    "--config.quantize.bits=2",
    "--config.quantize.rounds=3",
    "--config.quantize.recalibrate_batches=2",
    "--config.batch_size=128",
    "--config.plots.draw=false",
]
RUN = ["--config", "configs/digits_slq.py", *TERNARY]
EIGHT = ["--config.mesh.devices=8", "--config.mesh.fsdp=true"]


def make(**mesh):
    return layout.make(Config(mesh=Mesh(**mesh)))


def test_weights_are_split_along_their_longest_axis_that_the_devices_divide():
    split = make(devices=8, fsdp=True)
    assert split.of((3, 3, 64, 64)).spec == P(None, None, None, "data")
    assert split.of((128, 100)).spec == P("data")
    assert split.of((100, 128)).spec == P(None, "data")
    assert split.of((3, 7, 77)).spec == P()  # none of them
    assert split.of((8, 16)).spec == P()  # small
    assert split.of(()).spec == P()
    assert make(devices=8).of((3, 3, 64, 64)).spec == P()


def test_placed_arrays_keep_their_values_and_lie_in_parts():
    tree = {"kernel": np.arange(4096.0).reshape(64, 64), "mask": np.eye(64, dtype=bool), "n": 3}
    placed = make(devices=4, fsdp=True).place(tree)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    for name in ("kernel", "mask"):
        assert {s.data.shape for s in placed[name].addressable_shards} == {(64, 16)}
    jax.tree.map(np.testing.assert_array_equal, layout.gather(placed), tree)


def test_a_batch_is_split_and_only_its_rows_are_read():
    class Counting(np.ndarray):
        def __getitem__(self, rows):
            read.append(np.asarray(rows))
            return np.asarray(self)[rows]

    read: list[np.ndarray] = []
    images = np.arange(60.0).reshape(20, 3).view(Counting)
    rows = np.array([[4, 7, 1, 0], [19, 2, 3, 5]])
    fed = make(devices=4).feed(images, rows)
    np.testing.assert_array_equal(fed, np.asarray(images)[rows])
    assert fed.sharding.spec == P(None, "data")
    assert [part.tolist() for part in read] == rows.T[:, :, None].tolist()
    np.testing.assert_array_equal(
        make(devices=2).feed(images, rows[0]), np.asarray(images)[rows[0]]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mesh.devices=9"], "mesh.devices: expected at most 8, all there are, got 9"),
        (["--config.mesh.devices=3"], "batch_size: expected a multiple of the 3 devices, got 128"),
        (["--config.mesh.devices=-1"], "mesh.devices: expected at least 0, got -1"),
        (["--distributed=localhost"], "--distributed: expected HOST:PORT,PROCESSES,INDEX"),
        (["--distributed=a:1,two,0"], "--distributed: expected HOST:PORT,PROCESSES,INDEX"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    assert cli.main([*RUN, "--workdir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def restored(workdir, *mesh):
    """Return the arrays of the latest checkpoint, on these devices."""
    overrides = [argument.removeprefix("--config.") for argument in (*TERNARY, *mesh)]
    job = experiment.check(configs.load("configs/digits_slq.py", overrides)["digits_slq"])
    found = read(workdir / "checkpoints", states.shapes(job, states.functions(job)))
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert cli.main([*RUN, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """A run on eight devices that ended after the float network, its weights in parts."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    work = loop._Worker.work

    def interrupted(self, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return work(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Worker, "work", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli.main([*RUN, *EIGHT, "--workdir", str(workdir)])
    return workdir


def assert_close_runs(workdir, expected):
    """Check that two runs differ by no more than the order of their sums."""
    ours, theirs = (json.loads((x / "report.json").read_text()) for x in (workdir, expected))
    assert ours["quantized"]["on_codebook"] is True
    for stage in ("float", "quantized"):
        assert ours[stage]["accuracy"] == pytest.approx(theirs[stage]["accuracy"], abs=0.01)
    a, b = restored(workdir).train.params, restored(expected).train.params
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(jnp.mean(jnp.abs(x - y)), 0, atol=5e-4)


def test_on_eight_devices_weights_masks_and_momentum_lie_in_parts(on_eight):
    state = restored(on_eight, *EIGHT)
    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3, 3, 16, 32)]
    assert len(kernels) == 4  # weights, momentum, mask, reference
    for leaf in kernels:
        assert {s.data.shape for s in leaf.addressable_shards} == {(3, 3, 16, 4)}


@pytest.mark.parametrize(
    "mesh",
    [[], pytest.param(["--config.mesh.devices=4"], marks=pytest.mark.slow)],
    ids=["1", "4"],
)
@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_anywhere(on_one, on_eight, tmp_path, mesh, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(on_eight / "config.json", workdir)
    shutil.copytree(on_eight / "checkpoints", workdir / "checkpoints")
    assert cli.main([*RUN, *mesh, "--workdir", str(workdir)]) == 0
    assert "continuing after 2 of" in capsys.readouterr().out
    assert_close_runs(workdir, on_one)


def start(cache_folder, workdir, port, index, *arguments):
    """Start one of two processes with a device each."""
    flag = f"--distributed=localhost:{port},2,{index}"
    command = [sys.executable, "-m", "train", *RUN, *arguments, "--workdir", str(workdir), flag]
    environment = {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    mesh = ["--config.mesh.devices=0", "--config.mesh.fsdp=true"]
    return subprocess.Popen(
        [*command, *mesh],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_one_network_in_parts(on_one, cache_folder, tmp_path):
    workdir, port = tmp_path / "run", free_port()
    processes = [start(cache_folder, workdir, port, index) for index in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "| run " in outputs[0][0] and "| run " not in outputs[1][0]  # one of them speaks
    assert (workdir / "metrics.jsonl").read_text().count('"kind": "retrained"') == 1
    assert_close_runs(workdir, on_one)
    # All of them pass over what is damaged.
    latest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (latest / "arrays" / "_METADATA").write_text("")
    processes = [start(cache_folder, workdir, port, index) for index in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "this checkpoint cannot be read" in outputs[0][1]
    assert "continuing after 2 of" in outputs[0][0]
    assert len(list((workdir / "checkpoints.damaged").iterdir())) == 1
    assert_close_runs(workdir, on_one)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_and_stops_both(cache_folder, tmp_path):
    """A minute."""
    workdir, port = tmp_path / "run", free_port()
    long = "--config.fit.epochs=2000"
    processes = [start(cache_folder, workdir, port, index, long) for index in range(2)]
    while not (workdir / "metrics.jsonl").is_file() or not (workdir / "metrics.jsonl").read_text():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert list((workdir / "checkpoints").iterdir())
