"""What `calibrate` observes, against sums worked out from the inputs of each layer."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from tests.cases import mostly_further, mostly_slow

WIDTH, BATCH = 6, 10


def normal(shape, seed=0):
    """Return random numbers of a shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


TOKENS = jnp.asarray(np.arange(BATCH) % 5)


def chain(params, x):
    """Two dense layers, one of which has attention's kernel of three axes."""
    heads = jnp.einsum("bd,dhe->bhe", x, params["heads"])
    return jnp.tanh(heads).reshape(len(x), -1) @ params["out"]


def chain_params():
    return {"heads": normal((WIDTH, 2, 4)), "out": normal((8, 5), seed=1), "bias": jnp.zeros(5)}


def second_moments(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def close(got, expected, **options):
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(expected), **{"rtol": 2e-5, "atol": 1e-5} | options
    )


# Moments -----------------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs_of_each_layer_over_all_batches():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    found = jq.calibrate(chain, params, [x[:7], x[7:]])  # of different sizes
    hidden = jnp.tanh(jnp.einsum("bd,dhe->bhe", x, params["heads"])).reshape(BATCH, -1)
    close(found.moments["heads"], second_moments(x))
    close(found.moments["out"], second_moments(hidden))
    assert found.inputs == {"heads": 1, "out": 1}
    assert found.moments.keys() == {"heads", "out"}


def looped(params, x):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name])
    return x


def stacked(params):
    return jnp.stack([params["first"], params["second"]])


def by_scan(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]


def by_index(params, x):
    for number in range(2):
        x = jnp.tanh(x @ params["stack"][number])
    return x


def by_checkpointed_scan(params, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(jax.jit(jnp.matmul)(x, w)), None))
    return jax.lax.scan(step, x, params["stack"])[0]


def by_loop(params, x):
    def step(number, x):
        return jnp.tanh(x @ jax.lax.dynamic_index_in_dim(params["stack"], number, keepdims=False))

    return jax.lax.fori_loop(0, 2, step, x)


def by_branch(params, x):
    x = jax.lax.cond(x[0, 0] < 1e9, lambda x: x @ params["stack"][0], lambda x: x, x)
    return jnp.tanh(jnp.tanh(x) @ params["stack"][1])


STACKED = [by_scan, by_index, by_checkpointed_scan, by_loop, by_branch]


@pytest.mark.parametrize("function", mostly_slow(STACKED, by_checkpointed_scan, by_loop))
def test_stacked_layers_have_what_they_have_apart(function):
    apart = {"first": normal((WIDTH, WIDTH)), "second": normal((WIDTH, WIDTH), seed=1)}
    x = normal((BATCH, WIDTH), seed=2)
    expected = jq.calibrate(looped, apart, [x])
    rules = [jq.LayerRule("stack", axis=0)]
    found = jq.calibrate(function, {"stack": stacked(apart)}, [x], rules=rules)
    close(found.moments["stack"], stacked(expected.moments))
    close(found.sensitivity["stack"], stacked(expected.sensitivity))


def transposed(params, x):
    return jax.vmap(lambda x: params["w"] @ x)(x)


def tied(params, x):
    return (x + params["w"][TOKENS]) @ params["w"].T


def halves_of_outputs(params, x):
    first, second = jnp.split(params["w"], 2, axis=1)
    return jnp.concatenate([x @ first, x @ second], axis=1)


def thirds_of_rows(params, x):
    return jnp.concatenate([x @ part.T for part in jnp.split(params["w"], 3)], axis=1)


def stopped(params, x):
    return x @ jax.lax.stop_gradient(params["w"])


def narrow(params, x):
    return x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)


def reshaped(params, x):
    kernel = params["w"].reshape(2, 3, -1)
    return jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 3), kernel)


def swapped(params, x):
    kernel = params["w"].reshape(2, 3, -1).transpose(1, 0, 2)
    return jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 3).transpose(0, 2, 1), kernel)


@jax.custom_jvp
def product(x, w):
    return x @ w


product.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ primals[1]))


def by_own_rule(params, x):
    return product(x, params["w"])


