"""The sufficient statistic of one-dimensional clustering: a histogram, gathered in one pass.

Sums are kept as integers, so they do not depend on the order in which weights are added: one
device, eight devices and a GPU's atomic additions give the same bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.clustering.passes import fold

BINS = 65536
_OFFSET_BITS = 8  # float32 resolves a position among 65,536 bins to 2**-8 of a bin


class Histogram(NamedTuple):
    """Weights of one layer on equal bins; positions are in units of bins, counted from `low`."""

    mass: jax.Array  # [bins] int32 counts, or float32 sums of sample weights
    position: jax.Array  # [bins] float32, mean position of a bin's weights; its middle if empty
    low: jax.Array  # float32 scalar, smallest weight
    high: jax.Array  # float32 scalar, largest weight


def bin_width(histogram: Histogram) -> jax.Array:
    """Return the width of a bin, float32; 1 where all weights are equal."""
    bins = histogram.mass.shape[0]
    # Halves and divided before the difference: high - low of finite weights may overflow.
    width = jnp.maximum(histogram.high / bins - histogram.low / bins, jnp.finfo(jnp.float32).tiny)
    return jnp.where(histogram.high > histogram.low, width, 1.0)


def to_position(histogram: Histogram, values: jax.Array) -> jax.Array:
    """Convert weights to positions on the bins."""
    half = values * 0.5 - histogram.low * 0.5
    return half * (2.0 / bin_width(histogram))


def to_value(histogram: Histogram, positions: jax.Array) -> jax.Array:
    """Convert positions on the bins to weights."""
    scale = headroom(jnp.maximum(jnp.abs(histogram.low), jnp.abs(histogram.high)))
    values = histogram.low * scale + positions * (bin_width(histogram) * scale)
    limit = jnp.finfo(jnp.float32).max * scale
    return jnp.clip(values, -limit, limit) / scale


def headroom(largest: jax.Array) -> jax.Array:
    """Return the power of two by which to multiply before adding two such numbers or less.

    No constant: of a sum of halves XLA makes half of a sum, which may overflow.
    """
    limit = jnp.finfo(largest.dtype).max
    return jnp.where(largest > limit / 4, 0.25, 1.0).astype(largest.dtype)


def position_error(histogram: Histogram) -> jax.Array:
    """Return how far from the mean of its weights the position of a bin can be, at most.

    The rounding of sums of sample weights comes on top.
    """
    bins, total = histogram.mass.shape[0], jnp.sum(histogram.mass.astype(jnp.float32))
    # Half a step of the fixed-point offsets of `_count`, and of float32 among so many bins: once
    # for a weight's position, once for the bin's.
    return jnp.maximum(2.0 ** (-_OFFSET_BITS - 1), total * 2.0**-32) + bins * 2.0**-23


def histogram(
    x: jax.Array, sample_weight: jax.Array | None = None, *, bins: int = BINS
) -> Histogram:
    """Gather the histogram of all entries of `x` on equal bins between its extremes.

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
    empty = Histogram(
        jnp.zeros(bins, jnp.int32), jnp.arange(bins, dtype=jnp.float32) + 0.5, low, high
    )
    if sample_weight is None:
        return _count(x, empty)
    return _weigh(x, sample_weight, empty)


def _locate(x: jax.Array, empty: Histogram) -> tuple[jax.Array, jax.Array]:
    """Return the bin of each entry, int32, and its offset into the bin, float32 in [0, 1)."""
    bins = empty.mass.shape[0]
    position = to_position(empty, x.astype(jnp.float32))
    position = jnp.clip(position, 0.0, bins * (1.0 - 2.0**-24))
    index = position.astype(jnp.int32)
    return index, position - index.astype(jnp.float32)


def _count(x: jax.Array, empty: Histogram) -> Histogram:
    bits = min(_OFFSET_BITS, 32 - x.size.bit_length())  # the sums of offsets fit 32 bits

    def step(sums: jax.Array, piece: jax.Array) -> jax.Array:
        index, offset = _locate(piece, empty)
        fixed = jnp.round(offset * 2.0**bits).astype(jnp.uint32)
        update = jnp.stack([jnp.ones_like(fixed), fixed], axis=-1)
        return sums.at[index].add(update, mode="promise_in_bounds")

    sums = fold(step, jnp.zeros((empty.mass.shape[0], 2), jnp.uint32), x)
    count = sums[:, 0].astype(jnp.float32)
    offset = sums[:, 1].astype(jnp.float32) / jnp.maximum(count, 1.0) * 2.0**-bits
    return empty._replace(
        mass=sums[:, 0].astype(jnp.int32), position=_place(empty, count > 0, offset)
    )


def relative_weight(sample_weight: jax.Array, largest: jax.Array) -> jax.Array:
    """Divide weights by the largest, float32; where that is zero every entry counts alike."""
    usable = largest > 0
    share = sample_weight.astype(jnp.float32) / jnp.where(usable, largest, 1.0)
    return jnp.where(usable, share, 1.0)


def _weigh(x: jax.Array, sample_weight: jax.Array, empty: Histogram) -> Histogram:
    largest = jnp.max(sample_weight).astype(jnp.float32)

    def step(sums: jax.Array, piece: jax.Array, weight: jax.Array) -> jax.Array:
        index, offset = _locate(piece, empty)
        weight = relative_weight(weight, largest)
        update = jnp.stack([weight, weight * offset], axis=-1)
        return sums.at[index].add(update, mode="promise_in_bounds")

    sums = fold(step, jnp.zeros((empty.mass.shape[0], 2), jnp.float32), x, sample_weight)
    offset = sums[:, 1] / jnp.where(sums[:, 0] > 0, sums[:, 0], 1.0)
    return empty._replace(mass=sums[:, 0], position=_place(empty, sums[:, 0] > 0, offset))


def _place(empty: Histogram, occupied: jax.Array, offset: jax.Array) -> jax.Array:
    left = jnp.arange(empty.mass.shape[0], dtype=jnp.float32)
    return left + jnp.where(occupied, jnp.clip(offset, 0.0, 1.0), 0.5)
