"""The experiments on ImageNet: each builds, and runs two steps of every stage (slow)."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from tests.test_imagenet import write_archives
from train import __main__ as cli
from train import config as configs
from train import experiment, models, products

pytestmark = pytest.mark.usefixtures("optimized")

STUDY = "configs/imagenet.py"
CONFIGS = configs.load(STUDY)


@functools.cache
def shapes(name):
    """The network's variables and an image, as shapes."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = models.build(name, num_classes=1000)
    init = functools.partial(model.init, train=False)
    return model, jax.eval_shape(init, jax.random.key(0), image), image


def test_there_is_a_row_for_each_network_and_method():
    networks = ("alexnet", "vgg16", "googlenet", "resnet18")
    methods = ("slq5", "mlq", "inq5", "inq2", "qcnn")
    assert list(CONFIGS) == [f"{network}_{method}" for network in networks for method in methods]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_has_a_place_in_the_plan(name):
    config = CONFIGS[name]
    model, variables, image = shapes(config.model)
    kernels = len(jq.select(variables["params"]).selected)
    if config.quantize.method == "qcnn":
        assert len(products.check(model, variables, image, config.quantize)) == kernels
        return
    plan = experiment.make_plan(config, variables["params"], models.depth_rules(config.model))
    assert plan is not None and len(plan.selection.selected) == kernels
    rounds = {"slq5": 5, "mlq": 5, "inq5": 4, "inq2": 10}[name.partition("_")[2]]
    assert plan.num_rounds == rounds and len(config.retrain.epochs) in (1, rounds)
    if config.quantize.method == "mlq":
        head = plan.selection.by_depth()[-1]
        assert head.groups == (3,) and head.shape[-1] == 1000  # the last to go


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*unofficial")
@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_of_every_stage_run_on_a_small_archive(name, tmp_path):
    write_archives(tmp_path / "data")
    overrides = {
        "data.dir": tmp_path / "data",
        "data.allow_unofficial": "true",
        "data.image_size": 64,
        "data.workers": 0,
        "data.train_limit": 8,
        "mesh.devices": 1,
        "batch_size": 4,
        "eval_batch_size": 4,
        "fit.epochs": 1,
        "fit.learning_rate": 1e-4,  # networks without batch norm diverge at the usual one
        "retrain.epochs": 1,
        "quantize.calibration_images": 8,
        "plots": "false",
        "tensorboard": "false",
    }
    workdir = tmp_path / "runs"
    flags = [f"--config.{field}={value}" for field, value in overrides.items()]
    arguments = ["--config", STUDY, "--workdir", str(workdir), "--only", name]
    assert cli.main([*arguments, *flags]) == 0
    report = json.loads((workdir / name / "report.json").read_text())
    assert report["quantized"]["on_codebook"] is True
    lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    rounds = {"slq5": 5, "mlq": 5, "inq5": 4, "inq2": 10, "qcnn": 1}[name.partition("_")[2]]
    assert len(report["rounds"]) == rounds
    trained = [event for event in events if event["kind"] == "epoch"]
    assert len(trained) == 1 + (0 if name.endswith("qcnn") else rounds)
    head = jq.load(workdir / name / "model.safetensors")["params"]
    head = head["classifier_6" if name.startswith(("alexnet", "vgg16")) else "fc"]["kernel"]
    assert isinstance(head, jq.ProductArray if name.endswith("qcnn") else jq.PackedArray)
