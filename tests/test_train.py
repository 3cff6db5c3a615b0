"""The program from end to end on real digits: reports, resuming, one clear line for mistakes."""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

import jaxquant as jq
from tests.cases import mostly_slow, timeless, unpadded
from train import __main__ as cli
from train import config as configs
from train import experiment, loop, pretrained, states
from train.checkpoints import read
from train.config import Config, Fit, Quantize
from train.course import units

SHORT = [
    "--config.data.train_limit=352",
    "--config.batch_size=32",
    "--config.fit.epochs=2",
    "--config.retrain.epochs=1",
    "--config.quantize.rounds=9,17",
    "--config.quantize.recalibrate_batches=2",
    "--config.plots.draw=false",
]
SLQ = ["--config", "configs/digits_slq.py", *SHORT]


pytestmark = pytest.mark.usefixtures("experiments")


def final_params(workdir, *more):
    """Return what the latest checkpoint of a SHORT run holds: arrays and progress."""
    overrides = [a.removeprefix("--config.") for a in (*SHORT, *more)]
    job = experiment.check(configs.load("configs/digits_slq.py", overrides)["digits_slq"])
    restored = read(workdir / "checkpoints", states.shapes(job, states.functions(job)))
    assert restored is not None
    return restored


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main([*SLQ, "--workdir", str(workdir)]) == 0
    return workdir


def write_study(folder):
    """Write a study: a short run, one on half of the images, and the float network alone."""
    path = folder / "study.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from train.config import Config, Fit, Plots, Quantize\n"
        "def get_configs():\n"
        "    fit = Fit(epochs=(1,))\n"
        "    quantize = Quantize(method='slq', bits=2, rounds=(3,))\n"
        "    retrain = replace(fit, centroid_rate=1.0)\n"
        "    base = Config(fit=fit, quantize=quantize, retrain=retrain, plots=Plots(draw=False))\n"
        "    data = replace(base.data, train_limit=700)\n"
        "    return {'two': base, 'half': replace(base, data=data),\n"
        "            'float': replace(base, quantize=Quantize(method='none'))}\n"
    )
    return str(path)


@pytest.mark.slow
def test_a_study_runs_what_is_not_done_and_tabulates_all(tmp_path, capsys):
    arguments = ["--config", write_study(tmp_path), "--workdir", str(tmp_path / "runs")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"== {name}:" in out for name in ("two", "half", "float"))
    summary = (tmp_path / "runs" / "summary.md").read_text()
    table, curves = summary.split("\n\n")
    names = [[line.split("|")[1].strip() for line in x.splitlines()[2:]] for x in (table, curves)]
    assert names == [["two", "half", "float"], ["two", "half"]]
    report = json.loads((tmp_path / "runs" / "half" / "report.json").read_text())
    assert report["quantized"]["on_codebook"] is True
    (tmp_path / "runs" / "half" / "report.json").unlink()
    kept = (tmp_path / "runs" / "two" / "report.json").stat().st_mtime_ns
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "== half:" in out
    assert "== two:" not in out
    assert (tmp_path / "runs" / "two" / "report.json").stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "runs" / "half" / "report.json").read_text()) == report
    assert (tmp_path / "runs" / "summary.md").read_text() == summary