@pytest.mark.parametrize(
    ("function", "shape", "inputs"),
    [
        (transposed, (5, WIDTH), -1),
        (tied, (5, WIDTH), -1),
        (halves_of_outputs, (WIDTH, 8), 1),
        (thirds_of_rows, (9, WIDTH), -1),
        (stopped, (WIDTH, 5), 1),
        (narrow, (WIDTH, 5), 1),
        (reshaped, (WIDTH, 5), 1),
        (swapped, (WIDTH, 5), 1),
        (by_own_rule, (WIDTH, 5), 1),
    ],
)
def test_moments_by_whatever_way_a_weight_is_used(function, shape, inputs):
    params, x = {"w": normal(shape)}, normal((BATCH, WIDTH), seed=2)
    # Where a weight is cut up before its products, only a rule tells that its inputs come last.
    rules = [jq.LayerRule("w", inputs=-1)] if function is thirds_of_rows else None
    found = jq.calibrate(function, params, [x], rules=rules)
    seen = x + params["w"][TOKENS] if function is tied else x
    assert found.inputs == {"w": inputs}
    tolerance = 1e-2 if function is narrow else 2e-5
    close(found.moments["w"], second_moments(seen), rtol=tolerance, atol=tolerance)


def test_an_ensemble_of_a_batch_axis_has_moments_by_member():
    params, x = {"w": normal((3, WIDTH, 4))}, normal((3, BATCH, WIDTH), seed=2)
    rules = [jq.LayerRule("w", axis=0)]
    found = jq.calibrate(lambda params, x: jnp.matmul(x, params["w"]), params, [x], rules=rules)
    close(found.moments["w"], np.stack([second_moments(own) for own in x]))


LAYOUTS = {
    ("NHWC", "HWIO", "NHWC"): ((2, 8, 7, 3), (3, 2, 3, 4)),
    ("NCHW", "OIHW", "NCHW"): ((2, 3, 8, 7), (4, 3, 3, 2)),
    ("NCHW", "IOHW", "NHWC"): ((2, 3, 8, 7), (3, 4, 3, 2)),
}


OPTIONS = [{}, {"strides": (2, 1)}, {"dilations": (1, 2)}]
CONVOLUTIONS = list(itertools.product(LAYOUTS, OPTIONS))


@pytest.mark.parametrize(
    ("layout", "options"), mostly_slow(CONVOLUTIONS, *(CONVOLUTIONS[i] for i in (2, 4, 6)))
)
def test_moments_of_convolutions_are_of_their_windows(layout, options):
    of_images, of_kernel = LAYOUTS[layout]
    strides, dilations = options.get("strides", (1, 1)), options.get("dilations", (1, 1))
    padding = ((1, 0), (2, 1))

    def function(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], strides, padding, rhs_dilation=dilations, dimension_numbers=layout
        )

    x = normal(of_images, seed=1)
    found = jq.calibrate(function, {"w": normal(of_kernel)}, [x])
    images = x.transpose([layout[0].index(axis) for axis in "NHWC"])
    expected = jq.input_moments(
        images, window=(3, 2), window_strides=strides, padding=padding, kernel_dilation=dilations
    )
    if layout[1] == "IOHW":  # inputs on both sides of the outputs: no rule could say so
        assert found.moments == {}
        return
    if layout[1] == "OIHW":
        order = np.arange(18).reshape(3, 2, 3).transpose(2, 0, 1).ravel()
        expected = expected[order][:, order]
    close(found.moments["w"], expected)


def test_a_stack_with_one_codebook_has_no_moments_but_sensitivities():
    found = jq.calibrate(by_scan, {"stack": normal((2, WIDTH, WIDTH))}, [normal((BATCH, WIDTH))])
    assert found.moments == {}
    assert jnp.all(found.sensitivity["stack"] > 0)


# Sensitivities and guided moments ----------------------------------------------------------------


def losses(params, x):
    """Return the loss of each example."""
    y = chain(params, x) + params["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(y, TOKENS)


def test_sensitivities_are_mean_squared_gradients_of_the_examples():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    found = jq.calibrate(losses, params, [x])

    def loss(params, x, label):
        y = chain(params, x[None])[0] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(y, label)

    each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, TOKENS)
    expected = jax.tree.map(lambda g: jnp.mean(g**2, axis=0), each)
    for name in ("heads", "out"):
        close(found.sensitivity[name], expected[name], rtol=1e-4, atol=1e-8)
    assert found.sensitivity["bias"].shape == ()


