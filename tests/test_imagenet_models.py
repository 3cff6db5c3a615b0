"""The ImageNet networks: published sizes and names, and PyTorch's logits where torch is installed.

torch is in no requirements file; without it the tests against it are skipped.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.cases import mostly_further
from train import engine, experiment, layers, layout, models, pretrained
from train.config import Config, Quantize
from train.data import Dataset

LEAST = {"alexnet": 63, "vgg16": 32, "googlenet": 15, "resnet18": 1}
NAMES = list(LEAST)
ALL = [
    "alexnet",
    "googlenet",
    "resnet18",
    pytest.param("vgg16", marks=pytest.mark.slow),
]  # 553 MB of weights
SMALL = ["googlenet", "resnet18"]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("alexnet", "vgg16")]


def images(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def trace(name, size=224, classes=1000):
    module = models.build(name, num_classes=classes)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x)


abstract = functools.cache(trace)


def random_variables(name):
    """Return variables of size one, more or less, in which variances are positive."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32) + np.float32(0.5), abstract(name)
    )


@functools.cache
def calls(name, *kinds):
    """Return the modules of these kinds in the order in which the network calls them."""
    seen = []

    def record(call, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, kinds):
            seen.append(context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        trace(name)
    return seen


def path(module):
    return "/".join((*module.path, "kernel"))


# Sizes, names, order ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alexnet", 61_100_840),
        ("vgg16", 138_357_544),
        ("googlenet", 6_624_904),
        ("resnet18", 11_689_512),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(name)["params"])) == count


@pytest.mark.parametrize("name", NAMES)
def test_rules_put_all_kernels_in_the_order_in_which_they_are_called(name):
    rules = models.depth_rules(name)
    selection = jq.select(abstract(name)["params"], rules)
    order = [path(module) for module in calls(name, nn.Conv, nn.Dense)]
    assert [layer.path for layer in selection.by_depth()] == order
    by_default = jq.select(abstract(name)["params"])
    assert {layer.path for layer in by_default.selected} == set(order)
    assert [layer.path for layer in by_default.by_depth()] != order  # so rules are needed


@pytest.mark.parametrize(
    "name",
    mostly_further([name for name in models.NAMES if name not in NAMES], "resnet20", "lenet5"),
)
def test_other_networks_need_no_rules(name):
    order = [path(module) for module in calls(name, nn.Conv, nn.Dense)]
    assert models.depth_rules(name) is None
    by_default = jq.select(abstract(name, 28)["params"])
    assert [layer.path for layer in by_default.by_depth()] == order


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups_of_mlq_go_from_input_to_output(name):
    plan = jq.mlq(abstract(name)["params"], groups=3, rules=models.depth_rules(name))
    order = [path(module) for module in calls(name, nn.Conv, nn.Dense)]
    groups = {layer.path: layer.groups for layer in plan.selection.selected}
    assert groups[order[0]] == (0,) and groups[order[-1]] == (2,)
    assert sorted(groups[name] for name in order) == [groups[name] for name in order]