@pytest.mark.slow
def test_only_chooses_rows_of_a_study(tmp_path, capsys):
    study, runs = write_study(tmp_path), tmp_path / "runs"
    arguments = ["--config", study, "--workdir", str(runs), "--only"]
    assert cli.main([*arguments, "f*t"]) == 0
    assert [path.name for path in runs.iterdir() if path.is_dir()] == ["float"]
    assert cli.main([*arguments, "half"]) == 0
    table, _ = (runs / "summary.md").read_text().split("\n\n")
    rows = unpadded(table).splitlines()[2:]
    assert [line.split("|")[1] for line in rows] == [" half ", " float "]
    capsys.readouterr()
    assert cli.main(["eval", *arguments, "float"]) == 0
    report = json.loads((runs / "float" / "report.json").read_text())
    assert capsys.readouterr().out.startswith(f"float: accuracy {report['float']['accuracy']:.2%}")
    assert cli.main(["eval", *arguments, "*"]) == 2
    assert "expected one config, got 3; --only NAME chooses" in capsys.readouterr().err
    assert cli.main([*arguments, "twos"]) == 2
    assert "--only: expected one of two, half, float, got 'twos'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_workdir_that_another_process_is_at_is_left_to_it(tmp_path, capsys):
    runs = tmp_path / "runs"
    (runs / "two").mkdir(parents=True)
    arguments = ["--config", write_study(tmp_path), "--workdir", str(runs)]
    with experiment.lock(runs / "two") as free:
        assert free
        assert cli.main(arguments) == 0
        assert "== two: another process is at it" in capsys.readouterr().out
        assert not (runs / "two" / "report.json").exists()
        assert "two" not in (runs / "summary.md").read_text()
    (tmp_path / "one").mkdir()
    with experiment.lock(tmp_path / "one"):
        assert cli.main([*SLQ, "--workdir", str(tmp_path / "one")]) == 2
    assert "one: another process is at it" in capsys.readouterr().err
    with experiment.lock(tmp_path / "one") as free:
        assert free


def test_report_holds_what_was_promised(finished):
    report = json.loads((finished / "report.json").read_text())
    assert 0.5 < report["float"]["accuracy"] <= 1
    quantized = report["quantized"]
    assert {"accuracy", "bits_per_weight", "bytes", "compression"} <= set(quantized)
    assert quantized["on_codebook"] is True
    assert 5 < quantized["bits_per_weight"] < 5.3
    assert quantized["compression"] == pytest.approx(quantized["float_bytes"] / quantized["bytes"])
    assert [row["round"] for row in report["rounds"]] == [1, 2]
    assert report["rounds"][-1]["weights_frozen"] == 1.0
    assert report["rounds"][-1]["accuracy"] == quantized["accuracy"]
    text = unpadded((finished / "report.md").read_text())
    assert "| conv2/kernel | 3x3x16x32 | 17 | 17 | 100.0% |" in text
    assert "float: 1 dimension, fewer than 2" in text


def test_final_weights_lie_on_their_codebooks(finished):
    state, progress = final_params(finished)
    assert progress["progress"]["units"] == 4
    for name in ("conv1", "conv2", "linear"):
        values = np.unique(state.train.params[name]["kernel"])
        codebook = state.quant.codebooks[name]["kernel"]
        assert len(values) <= 17 and np.isin(values, codebook).all()
        assert state.quant.frozen[name]["kernel"].all()