def test_without_a_product_the_gradient_is_squared_as_a_whole():
    params, x = {"w": normal((WIDTH, 5))}, normal((BATCH, WIDTH), seed=2)

    def function(params, x):
        return jnp.sum(jnp.sin(params["w"]))[None] * jnp.ones(1)

    found = jq.calibrate(function, params, [x])
    close(found.sensitivity["w"], jnp.cos(params["w"]) ** 2)
    assert found.moments == {}


def test_look_ups_give_rows_the_squares_of_their_own_gradients():
    params = {"w": normal((7, WIDTH))}
    found = jq.calibrate(lambda params, tokens: params["w"][tokens], params, [TOKENS])
    counts = np.bincount(np.asarray(TOKENS), minlength=7)
    close(found.sensitivity["w"], np.broadcast_to(counts[:, None] / BATCH, (7, WIDTH)))


def test_guided_moments_weigh_each_vector_by_the_gradients_of_its_outputs():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    found = jq.calibrate(losses, params, [x], guided=True)

    def tail(heads):
        y = jnp.tanh(heads).reshape(len(x), -1) @ params["out"]
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(y, TOKENS))

    gradient = jax.grad(tail)(jnp.einsum("bd,dhe->bhe", x, params["heads"]))
    energies = np.mean(np.square(gradient), axis=(1, 2))
    expected = np.einsum("b,bi,bj->ij", energies, x, x) / BATCH
    close(found.moments["heads"], expected, atol=1e-7)
    assert found.guided


def test_guided_moments_of_stacks_are_by_layer():
    apart = {"first": normal((WIDTH, WIDTH)), "second": normal((WIDTH, WIDTH), seed=1)}
    x = normal((BATCH, WIDTH), seed=2)
    expected = jq.calibrate(looped, apart, [x], guided=True)
    rules = [jq.LayerRule("stack", axis=0)]
    found = jq.calibrate(by_scan, {"stack": stacked(apart)}, [x], rules=rules, guided=True)
    close(found.moments["stack"], stacked(expected.moments))


