"""Points of large arrays: bins, gathered in passes over the array, without a sort.

Sums are kept as integers, so they do not depend on the order in which weights are added: one
device, eight devices and a GPU's atomic additions give the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

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
_CHUNK = 1 << 18  # entries of a piece where they are cut: the program keeps several tables of them
_CUTS = 2  # of bins into smaller ones, one after the other
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

    Counts floats by the upper half of their bits, which needs no range. These bins are cut as their
    mass and range ask for, down to one for each float, and counted; then once more, since what was
    cut first may hold its entries in a small part. Reads `x` three times.

    Args:
      x: as for `histogram`.
      sample_weight: as for `histogram`.
      coarse: what that has gathered, of which the extremes are used.
      bins: at least 2**16.
    """
    low, high, scale = coarse.low, coarse.high, coarse.scale
    number = 2**_KEY_BITS
    runs = _Runs(
        (jnp.arange(number, dtype=jnp.int32) - number // 2) << _KEY_BITS,
        jnp.full(number, _KEY_BITS, jnp.int32),
    )
    tables: list[jax.Array] = []

    def find(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | int]:
        """Return the bins of entries, and their keys from the first of a bin on, of 2**shift."""
        key = to_key(x)
        index, shift = (key >> _KEY_BITS) + number // 2, _KEY_BITS
        for table in tables:
            entry = table.at[index].get(mode="promise_in_bounds")
            rest, shift = key & ((1 << shift) - 1), entry & 31
            index = (entry >> 5) + (rest >> shift)
        return index, key & ((1 << shift) - 1), shift

    def locate(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
        index, rest, shift = find(x)
        return index, (rest << bits >> shift).astype(jnp.float32)

    for _ in range(_CUTS):
        size = runs.key.shape[0]
        mass, _, _ = _gather(x, sample_weight, size, lambda x, _: (find(x)[0], None), _CHUNK)
        runs, table = _cut(runs, mass, coarse, bins)
        tables.append(table)
    mass, offset_inside, _ = _gather(x, sample_weight, bins, locate, _CHUNK)
    floats = 1 << runs.shift  # in a bin
    left = from_key(runs.key)
    spacing = (from_key(runs.key | 1) - left) * scale
    # Offsets are rounded down to a part of the bin, if that is more than one float.
    part = jnp.maximum(floats.astype(jnp.float32) * 2.0 ** -_bits(x), 1.0)
    inside = offset_inside * floats.astype(jnp.float32) + (part - 1.0) * 0.5
    width = (floats - 1).astype(jnp.float32) * spacing
    value = left * scale + inside * spacing
    error = (part - 1.0) * spacing * 0.5
    error += jnp.where((floats > 1) & (mass != 1), jnp.abs(value) * 2.0**-24, 0.0)
    within = jnp.maximum(inside * spacing, 0.0) * jnp.maximum(width - inside * spacing, 0.0)
    return _points(mass, value, within, width, error, low, high, scale)


class _Runs(NamedTuple):
    """Bins of neighbouring floats."""

    key: jax.Array  # [bins] int32 of the first float of each
    shift: jax.Array  # [bins] int32: there are 2**shift of them


def _cut(runs: _Runs, mass: jax.Array, coarse: Points, bins: int) -> tuple[_Runs, jax.Array]:
    """Cut each bin into a power of two of them, as its mass and range ask for; empty ones go.

    Returns the new bins, and for each old one the first of its new ones, times 32, and their shift.
    """
    stop = runs.key + ((1 << runs.shift) - 1)
    first, last = (
        jnp.clip(from_key(key), coarse.low, coarse.high) * coarse.scale for key in (runs.key, stop)
    )
    occupied, mass = mass > 0, mass.astype(jnp.float32)
    effort = jnp.cbrt(mass * jnp.square(last - first))
    effort = jnp.where(occupied & (effort > 0), effort, 0.0)
    shares = [part / jnp.maximum(jnp.sum(part), 1e-30) for part in (mass, effort)]
    share = (shares[0] + shares[1]) * 0.5 * (bins - jnp.sum(occupied)).astype(jnp.float32)
    cuts = jnp.clip(jnp.frexp(jnp.maximum(share, 1.0))[1] - 1, 0, runs.shift)
    size = jnp.where(occupied, 1 << cuts, 0)
    offset = jnp.cumsum(size) - size
    shift = runs.shift - cuts
    which = jnp.arange(mass.shape[0], dtype=jnp.int32)
    owner = jnp.zeros(bins, jnp.int32).at[jnp.where(occupied, offset, bins)].set(which, mode="drop")
    owner = jax.lax.cummax(owner)
    place = jnp.arange(bins, dtype=jnp.int32) - offset[owner]
    key = runs.key[owner] + (place << shift[owner])
    return _Runs(key, shift[owner]), (offset << 5) | shift


def _bits(x: jax.Array) -> int:
    return min(_OFFSET_BITS, 32 - x.size.bit_length())  # the sums of offsets fit 32 bits


def _gather(
    x: jax.Array,
    sample_weight: jax.Array | None,
    bins: int,
    locate: Callable[[jax.Array, int], tuple[jax.Array, jax.Array | None]],
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array, float]:
    """Return the mass of each bin, its entries' mean offset, in bins, and how wrong that may be.

    Args:
      x: entries.
      sample_weight: like `x`, or None.
      bins: number of bins.
      locate: function of entries and a number of bits: their bins, and offsets into the bins in
        units of 2**-bits of a bin; or None.
      chunk: entries of a piece, see `fold`.
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

        sums = fold(count, jnp.zeros((bins, columns), jnp.uint32), x, chunk=chunk)
        mass = sums[:, 0].astype(jnp.int32)
    else:
        largest = jnp.max(sample_weight).astype(jnp.float32)

        def weigh(sums: jax.Array, piece: jax.Array, weight: jax.Array) -> jax.Array:
            index, offset = locate(piece, bits)
            weight = relative_weight(weight, largest)
            parts = [weight] if offset is None else [weight, weight * offset]
            return sums.at[index].add(jnp.stack(parts, axis=-1), mode=mode)

        zeros = jnp.zeros((bins, columns), jnp.float32)
        sums = fold(weigh, zeros, x, sample_weight, chunk=chunk)
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
