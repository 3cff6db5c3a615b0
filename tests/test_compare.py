"""Comparing methods: equal budgets, one float network, table and figure, products end to end."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from train import __main__ as cli
from train import compare, experiment
from train.config import Config, Fit, Quantize

pytestmark = pytest.mark.usefixtures("experiments")


@pytest.fixture
def study(tmp_path):
    """A file of two short experiments."""
    path = tmp_path / "study.py"
    path.write_text(
        "from jaxquant import LayerRule\n"
        "from train.config import Config, Fit, Plots, Quantize, vary\n"
        "def get_configs():\n"
        "    base = Config(fit=Fit(epochs=(3,)), plots=Plots(draw=False), tensorboard=False)\n"
        "    inq = {'method': 'inq', 'bits': 3, 'shares': (0.5, 1.0)}\n"
        "    rules = (LayerRule('(conv2|linear)/kernel'),)\n"
        "    qcnn = {'method': 'qcnn', 'words': 16, 'calibration_images': 64, 'rules': rules}\n"
        "    once = {'epochs': (1,)}\n"
        "    return {'inq_3': vary(base, quantize=inq, retrain=once),\n"
        "            'qcnn_16': vary(base, quantize=qcnn)}\n"
    )
    return path


def test_methods_have_equal_budgets():
    made = compare.methods(Config(data=Config().data, fit=Fit(epochs=(0,)), init="x"), epochs=3)
    families = {name.partition("_")[0] for name in made}
    assert families == set(compare.LABELS)
    for name, config in made.items():
        job = experiment.check(dataclasses.replace(config, init="", fit=Fit(epochs=(1,))))
        rounds = 0 if job.plan is None else job.plan.num_rounds
        total = compare._epochs(config, rounds)
        assert total == (0 if name.startswith(("nearest", "qcnn")) else 15), name
        if len(config.retrain.epochs) > 1:
            assert max(config.retrain.epochs) - min(config.retrain.epochs) <= 1


@pytest.mark.slow
def test_all_start_from_one_float_network_and_end_in_a_table_and_a_figure(study, tmp_path, capsys):
    runs = tmp_path / "runs"
    arguments = ["compare", "--config", str(study), "--workdir", str(runs)]
    assert cli.main([*arguments, "--only", "inq*"]) == 0
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("== float:") == 1 and out.count("== inq_3:") == 1  # not again
    names = ("inq_3", "qcnn_16")
    reports = {name: json.loads((runs / name / "report.json").read_text()) for name in names}
    assert len({report["float"]["accuracy"] for report in reports.values()}) == 1
    lines = (runs / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["float", *reports]
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["", "2", "0"]
    q = reports["qcnn_16"]["quantized"]
    assert f"{q['entropy_bytes']:,}" in lines[-1] and f"{q['accuracy']:.2%}" in lines[-1]
    picture = matplotlib.image.imread(runs / "comparison.png")
    assert picture.shape[1] > 900 and np.ptp(picture) > 0.5

    # What Q-CNN leaves is a file as any other: it runs from its words, and is as good.
    assert q["on_codebook"] is True and len(reports["qcnn_16"]["rounds"]) == 1
    assert reports["qcnn_16"]["rounds"][0]["accuracy"] == q["accuracy"]
    layers = reports["qcnn_16"]["rounds"][0]["layers"]
    assert all(row["error_after"] <= row["error_before"] * 1.001 for row in layers.values())
    model = runs / "qcnn_16" / "model.safetensors"
    assert model.stat().st_size == q["file_bytes"] < q["bytes"] + 4000
    init = f"--config.init={model}"
    assert cli.main(["eval", "--config", str(study), "--only", "qcnn_16", init]) == 0
    assert f"accuracy {q['accuracy']:.2%}" in capsys.readouterr().out

    # The rows are run from a file that the config does not name, and read without.
    (runs / "float" / "float.safetensors").unlink()
    for name, report in reports.items():
        row = ["--config", str(study), "--only", name, "--workdir", str(runs)]
        assert cli.main(["eval", *row]) == 0
        assert f"accuracy {report['quantized']['accuracy']:.2%}" in capsys.readouterr().out
        output = tmp_path / f"{name}.safetensors"
        assert cli.main(["export", *row, "--output", str(output)]) == 0
        assert output.read_bytes() == (runs / name / "model.safetensors").read_bytes()


def test_experiments_that_start_from_different_networks_are_refused(tmp_path):
    base = Config(fit=Fit(epochs=(1,)))
    configs = {"a": base, "b": dataclasses.replace(base, seed=1)}
    with pytest.raises(ValueError, match="b: expected the seed of a, to start from one network"):
        compare.run(configs, configs, tmp_path)
    other = {"a": base, "b": dataclasses.replace(base, quantize=Quantize(bits=2))}
    assert compare._shared_start(other) == base


def test_products_on_several_devices_are_refused():
    config = Config(
        fit=Fit(epochs=(1,)),
        quantize=Quantize(method="qcnn"),
        mesh=dataclasses.replace(Config().mesh, devices=2),
    )
    with pytest.raises(ValueError, match=r"mesh\.devices: expected 1, product"):
        experiment.check(config)


def test_a_float_network_that_another_process_still_trains_is_waited_for(study, tmp_path, capsys):
    runs = tmp_path / "runs"
    (runs / "float").mkdir(parents=True)
    with experiment.lock(runs / "float"):
        assert cli.main(["compare", "--configs", str(study), "--workdir", str(runs)]) == 2
    assert "float: another process trains the float network" in capsys.readouterr().err
    assert not (runs / "float" / "float.safetensors").exists()


def test_a_row_that_cannot_run_is_refused_before_the_float_network_is_trained(tmp_path):
    base = Config(fit=Fit(epochs=(1,)))
    wrong = dataclasses.replace(base, quantize=Quantize(partition="size"))
    with pytest.raises(ValueError, match="expected partition to be one of"):
        compare.run({"a": base, "b": wrong}, ["a", "b"], tmp_path)
    assert not any(tmp_path.iterdir())