def test_a_plan_of_the_program_has_the_head_in_the_last_group():
    params = abstract("resnet18")["params"]
    config = Config(model="resnet18", quantize=Quantize(method="mlq", groups=2))
    by_depth = models.depth_rules("resnet18")
    plan = experiment.make_plan(config, params, by_depth)
    assert plan.selection.by_depth()[-1].path == "fc/kernel"
    assert plan.selection.by_depth()[-1].groups == (1,)
    own = Quantize(method="mlq", groups=1, rules=(jq.LayerRule("fc/kernel"),))
    plan = experiment.make_plan(dataclasses.replace(config, quantize=own), params, by_depth)
    assert [layer.path for layer in plan.selection.selected] == ["fc/kernel"]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "alexnet",
            [(27, 27, 64), (13, 13, 192), (13, 13, 384), (13, 13, 256), (6, 6, 256)]
            + [(4096,)] * 2,
        ),
        (
            "vgg16",
            [(224, 224, 64), (112, 112, 64), (112, 112, 128), (56, 56, 128)]
            + [(56, 56, 256)] * 2
            + [(28, 28, 256)]
            + [(28, 28, 512)] * 2
            + [(14, 14, 512)] * 3
            + [(7, 7, 512)]
            + [(4096,)] * 2,
        ),
        (
            "googlenet",
            [(28, 28, 256), (28, 28, 480)]
            + [(14, 14, channels) for channels in (512, 512, 512, 528, 832)]
            + [(7, 7, 832), (7, 7, 1024)],
        ),
        (
            "resnet18",
            [(56, 56, 64)] * 2 + [(28, 28, 128)] * 2 + [(14, 14, 256)] * 2 + [(7, 7, 512)] * 2,
        ),
    ],
)
def test_features_are_those_of_the_blocks_from_front_to_back(name, shapes):
    module = models.build(name, num_classes=1000)
    logits, new = jax.eval_shape(
        lambda v, x: module.apply(v, x, mutable=["intermediates"]),
        abstract(name),
        jnp.zeros((1, 224, 224, 3)),
    )
    assert (logits.shape, logits.dtype) == ((1, 1000), jnp.float32)
    assert [x.shape[1:] for x in jax.tree.leaves(new)] == shapes


@pytest.mark.parametrize("name", NAMES)
def test_too_small_images_are_refused(name):
    least = LEAST[name]
    assert abstract(name, least, 10)["params"]
    with pytest.raises(ValueError, match=f"{name}: expected images .* {least}x{least}, got shape"):
        abstract(name, least - 1)


def test_googlenet_refuses_images_without_colors():
    module = models.build("googlenet", num_classes=10)
    with pytest.raises(ValueError, match=r"googlenet: expected images of 3 channels, got shape"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))


# Layers against loops -----------------------------------------------------------------------------


def pooled(line, window, stride, padding, ceil_mode):
    """Maxima over the windows of a line, by PyTorch's documentation of MaxPool2d."""
    padded = np.pad(line, padding, constant_values=-np.inf)
    whole = range(0, len(padded) - window + 1, stride)
    # With ceil_mode also one that goes off bounds, if it starts in the left padding or the input.
    more = [whole[-1] + stride] if whole[-1] + window < len(padded) and ceil_mode else []
    starts = [*whole, *(start for start in more if start < padding + len(line))]
    return np.array([padded[start : start + window].max() for start in starts])


@pytest.mark.parametrize(
    ("window", "stride", "padding", "ceil_mode"),
    [
        (3, 2, 0, False),
        (3, 2, 0, True),
        (3, 2, 1, False),
        (3, 2, 1, True),
        (3, 1, 1, True),
        (2, 2, 0, True),
        (2, 2, 1, True),
        (2, 3, 1, True),
    ],
)
def test_max_pool_is_that_of_pytorch(window, stride, padding, ceil_mode):
    for size in range(3, 12):
        x = images(1, size, 5, 1) - 5.0  # below zero, where padding by zeros would show
        got = layers.max_pool(jnp.asarray(x), window, stride, padding=padding, ceil_mode=ceil_mode)[
            0, :, :, 0
        ]
        rows = np.apply_along_axis(pooled, 0, x[0, :, :, 0], window, stride, padding, ceil_mode)
        expected = np.apply_along_axis(pooled, 1, rows, window, stride, padding, ceil_mode)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", [(6, 6), (1, 2), (5, 9), (12, 18), (13, 7)])
def test_adaptive_mean_is_that_of_pytorch(shape):
    x = images(2, *shape, 3)
    expected = np.zeros((2, 6, 6, 3))
    for i, j in np.ndindex(6, 6):
        top, bottom = np.floor(i * shape[0] / 6), np.ceil((i + 1) * shape[0] / 6)
        left, right = np.floor(j * shape[1] / 6), np.ceil((j + 1) * shape[1] / 6)
        window = x[:, int(top) : int(bottom), int(left) : int(right)]
        expected[:, i, j] = window.mean((1, 2))
    np.testing.assert_allclose(layers.adaptive_mean(jnp.asarray(x), 6), expected, atol=1e-6)


# Dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rates"),
    [("alexnet", [0.5, 0.5]), ("vgg16", [0.5, 0.5]), ("googlenet", [0.2]), ("resnet18", [])],
)
def test_dropout_rates_are_those_of_torchvision(name, rates):
    assert [module.rate for module in calls(name, nn.Dropout)] == rates


@pytest.fixture(scope="module")
def alexnet():
    """An AlexNet for ten classes and its variables."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (
            rng.standard_normal(leaf.shape, np.float32)
            * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        ),
        abstract("alexnet", 63, 10),
    )
    return models.build("alexnet", num_classes=10), jax.tree.map(jnp.asarray, variables)


def test_dropout_depends_on_the_key_and_evaluation_on_none(alexnet):
    module, variables = alexnet
    x = images(2, 63, 63, 3)
    train = jax.jit(lambda v, key: module.apply(v, x, train=True, rngs={"dropout": key}))
    evaluate = jax.jit(module.apply)
    one, other, again = (train(variables, jax.random.key(seed)) for seed in (0, 1, 0))
    assert float(jnp.abs(one - other).max()) > 1e-3
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(evaluate(variables, x), evaluate(variables, x))


@pytest.mark.slow
def test_a_step_of_training_moves_every_weight_matrix(alexnet):
    module, variables = alexnet
    pixels = np.random.default_rng(0).integers(0, 256, (4, 63, 63, 3), dtype=np.uint8)
    labels = np.arange(4, dtype=np.int32)
    split = engine.Images(pixels, labels)
    dataset = Dataset("x", *split, *split, 10, (0.5,) * 3, (0.25,) * 3, 4, True)
    config = Config(batch_size=4, steps_per_call=1)
    functions = engine.build(config, dataset, module, module, layout.make(config))
    start = functions.start(variables, (), np.float32(0.9), np.float32(0))
    state, _, metrics = functions.train(
        start,
        (),
        None,
        functions.parts.layout.feed(split, np.arange(4)[None]),
        np.int32(0),
        engine.key_data(jax.random.key(1)),
        np.full(1, 0.01, np.float32),
        distill=False,
        move_centroids=False,
    )
    assert 0 < float(metrics["loss"]) < 100
    for name, layer in state.params.items():
        moved = layer["kernel"] - variables["params"][name]["kernel"]
        assert 0 < float(jnp.abs(moved).max()) < 1, name


# State_dicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_round_trip(name, tmp_path):
    variables, file = random_variables(name), tmp_path / "model.npz"
    np.savez(file, **pretrained.to_state_dict(variables))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(file, abstract(name)), variables)
    file.unlink()  # up to 553 MB, and pytest keeps folders


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file such as torchvision's of GoogLeNet, with its auxiliary heads; and a function."""
    variables, folder = random_variables("googlenet"), tmp_path_factory.mktemp("published")
    heads = {
        f"aux{head}.{layer}": np.ones(1, np.float32)
        for head in (1, 2)
        for layer in (
            "conv.conv.weight",
            *(f"conv.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
            *(f"fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")),
        )
    }
    file = folder / "googlenet.npz"
    np.savez(file, **pretrained.to_state_dict(variables), **heads)
    return variables, file


def test_auxiliary_heads_of_googlenet_are_left_out(published):
    variables, file = published
    shapes = abstract("googlenet")
    loaded = pretrained.load(file, shapes, unused=models.unused_tensors("googlenet"))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_the_program_starts_from_a_published_googlenet(published, monkeypatch):
    variables, file = published
    split = engine.Images(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32))
    dataset = Dataset("x", split, split, 1000, (0.5,) * 3, (0.5,) * 3, 0, True)
    monkeypatch.setattr(experiment, "_load_data", lambda *_: dataset)
    job = experiment.check(Config(model="googlenet", init=str(file), batch_size=4))
    jax.tree.map(np.testing.assert_array_equal, job.initial, variables)


