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


class Sums(NamedTuple):
    """Sums over the first entries of an array, 0 of them to all, as two floats each: [n + 1]."""

    high: jax.Array
    low: jax.Array


def prefix_sums(x: jax.Array) -> Sums:
    """Return the sums over the first 0..n entries, to twice the digits of float32.

    The difference of two of them is as exact as a sum over the run between would be, however large
    what lies before; over entries of zero it is zero. Source: Knuth, TAOCP 2, 4.2.2, theorem B.
    Rows of entries are summed side by side, then the rows.
    """
    size = x.shape[0]
    columns = 2 ** round(math.log2(size) / 2) if size > 1 else 1
    rows = -(-size // columns)
    table = jnp.pad(x, (0, rows * columns - size)).reshape(rows, columns)
    none = Sums(jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.float32))

    def along(sums: Sums, column: jax.Array) -> tuple[Sums, Sums]:
        sums = _add(sums, Sums(column, jnp.zeros_like(column)))
        return sums, sums

    def down(sums: Sums, row: Sums) -> tuple[Sums, Sums]:
        return _add(sums, row), sums

    total, inside = loops.scan(along, none, table.T)
    zero = Sums(jnp.float32(0.0), jnp.float32(0.0))
    _, before = loops.scan(down, zero, total)
    sums = _add(Sums(before.high[:, None], before.low[:, None]), Sums(inside.high.T, inside.low.T))
    return Sums(*(jnp.pad(part.reshape(-1)[:size], (1, 0)) for part in sums))


def _add(a: Sums, b: Sums) -> Sums:
    total = a.high + b.high
    rest = total - a.high
    error = (a.high - (total - rest)) + (b.high - rest)
    return Sums(total, a.low + (b.low + error))


def between(sums: Sums | jax.Array | None, edges: jax.Array) -> jax.Array:
    """Return the sums over the runs between neighbouring edges, float32; of ones for None."""
    if sums is None:
        return jnp.diff(edges).astype(jnp.float32)
    parts = sums if isinstance(sums, Sums) else (sums,)
    high, *low = (jnp.diff(part.at[edges].get(mode="promise_in_bounds")) for part in parts)
    return high.astype(jnp.float32) + low[0] if low else high.astype(jnp.float32)


class Prefix(NamedTuple):
    """Sums over the first 0..n points."""

    mass: Sums | jax.Array | None  # [n + 1] int32 where masses are counts; None where all are 1
    moment: Sums


def prefix(points: Points) -> Prefix:
    """Return the sums of masses, and of masses times values."""
    if points.mass is None:
        return Prefix(None, prefix_sums(points.value))
    if points.mass.dtype == jnp.int32:
        mass = jnp.pad(jnp.cumsum(points.mass), (1, 0))
    else:
        mass = prefix_sums(points.mass)
    return Prefix(mass, prefix_sums(masses(points) * points.value))


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


def means(sums: Prefix, edges: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Return the mean of each run between neighbouring edges, of an empty one what is given."""
    mass = between(sums.mass, edges)
    moment = between(sums.moment, edges)
    return jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1.0), otherwise)


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
    """Return the next float below each; of float32 in few operations."""
    if x.dtype != jnp.float32:
        return jnp.nextafter(x, -jnp.inf)
    key = to_key(x)
    below = key - (x > -jnp.inf).astype(jnp.int32)
    return from_key(jnp.where(x == 0, -2, below))  # -1 is the key of -0.0