def by_convolution(params, x):
    images = x.reshape(2, BATCH // 2, WIDTH, 1)
    layout = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(
        images, params["w"], (1, 1), "VALID", dimension_numbers=layout
    )


def by_heads(params, x):  # outputs of a convolution, in another order than they are stored
    kernel = params["w"].reshape(WIDTH, 1, 2, 4).transpose(0, 1, 3, 2).reshape(WIDTH, 1, 8)
    return jax.lax.conv_general_dilated(
        x[..., None], kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def plain(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    ("function", "shape", "groups", "axis"),
    [
        (plain, (WIDTH, 8), 4, 1),
        (plain, (WIDTH, 6), 3, 1),  # of 4 at most
        (plain, (WIDTH, 5), 1, 1),
        (transposed, (8, WIDTH), 4, 0),
        (halves_of_outputs, (WIDTH, 8), 4, 1),
        (thirds_of_rows, (12, WIDTH), 4, 0),
        (by_convolution, (4, 1, 2, 3), 4, 0),
        (by_heads, (WIDTH, 1, 8), 4, 2),
    ],
)
def test_groups_of_outputs_have_moments_by_their_own_gradients(function, shape, groups, axis):
    params, x = {"w": normal(shape)}, normal((BATCH, WIDTH), seed=2)
    rules = [jq.LayerRule("w", inputs=-1)] if function is thirds_of_rows else None

    def squared(params, x):  # of which outputs matter by what they are
        return jnp.square(function(params, x))

    seen = jq.calibrate(squared, params, [x], rules=rules, guided=4)
    inputs = np.prod(shape) // shape[axis]
    assert seen.moments["w"].shape == (groups,) * (groups > 1) + (inputs, inputs)
    apart = np.asarray(seen.moments["w"]).reshape(groups, inputs, inputs)
    whole = jq.calibrate(squared, params, [x], rules=rules, guided=True).moments["w"]
    close(apart.mean(axis=0), whole, rtol=1e-4)
    # A weight's sensitivity is that of its output, times the square of its input.
    sensitivity = np.moveaxis(np.asarray(seen.sensitivity["w"]), axis, 0)
    sensitivity = sensitivity.reshape(groups, -1, inputs).mean(axis=1)
    close(np.diagonal(apart, axis1=1, axis2=2), sensitivity, rtol=1e-4)


def test_groups_of_outputs_of_stacks_are_by_layer():
    apart = {"first": normal((WIDTH, WIDTH)), "second": normal((WIDTH, WIDTH), seed=1)}
    x = normal((BATCH, WIDTH), seed=2)
    expected = jq.calibrate(looped, apart, [x], guided=2)
    rules = [jq.LayerRule("stack", axis=0)]
    found = jq.calibrate(by_scan, {"stack": stacked(apart)}, [x], rules=rules, guided=2)
    assert found.moments["stack"].shape == (2, 2, WIDTH, WIDTH)
    close(found.moments["stack"], stacked(expected.moments))


def test_rounds_by_groups_of_outputs_lose_what_allocation_says():
    params, x = {"w": normal((2, WIDTH, 8))}, normal((BATCH, WIDTH), seed=2)
    rules = [jq.LayerRule("w", k=3, block=(1, -1, -1))]
    seen = jq.calibrate(by_slices, params, [x], rules=rules, guided=4)
    assert seen.moments["w"].shape == (2, 4, WIDTH, WIDTH)
    plan = jq.slq(params, rounds=(1,), rules=rules)
    new, _, _ = jq.quantize_round(plan, params, jq.init(plan, params), calibration=seen)
    change = np.asarray(new["w"] - params["w"], np.float64).reshape(2, WIDTH, 4, 2)
    lost = np.einsum("lign,lgij,ljgn->", change, np.asarray(seen.moments["w"], float), change)
    found = jq.allocate(params, bits=30, choices=rules, calibration=seen)
    assert found.loss == pytest.approx(lost, rel=1e-4)


def by_slices(params, x):
    return jax.lax.map(lambda w: jnp.square(x @ w) * jnp.arange(8.0)[None], params["w"]).sum(0)


def test_sensitivities_predict_the_divergence_of_predictions():
    params = {"w": 0.3 * normal((WIDTH, 5))}
    x = normal((4000, WIDTH), seed=2)

    def function(params, x):
        return x @ params["w"]

    found = jq.calibrate(function, params, [x], outputs="categorical")
    change = np.zeros((WIDTH, 5), np.float32)
    change[2, 3] = 0.02
    before = jax.nn.log_softmax(function(params, x))
    after = jax.nn.log_softmax(function({"w": params["w"] + change}, x))
    divergence = jnp.mean(jnp.sum(jnp.exp(before) * (before - after), axis=-1))
    predicted = 0.5 * jnp.sum(found.sensitivity["w"] * change**2)
    assert abs(predicted / divergence - 1) < 0.1


# Whatever made the layers -------------------------------------------------------------------------


class Attention(nnx.Module):
    """Attention and a dense layer, with statistics and randomness beside the parameters."""

    def __init__(self, rngs):
        """Make the layers."""
        self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        """Return [batch, positions, 3]."""
        return self.dense(self.dropout(self.norm(self.attention(x))))


@pytest.mark.further
@pytest.mark.default_promotion
def test_models_of_nnx_are_taken_as_they_are():
    model, x = Attention(nnx.Rngs(0)), normal((2, 5, WIDTH))
    rules = [jq.LayerRule(".*kernel", k=4)]
    found = jq.calibrate(lambda model, x: model(x), model, [x], rules=rules)
    heads = {f"attention/{name}/kernel": 1 for name in ("key", "query", "value")}
    assert found.inputs == heads | {"attention/out/kernel": 2, "dense/kernel": 1}
    for name in heads:
        close(found.moments[name], second_moments(x))
    plan = jq.slq(model, rounds=(1,), rules=rules)
    new, state, _ = jq.quantize_round(plan, model, jq.init(plan, model), calibration=found)
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))


def test_grouped_convolutions_have_sensitivities_alone():
    model = nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False)
    x = normal((2, 6, 6, 4))
    params = model.init(jax.random.key(0), x)
    found = jq.calibrate(model.apply, params, [x])
    assert found.moments == {}
    assert jnp.all(found.sensitivity["params"]["kernel"] > 0)


