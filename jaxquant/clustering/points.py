"""The statistic that one-dimensional clustering works on: ascending points with masses.

The points of a small array are its entries, sorted; those of a large one are bins, see `histogram`.
Values are scaled by a power of two, which is exact, so that the largest magnitude is 2**40: the
squares of what is 1e30 times smaller are still normal numbers, and sums of squares do not overflow.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops

_LARGEST = 40  # exponent of the largest magnitude of a point
MOST_COMPARES = 32  # of an entry, one after the other; with more the search is binary


class Points(NamedTuple):
    """Entries of one array in ascending order, or bins of them; in units of 1 / `scale`."""

    value: jax.Array  # [n] float32, ascending; a point without mass repeats the one before
    mass: jax.Array | None  # [n] int32 counts, None where all are 1, or float32 sums of sample
    # weights, over the largest of them
    within: jax.Array  # [n] float32, variance of a point's entries about its value, at most
    low: jax.Array  # float32 scalar, smallest entry, not scaled; NaN if one is
    high: jax.Array  # float32 scalar, largest
    scale: jax.Array  # float32 scalar, a power of two


def scale_of(low: jax.Array, high: jax.Array) -> jax.Array:
    """Return the power of two that takes the larger magnitude to 2**40, or as near as floats go."""
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    largest = jnp.where(jnp.isfinite(largest), largest, 1.0)
    exponent = (
        jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    ) - 126  # a fraction times 2**it
    exponent = jnp.clip(jnp.where(largest > 0, _LARGEST - exponent, 0), -126, 126)
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def to_units(points: Points, values: jax.Array) -> jax.Array:
    """Return values in the units of the points; far away ones are taken nearer."""
    limit = 2.0 ** (2 * _LARGEST)
    return jnp.clip(values.astype(jnp.float32) * points.scale, -limit, limit)


def from_units(points: Points, values: jax.Array) -> jax.Array:
    """Return values in the units of the array; beyond float32 its largest number."""
    limit = jnp.finfo(jnp.float32).max
    return jnp.clip(values * (1.0 / points.scale), -limit, limit)


def resolution(points: Points) -> jax.Array:
    """Return 2**-16 of the range, in the units of the array; 1 where all entries are equal."""
    low, high = points.low * points.scale, points.high * points.scale
    width = (high - low) * (2.0**-16 / points.scale)
    return jnp.where(high > low, jnp.maximum(width, jnp.finfo(jnp.float32).tiny), 1.0)


def relative_weight(sample_weight: jax.Array, largest: jax.Array) -> jax.Array:
    """Divide weights by the largest, float32; where that is zero every entry counts alike."""
    usable = largest > 0
    share = sample_weight.astype(jnp.float32) / jnp.where(usable, largest, 1.0)
    return jnp.where(usable, share, 1.0)


# Sorted entries ----------------------------------------------------------------------------------


def to_key(x: jax.Array) -> jax.Array:
    """Return int32 in the order of float32: sorted several times as fast on CPU."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_key(key: jax.Array) -> jax.Array:
    """Return the float32 of a key."""
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def sorted_points(
    x: jax.Array, sample_weight: jax.Array | None = None
) -> tuple[Points, jax.Array | None]:
    """Return the entries of an array as points, and if they weigh, all of them as they are.

    The latter are scaled and ascending, [n]; points of entries without weight are others.

    Args:
      x: [...] floating point.
      sample_weight: non-negative, like `x`; all zero counts as all equal.
    """
    key = to_key(x.reshape(-1))
    ascending = jax.lax.sort(key)
    entries = from_key(ascending)
    # NaN has the outermost keys, of either sign.
    if sample_weight is None:
        mass, value = None, entries
        low, high = entries[0], entries[-1]
    else:
        weight = sample_weight.reshape(-1)
        relative = relative_weight(weight, jnp.max(weight).astype(jnp.float32))
        place = jnp.searchsorted(ascending, key).astype(jnp.int32)
        mass = jnp.zeros(entries.shape, jnp.float32).at[place].add(relative)
        counted = (mass > 0) | ~jnp.isfinite(entries)
        low = jnp.min(entries, where=counted, initial=jnp.inf)
        high = jnp.max(entries, where=counted, initial=-jnp.inf)
        value = jnp.maximum(jax.lax.cummax(jnp.where(counted, entries, -jnp.inf)), low)
    scale = scale_of(low, high)
    within = jnp.zeros(entries.shape, jnp.float32)
    points = Points(value * scale, mass, within, low, high, scale)
    return points, None if sample_weight is None else entries * scale


# Sums over runs of points ------------------------------------------------------------------------


class DoubleFloat(NamedTuple):
    """Numbers as sums of two floats each, to twice the digits of float32."""

    high: jax.Array
    low: jax.Array


