"""Every public function, in every place where users put functions: one table of calls.

A function that becomes public has to come into `CALLS`, or into `ELSEWHERE` with the reason.
"""

import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxquant as jq
from jaxquant import cpp
from jaxquant.clustering.options import STARTS
from tests.cases import mostly_further, mostly_slow

pytestmark = pytest.mark.default_promotion  # optax's own arithmetic

ELSEWHERE = {
    "inq": "reads shapes only: test_schedules",
    "slq": "reads shapes only: test_schedules",
    "mlq": "reads shapes only: test_schedules",
    "select": "reads shapes only: test_selection",
    "num_centroids": "of an integer: test_codebooks",
    "save": "runs on the host: test_storage",
    "to_lut_b": "runs on the host: test_lut_b",
    "from_lut_b": "runs on the host: test_lut_b",
    "load": "runs on the host: test_storage",
    "read_metadata": "runs on the host: test_storage",
    "report": "runs on the host: test_metrics",
    "allocate": "runs on the host: test_allocate",
    "quantize_in_order": "runs on the host: test_in_order",
    "packed": "makes a function: `both_ways` stands for it",
    "freeze_quantized": "makes a transformation: `freeze_update` stands for it",
    "incremental": "makes a transformation: `incremental_init` and `_update` stand for it",
}
ROWS, COLUMNS = 16, 6


class Given(NamedTuple):
    """What the calls take: arrays, all of which may be traced."""

    weights: jax.Array  # [16, 6]
    inputs: jax.Array  # [4, 16]
    images: jax.Array  # [2, 5, 5, 4]
    kernel: jax.Array  # [3, 3, 4, 2]
    sensitivity: jax.Array  # like the weights
    key: jax.Array


def given(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(ROWS, COLUMNS), (4, ROWS), (2, 5, 5, 4), (3, 3, 4, 2), (ROWS, COLUMNS)]
    arrays = [jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True)]
    arrays[-1] = jnp.square(arrays[-1]) + 0.1
    return Given(*(x.astype(dtype) for x in arrays), keys[0])


TREE = {"w": jax.ShapeDtypeStruct((ROWS, COLUMNS), "float32")}
PLAN = jq.slq(TREE, bits=2, rounds=(1, 3))
CENTROIDS = (-1.0, 0.0, 1.0)


def round_of(g, plan=PLAN, **options):
    params = {"w": g.weights}
    return jq.quantize_round(plan, params, jq.init(plan, params), **options)


def on_codebook(g, name="weights"):
    centroids = jnp.array(CENTROIDS, g.weights.dtype)
    return jq.reconstruct(jq.assign(getattr(g, name), centroids), centroids), centroids


def packed(g, name="weights"):
    return jq.pack_array(*on_codebook(g, name))


def state_of(g):
    weights, centroids = on_codebook(g)
    everything = jnp.ones(weights.shape, bool)
    return {"w": weights}, jq.QuantState(
        {"w": centroids}, {"w": everything}, {"w": jnp.ones(3, bool)}, jnp.int32(2)
    )


TX = jq.incremental(optax.adam(0.1), PLAN, 2)


def incremental_update(g):
    params = {"w": g.weights}
    return TX.update(params, TX.init(params), params)


def freeze_update(g):
    tx = jq.freeze_quantized()
    return tx.update({"w": g.weights}, tx.init({}), frozen={"w": g.weights > 0})


def product_of(g, name="weights"):
    return jq.product.cluster(getattr(g, name), words=4, length=2, key=g.key, iterations=2)


def correct(g):
    response = jq.product.observe(g.inputs, jnp.ones((4, COLUMNS), g.inputs.dtype))
    return jq.product.correct(product_of(g), response, sweeps=1)


def answers(params, inputs):
    return jnp.tanh(inputs @ params["w"])


def calibrated(g, **options):
    return jq.calibrate(answers, {"w": g.weights}, [g.inputs], rules=CALIBRATED, **options)


CALIBRATED = [jq.LayerRule("w")]
SEEN = jq.slq(TREE, bits=2, rounds=(3,))


@jq.packed
def both_ways(weights, inputs):
    outputs = inputs @ weights
    return outputs, outputs @ weights.T, weights[jnp.array([3, 1])]