# Where it runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_tell_what_whole_ones_do(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    params, x = chain_params(), normal((8, WIDTH), seed=2)
    expected = jq.calibrate(chain, params, [x])
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    on_mesh = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found = jq.calibrate(chain, on_mesh, [sharded])
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("kind", mostly_further([AxisType.Auto, AxisType.Explicit], AxisType.Auto))
def test_groups_of_outputs_of_sharded_weights_are_those_of_whole_ones(kind):
    mesh = jax.make_mesh((2, 2), ("data", "outputs"), axis_types=(kind,) * 2)
    params, x = {"w": normal((WIDTH, 8))}, normal((8, WIDTH), seed=2)
    rules = [jq.LayerRule("w", k=3)]
    plan = jq.slq(params, rounds=(3,), rules=rules)

    def quantized(params, x):
        seen = jq.calibrate(squares, params, [x], rules=rules, guided=4)
        return seen, jq.quantize_round(plan, params, jq.init(plan, params), calibration=seen)[0]

    def on_mesh(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    with jax.set_mesh(mesh):
        found = quantized({"w": on_mesh(params["w"], None, "outputs")}, on_mesh(x, "data"))
    assert found[0].moments["w"].shape == (4, WIDTH, WIDTH)
    jax.tree.map(close, found, quantized(params, x))


def squares(params, x):
    return jnp.square(x @ params["w"])


def test_arguments_that_are_no_arrays_are_constants():
    def function(params, batch):
        assert batch["train"] is False
        return batch["x"] @ params["w"]

    x = normal((BATCH, WIDTH))
    found = jq.calibrate(function, {"w": normal((WIDTH, 4))}, [{"x": x, "train": False}])
    close(found.moments["w"], second_moments(x))


def test_it_compiles_once_for_batches_of_a_shape():
    traces = []

    def function(params, x):
        traces.append(x)
        return chain(params, x)

    batches = normal((6, BATCH, WIDTH))
    jq.calibrate(function, chain_params(), batches[:1])
    once = len(traces)
    jq.calibrate(function, chain_params(), batches)
    looks = len(traces) - once  # at what products sum over, by shapes alone
    jq.calibrate(function, chain_params(), batches)
    assert len(traces) == once + 2 * looks < 3 * once


def test_checkpoints_hold_it(tmp_path):
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    found = jq.calibrate(chain, params, [x], guided=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "seen", found)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "seen", found)
    jax.tree.map(np.testing.assert_array_equal, restored, found)
    assert restored.guided
    assert restored.inputs == found.inputs


# What rounds make of it --------------------------------------------------------------------------


def test_rounds_take_it_as_they_take_its_parts():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    rules = [jq.LayerRule("heads", k=4, inputs=1), jq.LayerRule("out", k=4)]
    plan = jq.slq(params, rounds=(4,), rules=rules)
    found = jq.calibrate(chain, params, [x], rules=rules)
    state = jq.init(plan, params)
    whole = jq.quantize_round(plan, params, state, calibration=found)
    damped = jax.tree.map(lambda own: own + jnp.mean(own), found.sensitivity)
    parts = jq.quantize_round(plan, params, state, sensitivity=damped, moments=found.moments)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert not is_on_nearest(whole[0]["out"], params["out"], whole[1].codebooks["out"])


def is_on_nearest(new, old, codebook):
    """Return whether all weights are on the centroid that was nearest."""
    distance = np.abs(np.asarray(old)[..., None] - np.asarray(codebook))
    return np.array_equal(new, np.asarray(codebook)[distance.argmin(axis=-1)])


def test_inputs_that_no_rule_tells_are_those_that_were_found():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    told = [jq.LayerRule("heads", k=4, inputs=1)]
    untold = [dataclasses.replace(rule, inputs=None) for rule in told]
    found = jq.calibrate(chain, params, [x], rules=untold)

    def quantized(rules):
        plan = jq.slq(params, rounds=(4,), rules=rules)
        return jq.quantize_round(plan, params, jq.init(plan, params), calibration=found)[0]

    jax.tree.map(np.testing.assert_array_equal, quantized(told), quantized(untold))


def test_layers_that_were_not_looked_at_are_clustered_as_without():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    plan = jq.slq(params, rounds=(4,), rules=[jq.LayerRule("heads|out", k=4)])
    found = jq.calibrate(chain, params, [x], rules=[jq.LayerRule("out")])
    state = jq.init(plan, params)
    new, state, _ = jq.quantize_round(plan, params, state, calibration=found)
    assert is_on_nearest(new["heads"], params["heads"], state.codebooks["heads"])
    assert not is_on_nearest(new["out"], params["out"], state.codebooks["out"])