def prefix_sums(x: jax.Array | DoubleFloat) -> DoubleFloat:
    """Return the sums [n + 1] over the first 0..n of some numbers [n].

    The difference of two of them is as exact as a sum over the run between would be, however large
    what lies before; over entries of zero it is zero. Source: Knuth, TAOCP 2, 4.2.2, theorem B.
    Rows of entries are summed side by side, then the rows.
    """
    x = x if isinstance(x, DoubleFloat) else DoubleFloat(x, jnp.zeros_like(x))
    size = x.high.shape[0]
    columns = 2 ** round(math.log2(size) / 2) if size > 1 else 1
    rows = -(-size // columns)

    def table(part: jax.Array) -> jax.Array:
        return jnp.pad(part, (0, rows * columns - size)).reshape(rows, columns).T

    none = DoubleFloat(jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.float32))

    def add(sums: DoubleFloat, numbers: DoubleFloat) -> tuple[DoubleFloat, DoubleFloat]:
        total = _add(sums, numbers)
        return total, total

    def before(sums: DoubleFloat, row: DoubleFloat) -> tuple[DoubleFloat, DoubleFloat]:
        return _add(sums, row), sums

    total, inside = loops.scan(add, none, DoubleFloat(table(x.high), table(x.low)))
    zero = DoubleFloat(jnp.float32(0.0), jnp.float32(0.0))
    _, start = loops.scan(before, zero, total)
    start = DoubleFloat(start.high[:, None], start.low[:, None])
    sums = _add(start, DoubleFloat(inside.high.T, inside.low.T))
    return DoubleFloat(*(jnp.pad(part.reshape(-1)[:size], (1, 0)) for part in sums))


def _add(a: DoubleFloat, b: DoubleFloat) -> DoubleFloat:
    total = a.high + b.high
    rest = total - a.high
    error = (a.high - (total - rest)) + (b.high - rest)
    return DoubleFloat(total, a.low + (b.low + error))


def _multiply(a: jax.Array, b: jax.Array) -> DoubleFloat:
    """Return the products of floats, almost exact (Dekker, 1971).

    Both are cut in halves of twelve bits, whose products are floats: so it does not matter whether
    a compiler rounds a product before it adds it to something.
    """
    upper, lower = _halves(a)
    others, rests = _halves(b)
    rest = (upper * rests + lower * others) + lower * rests
    zero = jnp.zeros_like(rest)
    return _add(DoubleFloat(upper * others, zero), DoubleFloat(rest, zero))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & ~0xFFF, jnp.float32)
    return upper, x - upper


def between(sums: DoubleFloat | jax.Array | None, edges: jax.Array) -> DoubleFloat:
    """Return the sums over the runs between neighbouring edges; of ones for None."""
    if isinstance(sums, DoubleFloat):
        high, low = (part.at[edges].get(mode="promise_in_bounds") for part in sums)
        high, low = _add(DoubleFloat(high[1:], low[1:]), DoubleFloat(-high[:-1], -low[:-1]))
        return _add(DoubleFloat(high, jnp.zeros_like(high)), DoubleFloat(low, jnp.zeros_like(low)))
    counts = edges if sums is None else sums.at[edges].get(mode="promise_in_bounds")
    counts = jnp.diff(counts)
    high = counts.astype(jnp.float32)
    return DoubleFloat(high, (counts - high.astype(counts.dtype)).astype(jnp.float32))


class Prefix(NamedTuple):
    """Sums over the first 0..n points, [n + 1]."""

    mass: DoubleFloat | jax.Array | None  # int32 where masses are counts; None where all are 1
    moment: DoubleFloat


def prefix(points: Points) -> Prefix:
    """Return the sums of masses, and of masses times values."""
    if points.mass is None:
        return Prefix(None, prefix_sums(points.value))
    if points.mass.dtype == jnp.int32:
        mass = jnp.pad(jnp.cumsum(points.mass), (1, 0))
    else:
        mass = prefix_sums(points.mass)
    return Prefix(mass, prefix_sums(_multiply(masses(points), points.value)))


def masses(points: Points) -> jax.Array:
    """Return the mass of each point, float32."""
    if points.mass is None:
        return jnp.ones(points.value.shape, jnp.float32)
    return points.mass.astype(jnp.float32)


def edges_of(points: Points, ascending: jax.Array) -> jax.Array:
    """Return the first points [k + 1] of the clusters of ascending centroids; ties go down."""
    last = last_below_middles(ascending)
    inner = count_up_to(points.value, last)
    return jnp.pad(inner, (1, 1), constant_values=(0, points.value.shape[0]))


def count_up_to(values: jax.Array, limits: jax.Array) -> jax.Array:
    """Return how many of some ascending values are not above each limit, int32."""
    return jnp.searchsorted(values, limits, side="right").astype(jnp.int32)