CALLS = {
    "packed": lambda g: both_ways(packed(g), g.inputs),
    "kmeans": lambda g: jq.kmeans(g.weights, 3),
    "kmeans weighed": lambda g: jq.kmeans(
        g.weights, 3, sample_weight=g.sensitivity, zero=True, iterations=2, bins=64, cells=16
    ),
    "kmeans from centroids": lambda g: jq.kmeans(
        g.weights, 3, init=jnp.array(CENTROIDS), frozen=jnp.array([True, False, False])
    ),
    "assign": lambda g: jq.assign(g.weights, g.weights[:3, 0]),
    "assign many": lambda g: jq.assign(g.weights, g.weights.ravel()[:40]),
    "reconstruct": lambda g: jq.reconstruct(jnp.zeros((4, 2), jnp.int32), g.weights[0]),
    "init": lambda g: jq.init(PLAN, {"w": g.weights}),
    "quantize_round": round_of,
    "quantize_round weighed": lambda g: round_of(g, sensitivity={"w": g.sensitivity}),
    "quantize_round by moments": lambda g: round_of(
        g, jq.slq(TREE, bits=2, rounds=(3,)), moments={"w": g.inputs.T @ g.inputs}
    ),
    "calibrate": lambda g: calibrated(g).moments,
    "calibrate guided": lambda g: calibrated(g, guided=2, outputs="categorical"),
    "quantize_round calibrated": lambda g: round_of(g, SEEN, calibration=calibrated(g, guided=2)),
    "straight_through": lambda g: jq.straight_through(
        SEEN, {"w": g.weights}, jq.release(state_of(g)[1])
    ),
    "straight_through softly": lambda g: jq.straight_through(
        SEEN, {"w": g.weights}, jq.release(state_of(g)[1]), temperature=0.1
    ),
    "release": lambda g: jq.release(state_of(g)[1]),
    "settle": lambda g: jq.settle(SEEN, {"w": g.weights}, jq.release(state_of(g)[1])),
    "quantize_round inq": lambda g: round_of(
        g, jq.inq(TREE, bits=3, shares=(0.5, 1.0), partition="random"), key=g.key
    ),
    "is_on_codebook": lambda g: jq.is_on_codebook(*state_of(g)),
    "centroid_gradients": lambda g: jq.centroid_gradients({"w": g.sensitivity}, *state_of(g)),
    "set_centroids": lambda g: jq.set_centroids(*state_of(g), {"w": jnp.array([-2.0, 0.0, 2.0])}),
    "pack": lambda g: jq.pack(*state_of(g)),
    "pack_array": packed,
    "unpack": lambda g: jq.unpack({"w": packed(g)}),
    "unpack a product": lambda g: jq.unpack({"w": product_of(g)}),
    "matmul": lambda g: jq.matmul(g.inputs, packed(g)),
    "matmul by native": lambda g: jq.matmul(g.inputs, packed(g), implementation="native"),
    "matmul by blocks": lambda g: jq.matmul(g.inputs, packed(g), implementation="blocks"),
    "matmul of words": lambda g: jq.matmul(g.inputs, product_of(g), implementation="words"),
    "conv": lambda g: jq.conv(g.images, packed(g, "kernel")),
    "conv of words": lambda g: jq.conv(g.images, product_of(g, "kernel"), implementation="words"),
    "input_moments": lambda g: jq.input_moments(g.inputs),
    "input_moments of windows": lambda g: jq.input_moments(g.images, window=(3, 3)),
    "incremental_init": lambda g: TX.init({"w": g.weights}),
    "incremental_update": incremental_update,
    "quant_state": lambda g: jq.quant_state(TX.init({"w": g.weights})),
    "freeze_update": freeze_update,
    "product.cluster": product_of,
    "product.observe": lambda g: jq.product.observe(g.inputs, g.inputs),
    "product.correct": correct,
    "product.response_error": lambda g: jq.product.response_error(
        g.weights, jq.product.observe(g.inputs, jnp.ones((4, COLUMNS), g.inputs.dtype))
    ),
}
NAMES = [name for name in CALLS if "native" not in name or cpp.missing() is None]
MOST = mostly_slow(
    NAMES, *(name for name in NAMES if not re.search("moments|calibrated|guided|settle", name))
)  # long to compile
# Compiling takes most of the time: of calls that share their parts with others, or compile for
# long, some places only see the trace, at which what cannot stand there fails.
LONG = (
    "quantize_round by moments",
    "quantize_round calibrated",
    "quantize_round inq",
    "incremental_update",
    "product.correct",
)
RUN = ("kmeans weighed", "assign many", "quantize_round", "set_centroids", "pack", "conv")
RUN += (
    "packed",
    "matmul",
    "matmul by native",
    "matmul by blocks",
    "matmul of words",
    "input_moments",
)


def some(place):
    """Leave three names of four to `--all`, in each place others."""
    return mostly_further(MOST, *NAMES[place::4])