def test_auxiliary_heads_of_other_networks_are_refused(published, tmp_path):
    _, file = published
    assert [models.unused_tensors(name) for name in ("alexnet", "vgg16", "resnet18")] == [None] * 3
    with pytest.raises(ValueError, match=r"got 18 unexpected \(aux1.conv.bn.bias, .*, \.\.\.\)"):
        pretrained.load(file, abstract("googlenet"))
    names = pretrained.to_state_dict(
        jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract("resnet18"))
    )
    other = tmp_path / "resnet18.npz"
    np.savez(other, **{name: np.ones(1) for name in (*names, "aux1.fc1.bias")})
    with pytest.raises(ValueError, match=r"102 tensors, got 1 unexpected \(aux1.fc1.bias\)"):
        pretrained.load(other, abstract("resnet18"), unused=models.unused_tensors("resnet18"))


@pytest.mark.parametrize("name", ["aux3.fc1.bias", "aux1.fc3.bias", "inception3a.aux1.fc1.bias"])
def test_other_names_are_no_auxiliary_heads(name, tmp_path):
    file = tmp_path / "googlenet.npz"
    np.savez(file, **{name: np.ones(1)})
    with pytest.raises(ValueError, match=rf"1 unexpected \({name}\)"):
        pretrained.load(file, abstract("googlenet"), unused=models.unused_tensors("googlenet"))


# Against PyTorch ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function: name -> (a network in PyTorch, its state_dict, the same in Linen's variables)."""
    torch = pytest.importorskip("torch")
    from tests import torch_networks

    made = {}

    def make(name):
        if name not in made:
            network = torch_networks.randomize(getattr(torch_networks, name)()).eval()
            torch_networks.scale_logits(network, torch.randn(2, 3, 224, 224))
            tensors = {k: tensor.numpy() for k, tensor in network.state_dict().items()}
            file = tmp_path_factory.mktemp(name) / f"{name}.npz"
            np.savez(file, **tensors)
            made[name] = network, tensors, pretrained.load(file, abstract(name))
            file.unlink()
        return made[name]

    return make


def both_logits(name, reference, x):
    from tests.torch_networks import logits

    network, _, variables = reference(name)
    module = models.build(name, num_classes=1000)
    return jax.jit(module.apply)(variables, x), logits(network, x)


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_pytorch(name, reference):
    ours, theirs = both_logits(name, reference, images(2, 224, 224, 3))
    assert 0.5 < theirs.std() < 2
    print(f"{name}: logits differ by at most {np.abs(ours - theirs).max():.1e}")  # pytest -rP
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alexnet", (64, 64)),
        ("alexnet", (200, 321)),
        ("googlenet", (65, 98)),
        ("resnet18", (65, 98)),
        pytest.param("vgg16", (64, 100), marks=pytest.mark.slow),
    ],
)
def test_logits_of_other_images_are_those_of_pytorch(name, shape, reference):
    ours, theirs = both_logits(name, reference, images(1, *shape, 3))
    assert theirs.std() > 0.2
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_is_that_of_pytorch(name, reference):
    _, tensors, variables = reference(name)
    ours = pretrained.to_state_dict(variables)
    theirs = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)


def test_training_normalizes_by_the_batch_as_pytorch(reference):
    from tests.torch_networks import logits

    network, _, variables = reference("resnet18")
    module, x = models.build("resnet18", num_classes=1000), images(4, 64, 64, 3)
    ours, new = jax.jit(lambda v: module.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables
    )
    before = {k: tensor.clone() for k, tensor in network.state_dict().items()}
    try:
        theirs = logits(network.train(), x)
        after = {k: tensor.numpy().copy() for k, tensor in network.state_dict().items()}
    finally:
        network.load_state_dict(before)
        network.eval()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    stats = pretrained.to_state_dict({"batch_stats": new["batch_stats"]})
    for key, tensor in stats.items():
        if key.endswith("running_mean"):
            np.testing.assert_allclose(tensor, after[key], rtol=0, atol=1e-4, err_msg=key)
    # PyTorch's running variances are unbiased: here of 4096 pixels.
    var = np.asarray(variables["batch_stats"]["bn1"]["var"])
    grown = (stats["bn1.running_var"] - 0.9 * var) * 4096 / 4095
    np.testing.assert_allclose(0.9 * var + grown, after["bn1.running_var"], rtol=1e-5)
