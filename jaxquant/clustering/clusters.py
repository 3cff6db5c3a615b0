"""Clusters of the weights themselves: counts, losses, extremes, in one pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.codebooks import assign, reconstruct, rounded
from jaxquant.clustering.passes import fold
from jaxquant.clustering.points import relative_weight

MAX_SETTLES = 3
_SPREAD = 256  # partial sums a cluster: float32 keeps its digits over 1e8 weights


class Clusters(NamedTuple):
    """What one layer's weights look like under a codebook."""

    counts: jax.Array  # [k] int32
    losses: jax.Array  # [k] float32, (weighted) sum of squared distances
    lows: jax.Array  # [k] float32, smallest entry of each whose weight is not 0; +inf where none
    highs: jax.Array  # [k] float32, largest; -inf where none
    norm: jax.Array  # float32 scalar, (weighted) sum of squares of all entries


def weight_scale(sample_weight: jax.Array | None) -> jax.Array:
    """Return the largest sample weight, by which the histogram divides all; else 1."""
    if sample_weight is None:
        return jnp.float32(1.0)
    largest = jnp.max(sample_weight).astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0)


def measure(
    x: jax.Array,
    centroids: jax.Array,
    sample_weight: jax.Array | None = None,
    *,
    scale: jax.Array | float = 1.0,
) -> Clusters:
    """Return counts, losses and extremes of the clusters of `x` under `centroids`; one pass.

    Losses and the norm are in squares of 1 / `scale`, and relative to
    `weight_scale(sample_weight)`.
    """
    k = centroids.shape[0]
    centroids = centroids.astype(jnp.float32)
    weights = () if sample_weight is None else (sample_weight,)
    largest = [jnp.max(weight).astype(jnp.float32) for weight in weights]
    parts = partial_sums(x.size)
    slots = jnp.zeros(k * parts, jnp.float32)
    scaled = centroids * scale
    infinity = jnp.full(k, jnp.inf, jnp.float32)  # which narrow floats lack
    none = Clusters(slots.astype(jnp.int32), slots, infinity, -infinity, jnp.float32(0.0))

    def step(sums: Clusters, piece: jax.Array, *weight: jax.Array) -> Clusters:
        codes = assign(piece, centroids)
        piece = piece.astype(jnp.float32)
        low = high = piece
        loss = jnp.square(piece * scale - reconstruct(codes, scaled))
        square = jnp.square(piece * scale)
        if weight:
            relative = relative_weight(weight[0], largest[0])
            loss = jnp.where(relative > 0, loss * relative, 0.0)
            square = jnp.where(relative > 0, square * relative, piece * 0.0)  # NaN stays NaN
            low = jnp.where(relative > 0, piece, jnp.inf)
            high = jnp.where(relative > 0, piece, -jnp.inf)
        slot = codes.astype(jnp.int32) * parts + spread(piece.shape, parts)
        mode = "promise_in_bounds"
        return Clusters(
            sums.counts.at[slot].add(1, mode=mode),
            sums.losses.at[slot].add(loss, mode=mode),
            sums.lows.at[codes].min(low, mode=mode),
            sums.highs.at[codes].max(high, mode=mode),
            sums.norm + jnp.sum(square),
        )

    sums = fold(step, none, x, *weights)
    return sums._replace(
        counts=jnp.sum(sums.counts.reshape(k, parts), axis=1, dtype=jnp.int32),
        losses=jnp.sum(sums.losses.reshape(k, parts), axis=1),
    )


def partial_sums(size: int) -> int:
    """Return how many partial sums a cluster of so many entries takes, a power of two."""
    return min(_SPREAD, 1 << max(size // _SPREAD, 1).bit_length() - 1)


def spread(shape: tuple[int, ...], parts: int) -> jax.Array:
    """Number the entries round-robin below a power of two, without a ravel."""
    number = jnp.zeros(shape, jnp.int32)
    stride = 1
    for axis in reversed(range(len(shape))):
        number += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * (stride % parts)
        stride *= shape[axis]
    return number % parts


def settle(
    x: jax.Array,
    centroids: jax.Array,
    fixed: jax.Array,
    width: jax.Array,
    sample_weight: jax.Array | None = None,
    *,
    scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, Clusters]:
    """Put the centroid of a cluster of equal weights exactly onto them, and measure the clusters.

    The histogram resolves a position to 2**-24 of the range; this makes a layer that has at most
    k distinct values a fixed point, bit for bit. It is no Lloyd pass: a centroid moves by the
    `width` of a bin at most. Reads `x` once, and once more if a centroid moved, as that may turn a
    tie.
    """

    def step(carry: tuple[jax.Array, Clusters, jax.Array, jax.Array]):
        centroids, _, passes, _ = carry
        clusters = measure(x, centroids, sample_weight, scale=scale)
        moved, any_moved = onto_equals(centroids, clusters.lows, clusters.highs, fixed, width)
        more = any_moved & (passes < MAX_SETTLES)
        return jnp.where(more, moved, centroids), clusters, passes + 1, more

    zeros = jnp.zeros(centroids.shape, jnp.float32)
    nothing = Clusters(zeros.astype(jnp.int32), zeros, zeros, zeros, jnp.float32(0.0))
    start = (centroids, nothing, jnp.int32(0), jnp.bool_(True))
    return loops.while_loop(lambda carry: carry[3], step, start)[:2]


def onto_equals(
    centroids: jax.Array, lows: jax.Array, highs: jax.Array, fixed: jax.Array, width: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put centroids [k] onto the weights of their clusters where these are all equal.

    By the `width` at most, and none that is fixed. Also returns whether any has moved.
    """
    values = rounded(lows, centroids.dtype)
    near = jnp.abs(values.astype(jnp.float32) - centroids.astype(jnp.float32)) <= width
    onto = (lows == highs) & (values != centroids) & near & ~fixed
    return jnp.where(onto, values, centroids), jnp.any(onto)
