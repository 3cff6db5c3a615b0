"""Every function of weights on arrays of eight devices, axes automatic or explicit, is that of one.

Eager operations on automatic axes are left out: each is a program of its own, and XLA's devices on
CPU, which are threads of one pool, can wait for each other when several are on their way.
"""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from tests.cases import mostly_slow

SPECS = {"matrix": P("x", "y"), "rows": P("x"), "stack": P(None, "x", "y"), "bias": P()}
SHAPES = {"matrix": (16, 24), "rows": (8, 24), "stack": (4, 8, 16), "bias": (3,)}
RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.normal(size=s).astype(np.float32)) for name, s in SHAPES.items()}
RULES = [jq.LayerRule("stack", axis=0, k=3), jq.LayerRule(".*", k=5)]
PLAN = jq.slq(PARAMS, rounds=(17,), rules=RULES, init="quantile")


@functools.cache
def quantized():
    """Return all weights on their codebooks, and the state, of one device."""
    one_round = jax.jit(jq.quantize_round, static_argnums=0)
    return one_round(PLAN, PARAMS, jq.init(PLAN, PARAMS))[:2]


def start(free):
    return jnp.asarray(np.linspace(-1, 1, 3, dtype=np.float32)) + 0 * free["bias"]


# Of free weights, weights on their codebooks, and the state.
FUNCTIONS = {
    "init": lambda free, on, state: jq.init(PLAN, free),
    "quantize_round": lambda free, on, state: jq.quantize_round(PLAN, free, jq.init(PLAN, free)),
    "kmeans": lambda free, on, state: jq.kmeans(
        free["matrix"], 3, init=start(free), frozen=jnp.arange(3) == 1
    ),
    "assign": lambda free, on, state: jq.assign(free["matrix"], state.codebooks["matrix"]),
    "assign to many": lambda free, on, state: jq.assign(
        free["matrix"], jnp.asarray(np.linspace(-1, 1, 40, dtype=np.float32))
    ),
    "pack": lambda free, on, state: jq.pack(on, state),
    "unpack": lambda free, on, state: jq.unpack(jq.pack(on, state)),
    "is_on_codebook": lambda free, on, state: jq.is_on_codebook(
        {**on, "rows": free["rows"]}, state
    ),
    "centroid_gradients": lambda free, on, state: jq.centroid_gradients(free, on, state),
    "set_centroids": lambda free, on, state: jq.set_centroids(
        on, state, jax.tree.map(lambda c: c * 1.5, state.codebooks)
    ),
}


