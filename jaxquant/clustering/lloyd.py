"""Lloyd's passes over points: each centroid to the mean of what is nearest to it."""

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.points import (
    Points,
    Prefix,
    edges_of,
    from_units,
    means,
    placed,
    prefix,
    ranks,
    to_units,
)

MOST_PASSES = 200


def pin(
    centroids: jax.Array, frozen: jax.Array | None, *, zero: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the centroids with one of them exactly zero if asked, and which must not move."""
    fixed = jnp.zeros(centroids.shape, bool) if frozen is None else jnp.asarray(frozen)
    if zero:
        distance = jnp.where(fixed & (centroids != 0), jnp.inf, jnp.abs(centroids))
        nearest = jnp.arange(centroids.shape[0]) == jnp.argmin(distance)
        nearest &= jnp.isfinite(distance)  # all frozen elsewhere: there they stay
        centroids, fixed = jnp.where(nearest, 0.0, centroids), fixed | nearest
    return centroids, fixed


def lloyd(
    points: Points,
    start: jax.Array,
    fixed: jax.Array,
    iterations: int | None = None,
    sums: Prefix | None = None,
    *,
    most: int = MOST_PASSES,
) -> jax.Array:
    """Return the centroids after Lloyd passes over points; index order is kept.

    An empty cluster keeps its value; a tie goes to the lower centroid.

    Args:
      points: of the weights.
      start: [k] float32 centroids.
      fixed: [k] bool, centroids that must not move.
      iterations: exact number of passes, or None to pass until no point changes its cluster.
      sums: the `prefix` of the points, if it is there.
      most: passes if their number is not given.
    """
    if iterations == 0:
        return start
    sums = prefix(points) if sums is None else sums
    rank = ranks(start)  # Lloyd passes never change the order
    first, still = placed(to_units(points, start), rank), placed(fixed, rank)

    most = most if iterations is None else iterations

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        centroids, edges, passes, _ = carry
        new = edges_of(points, centroids)
        centroids = jnp.where(still, centroids, means(sums, new, centroids).high)
        more = jnp.any(new != edges) if iterations is None else jnp.bool_(True)
        return centroids, new, passes + 1, more & (passes + 1 < most)

    none = jnp.full(first.shape[0] + 1, -1, jnp.int32)
    begin = first, none, jnp.int32(0), jnp.bool_(True)
    centroids, edges, *_ = loops.while_loop(lambda carry: carry[3], step, begin)
    centroids = jnp.where(still, centroids, _inside(points, edges, centroids))
    moved = jnp.where(centroids == first, placed(start, rank), from_units(points, centroids))
    return moved.at[rank].get(mode="promise_in_bounds")


def _inside(points: Points, edges: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return means that rounding has not taken out of their clusters: they stay in order."""
    last = points.value.shape[0] - 1
    low = points.value.at[jnp.minimum(edges[:-1], last)].get(mode="promise_in_bounds")
    high = points.value.at[jnp.maximum(edges[1:] - 1, 0)].get(mode="promise_in_bounds")
    return jnp.where(edges[1:] > edges[:-1], jnp.clip(centroids, low, high), centroids)
