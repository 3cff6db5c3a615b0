"""Small blocks clustered in C++, held against the same steps in XLA and against exact optima."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import cpp, platform
from jaxquant.clustering import native
from jaxquant.clustering.codebooks import assign, rounded
from jaxquant.clustering.options import Clustering
from jaxquant.clustering.solver import cluster_block

pytestmark = pytest.mark.skipif(cpp.missing() is not None, reason=str(cpp.missing()))
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(platform, "is_one_device", lambda: True)


@functools.partial(jax.jit, static_argnames=("k", "dtype", "options"))
def cluster(x, weight=None, codebook=None, frozen=None, *, k, dtype="float32", options=()):
    """Cluster blocks [blocks, n]; `weight` like them, `codebook` and `frozen` [blocks, k]."""
    codebook = jnp.zeros((len(x), k), dtype) if codebook is None else codebook
    frozen = jnp.zeros((len(x), k), bool) if frozen is None else frozen
    solve = functools.partial(
        cluster_block, clustering=Clustering(**dict(options)), dtype=jnp.dtype(dtype), quick=True
    )
    axes = (0, None if weight is None else 0, 0, 0)
    return jax.vmap(solve, in_axes=axes)(x, weight, codebook, frozen)


def is_called(function, *args):
    return "native_call" in str(jax.make_jaxpr(function)(*args))


def rows(found):
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(found.counts))]


def best_loss(x, k, zero=False):
    """Return the least sum of squares of k clusters of one block, by dynamic programming."""
    x = np.sort(np.asarray(x, np.float64))
    n = len(x)
    first, second = (np.concatenate([[0], np.cumsum(x**p)]) for p in (1, 2))
    i, j = np.triu_indices(n + 1, 1)
    about_zero = np.full((n + 1, n + 1), np.inf)
    about_zero[i, j] = second[j] - second[i]
    about_mean = about_zero.copy()
    about_mean[i, j] -= (first[j] - first[i]) ** 2 / (j - i)
    nothing = np.r_[0.0, np.full(n, np.inf)]
    without, with_zero = nothing, np.full(n + 1, np.inf)
    for _ in range(k):
        ends = [np.min(table[:, None] + about_mean, axis=0) for table in (without, with_zero)]
        pinned = np.minimum(np.min(without[:, None] + about_zero, axis=0), without)
        without = np.minimum(ends[0], without)
        with_zero = np.minimum(np.minimum(ends[1], with_zero), pinned)
    return max((with_zero if zero else without)[n], 0.0)


HARD = {
    "normal": RNG.standard_normal((6, 48)),
    "heavy tails": RNG.standard_cauchy((6, 48)),
    "far modes": np.where(RNG.random((6, 48)) < 0.5, 1e6, 0.0) + RNG.standard_normal((6, 48)),
    "far outliers": np.where(RNG.random((6, 48)) < 0.1, 1e7, 1.0) * RNG.standard_normal((6, 48)),
    "few values": RNG.integers(-3, 4, (6, 48)) / 4,
    "tiny": 1e-30 * RNG.standard_normal((6, 48)),
    "huge": 1e30 * RNG.standard_normal((6, 48)),
    "one value": np.full((6, 48), 0.3),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_blocks_are_within_a_hundredth_of_the_exact_optimum(name, zero):
    x = jnp.asarray(HARD[name], jnp.float32)
    found = cluster(x, k=5, options=(("zero", zero),))
    assert np.all(found.finite)
    for own, loss, centroids in zip(x, found.losses, found.centroids, strict=True):
        wide = np.asarray(own, np.float64)
        distance = np.min(np.abs(wide[:, None] - np.asarray(centroids, np.float64)), axis=1)
        with np.errstate(over="ignore"):
            expected = np.sum(distance**2).astype(np.float32)  # which may be 0 or infinite
        np.testing.assert_allclose(jnp.sum(loss), expected, 1e-4)
        rounding = np.sum((wide * 2.0**-22) ** 2)
        assert np.sum(distance**2) <= 1.01 * best_loss(wide, 5, zero) + rounding
        assert not zero or np.any(centroids == 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "k"), [(5, 3), (64, 16), (300, 8), (2100, 16), (2100, 200)])
def test_what_is_told_is_so_and_no_worse_than_xla(monkeypatch, size, k, weighted):
    x = jnp.asarray(RNG.standard_t(4, (8, size)), jnp.float32)
    weight = jnp.asarray(RNG.gamma(1, 1, x.shape) * (RNG.random(x.shape) < 0.8), jnp.float32)
    weight = weight if weighted else None
    found = cluster(x, weight, k=k)
    masses = np.ones(x.shape) if weight is None else np.asarray(weight, np.float64)
    for own, mass, got in zip(x, masses, rows(found), strict=True):
        codes = np.asarray(assign(own, got.centroids))
        np.testing.assert_array_equal(got.counts, np.bincount(codes, minlength=k))
        wide = np.asarray(own, np.float64)
        squares = mass * (wide - np.asarray(got.centroids)[codes]) ** 2
        np.testing.assert_allclose(got.losses, np.bincount(codes, squares, k), 1e-4, 1e-9)
        np.testing.assert_allclose(got.norm, np.sum(mass * wide**2), 1e-5)
        assert np.all(np.diff(got.centroids) >= 0)
    monkeypatch.setattr(native, "supports", lambda *_: False)
    expected = jax.jit(lambda: cluster.__wrapped__(x, weight, k=k))()
    assert np.sum(found.losses) <= 1.01 * np.sum(expected.losses)


@pytest.mark.parametrize("options", [(), (("zero", True),), (("iterations", 0),)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_frozen_centroids_stay_and_the_others_are_numbers_of_the_codebook(dtype, options):
    x = jnp.asarray(30 * RNG.standard_normal((5, 90)), jnp.float32)
    codebook = rounded(jnp.asarray(40 * RNG.standard_normal((5, 6)), jnp.float32), dtype)
    codebook = codebook.at[2, 4].set(codebook[2, 1])  # equal ones, too
    frozen = jnp.asarray(RNG.random((5, 6)) < 0.4).at[2, 1].set(True)
    found = cluster(x, None, codebook, frozen, k=6, dtype=dtype, options=options)
    assert found.centroids.dtype == dtype
    kept = np.asarray(frozen) | (dict(options).get("iterations") == 0)
    kept &= np.any(kept, axis=1, keepdims=True)
    np.testing.assert_array_equal(found.centroids[kept & frozen], codebook[kept & frozen])
    wide = found.centroids.astype(jnp.float32)
    for own, got, centroids in zip(x, rows(found), wide, strict=True):
        np.testing.assert_array_equal(
            got.counts, np.bincount(np.asarray(assign(own, centroids)), minlength=6)
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8"])
@hypothesis.given(data=st.data())
def test_centroids_are_rounded_to_the_nearest_number(dtype, data):
    numbers = st.floats(-1e5, 1e5, width=32, allow_subnormal=False)
    values = np.array(data.draw(st.lists(numbers, min_size=8, max_size=8)), np.float32)
    found = cluster(jnp.broadcast_to(values[:, None], (8, 3)), k=1, dtype=dtype)
    limits = (jnp.iinfo if dtype == "int8" else jnp.finfo)(dtype)
    expected = np.clip(np.rint(values) if dtype == "int8" else values, limits.min, limits.max)
    np.testing.assert_array_equal(found.centroids[:, 0], expected.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_passes_are_as_many_as_asked(monkeypatch, passes):
    x = jnp.asarray(RNG.standard_normal((4, 500)), jnp.float32)
    codebook = jnp.sort(jnp.asarray(RNG.standard_normal((4, 7)), jnp.float32))
    frozen = jnp.zeros((4, 7), bool).at[:, 2].set(True)
    own = {"k": 7, "options": (("iterations", passes),)}
    found = cluster(x, None, codebook, frozen, **own)
    monkeypatch.setattr(native, "supports", lambda *_: False)
    expected = jax.jit(lambda: cluster.__wrapped__(x, None, codebook, frozen, **own))()
    np.testing.assert_allclose(found.centroids, expected.centroids, 1e-5, 1e-6)
    np.testing.assert_array_equal(found.counts, expected.counts)


def test_passes_go_on_until_nothing_changes_wherever_they_begin():
    x = jnp.asarray([[0.0, 1.0, 2.0, 9.0]])  # half of them nearest to each at first
    found = cluster(x, None, jnp.asarray([[0.0, 3.1]]), jnp.asarray([[True, False]]), k=2)
    np.testing.assert_array_equal(found.centroids, [[0.0, 9.0]])


def test_a_middle_that_is_no_float_is_not_rounded_up():
    x = jnp.asarray([[1.0, 8388609.0, 8388610.0, 16777218.0]])  # the middle is 8388609.5
    codebook, frozen = jnp.asarray([[1.0, 16777218.0]]), jnp.asarray([[True, True]])
    np.testing.assert_array_equal(cluster(x, None, codebook, frozen, k=2).counts, [[2, 2]])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_blocks_that_hold_no_numbers_are_told_of_and_harm_no_others(bad):
    x = jnp.asarray(RNG.standard_normal((3, 40)), jnp.float32)
    weight = jnp.ones(x.shape)
    as_ever = cluster(x, weight, k=4)
    of_x = cluster(x.at[1, 7].set(bad), weight, k=4)
    of_weight = cluster(x, weight.at[1, 7].set(bad), k=4)
    negative = cluster(x, weight.at[1, 7].set(-1.0), k=4)
    for found in (of_x, of_weight, negative):
        np.testing.assert_array_equal(found.finite, [True, False, True])
        np.testing.assert_array_equal(found.centroids[::2], as_ever.centroids[::2])


def test_weights_of_zero_are_counted_and_no_more_and_all_zero_are_all_equal():
    x = jnp.asarray([[1.0, 1.0, 2.0, 9.0, -50.0]])
    found = cluster(x, jnp.asarray([[1.0, 1.0, 3.0, 0.0, 0.0]]), k=2)
    np.testing.assert_array_equal(found.centroids, [[1.0, 2.0]])
    np.testing.assert_array_equal(found.counts, [[3, 2]])
    np.testing.assert_array_equal(found.losses, [[0.0, 0.0]])
    plain, zeros = cluster(x, k=2), cluster(x, jnp.zeros_like(x), k=2)
    for got, expected in zip(zeros, plain, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_it_maps_differentiates_exports_and_runs_in_shard_map(monkeypatch):
    x = jnp.asarray(RNG.standard_normal((2, 3, 50)), jnp.float32)
    codebook, frozen = jnp.zeros((3, 4)), jnp.zeros((3, 4), bool)

    def centroids(x):  # the codebooks are not mapped
        return jax.vmap(lambda x: cluster.__wrapped__(x, None, codebook, frozen, k=4).centroids)(x)

    assert is_called(centroids, x)
    expected = jnp.stack([cluster(own, k=4).centroids for own in x])
    np.testing.assert_array_equal(jax.jit(centroids)(x), expected)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.jit(
        jax.shard_map(centroids, mesh=mesh, in_specs=(jax.P("data"),), out_specs=jax.P("data"))
    )
    np.testing.assert_array_equal(spread(x), expected)
    exported = jax.export.export(jax.jit(centroids))(x)
    assert "jaxquant_clusters" not in exported.mlir_module()
    made, moved = jax.jvp(lambda x: centroids(x).sum(), (x,), (jnp.ones_like(x),))
    assert jnp.isfinite(made) and moved.shape == ()
    monkeypatch.setattr(native, "supports", lambda *_: False)
    by_xla = jax.jit(lambda x: centroids(x))(x)
    np.testing.assert_allclose(exported.call(x), by_xla, 1e-5)
    np.testing.assert_allclose(made, jnp.sum(by_xla), 1e-5)


def test_rounds_call_it_on_one_device_and_xla_on_several(monkeypatch):
    params = {"w": jnp.asarray(RNG.standard_normal((64, 80)), jnp.float32)}
    plan = jq.slq(params, rounds=(3, 5), rules=[jq.LayerRule("w", k=5, block=(-1, 1))])
    state = jq.init(plan, params)
    run = functools.partial(jq.quantize_round, plan)
    assert is_called(run, params, state)
    new, after, info = jax.jit(run)(params, state)
    last, _, _ = jax.jit(run)(new, after)
    frozen = np.asarray(after.frozen["w"])
    assert 0 < np.mean(frozen) < 1
    np.testing.assert_array_equal(np.asarray(last["w"])[frozen], np.asarray(new["w"])[frozen])
    monkeypatch.setattr(platform, "is_one_device", lambda: False)
    jax.clear_caches()  # of programs that know of one device
    assert not is_called(run, params, state)
    _, _, expected = jax.jit(run)(params, state)
    ours, theirs = (float(jnp.sum(told.loss["w"])) for told in (info, expected))
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"frozen": (2, 3)}, {}, "expected a codebook for each block"),
        ({"weight": (2, 7)}, {}, "expected sample weights like x"),
        ({}, {"cells": 11}, "expected cells that the blocks"),
        ({}, {"longest": 1}, "expected cells that the blocks"),
        ({"x": (2, 0)}, {}, "expected blocks of 1 to 65,535"),
    ],
)
def test_calls_that_buffers_do_not_fit_are_refused(shapes, options, message):
    own = {"x": (2, 10), "weight": (2, 0), "codebook": (2, 4), "frozen": (2, 4)} | shapes
    arrays = [
        jnp.ones(shape, bool if name == "frozen" else "float32") for name, shape in own.items()
    ]
    results = [jax.ShapeDtypeStruct((2, 4), name) for name in ("float32", "int32", "float32")]
    results += [jax.ShapeDtypeStruct((2,), name) for name in ("float32", "bool")]
    integers = {"cells": 8, "longest": 4, "iterations": -1, "passes": 9} | options
    rest = {"digits": np.int32(23), "least_exponent": np.int32(-126)}
    rest |= {"least": np.float32(-1), "largest": np.float32(1), "zero": False}
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(
            jax.ffi.ffi_call("jaxquant_clusters", results)(*arrays, **integers, **rest)
        )
