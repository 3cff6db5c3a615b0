"""Q-CNN on networks: layers in the order in which they run, corrected for the front."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from train import models, products
from train.config import Quantize

SETTINGS = Quantize(method="qcnn", words=4, length=4, sweeps=2)


class Net(nn.Module):
    """Its layers run in another order than their names sort in; a batch norm in between."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), padding=((1, 1), (1, 1)), strides=2, name="z")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = nn.relu(nn.Conv(12, (1, 1), use_bias=False, name="m")(x))
        return nn.Dense(6, name="a")(x.mean(axis=(1, 2)))


def images(seed, size=32):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(0, 1, (size, 4, 4, 3)).repeat(2, 1).repeat(2, 2)
    return jnp.asarray(smooth + rng.normal(0, 0.2, smooth.shape), jnp.float32)


@pytest.fixture(scope="module")
def quantized():
    """A network, its float variables, and what becomes of it with and without correction."""
    model = Net()
    variables = model.init(jax.random.key(0), images(0))
    batches, lines = [images(1), images(2)], []
    runs = {
        sweeps: products.quantize(
            model,
            variables,
            batches,
            Quantize(method="qcnn", words=4, length=4, sweeps=sweeps),
            key=jax.random.key(1),
            tell=lines.append,
        )
        for sweeps in (0, 3)
    }
    return model, variables, runs, lines


def test_layers_come_in_the_order_in_which_they_run():
    model = Net()
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images(0)))
    found = products.check(
        model, variables, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), SETTINGS
    )
    assert list(found) == [("z",), ("m",), ("a",)]
    assert found[("z",)]["window"] == (3, 3) and found[("a",)] == {}


@pytest.mark.slow
def test_every_kernel_becomes_words_and_nothing_else_changes(quantized):
    _, variables, runs, lines = quantized
    packed, errors = runs[3]
    kernels = {name for name in packed if "kernel" in packed[name]}
    assert all(isinstance(packed[name]["kernel"], jq.ProductArray) for name in kernels)
    np.testing.assert_array_equal(packed["a"]["bias"], variables["params"]["a"]["bias"])
    assert list(errors) == ["z/kernel", "m/kernel", "a/kernel"]
    assert packed["z"]["kernel"].words.shape == (1, 4, 3)  # three channels: no piece of four
    assert all(error.after <= error.before * (1 + 1e-4) for error in errors.values())
    assert len(lines) == 6 and lines[0].startswith("z/kernel: response error ")


@pytest.mark.slow
def test_correction_brings_held_out_outputs_nearer_to_the_float_network(quantized):
    model, variables, runs, _ = quantized
    held_out = images(5)
    want = model.apply(variables, held_out)
    errors = [
        float(
            jnp.sum(jnp.square(model.apply({**variables, "params": jq.unpack(p)}, held_out) - want))
        )
        for p, _ in (runs[0], runs[3])
    ]
    assert errors[1] < 0.8 * errors[0]


def test_a_layer_is_corrected_for_what_the_front_makes_of_its_inputs(quantized):
    model, variables, runs, _ = quantized
    packed, errors = runs[3]
    front = {**variables["params"], "z": jq.unpack(packed["z"]), "m": jq.unpack(packed["m"])}
    batches = [images(1), images(2)]
    got = [
        model.apply({**variables, "params": front | {"a": jq.unpack(packed["a"])}}, x)
        for x in batches
    ]
    want = [model.apply(variables, x) for x in batches]
    bias = variables["params"]["a"]["bias"][None]
    off = sum(jnp.sum(jnp.square(g - w)) for g, w in zip(got, want, strict=True))
    assert float(off / sum(jnp.sum(jnp.square(w - bias)) for w in want)) == pytest.approx(
        errors["a/kernel"].after, rel=1e-2
    )


def test_rules_leave_layers_alone():
    rules = (jq.LayerRule("a/.*", quantize=False), jq.LayerRule(".*kernel"))
    settings = Quantize(method="qcnn", words=4, rules=rules)
    variables = Net().init(jax.random.key(0), images(0))
    assert list(products.check(Net(), variables, images(0), settings)) == [("z",), ("m",)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Embed(5, 4, name="e")(jnp.zeros(1, int)),
            "e/embedding: expected the kernel of",
        ),
        (
            lambda: nn.Conv(4, (3, 3), feature_group_count=2, name="g")(jnp.zeros((1, 4, 4, 2))),
            "g/kernel: expected no groups",
        ),
    ],
)
def test_layers_that_products_cannot_stand_for_are_named(make, message):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(x.mean(axis=(1, 2))) + jnp.sum(make())

    variables = Odd().init(jax.random.key(0), images(0))
    with pytest.raises(ValueError, match=message):
        products.check(Odd(), variables, images(0), SETTINGS)


def test_a_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            layer = nn.Dense(3, name="d")
            return layer(layer(x))

    variables = Twice().init(jax.random.key(0), images(0))
    with pytest.raises(ValueError, match="d/kernel: expected a layer that runs once in a pass"):
        products.check(Twice(), variables, images(0), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
def test_all_networks_of_the_program_can_be_quantized(name):
    size = {"lenet5": (28, 28, 1), "alexnet": (64, 64, 3)}.get(name, (32, 32, 3))
    image = jax.ShapeDtypeStruct((1, *size), jnp.float32)
    model = models.build(name, num_classes=10)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    found = products.check(model, variables, image, SETTINGS)
    kernels = len(jq.select(variables["params"]).selected)
    assert len(found) == kernels > 0


def test_pieces_divide_the_channels():
    assert [products.piece(n, 4) for n in (3, 16, 6, 1, 7)] == [3, 4, 3, 1, 1]


@pytest.mark.parametrize(
    ("size", "most", "shape"), [(256, 100, (3, 85)), (8, 4, (2, 4)), (5, 9, (1, 5))]
)
def test_calibration_images_come_in_parts_of_equal_size(size, most, shape):
    rows = np.random.default_rng(0).permutation(size)
    parts = products.equal_parts(rows, most)
    assert np.shape(parts) == shape and max(map(len, parts)) <= most
    np.testing.assert_array_equal(np.ravel(parts), rows[: np.prod(shape)])