def test_every_public_function_is_in_the_table():
    def is_function(value):  # one that is jitted is none to `inspect`
        return callable(value) and not inspect.isclass(value)

    functions = {n for n in jq.__all__ if is_function(getattr(jq, n))}
    products = {
        f"product.{name}"
        for name, value in inspect.getmembers(jq.product, is_function)
        if value.__module__ == "jaxquant.product" and not name.startswith("_")
    }
    called = {name.partition(" ")[0] for name in CALLS}
    assert (functions | products) - ELSEWHERE.keys() <= called


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), **tolerance)


@functools.cache
def expected(name):
    """What a function gives outside of jit."""
    return CALLS[name](given())


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Compiles:
    """Counts the programs that JAX compiles."""

    def __init__(self):
        self.count = 0

    def __call__(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def compiles():
    counter = Compiles()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


@pytest.mark.parametrize("name", some(0))
def test_outside_of_jit_the_second_call_compiles_nothing(name, compiles):
    first, before = expected(name), compiles.count
    assert_same(CALLS[name](given()), first)
    assert compiles.count == before


def test_programs_are_counted(compiles):
    before = compiles.count
    jax.jit(lambda x: x + 1)(1.0)
    assert compiles.count == before + 1


@pytest.mark.parametrize("name", mostly_further(NAMES, *NAMES[0::4]))
def test_arrays_that_are_closed_over_may_stand_in_any_trace(name):
    arrays = given()
    shapes = jax.eval_shape(lambda: CALLS[name](arrays))
    assert dtypes(shapes) == dtypes(expected(name))
    assert [x.shape for x in jax.tree.leaves(shapes)] == [
        x.shape for x in jax.tree.leaves(expected(name))
    ]
    jax.jit(lambda: CALLS[name](arrays)).lower()  # XLA would fold what is known, for long


def test_arrays_that_are_closed_over_give_what_arguments_do():
    arrays = given()
    got = jax.jit(lambda: CALLS["kmeans weighed"](arrays))()
    assert_same(got, expected("kmeans weighed"), **CLOSE)


@pytest.mark.parametrize("name", some(1))
def test_under_vmap_each_gets_its_own(name):
    keys = jax.random.split(jax.random.key(1), 2)
    arrays = given()
    stacked = arrays._replace(weights=jnp.stack([arrays.weights, arrays.weights * 2]), key=keys)
    axes = Given(0, None, None, None, None, 0)
    function = jax.jit(jax.vmap(CALLS[name], in_axes=(axes,)))
    if name in LONG:
        function.lower(stacked)
        return
    got = jax.tree.map(lambda x: x[1], function(stacked))
    one = CALLS[name](arrays._replace(weights=arrays.weights * 2, key=keys[1]))
    assert_same(got, one, **CLOSE)


@pytest.mark.parametrize("name", some(2))
def test_inside_shard_map_each_device_gets_its_own(name):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays = given()
    other = arrays._replace(weights=arrays.weights * 2, inputs=arrays.inputs + 1)
    both = [jnp.concatenate(pair) for pair in zip(arrays[:-1], other[:-1], strict=True)]
    split = PartitionSpec("data")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(Given(*[split] * len(both), PartitionSpec()),),
        out_specs=split,
    )
    def run(local):
        return jax.tree.map(lambda x: x[None], CALLS[name](local))

    if name in RUN:
        got = jax.tree.map(lambda x: x[1], run(Given(*both, arrays.key)))
        assert_same(got, CALLS[name](other), **CLOSE)
    else:
        run.lower(Given(*both, arrays.key))


