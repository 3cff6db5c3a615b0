"""Codebooks of centroids: how many, where they start, which one a weight is nearest to."""

import jax
import jax.export
import jax.numpy as jnp

from jaxquant import checks
from jaxquant.clustering.points import (
    MOST_COMPARES,
    Points,
    from_units,
    last_below_middles,
    masses,
    placed,
    ranks,
)
from jaxquant.meshes import compiled

_FEW_ENTRIES = 8192
MOST_CENTROIDS = 256  # of a codebook whose codes are packed: a code fits a byte


def num_centroids(bits: int) -> int:
    """Return the number of centroids that the paper gives to `bits` bits: `2**(bits-1) + 1`.

    One centroid is zero, the others come in pairs of sign (Xu et al., 2018; so does INQ).

    Args:
      bits: 1 to 16.

    Raises:
      ValueError: if `bits` is not such a number.

    >>> [num_centroids(bits) for bits in (2, 3, 5)]
    [3, 5, 17]
    """
    return 2 ** (checks.integer("bits", bits, least=1, most=16) - 1) + 1


def assign(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return the code of the centroid nearest to each entry.

    `codes[i] = argmin_j |x[i] - centroids[j]|`; a tie goes to the lower centroid, and among equal
    centroids to the lower index. Centroids may stand in any order. Elementwise in `x`: any shape,
    any sharding; under jit no [n, k] array. Cost O(n k) compares up to k = 33, O(n log k) beyond.

    Args:
      x: [...] floating point.
      centroids: [k] floating point.

    Returns:
      [...] codes, uint8 for k up to 256, else int32.

    Raises:
      ValueError: if `centroids` is not one-dimensional or empty.

    >>> assign(jnp.array([-1.0, 0.5, 0.6, 9.0]), jnp.array([0.0, 1.0]))
    Array([0, 0, 1, 1], dtype=uint8)
    """
    x, centroids = jnp.asarray(x), jnp.asarray(centroids)
    if centroids.ndim != 1 or not centroids.size:
        raise ValueError(f"expected centroids of shape [k] with k >= 1, got {centroids.shape}")
    return compiled(_assign, x, centroids, like=x)


def _assign(x: jax.Array, centroids: jax.Array) -> jax.Array:
    dtype = jnp.float64 if jnp.float64 in (x.dtype, centroids.dtype) else jnp.float32
    return pick(x, *bounds(centroids.astype(dtype)))


def bounds(centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where the clusters of codebooks end, in ascending order, and their codes.

    Args:
      centroids: [..., k] float32 or float64.

    Returns:
      The last float [..., k - 1] of each cluster but the highest, and the code [..., k] of each: of
      equal centroids the lowest. See `pick`.
    """
    ascending, codes = _in_order(centroids)
    # It ascends already. But what XLA can fuse it computes anew for each weight; this it cannot.
    last = jax.lax.cummax(last_below_middles(ascending), axis=centroids.ndim - 1)
    return last, codes.astype(jnp.uint8 if codes.shape[-1] <= MOST_CENTROIDS else jnp.int32)


def pick(
    x: jax.Array,
    last: jax.Array,
    table: jax.Array,
    *,
    side_by_side: bool = False,
    short: bool = False,
) -> jax.Array:
    """Return for each entry of x the table's entry of its cluster, elementwise.

    Args:
      x: [...] floating point.
      last: [k - 1] ascending, from `bounds`; or of several codebooks [k - 1, ...], where the other
        axes broadcast against x.
      table: [k] or [k, ...], an entry for each cluster in ascending order.
      side_by_side: whether x is one of many under `vmap`.
      short: whether of a single codebook the codes are made first, a byte for each entry: a tenth
        of the program, as fast where several tables are looked up at the codes.
    """
    x = x.astype(last.dtype)
    if len(last) > MOST_COMPARES:
        return entries(table, _count_below(x, last))
    few = not jax.export.is_symbolic_dim(x.size) and x.size <= _FEW_ENTRIES
    if (few and not side_by_side) or (short and last.ndim == 1):
        last = last.reshape(len(last), *([1] * x.ndim)) if last.ndim == 1 else last
        return entries(table, jnp.sum(x[None] > last, axis=0, dtype=jnp.uint8))
    picked = jnp.broadcast_to(table[0], x.shape)
    for bound, entry in zip(last, table[1:], strict=True):
        picked = jnp.where(x > bound, entry, picked)
    return picked


def _count_below(x: jax.Array, last: jax.Array) -> jax.Array:
    """Return how many of `last` [number, ...] are below each entry of x, int32, by halving."""
    number = len(last)
    rank = jnp.zeros(x.shape, jnp.int32)
    for digit in reversed(range(number.bit_length())):
        upper = rank + (1 << digit)
        bound = entries(last, jnp.minimum(upper, number) - 1)
        rank = jnp.where((upper <= number) & (x > bound), upper, rank)
    return rank


def entries(table: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the entries of a table [k] at some codes, elementwise.

    Args:
      table: [k]; or of several codebooks [k, ...], where the other axes broadcast against codes.
      codes: [...] integers in [0, k).
    """
    if table.ndim == 1:
        return table.at[codes].get(mode="promise_in_bounds")
    if len(table) <= MOST_COMPARES + 1:
        picked = jnp.broadcast_to(table[0], codes.shape)
        for code, entry in enumerate(table[1:], start=1):
            picked = jnp.where(codes == code, entry, picked)
        return picked
    codes = codes.astype(jnp.int32)[None]
    return jnp.take_along_axis(table, codes, axis=0, mode="promise_in_bounds")[0]


def _in_order(centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the centroids in ascending order, and the lowest index of those equal to each."""
    size = centroids.shape[-1]
    if size > MOST_COMPARES:
        order = jnp.argsort(centroids, axis=-1)  # stable: of equal ones the lower index comes first
        ascending = jnp.take_along_axis(centroids, order, axis=-1, mode="promise_in_bounds")
        new = jnp.diff(ascending, axis=-1) != 0
        place = jnp.where(new, jnp.expand_dims(jnp.arange(1, size), range(new.ndim - 1)), 0)
        place = jnp.pad(place, [(0, 0)] * (new.ndim - 1) + [(1, 0)])
        first = jax.lax.cummax(place, axis=centroids.ndim - 1)
        return ascending, jnp.take_along_axis(order, first, axis=-1, mode="promise_in_bounds")
    rank = ranks(centroids)  # no sort: there may be a codebook for few weights
    equal = centroids[..., :, None] == centroids[..., None, :]
    index = jnp.expand_dims(jnp.arange(size, dtype=jnp.int32), range(centroids.ndim))
    lowest = jnp.min(jnp.where(equal, index, size), axis=-1)
    return placed(centroids, rank), placed(lowest, rank)


def reconstruct(codes: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return the centroid of each code, `centroids[codes]`.

    Args:
      codes: [...] integers in [0, k).
      centroids: [k], any dtype.

    Returns:
      [...] of the centroids' dtype; NaN for a code out of range.

    >>> reconstruct(jnp.array([2, 0]), jnp.array([-1.0, 0.0, 1.0]))
    Array([ 1., -1.], dtype=float32)
    """
    codes = jnp.asarray(codes)
    return compiled(_reconstruct, codes, jnp.asarray(centroids), like=codes)


def _reconstruct(codes: jax.Array, centroids: jax.Array) -> jax.Array:
    return centroids.at[codes].get(mode="fill", fill_value=jnp.nan)


def rounded(centroids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return float32 centroids in another dtype: the nearest of its values, the last beyond them.

    >>> rounded(jnp.array([0.3, 900.0]), jnp.int8), rounded(jnp.float32(900.0), jnp.float8_e4m3fn)
    (Array([  0, 127], dtype=int8), Array(448, dtype=float8_e4m3fn))
    """
    if jnp.issubdtype(dtype, jnp.integer):
        limits, centroids = jnp.iinfo(dtype), jnp.round(centroids)
    else:
        limits = jnp.finfo(dtype)
    if limits.bits >= 32:
        return centroids.astype(dtype)
    return jnp.clip(centroids, float(limits.min), float(limits.max)).astype(dtype)


def start_linear(points: Points, k: int) -> jax.Array:
    """Return `k` centroids equally spaced between the extreme weights (Han et al., 2016)."""
    low, high = points.low * points.scale, points.high * points.scale
    return from_units(points, jnp.linspace(low, high, k, dtype=jnp.float32))


def start_quantile(points: Points, k: int) -> jax.Array:
    """Return `k` centroids at the quantiles (j + 1/2) / k of the weights."""
    cumulative = jnp.cumsum(masses(points) if points.mass is None else points.mass).astype(
        jnp.float32
    )
    targets = (jnp.arange(k, dtype=jnp.float32) + 0.5) / k * cumulative[-1]
    return from_units(points, points.value[jnp.searchsorted(cumulative, targets)])


def start_power_of_two(points: Points, k: int) -> jax.Array:
    """Return the centroids 0, m, -m, m/2, -m/2, ... with `m = 2**floor(log2 max|w|)`.

    In index order, not ascending: the start of the SLQ authors' released code.
    """
    largest = _largest(points)
    _, exponent = jnp.frexp(largest)  # exact: largest = f * 2**exponent with f in [1/2, 1)
    return _powers(exponent - 1, k, largest > 0)


def start_inq(points: Points, k: int) -> jax.Array:
    """Return INQ's codebook 0, m, -m, m/2, -m/2, ... with `m = 2**floor(log2(4/3 max|w|))`.

    So `max|w| < 1.5 m`: the largest weight is nearest to m. With `k = num_centroids(bits)` these
    are the powers from n1 down to `n2 = n1 + 1 - 2**(bits-1) / 2` of Zhou et al., ICLR 2017,
    section 2.1.
    """
    largest = _largest(points)
    fraction, exponent = jnp.frexp(largest)
    return _powers(jnp.where(fraction >= 0.75, exponent, exponent - 1), k, largest > 0)


def start_ternary(points: Points, k: int) -> jax.Array:
    """Return the symmetric ternary codebook -a, 0, a of least squared error.

    With the weights sorted by magnitude and S(n) the sum of the n largest, that is a = S(n) / n
    with n maximizing S(n)**2 / n: the optimum that TWN (Li et al., 2016, equation 6) approximates
    by a threshold of 0.7 mean|w|. Exact up to the bins, each of which counts as its mean.
    """
    del k  # three, as `kmeans.check_start` makes sure
    mass = masses(points)
    magnitudes = jnp.where(mass > 0, jnp.abs(points.value), 0.0)
    order = jnp.argsort(magnitudes, descending=True)
    mass = mass[order]
    number, total = jnp.cumsum(mass), jnp.cumsum(mass * magnitudes[order])
    means = total / jnp.where(number > 0, number, 1.0)
    mean = from_units(points, means[jnp.argmax(total * means)])
    return jnp.stack([-mean, jnp.zeros_like(mean), mean])


def _largest(points: Points) -> jax.Array:
    return jnp.maximum(jnp.abs(points.low), jnp.abs(points.high))


def _powers(exponent: jax.Array, k: int, nonzero: jax.Array) -> jax.Array:
    """Return 0, m, -m, m/2, -m/2, ... from `m = 2**exponent`; zeros if all weights are."""
    power = exponent - jnp.arange(k // 2)
    magnitudes = jnp.where(nonzero, jnp.ldexp(jnp.float32(1.0), power), 0.0)
    pairs = jnp.stack([magnitudes, -magnitudes], axis=1).reshape(-1)
    return jnp.pad(pairs, (1, 0))


def to_powers_of_two(centroids: jax.Array) -> jax.Array:
    """Return for each centroid the nearest of 0 and +-2**n; a tie goes to the larger magnitude.

    Zero only for zero (and where 2**n would be subnormal): a product with such a centroid is a
    shift. Bit for bit exact in any floating dtype that holds the power.

    >>> to_powers_of_two(jnp.array([-0.9, 0.0, 0.7, 3.0]))
    Array([-1. ,  0. ,  0.5,  4. ], dtype=float32)
    """
    fraction, exponent = jnp.frexp(jnp.abs(centroids))  # fraction in [1/2, 1)
    exponent = jnp.where(fraction >= 0.75, exponent, exponent - 1)
    power = jnp.ldexp(jnp.ones_like(centroids), exponent)
    return jnp.where(centroids == 0, 0.0, jnp.copysign(power, centroids)).astype(centroids.dtype)
