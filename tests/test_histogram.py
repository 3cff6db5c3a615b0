"""The histogram: counts to the last weight, positions to a fraction of a bin, in pieces or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant.clustering.passes as module
from jaxquant.clustering.histogram import histogram, refined
from jaxquant.clustering.passes import fold
from jaxquant.clustering.points import sorted_points

count = jax.jit(histogram, static_argnames="bins")


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LONG = [
    (200_000,),
    (199_999,),
    (2, 100_000),
    (400, 500),
    (3, 3, 150, 150),
    (1, 1, 1, 200_003),
    (200_003, 1),
]


def test_four_weights_on_four_bins():
    result = count(jnp.array([0.0, 1.0, 1.5, 4.0]), bins=4)
    np.testing.assert_array_equal(result.mass, [1, 2, 0, 1])
    np.testing.assert_allclose(result.value / result.scale, [0.0, 1.25, 1.25, 4.0], atol=2.0**-9)
    assert (result.low, result.high) == (0, 4)


def test_weighted_mass_is_relative_to_the_largest():
    x, weight = jnp.array([0.0, 1.0, 1.5, 4.0]), jnp.array([1.0, 3.0, 1.0, 4.0])
    result = count(x, weight, bins=4)
    np.testing.assert_allclose(result.mass, [0.25, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(result.value / result.scale, [0.0, 1.125, 1.125, 4.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_counts_are_those_of_numpy(dtype):
    x = jnp.asarray(normal(20_000), dtype)
    result = count(x, bins=64)
    wide = np.asarray(x).astype(np.float64)
    edges = np.linspace(wide.min(), wide.max(), 65)
    expected, _ = np.histogram(wide, edges)
    near_an_edge = np.abs(wide[:, None] - edges[None, 1:-1]).min(axis=1) < 1e-5
    assert np.abs(np.asarray(result.mass) - expected).sum() <= 2 * near_an_edge.sum()
    assert result.mass.sum() == x.size


@given(hnp.arrays(np.float32, 30, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_mass_and_moment_are_those_of_the_weights(x):
    result = count(x, bins=256)
    assert result.mass.sum() == x.size
    values = np.float64(result.value) / np.float64(result.scale)
    width = (np.float64(result.high) - np.float64(result.low)) / 256
    mean = np.sum(np.float64(result.mass) * values) / x.size
    atol = width * 2.0**-8 + np.abs(x).max() * 1e-6
    np.testing.assert_allclose(mean, np.mean(x.astype(np.float64)), atol=atol)
    assert np.isfinite(values).all() and (np.diff(values) >= 0).all()


fine = jax.jit(lambda *a: refined(*a, histogram(*a), bins=1 << 16))


@pytest.mark.parametrize("weighted", [False, True])
def test_refined_bins_hold_what_the_sorted_entries_do(weighted):
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(size=500), 1e-3 * rng.normal(size=500) + 100, -1e10, 0].astype(np.float32)
    weight = rng.uniform(size=x.size).astype(np.float32) if weighted else None
    result = jax.tree.map(np.asarray, fine(x, weight))
    order = np.argsort(x)
    mass = np.ones(x.size) if weight is None else weight[order] / weight.max()
    occupied = result.mass > 0
    values = result.value[occupied].astype(np.float64) / result.scale
    np.testing.assert_allclose(result.mass.sum(), mass.sum(), rtol=1e-6)
    assert (np.diff(result.value) >= 0).all()
    # Every value is within what its bin says of its bin's.
    bin_of = np.searchsorted(np.cumsum(result.mass[occupied]), np.cumsum(mass) - 1e-4)
    distance = np.abs(values[bin_of] - np.sort(x).astype(np.float64))
    assert np.all(distance <= np.where(np.abs(np.sort(x)) > 1e9, 1e4, 1e-4))
    assert (np.bincount(bin_of) == 1).mean() > 0.5  # most floats have one of their own


def test_refined_bins_tell_near_values_apart_however_wide_the_range():
    x = np.float32([1, 1 + 2.0**-19, -1e20, 1e20])
    result = jax.tree.map(np.asarray, fine(np.repeat(x, 3), None))
    values = result.value[result.mass > 0] / result.scale
    np.testing.assert_allclose(values, np.sort(x), rtol=2.0**-20)
    np.testing.assert_array_equal(result.mass[result.mass > 0], [3, 3, 3, 3])


def test_refined_bins_are_floats_where_narrow_modes_share_their_leading_bits():
    rng = np.random.default_rng(0)
    x = rng.choice([1e6, 1e6 + 2000], 50_000) + rng.normal(size=50_000)
    x = np.r_[x, rng.normal(size=50_000), -1e12].astype(np.float32)
    result = jax.tree.map(np.asarray, fine(x, None))
    own, counts = np.unique(x[x > 1e5], return_counts=True)
    far = (result.mass > 0) & (result.value > 1e5 * result.scale)
    np.testing.assert_array_equal(result.value[far] / result.scale, own)
    np.testing.assert_array_equal(result.mass[far], counts)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_points_of_a_small_array_are_its_entries_in_order(dtype):
    x = jnp.asarray(normal(500), dtype)
    weight = np.abs(normal(500, 1)) * (normal(500, 2) > 0)
    points, entries = jax.jit(sorted_points)(x, weight)
    wide = np.asarray(x, np.float32)
    np.testing.assert_array_equal(entries / points.scale, np.sort(wide))
    for value in np.unique(wide):
        here = np.asarray(points.value) / points.scale == value
        expected = weight[wide == value].sum() / weight.max()
        np.testing.assert_allclose(np.sum(points.mass, where=here), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_miss_nothing(monkeypatch, shape, weighted):
    x = normal(shape)
    weight = np.ones_like(x) if weighted else None
    whole = jax.jit(lambda *a: histogram(*a, bins=32))(x, weight)
    monkeypatch.setattr(module, "_CHUNK", 1 << 14)
    assert "scan" in str(jax.make_jaxpr(lambda *a: histogram(*a, bins=32))(x, weight))
    pieces = jax.jit(lambda *a: histogram(*a, bins=32))(x, weight)
    np.testing.assert_array_equal(pieces.mass, whole.mass)
    np.testing.assert_allclose(pieces.value, whole.value, atol=2.0**20)  # of a range of 2**41


@pytest.mark.parametrize("shape", LONG)
def test_pieces_are_small(monkeypatch, shape):
    monkeypatch.setattr(module, "_CHUNK", 1 << 14)
    sizes = []

    def step(carry, piece):
        sizes.append(piece.size)
        return carry + piece.size

    assert fold(step, jnp.int32(0), jnp.ones(shape)) == np.prod(shape)
    assert max(sizes) <= 2 << 14


def test_counts_do_not_stop_at_the_24_bits_of_float32():
    x = jax.lax.broadcasted_iota(jnp.int32, (1 << 12, 5 << 10), 1).astype(jnp.bfloat16)
    ones = jax.jit(lambda x: histogram(jnp.where(x > 0, 1, 0).astype(jnp.bfloat16), bins=2))(x)
    np.testing.assert_array_equal(ones.mass, [1 << 12, (5 << 22) - (1 << 12)])


def test_sharding_changes_no_bit():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = normal((64, 48))
    one = count(x, bins=256)
    many = count(jax.device_put(x, NamedSharding(mesh, P("a", "b"))), bins=256)
    jax.tree.map(np.testing.assert_array_equal, many, one)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_show_in_the_extremes(bad):
    x = normal(100)
    x[3] = bad
    result = count(x, bins=16)
    assert not (np.isfinite(result.low) and np.isfinite(result.high))