def dtypes(tree):
    return jax.tree.structure(tree), [x.dtype for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", some(1))
def test_under_x64_float32_stays_float32(name):
    arrays, want = given(), expected(name)
    with jax.enable_x64(True):
        if name in RUN:
            assert_same(CALLS[name](arrays), want, **CLOSE)
        else:
            assert dtypes(jax.eval_shape(CALLS[name], arrays)) == dtypes(want)


@pytest.mark.parametrize(
    "start", mostly_further(mostly_slow(STARTS, "quantile", "inq"), "quantile")
)
def test_under_x64_every_start_clusters_float32_as_ever(start):
    plan = jq.slq(TREE, bits=2, rounds=(1, 3), init=start)
    weights = given().weights
    want = round_of(given(), plan)
    with jax.enable_x64(True):
        assert_same(round_of(given(), plan), want, **CLOSE)
        shapes = jax.eval_shape(functools.partial(jq.kmeans, k=3, init=start), weights)
        names = jq.KMeansResult("float32", "int32", "float32", "float32")
        assert jax.tree.map(lambda x: x.dtype.name, shapes) == names


@pytest.mark.parametrize(
    "dtype",
    mostly_slow(["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"], "bfloat16"),
)
@pytest.mark.parametrize("name", some(3))
def test_narrow_weights_are_taken(name, dtype):
    if dtype in ("float16", "float8_e5m2") or (name in LONG and dtype != "bfloat16"):
        jax.jit(CALLS[name]).lower(given(dtype))
        return
    for x in jax.tree.leaves(CALLS[name](given(dtype))):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert np.isfinite(np.asarray(x).astype(np.float32)).all()


INTEGERS = {  # n makes an integer: Python's or one of NumPy's
    "kmeans": lambda n, g: jq.kmeans(
        g.weights, n(3), iterations=n(2), bins=n(64), cells=n(16), init="quantile"
    ),
    "num_centroids": lambda n, g: jq.num_centroids(n(3)),
    "LayerRule": lambda n, g: jq.LayerRule(
        ".*", k=n(3), group=n(0), axis=n(1), min_ndim=n(1), depth=n(2)
    ),
    "LayerRule of bits": lambda n, g: jq.LayerRule(".*", bits=n(2), group=[n(0)] * 6, axis=n(1)),
    "select": lambda n, g: jq.select(TREE, k=n(3)),
    "slq": lambda n, g: jq.slq(TREE, bits=n(2), rounds=np.array([n(1), n(3)]), iterations=n(3)),
    "mlq": lambda n, g: jq.mlq(TREE, bits=n(2), groups=n(1), iterations=n(3)),
    "inq": lambda n, g: jq.inq(TREE, bits=n(3), iterations=n(0), shares=np.array([0.5, 1.0])),
    "incremental": lambda n, g: [
        jq.incremental(optax.sgd(0.1), PLAN, steps).init({"w": g.weights}).step
        for steps in (n(3), [n(2), n(3)], np.array([n(2), n(3)]))
    ],
    "conv": lambda n, g: jq.conv(
        g.images,
        packed(g, "kernel"),
        window_strides=n(2),
        padding=((n(1), n(1)), (n(0), n(1))),
        input_dilation=n(1),
        kernel_dilation=(n(1), n(1)),
        feature_group_count=n(1),
    ),
    "input_moments": lambda n, g: jq.input_moments(
        g.images, window=(n(3), n(3)), window_strides=n(1), kernel_dilation=[n(1), n(1)]
    ),
    "product.cluster": lambda n, g: jq.product.cluster(
        g.weights, words=n(4), length=n(2), key=g.key, iterations=n(2)
    ),
    "product.correct": lambda n, g: jq.product.correct(
        product_of(g),
        jq.product.observe(g.inputs, jnp.ones((4, COLUMNS))),
        sweeps=n(1),
    ),
}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", list(INTEGERS))
def test_integers_of_numpy_are_integers(name, kind):
    got, want = (INTEGERS[name](n, given()) for n in (kind, int))
    if not jax.tree.leaves(got) or name in ("LayerRule", "LayerRule of bits"):
        assert got == want
    else:
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "2", None, [2]])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: jq.kmeans(jnp.arange(9.0), v),
        lambda v: jq.num_centroids(v),
        lambda v: jq.slq(TREE, bits=v),
        lambda v: jq.slq(TREE, rounds=(1, v)),
        lambda v: jq.inq(TREE, bits=v),
        lambda v: jq.mlq(TREE, bits=v),
    ],
)
def test_what_is_no_integer_is_refused(call, value):
    with pytest.raises(ValueError, match="expected"):
        call(value)


EXPORTED = {
    "assign": lambda g: jq.assign(g.inputs, jnp.array(CENTROIDS)),
    "reconstruct": lambda g: jq.reconstruct(g.inputs.astype(jnp.int32), jnp.array(CENTROIDS)),
    **{
        name: CALLS[name]
        for name in NAMES
        if name.startswith(("packed", "matmul", "conv", "input_mom"))
    },
}


@pytest.mark.parametrize("name", mostly_further(EXPORTED, "assign", "packed", "conv"))
def test_a_batch_of_any_size_is_exported(name):
    arrays = given()
    (size,) = jax.export.symbolic_shape("b")
    inputs = jax.ShapeDtypeStruct((size, ROWS), "float32")
    images = jax.ShapeDtypeStruct((size, 5, 5, 4), "float32")
    function = jax.jit(
        lambda inputs, images: EXPORTED[name](arrays._replace(inputs=inputs, images=images))
    )
    exported = jax.export.export(function)(inputs, images)
    want = function(arrays.inputs[:2], arrays.images)
    assert_same(exported.call(arrays.inputs[:2], arrays.images), want, **CLOSE)