def means(sums: Prefix, edges: jax.Array, otherwise: jax.Array) -> DoubleFloat:
    """Return the mean of each run between neighbouring edges, of an empty one what is given.

    The high parts are the nearest floats. A quotient that is rounded twice may be off by a whole
    step between floats, which counts where a cluster is few steps wide.
    """
    mass, moment = between(sums.mass, edges), between(sums.moment, edges)
    divisor = jnp.where(mass.high > 0, mass.high, 1.0)
    quotient = moment.high / divisor
    product = _multiply(quotient, divisor)
    rest = (moment.high - product.high) + ((moment.low - product.low) - quotient * mass.low)
    rest /= divisor
    mean = quotient + rest
    low = rest - (mean - quotient)
    empty = mass.high <= 0
    return DoubleFloat(jnp.where(empty, otherwise, mean), jnp.where(empty, 0.0, low))


# Few centroids in order ---------------------------------------------------------------------------


def ranks(x: jax.Array) -> jax.Array:
    """Return the places of entries [..., k] of short rows in ascending order, int32; ties stay."""
    size = x.shape[-1]
    if size > MOST_COMPARES:
        return jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)
    index = jnp.arange(size)
    earlier = jnp.expand_dims(index[None] < index[:, None], range(x.ndim - 1))
    own, other = x[..., :, None], x[..., None, :]
    return jnp.sum((other < own) | ((other == own) & earlier), axis=-1, dtype=jnp.int32)


def placed(x: jax.Array, rank: jax.Array) -> jax.Array:
    """Return the entries [..., k] of short rows at the places that `ranks` gives them."""
    size = x.shape[-1]
    if size > MOST_COMPARES:
        order = jnp.argsort(rank, axis=-1)
        return jnp.take_along_axis(x, order, axis=-1, mode="promise_in_bounds")
    place = jnp.expand_dims(jnp.arange(size, dtype=rank.dtype)[:, None], range(x.ndim - 1))
    return _only(rank[..., None, :] == place, x[..., None, :])


def taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return the entries [..., n] of short rows [..., k] at some indices in [0, k)."""
    size = x.shape[-1]
    if size > MOST_COMPARES:
        return jnp.take_along_axis(x, index.astype(jnp.int32), axis=-1, mode="promise_in_bounds")
    # Of a gather XLA would write the indices along all axes to memory.
    place = jnp.expand_dims(jnp.arange(size, dtype=index.dtype), range(index.ndim))
    return _only(index[..., :, None] == place, x[..., None, :])


def _only(here: jax.Array, own: jax.Array) -> jax.Array:
    """Return the one entry along the last axis that is here."""
    if own.dtype == bool:
        return jnp.any(here & own, axis=-1)
    # As integers: sums of floats XLA does not compute within others, but of a table in memory.
    bits = jax.lax.bitcast_convert_type(own, f"uint{8 * own.dtype.itemsize}")
    bits = jnp.sum(jnp.where(here, bits, jnp.zeros((), bits.dtype)), axis=-1, dtype=bits.dtype)
    return jax.lax.bitcast_convert_type(bits, own.dtype)


def headroom(largest: jax.Array) -> jax.Array:
    """Return the power of two by which to multiply before adding two such numbers or less.

    No constant: of a sum of halves XLA makes half of a sum, which may overflow.
    """
    limit = jnp.finfo(largest.dtype).max
    return jnp.where(largest > limit / 4, 0.25, 1.0).astype(largest.dtype)


def last_below_middles(ascending: jax.Array) -> jax.Array:
    """Return the last float that is not above the middle of each two neighbours, [..., k - 1].

    A middle of neighbouring floats is none itself: rounded up, it would be the upper one, and that
    one nearer to the lower. The error of the sum is exact (Knuth, TAOCP 2, 4.2.2, theorem B).
    """
    scale = headroom(jnp.max(jnp.abs(ascending), axis=-1, keepdims=True))
    lower, upper = ascending[..., :-1] * scale, ascending[..., 1:] * scale
    total = lower + upper
    rest = total - lower
    error = (lower - (total - rest)) + (upper - rest)
    total = jnp.where(error < 0, _float_below(total), total)
    last = total * (0.5 / scale)
    # Where that rounds, next to zero, a centroid is still nearest to itself.
    lower, upper = ascending[..., :-1], ascending[..., 1:]
    return jnp.clip(last, lower, jnp.maximum(lower, _float_below(upper)))


def _float_below(x: jax.Array) -> jax.Array:
    """Return the next float below each; of float32 in few operations.

    Below zero that is the next normal one: devices take those between for zero.
    """
    if x.dtype != jnp.float32:
        return jnp.nextafter(x, -jnp.inf)
    key = to_key(x)
    below = key - (x > -jnp.inf).astype(jnp.int32)
    return from_key(jnp.where(x == 0, -1 - 2**23, below))  # -1 is the key of -0.0