def on_mesh(axis_type):
    """Return the mesh, and the arguments of `FUNCTIONS` on it."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    on, state = quantized()
    masks = {
        name: jax.device_put(mask, shardings[name]) if mask.ndim else mask
        for name, mask in state.frozen.items()
    }
    free, on = jax.device_put((PARAMS, on), (shardings, shardings))
    return mesh, (free, on, state._replace(frozen=masks))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", mostly_slow(FUNCTIONS, "set_centroids"))
def test_many_devices_give_what_one_gives(name):
    def jit(function):  # a new one each time, as one that is cached would hide the mesh it meets
        return jax.jit(lambda *args: function(*args))

    function = FUNCTIONS[name]
    want = jit(function)(PARAMS, *quantized())
    for axis_type, wrap, inside in (
        (AxisType.Auto, jit, False),
        (AxisType.Explicit, jit, True),
        (AxisType.Explicit, lambda f: f, False),
    ):
        mesh, args = on_mesh(axis_type)
        with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
            assert_same(wrap(function)(*args), want)


def test_reports_of_many_devices_are_those_of_one():
    want = jq.report(*quantized(), reference=PARAMS)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        _, (free, on, state) = on_mesh(axis_type)
        assert jq.report(on, state, reference=free) == want


def test_masks_of_explicit_axes_are_sharded_as_the_weights_from_the_start():
    _, (free, *_) = on_mesh(AxisType.Explicit)
    state = jax.jit(functools.partial(jq.init, PLAN))(free)
    for name in ("matrix", "rows", "stack"):
        assert state.frozen[name].sharding.is_equivalent_to(free[name].sharding, free[name].ndim)
        assert not state.frozen[name].any()


def test_packed_codes_of_explicit_axes_are_sharded_as_layers_and_columns():
    _, (_, on, state) = on_mesh(AxisType.Explicit)
    packed = jq.pack(on, state)
    assert jax.typeof(packed["matrix"].codes).sharding.spec == P(None, "y")
    assert jax.typeof(packed["stack"].codes).sharding.spec == P(None, None, "y")
    assert jax.typeof(jq.unpack(packed)["matrix"]).sharding.spec == P(None, "y")


def forward(params, x):
    x = jnp.tanh(x @ params["columns"])
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
    return x @ params["columns"].T, params["columns"][jnp.array([3, 1])]


def spread(function, spec):
    return lambda w, x: jax.sharding.auto_axes(function, out_sharding=spec)(w, x)


ASKING = {
    "product": lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("x", None)),
    "whole product": lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P(None, None)),
    "reshape": lambda w, x: jnp.reshape(w, (16, 4, 2), out_sharding=P(None, "x", None)) * 2,
    "broadcast": lambda w, x: jnp.broadcast_to(w, (2, 16, 8), out_sharding=P("x", None, None)) * 2,
    "reshard": lambda w, x: jax.sharding.reshard(w, P(None, "x")) * 2,
    "automatic axes": spread(lambda w, x: x @ w, P("x", None)),
    "rows": lambda w, x: w.at[jnp.array([1, 2, 3, 4])].get(out_sharding=P("x", None)),
}


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("spec", [P(), P(None, "x")], ids=str)
def test_shardings_that_a_function_asks_for_on_explicit_axes_are_those_of_floats(name, spec):
    if (name, spec) == ("broadcast", P(None, "x")):
        pytest.skip("JAX itself refuses one axis twice")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        weights = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
        weights = jax.device_put(weights, NamedSharding(mesh, spec))
        packed = jq.pack_array(weights, jnp.linspace(-2.0, 2.0, 5))
        x = jax.device_put(jnp.ones((4, 16)), NamedSharding(mesh, P()))
        got, want = (f(w, x) for f, w in (
            (jq.packed(ASKING[name]), packed), (ASKING[name], jq.unpack(packed)),
        ))  # fmt: skip
    assert jax.typeof(got) == jax.typeof(want)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_packed_functions_run_from_columns_and_layers_on_several_devices(axis_type):
    levels = jnp.linspace(-0.5, 0.5, 5)
    params = {
        "columns": jq.pack_array(jnp.asarray(RNG.normal(size=(16, 24)), jnp.float32), levels),
        "stack": jq.pack_array(
            jnp.asarray(RNG.normal(size=(4, 24, 24)), jnp.float32),
            jnp.broadcast_to(levels, (4, 1, 1, 5)),
        ),
    }
    x = jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)
    function = forward
    if axis_type == AxisType.Explicit:  # `scan` takes no such axis apart, `@` sums over none

        def function(params, x):
            return (jnp.tanh(x @ params["columns"]),)

    expected = function(jq.unpack(params), x)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)

    def placed(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    by_column, by_layer = params["columns"], params["stack"]
    placed_params = {
        "columns": dataclasses.replace(
            by_column,
            codes=placed(by_column.codes, P(None, "y")),
            codebook=placed(by_column.codebook, P()),
        ),
        "stack": dataclasses.replace(
            by_layer,
            codes=placed(by_layer.codes, P("x")),
            codebook=placed(by_layer.codebook, P("x")),
        ),
    }
    with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else contextlib.nullcontext():
        run = jax.jit(jq.packed(function)).lower(placed_params, placed(x, P("x"))).compile()
        got = run(placed_params, placed(x, P("x")))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather", run.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for dtype, shape in gathered if dtype == "f32"]
    assert max(sizes, default=0) < 16 * 24, gathered  # no weight, unpacked