def test_a_weight_that_nothing_uses_is_clustered_as_without():
    params = {"unused": normal((8, 5), seed=3), "used": normal((8, 5))}
    rule = {"k": 4, "block": (-1, 1), "scaled": True}
    found = jq.calibrate(lambda params, x: x @ params["used"], params, [normal((BATCH, 8))])
    plan = jq.slq(params, rounds=(1,), rules=[jq.LayerRule("unused", **rule)])
    start = jq.init(plan, params)
    expected, *_ = jq.quantize_round(
        plan, params, start, sensitivity=jax.tree.map(jnp.ones_like, params)
    )
    new, *_ = jq.quantize_round(plan, params, start, calibration=found)
    np.testing.assert_array_equal(new["unused"], expected["unused"])


def test_optimizers_take_it_too():
    params, x = chain_params(), normal((BATCH, WIDTH), seed=2)
    rules = [jq.LayerRule("out", k=3)]
    found = jq.calibrate(chain, params, [x], rules=rules)
    plan = jq.slq(params, rounds=(3,), rules=rules)
    expected, *_ = jq.quantize_round(plan, params, jq.init(plan, params), calibration=found)
    tx = jq.incremental(optax.sgd(0.1), plan, 5)
    updates, _ = tx.update(params, tx.init(params), params, calibration=found)
    jax.tree.map(close, optax.apply_updates(params, updates), expected)


# Bad input ---------------------------------------------------------------------------------------


def calibrated(function=chain, params=None, batches=None, **options):
    batches = [normal((BATCH, WIDTH))] if batches is None else batches
    return jq.calibrate(function, params or chain_params(), batches, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "batches: expected at least one"),
        ({"outputs": "logits"}, "expected outputs to be one of"),
        ({"key": 3}, "expected key to be a key"),
        ({"guided": -1}, "expected guided to be an integer of at least 0, got -1"),
        (
            {"rules": [jq.LayerRule("heads", inputs=2), jq.LayerRule(".*")]},
            r"heads: its rule says inputs=2.*expected inputs=1",
        ),
        ({"function": lambda params, x: jnp.argmax(chain(params, x))}, "returns floating point"),
        ({"function": lambda params, x: x}, "got nothing to observe"),
        ({"batches": [jnp.full((2, WIDTH), jnp.nan)]}, "finite values in moments: heads"),
        ({"params": {"heads": jnp.full((6, 2, 4), jnp.inf)}}, "finite values in heads"),
        (
            {"function": lambda params, x: jnp.sum(chain(params, x)), "outputs": "categorical"},
            "scalar",
        ),
        ({"function": lambda params, x: jnp.mean(chain(params, x))}, "each example, got a scalar"),
        (
            {"function": lambda params, x: (jnp.sum(chain(params, x)), chain(params, x))},
            "each example, got a scalar",
        ),
        (
            {"function": lambda params, x: (chain(params, x), chain(params, x)[1:])},
            r"the same number of examples, at least one, got \[9, 10\]",
        ),
        (
            {"function": lambda params, x: x @ params["out"], "batches": [jnp.zeros((0, 8))]},
            r"at least one, got \[0\]",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrated(**arguments)


def test_rounds_refuse_what_is_no_calibration_and_what_is_told_twice():
    params = chain_params()
    plan = jq.slq(params, rounds=(4,), rules=[jq.LayerRule("out", k=4)])
    state, found = jq.init(plan, params), calibrated()
    with pytest.raises(ValueError, match="got both"):
        jq.quantize_round(plan, params, state, calibration=found, moments=found.moments)
    other = jq.slq(params, rounds=(4,), rules=[jq.LayerRule("out", k=4, inputs=-1)])
    with pytest.raises(ValueError, match=r"out: its rule says inputs=-1.*expected inputs=1"):
        jq.quantize_round(other, params, state, calibration=found)
    with pytest.raises(ValueError, match=r"expected a Calibration.*got a dict"):
        jq.quantize_round(plan, params, state, calibration={"moments": {}})