@pytest.mark.slow
@pytest.mark.parametrize("stop", mostly_slow([1, 2, 3], 2))
def test_a_stopped_run_ends_as_if_it_had_not_stopped(finished, tmp_path, monkeypatch, stop):
    workdir = tmp_path / "run"
    work = loop._Worker.work

    def interrupted(self, number, *rest):
        if number == stop:
            raise KeyboardInterrupt
        return work(self, number, *rest)

    monkeypatch.setattr(loop._Worker, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.main([*SLQ, "--workdir", str(workdir)])
    monkeypatch.setattr(loop._Worker, "work", work)
    assert cli.main([*SLQ, "--workdir", str(workdir)]) == 0
    assert_same_run(workdir, finished)


def assert_same_run(workdir, finished):
    """Check the files, and the arrays of the last checkpoint bit for bit."""
    for name in ("report.json", "metrics.jsonl"):
        assert timeless(workdir / name) == timeless(finished / name)
    chex.assert_trees_all_equal(final_params(workdir)[0], final_params(finished)[0])


def after_steps(monkeypatch, count, action):
    """Call a function once, in the middle of an epoch, after so many training steps."""
    show_progress, taken = loop.show_progress, itertools.count(1)

    def counting(items, **options):
        for item in show_progress(items, **options):
            yield item
            if next(taken) == count:
                action()

    monkeypatch.setattr(loop, "show_progress", counting)


def test_signals_save_in_the_middle_of_an_epoch(finished, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    arguments = [*SLQ, "--workdir", str(tmp_path / "run")]
    # Of 11 steps an epoch: in the first, the third and the last one.
    for count, number in ((4, signal.SIGTERM), (16, signal.SIGINT), (16, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            after_steps(patch, count, functools.partial(signal.raise_signal, number))
            with pytest.raises(SystemExit) as stopped:
                cli.main(arguments)
        assert stopped.value.code == 128 + number
        assert f"stopped by {number.name}, all is saved" in capsys.readouterr().out
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert cli.main(arguments) == 0
    assert "continuing after 3 of 4 epochs and" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


def test_a_signal_between_asking_and_agreeing_is_not_lost(monkeypatch):
    keeper = loop._Keeper(1e9, None, None)

    def signalled(urgency):
        keeper.tell(signal.SIGTERM)
        return urgency

    monkeypatch.setattr(loop.layout, "highest", signalled)
    assert not keeper.due()
    assert keeper.due() and keeper.stopping == signal.SIGTERM


@pytest.mark.further  # as test_loop.py does after each save
def test_a_run_killed_in_an_epoch_goes_on_from_its_last_save(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    arguments = [*SLQ, "--workdir", str(tmp_path / "run"), "--config.save_seconds=0"]
    with monkeypatch.context() as patch:
        after_steps(patch, 18, kill)
        with pytest.raises(Killed):
            cli.main(arguments)
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_ends_with_the_same_bits(tmp_path, cache_folder):
    """Five minutes; in checkpoint writes too, of which there is one a step."""
    rng = random.Random(0)
    command = [sys.executable, "-m", "train", *SLQ, "--config.fit.epochs=40", "--workdir"]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    subprocess.run([*command, str(whole)], check=True, env=environment)
    often = [*command, str(killed), "--config.save_seconds=0"]
    for kill in range(20):
        process = subprocess.Popen(often, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # "== digits_slq ...": it has begun
        time.sleep(rng.uniform(0, 4))
        assert process.poll() is None, f"finished before kill {kill + 1}"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(often, check=True, env=environment)
    for name in ("report.json", "metrics.jsonl", "model.safetensors"):
        assert timeless(killed / name) == timeless(whole / name)
    chex.assert_trees_all_equal(
        *(final_params(x, "--config.fit.epochs=40")[0] for x in (killed, whole))
    )


shows_warnings = pytest.mark.filterwarnings("always:.*cannot be read")


@shows_warnings
@pytest.mark.parametrize("damage", mostly_slow(["truncated", "missing"], "truncated"))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    finished, tmp_path, monkeypatch, capsys, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    folders = sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(folders) == 2
    files = [path for path in folders[-1].rglob("*") if path.is_file()]
    for path in files:
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert cli.main([*SLQ, "--workdir", str(workdir)]) == 0
    captured = capsys.readouterr()
    assert f"checkpoints/{folders[-1].name}: this checkpoint cannot be read" in captured.err
    assert "continuing after 3 of" in captured.out
    assert_same_run(workdir, finished)
    assert len(list((workdir / "checkpoints.damaged").iterdir())) == 1


@shows_warnings
def test_no_readable_checkpoint_is_said_and_never_overwritten(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert cli.main([*SLQ, "--workdir", str(workdir)]) == 2
    assert "expected a checkpoint that can be read, got none of 2" in capsys.readouterr().err
    assert len(list((workdir / "checkpoints.damaged").iterdir())) == 2


def test_a_finished_run_reports_again_without_training(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert cli.main([*SLQ, "--workdir", str(finished)]) == 0
    assert "continuing after 4 of" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


def test_eval_reads_the_latest_checkpoint(finished, capsys):
    report = json.loads((finished / "report.json").read_text())
    assert cli.main(["eval", *SLQ, "--workdir", str(finished)]) == 0
    assert f"accuracy {report['quantized']['accuracy']:.2%}" in capsys.readouterr().out
    assert cli.main(["eval", *SLQ, "--workdir", str(finished), "--mirrored"]) == 2
    message = "--mirrored: expected images that may be mirrored, got those of digits"
    assert message in capsys.readouterr().err


def test_the_packed_network_is_small_and_as_accurate(finished, capsys):
    report = json.loads((finished / "report.json").read_text())
    quantized, packed = report["quantized"], finished / "model.safetensors"
    size = quantized["entropy_bytes"]
    assert quantized["file_bytes"] == packed.stat().st_size < 1.05 * size + 2048
    recorded = jq.read_metadata(packed)
    assert recorded["method"] == "slq"
    assert recorded["metadata"] == {"model": "small_cnn", "data": "digits"}
    assert cli.main(["eval", *SLQ, f"--config.init={packed}"]) == 0
    assert f"accuracy {quantized['accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("form", ["packed", "pytorch"])
def test_an_exported_network_is_the_same(finished, tmp_path, capsys, form):
    arguments = ["export", *SLQ, "--workdir", str(finished), "--format", form, "--output"]
    output = tmp_path / "out.safetensors"
    assert cli.main([*arguments, str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: {output.stat().st_size:,} bytes\n"
    train = final_params(finished)[0].train
    variables = {"params": train.params, "batch_stats": train.batch_stats}
    chex.assert_trees_all_equal(jq.unpack(pretrained.load(output, variables)), variables)
    assert cli.main([*arguments, str(tmp_path / "out.npz")]) == 2
    assert "expected --output FILE.safetensors, got" in capsys.readouterr().err


def test_report_prints_the_table_of_several_runs(finished, capsys):
    assert cli.main(["report", "--workdir", str(finished.parent)]) == 0
    out = capsys.readouterr().out
    assert "| run | float | quantized |" in unpadded(out) and "conv2/kernel" in out


def test_report_draws_the_curves_of_several_runs(finished, tmp_path, capsys):
    arguments = ["report", "--workdir", str(finished.parent), "--output"]
    assert cli.main([*arguments, str(tmp_path / "curves.png")]) == 0
    assert capsys.readouterr().out.endswith(f"\n{tmp_path / 'curves.png'}\n")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    for form, start in (("pdf", b"%PDF-"), ("svg", b"<?xml")):
        assert cli.main([*arguments, str(tmp_path / f"curves.{form}")]) == 0
        assert (tmp_path / f"curves.{form}").read_bytes().startswith(start)
    capsys.readouterr()
    assert cli.main([*arguments, "curves.jpg"]) == 2
    assert "expected --output FILE.png, .pdf or .svg, got curves.jpg" in capsys.readouterr().err


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(finished, capsys):
    arguments = [*SLQ, "--config.seed=1", "--workdir", str(finished)]
    assert cli.main(arguments) == 2
    assert "got seed: 0 -> 1" in capsys.readouterr().err


@pytest.mark.slow
def test_several_configs_end_in_one_table(tmp_path, capsys):
    both = "configs/digits_slq.py,configs/digits_mlq.py"
    overrides = ["--config.fit.epochs=1", "--config.retrain.epochs=0", "--config.plots.draw=true"]
    assert cli.main(["--config", both, *overrides, "--workdir", str(tmp_path)]) == 0
    table = (tmp_path / "summary.md").read_text()
    for name in ("digits_slq", "digits_mlq"):
        assert unpadded(table).count(f"| {name} |") == 2  # and curves
    assert table in capsys.readouterr().out
    for name in ("digits_slq", "digits_mlq"):
        for plot in ("rounds", "weights", "errors"):
            assert (tmp_path / name / "plots" / f"{plot}.png").stat().st_size > 5000


def no_device(*_, **__):
    raise AssertionError("a device was touched")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --config FILE"),
        (["--config", "configs/nothing.py", "--workdir", "w"], "configs/nothing.py: expected a"),
        (["--config", "configs/digits_slq.py"], "expected --workdir DIR"),
        (
            [*SLQ, "--workdir", "w", "--config.quantize.bits=9"],
            "conv2/kernel: expected 1 to 256 centroids, as many as can be packed, got 257",
        ),
        ([*SLQ, "--workdir", "w", "--config.modle=x"], "--config.modle: expected one of"),
        ([*SLQ, "--workdir", "w", "--config.model=resnet19"], "resnet19"),
        ([*SLQ, "--workdir", "w", "--config.data.name=imagenet"], "imagenet"),
        ([*SLQ, "--workdir", "w", "--config.init=no.npz"], "no.npz"),
        ([*SLQ, "--workdir", "w", "--config.quantize.partition=size"], "expected partition"),
        ([*SLQ, "--workdir", "w", "--config.quantize.init=best"], "expected init to be one of"),
        ([*SLQ, "--workdir", "w", "--config.quantize.rounds=9,5"], "expected rounds that grow"),
        ([*SLQ, "--workdir", "w", "--config.quantize.bits=0"], "expected bits to be 1 to"),
        (
            [*SLQ, "--workdir", "w", "--config.retrain.epochs=1,2,3"],
            "retrain.epochs: expected 1 or",
        ),
        ([*SLQ, "--workdir", "w", "--config.batch_size=5000"], "batch_size: expected at most 352"),
        ([*SLQ, "--workdir", "w", "--config.fit.epochs=0"], "expected init=FILE or fit.epochs"),
        (
            [
                *SLQ,
                *("--workdir", "w", "--config.retrain.distill_weight=1"),
                "--config.retrain.mirrored_teacher=true",
            ],
            "retrain.mirrored_teacher: expected images that may be mirrored, got those of digits",
        ),
        (["eval", *SLQ], "expected --config.init=FILE or --workdir DIR"),
        (["report"], "expected --workdir DIR"),
        (["report", "--workdir", "nowhere"], "expected the report of a finished run"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2_before_any_device_work(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "run", no_device)
    arguments = [str(tmp_path / "w") if a == "w" else a for a in arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "w").exists()


def test_moments_are_of_the_weights_that_are_quantized():
    rules = (jq.LayerRule("conv2/kernel", axis=-1), jq.LayerRule("linear/kernel"))
    job = experiment.check(Config(quantize=Quantize(moment_batches=1, rules=rules)))
    assert job.inputs == ("conv2/kernel", "linear/kernel")
    assert experiment.check(Config()).inputs == ()


def test_an_unusable_workdir_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([*SLQ, "--workdir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_units_are_the_epochs_of_each_stage():
    import jaxquant as jq

    params = {"a": jax.ShapeDtypeStruct((9, 9), "float32")}
    plan = jq.slq(params, rounds=(9, 17))
    config = Config(fit=Fit(epochs=(0,)), retrain=Fit(epochs=(2, 1)), quantize=Quantize())
    assert [tuple(unit) for unit in units(config, plan)] == [
        (-1, 0, 0),
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 1),
    ]


def test_diverging_training_stops_and_says_where(tmp_path, capsys):
    arguments = [*SLQ, "--config.retrain.learning_rate=1e30", "--workdir", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "diverged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_or_read_only_disk_ends_a_run_in_one_line(tmp_path):
    """Half a minute; needs the right to mount a file system in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        command = [sys.executable, "-m", "train", *SLQ, "--workdir", str(disk / "run")]
        full = subprocess.run(command, capture_output=True, text=True)
        assert full.returncode == 2
        (error,) = full.stderr.splitlines()
        assert error.startswith("error: ") and "space left on device" in error.lower()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        more = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "continuing after" in more.stdout
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        evaluating = [*command[:3], "eval", *command[3:]]
        assert (
            "accuracy"
            in subprocess.run(evaluating, capture_output=True, text=True, check=True).stdout
        )
        for workdir in ("run", "new"):
            command[-1] = str(disk / workdir)
            closed = subprocess.run(command, capture_output=True, text=True)
            assert closed.returncode == 2
            (error,) = closed.stderr.splitlines()
            assert error.startswith("error: ") and "read-only file system" in error.lower()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
