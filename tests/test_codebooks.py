"""Codes and centroids: nearest, ties to the lower value, any order, any dtype."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxquant.clustering.codebooks import assign, num_centroids, reconstruct, start_power_of_two
from jaxquant.clustering.histogram import histogram

jitted_assign = jax.jit(assign)
QUARTERS = st.integers(-40, 40).map(lambda i: i / 4)


def nearest(x, centroids):
    """Brute force: ties to the lower value, among equal centroids to the lower index."""
    x, c = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    order = np.lexsort((np.arange(c.size), c))
    return order[np.argmin(np.abs(x[..., None] - c[order]), axis=-1)]


def test_ties_go_to_the_lower_value_in_any_order():
    x = jnp.array([0.5, -0.5, 1.5])
    np.testing.assert_array_equal(assign(x, jnp.array([0.0, 1.0, -1.0])), [0, 2, 1])
    np.testing.assert_array_equal(assign(x, jnp.array([-1.0, 0.0, 1.0])), [1, 0, 2])


def test_equal_centroids_share_the_lower_index():
    codes = assign(jnp.array([-9.0, 2.0, 9.0]), jnp.array([5.0, 2.0, 5.0, 2.0]))
    np.testing.assert_array_equal(codes, [1, 1, 0])


@given(
    hnp.arrays(np.float32, (3, 4), elements=QUARTERS),
    hnp.arrays(np.float32, 5, elements=QUARTERS),
)
def test_codes_are_those_of_brute_force(x, centroids):
    expected = nearest(x, centroids)
    np.testing.assert_array_equal(jitted_assign(x, centroids), expected)


# No subnormal numbers, which devices take for zero.
NORMAL = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def neighbours(values):
    """Values and the floats next to them."""
    with np.errstate(over="ignore", under="ignore"):
        up, down = (np.nextafter(values, np.float32(x)) for x in (np.inf, -np.inf))
    near = np.concatenate([values, up, down])
    tiny = np.finfo(np.float32).tiny
    return np.where(np.isfinite(near) & ((near == 0) | (np.abs(near) >= tiny)), near, 0)


@given(hnp.arrays(np.float32, 5, elements=NORMAL), st.booleans())
@example(np.float32([0, -1, -1, -1, -1]) * np.finfo(np.float32).tiny, False)
def test_codes_are_exact_to_the_last_bit_at_any_scale(centroids, close):
    if close:
        centroids = np.resize(neighbours(centroids[:2]), 5)
    ascending = np.sort(centroids).astype(np.float64)
    middles = ((ascending[1:] + ascending[:-1]) / 2).astype(np.float32)
    x = neighbours(np.concatenate([centroids, middles]))

    def exact(entry):
        def key(j):
            distance = abs(Fraction(float(entry)) - Fraction(float(centroids[j])))
            return distance, centroids[j], j

        return min(range(5), key=key)

    np.testing.assert_array_equal(jitted_assign(x, centroids), [exact(entry) for entry in x])


@given(hnp.arrays(np.float32, 9, elements=QUARTERS))
def test_a_centroid_is_assigned_to_its_own_value(centroids):
    codes = jitted_assign(centroids, centroids)
    np.testing.assert_array_equal(reconstruct(codes, jnp.asarray(centroids)), centroids)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("k", [1, 17, 33, 34, 256, 257])
def test_every_k_and_dtype_agrees_with_brute_force(k, dtype):
    rng = np.random.default_rng(k)
    x = jnp.asarray(rng.normal(size=(20, 30)), dtype)
    centroids = jnp.asarray(rng.normal(size=k), jnp.float32)
    codes = jitted_assign(x, centroids)
    assert codes.dtype == (jnp.uint8 if k <= 256 else jnp.int32)
    np.testing.assert_array_equal(codes, nearest(np.asarray(x, np.float32), centroids))


@pytest.mark.parametrize("k", [17, 40])
def test_eager_jit_and_vmap_agree(k):
    rng = np.random.default_rng(0)
    x, centroids = (jnp.asarray(rng.normal(size=(3, n)).astype(np.float32)) for n in (50, k))
    expected = jnp.stack([assign(a, b) for a, b in zip(x, centroids, strict=True)])
    np.testing.assert_array_equal(jax.vmap(assign)(x, centroids), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(assign))(x, centroids), expected)
    back = jax.vmap(reconstruct)(expected, centroids)
    np.testing.assert_array_equal(back[1], centroids[1][expected[1]])


def test_extreme_centroids_do_not_overflow():
    big = jnp.float32(3e38)
    np.testing.assert_array_equal(
        assign(jnp.array([-big, 0.0, big]), jnp.array([-big, big])), [0, 0, 1]
    )


def test_float64_weights_are_compared_in_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.array([1.0 + 1e-12, 1.0 - 1e-12])
        np.testing.assert_array_equal(assign(x, jnp.array([0.0, 2.0], jnp.float64)), [1, 0])


@pytest.mark.parametrize("k", [17, 33, 34, 256, 4096])
def test_no_array_of_weights_by_centroids_is_made(k):
    x = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    c = jax.ShapeDtypeStruct((k,), jnp.float32)
    memory = jitted_assign.lower(x, c).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.9 * (k << 20)  # as booleans
    assert memory.temp_size_in_bytes < 40 << 20


def test_reconstruct_keeps_the_dtype_of_the_centroids():
    codes = jnp.array([[1, 0], [0, 1]], jnp.uint8)
    result = reconstruct(codes, jnp.array([1.5, 2.5], jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.astype(jnp.float32), [[2.5, 1.5], [1.5, 2.5]])


def test_a_code_out_of_range_is_nan_and_not_a_neighbour():
    assert np.isnan(reconstruct(jnp.array([2]), jnp.array([0.0, 1.0])))


def test_num_centroids_of_the_paper():
    assert [num_centroids(bits) for bits in (1, 2, 3, 4, 5, 8, 16)] == [2, 3, 5, 9, 17, 129, 32769]


@pytest.mark.parametrize("bits", [0, 17, -1, 2.0, True, "5"])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"expected bits to be 1 to 16, got {bits!r}"):
        num_centroids(bits)


@pytest.mark.parametrize("shape", [(), (0,), (2, 2)])
def test_centroids_of_another_rank_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected centroids of shape \[k\] with k >= 1, got"):
        assign(jnp.zeros(3), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("largest", "power"),
    [(1.0, 1.0), (0.99, 0.5), (1.99, 1.0), (2.0, 2.0), (-3e38, 2.0**127), (1e-30, 2.0**-100)],
)
def test_power_of_two_start_is_the_largest_power_below_the_largest_weight(largest, power):
    start = start_power_of_two(histogram(jnp.array([largest, 0.0]), bins=4), 5)
    np.testing.assert_array_equal(start, np.float32([0, power, -power, power / 2, -power / 2]))


def test_power_of_two_start_of_zeros_is_zero():
    assert not start_power_of_two(histogram(jnp.zeros(9), bins=4), 5).any()
