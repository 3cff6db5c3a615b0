"""Points of large arrays: bins, gathered in passes over the array, without a sort.

Sums are kept as integers, so they do not depend on the order in which weights are added: one
device, eight devices and a GPU's atomic additions give the same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.clustering.passes import fold
from jaxquant.clustering.points import (
    Points,
    from_key,
    relative_weight,
    scale_of,
    to_key,
)

BINS = 65536
_OFFSET_BITS = 8  # float32 resolves a position among 65,536 bins to 2**-8 of a bin
_KEY_BITS = 16  # the upper half of a key: floats that agree in it are equally spaced


def histogram(x: jax.Array, sample_weight: jax.Array | None = None, *, bins: int = BINS) -> Points:
    """Gather all entries of `x` on equal bins between its extremes.

    Reads `x` twice (extremes, then counts) and never ravels it. Cost O(n + bins), memory O(bins)
    beyond a piece of about a million entries.

    Args:
      x: [...] floating point; at most 2**32 - 1 entries.
      sample_weight: [...] non-negative, like `x`, or None for counts.
      bins: number of bins.
    """
    wide = x.astype(jnp.float32)  # narrow floats may have no infinity
    if sample_weight is None:
        low, high = jnp.min(wide), jnp.max(wide)
    else:  # entries of weight zero must not widen the bins
        counted = (sample_weight > 0) | (jnp.max(sample_weight) <= 0) | ~jnp.isfinite(x)
        low = jnp.min(wide, where=counted, initial=jnp.inf)
        high = jnp.max(wide, where=counted, initial=-jnp.inf)
    scale = scale_of(low, high)
    first, last = low * scale, high * scale
    width = jnp.where(last > first, (last - first) / bins, 1.0)
    per_bin = 1.0 / width

    def locate(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
        position = (x.astype(jnp.float32) * scale - first) * per_bin
        position = jnp.clip(position, 0.0, bins * (1.0 - 2.0**-24))
        index = position.astype(jnp.int32)
        return index, (position - index.astype(jnp.float32)) * 2.0**bits

    mass, offset, error = _gather(x, sample_weight, bins, locate)
    # What a position is rounded to among so many bins: once for an entry's, once for the bin's.
    error = (error + bins * 2.0**-23) * width
    left = first + jnp.arange(bins, dtype=jnp.float32) * width
    within = width * width * offset * (1.0 - offset)
    value = jnp.clip(left + offset * width, first, last)
    return _points(mass, value, within, width, error, low, high, scale)


def refined(
    x: jax.Array, sample_weight: jax.Array | None, coarse: Points, *, bins: int = BINS
) -> Points:
    """Gather all entries again, on bins that are where they are, at any scale.

    Counts floats by the upper half of their bits, which needs no range. Each of these bins is then
    cut into 2**s equal ones, as its mass and range ask for, down to one for each float; a second
    count goes by these. Reads `x` twice.

    Args:
      x: as for `histogram`.
      sample_weight: as for `histogram`.
      coarse: what that has gathered, of which the extremes are used.
      bins: at least 2**16.
    """
    low, high, scale = coarse.low, coarse.high, coarse.scale
    number = 2**_KEY_BITS

    def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = to_key(x)
        return (key >> _KEY_BITS) + number // 2, key & (number - 1)

    upper, _, _ = _gather(x, sample_weight, number, lambda x, _: (halves(x)[0], None))
    which = jnp.arange(number, dtype=jnp.int32)
    ends = from_key((which - number // 2) << _KEY_BITS)
    start = jnp.clip(ends, low, high) * scale
    stop = jnp.clip(from_key(((which - number // 2) << _KEY_BITS) + number - 1), low, high) * scale
    mass = upper.astype(jnp.float32)
    occupied = mass > 0
    effort = jnp.cbrt(mass * jnp.square(stop - start))
    effort = jnp.where(occupied & (effort > 0), effort, 0.0)
    shares = [part / jnp.maximum(jnp.sum(part), 1e-30) for part in (mass, effort)]
    share = (shares[0] + shares[1]) * 0.5 * (bins - jnp.sum(occupied)).astype(jnp.float32)
    cuts = jnp.clip(jnp.frexp(jnp.maximum(share, 1.0))[1] - 1, 0, _KEY_BITS)
    size = jnp.where(occupied, 1 << cuts, 0)
    offset = jnp.cumsum(size) - size
    table = (offset << 5) | cuts

    def locate(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
        bin_, rest = halves(x)
        entry = table.at[bin_].get(mode="promise_in_bounds")
        shift = _KEY_BITS - (entry & 31)
        inside = (rest & ((1 << shift) - 1)) << bits >> shift
        return (entry >> 5) + (rest >> shift), inside.astype(jnp.float32)

    mass, offset_inside, _ = _gather(x, sample_weight, bins, locate)
    owner = jnp.zeros(bins, jnp.int32).at[jnp.where(occupied, offset, bins)].set(which, mode="drop")
    owner = jax.lax.cummax(owner)
    shift = _KEY_BITS - cuts[owner]
    key = ((owner - number // 2) << _KEY_BITS) + (
        (jnp.arange(bins, dtype=jnp.int32) - offset[owner]) << shift
    )
    floats = 1 << shift  # in a bin
    left = from_key(key)
    spacing = (from_key(key | 1) - left) * scale
    # Offsets are rounded down to a part of the bin, if that is more than one float.
    part = jnp.maximum(floats.astype(jnp.float32) * 2.0 ** -_bits(x), 1.0)
    inside = offset_inside * floats.astype(jnp.float32) + (part - 1.0) * 0.5
    width = (floats - 1).astype(jnp.float32) * spacing
    value = left * scale + inside * spacing
    error = (part - 1.0) * spacing * 0.5
    error += jnp.where((floats > 1) & (mass != 1), jnp.abs(value) * 2.0**-24, 0.0)
    within = jnp.maximum(inside * spacing, 0.0) * jnp.maximum(width - inside * spacing, 0.0)
    return _points(mass, value, within, width, error, low, high, scale)


def _bits(x: jax.Array) -> int:
    return min(_OFFSET_BITS, 32 - x.size.bit_length())  # the sums of offsets fit 32 bits


def _gather(
    x: jax.Array,
    sample_weight: jax.Array | None,
    bins: int,
    locate: Callable[[jax.Array, int], tuple[jax.Array, jax.Array | None]],
) -> tuple[jax.Array, jax.Array, float]:
    """Return the mass of each bin, its entries' mean offset, in bins, and how wrong that may be.

    Args:
      x: entries.
      sample_weight: like `x`, or None.
      bins: number of bins.
      locate: function of entries and a number of bits: their bins, and offsets into the bins in
        units of 2**-bits of a bin; or None.
    """
    bits, mode = _bits(x), "promise_in_bounds"
    error = 2.0 ** (-bits - 1)
    wanted = jax.eval_shape(lambda x: locate(x, bits)[1], x)
    columns = 1 if wanted is None else 2
    if sample_weight is None:

        def count(sums: jax.Array, piece: jax.Array) -> jax.Array:
            index, offset = locate(piece, bits)
            one = jnp.ones(piece.shape, jnp.uint32)
            parts = [one] if offset is None else [one, jnp.round(offset).astype(jnp.uint32)]
            return sums.at[index].add(jnp.stack(parts, axis=-1), mode=mode)

        sums = fold(count, jnp.zeros((bins, columns), jnp.uint32), x)
        mass = sums[:, 0].astype(jnp.int32)
    else:
        largest = jnp.max(sample_weight).astype(jnp.float32)

        def weigh(sums: jax.Array, piece: jax.Array, weight: jax.Array) -> jax.Array:
            index, offset = locate(piece, bits)
            weight = relative_weight(weight, largest)
            parts = [weight] if offset is None else [weight, weight * offset]
            return sums.at[index].add(jnp.stack(parts, axis=-1), mode=mode)

        sums = fold(weigh, jnp.zeros((bins, columns), jnp.float32), x, sample_weight)
        mass = sums[:, 0]
    if wanted is None:
        return mass, jnp.zeros(bins, jnp.float32), error
    total = sums[:, 0].astype(jnp.float32)
    offset = sums[:, 1].astype(jnp.float32) / jnp.where(total > 0, total, 1.0) * 2.0**-bits
    return mass, jnp.clip(offset, 0.0, 1.0), error


def _points(
    mass: jax.Array,
    value: jax.Array,
    within: jax.Array,
    width: jax.Array,
    error: jax.Array,
    low: jax.Array,
    high: jax.Array,
    scale: jax.Array,
) -> Points:
    """Return bins as points: those without mass repeat the one before."""
    occupied = mass > 0
    filled = jax.lax.cummax(jnp.where(occupied, value, -jnp.inf))
    filled = jnp.maximum(filled, low * scale)
    # An error of the mean moves it, to whatever point: (a + e)**2 <= a**2 (1 + h) + e**2 (1 + 1/h).
    within = within + error * width + jnp.square(error) * 1025.0
    single = mass == 1 if mass.dtype == jnp.int32 else jnp.zeros_like(occupied)
    within = jnp.where(single, jnp.square(error) * 1025.0, within)
    within = jnp.where(occupied & (high > low), within, 0.0)
    return Points(filled, mass, within, low, high, scale)
