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
from jaxquant.clustering.histogram import bin_width, histogram, to_position, to_value
from jaxquant.clustering.passes import fold

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
    np.testing.assert_allclose(result.position, [0.0, 1.25, 2.5, 4.0], atol=2.0**-9)
    assert (result.low, result.high) == (0, 4)


def test_weighted_mass_is_relative_to_the_largest():
    x, weight = jnp.array([0.0, 1.0, 1.5, 4.0]), jnp.array([1.0, 3.0, 1.0, 4.0])
    result = count(x, weight, bins=4)
    np.testing.assert_allclose(result.mass, [0.25, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(result.position, [0.0, 1.125, 2.5, 4.0], rtol=1e-6)


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
    width = np.float64(bin_width(result))
    mean = np.sum(np.float64(result.mass) * np.float64(result.position)) / x.size
    expected = np.mean((x.astype(np.float64) - np.float64(result.low)) / width)
    np.testing.assert_allclose(mean, expected, atol=2.0**-8 + 256 * 2e-7)
    assert np.isfinite(result.position).all()


# XLA takes subnormal numbers for zero.
NORMAL = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@given(hnp.arrays(np.float32, 30, elements=NORMAL))
def test_values_go_to_positions_and_back(x):
    statistic = count(x, bins=256)
    back = to_value(statistic, to_position(statistic, jnp.asarray(x)))
    np.testing.assert_allclose(back, x, atol=1e-6 * np.abs(x).max())


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
    np.testing.assert_allclose(pieces.position, whole.position, rtol=1e-6)


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
