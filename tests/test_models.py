"""Tests of the networks: sizes, names, and their arithmetic against NumPy with PyTorch's rules."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import mostly_slow
from train import layers, models

SHAPES = {
    "resnet20": (2, 32, 32, 3),
    "resnet32": (2, 32, 32, 3),
    "resnet44": (2, 32, 32, 3),
    "resnet56": (2, 32, 32, 3),
    "small_cnn": (2, 8, 8, 1),
    "lenet5": (2, 28, 28, 1),
}


def init(name, shape=None, **options):
    module = models.build(name, num_classes=10, **options)
    return module, module.init(jax.random.key(0), jnp.zeros(shape or SHAPES[name]))


def abstract(name):
    module = models.build(name, num_classes=10)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(SHAPES[name]))


def kernel_paths(variables):
    leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    natural = [[int(s) if s.isdigit() else s for s in re.split(r"(\d+)", path)] for path in paths]
    return [path for _, path in sorted(zip(natural, paths, strict=True)) if "kernel" in path]


def conv_torch(x, kernel, *, stride):
    """torch.nn.functional.conv2d(padding=1, bias=None), for x NHWC and a kernel HWIO, by loops."""
    x = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = ((size - 3) // stride + 1 for size in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            y[:, i, j] = np.tensordot(window, kernel.astype(np.float64), 3)
    return y


def norm_torch(x, params, stats):
    scaled = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return scaled * params["scale"] + params["bias"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("small_cnn", 24_058),
        ("lenet5", 431_080),
    ],
)
def test_parameter_count(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(name)["params"])) == count


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet20", [(32, 32, 16)] * 3 + [(16, 16, 32)] * 3 + [(8, 8, 64)] * 3),
        ("small_cnn", [(4, 4, 16), (2, 2, 32), (2, 2, 64)]),
        ("lenet5", [(12, 12, 20), (4, 4, 50), (500,)]),
    ],
)
def test_features_are_those_of_the_blocks_from_front_to_back(name, shapes):
    module, variables = models.build(name, num_classes=10), abstract(name)
    assert "intermediates" not in variables  # initial variables hold no features
    _, new = jax.eval_shape(
        lambda v, x: module.apply(v, x, mutable=["intermediates"]),
        variables,
        jnp.zeros(SHAPES[name]),
    )
    assert [x.shape[1:] for x in jax.tree.leaves(new)] == shapes


def test_natural_sort_of_kernels_is_depth_order():
    blocks = [
        f"layer{stage}_{block}/conv{conv}/kernel"
        for stage in (1, 2, 3)
        for block in range(9)
        for conv in (1, 2)
    ]
    expected = ["conv1/kernel", *blocks, "linear/kernel"]
    assert kernel_paths(abstract("resnet56")) == expected
    assert kernel_paths(abstract("small_cnn")) == [
        *(f"conv{i}/kernel" for i in (1, 2, 3)),
        "linear/kernel",
    ]
    assert kernel_paths(abstract("lenet5")) == [
        f"{name}/kernel" for name in ("conv1", "conv2", "fc1", "fc2")
    ]


@pytest.mark.parametrize("name", mostly_slow(["resnet20", "small_cnn", "lenet5"], "small_cnn"))
def test_every_network_is_called_alike(name):
    module, variables = init(name)
    x = jax.random.normal(jax.random.key(1), SHAPES[name])
    logits = module.apply(variables, x, train=False)
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    logits, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert logits.shape == (2, 10)
    assert ("batch_stats" in updates) == ("batch_stats" in variables) == (name != "lenet5")


def test_bn_momentum_is_the_decay_of_the_running_statistics():
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    means = {}
    for momentum in (0.9, 0.5):
        module, variables = init("small_cnn", bn_momentum=momentum)
        _, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
        means[momentum] = updates["batch_stats"]["bn1"]["mean"]
    np.testing.assert_allclose(means[0.5], 5 * means[0.9], rtol=1e-5)


def test_strided_block_is_that_of_pytorch():
    """A block of stride 2 that doubles the channels, against loops, with option A's shortcut."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    block = layers.BasicBlock(8, 2)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), shapes)
    params, stats = variables["params"], variables["batch_stats"]
    y = conv_torch(x, params["conv1"]["kernel"], stride=2)
    y = np.maximum(norm_torch(y, params["bn1"], stats["bn1"]), 0)
    y = conv_torch(y, params["conv2"]["kernel"], stride=1)
    y = norm_torch(y, params["bn2"], stats["bn2"])
    y[..., 2:6] += x[:, ::2, ::2, :]
    variables = jax.tree.map(jnp.float32, variables)
    np.testing.assert_allclose(block.apply(variables, x), np.maximum(y, 0), rtol=1e-4)


def test_shortcut_pads_half_on_each_side():
    x = np.arange(1, 1 + 4 * 4 * 2, dtype=np.float32).reshape(1, 4, 4, 2)
    y = np.asarray(layers.shortcut_a(jnp.asarray(x), 4))
    assert y.shape == (1, 2, 2, 4)
    assert y[0, :, :, 1].tolist() == [[1, 5], [17, 21]]
    assert y[0, :, :, 2].tolist() == [[2, 6], [18, 22]]
    assert not y[..., [0, 3]].any()


@pytest.mark.slow
def test_lenet5_flattens_as_pytorch():
    """With fc1 a selection of 500 inputs, the hidden units are channel-major features."""
    module, variables = init("lenet5")
    x = jax.random.normal(jax.random.key(1), (1, 28, 28, 1))
    params = variables["params"]
    fc1 = {"kernel": jnp.eye(800, 500), "bias": jnp.zeros(500)}
    fc2 = {"kernel": jnp.eye(500, 10), "bias": jnp.zeros(10)}
    logits = module.apply({"params": {**params, "fc1": fc1, "fc2": fc2}}, x)
    y = x
    for name in ("conv1", "conv2"):
        conv = nn.Conv(params[name]["bias"].size, (5, 5), padding="VALID")
        y = nn.max_pool(conv.apply({"params": params[name]}, y), (2, 2), strides=(2, 2))
    first_channel = np.asarray(y)[0, :, :, 0].ravel()
    np.testing.assert_allclose(logits[0], np.maximum(first_channel[:10], 0), rtol=1e-5)


@pytest.mark.parametrize(("name", "least"), [("small_cnn", 4), ("lenet5", 16)])
def test_too_small_images_are_refused(name, least):
    init(name, (1, least, least, 1))
    with pytest.raises(ValueError, match=f"{name}: expected images .* {least}x{least}, got shape"):
        init(name, (1, least - 1, least, 1))


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"expected one of resnet20, .*lenet5, .* got 'resnet19'"):
        models.build("resnet19", num_classes=10)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        models.build("lenet5", num_classes=0)
    with pytest.raises(ValueError, match=r"bn_momentum: expected .* got 1.5"):
        models.build("lenet5", num_classes=10, bn_momentum=1.5)
