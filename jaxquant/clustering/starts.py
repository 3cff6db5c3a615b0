"""A start for one of very many small blocks: the optimum of clusters that are not long."""

import functools

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.optimum import Cells, after_all, centroids_between, coarsen
from jaxquant.clustering.points import Points, Prefix

_LONGEST = 4  # cells of a cluster at most, over their mean


def short_clusters(points: Points, sums: Prefix, k: int, *, zero: bool, cells: int) -> jax.Array:
    """Return centroids [k] from which Lloyd's passes go on: `optimum` of clusters of few cells.

    Cells are about as many for each cluster of the optimum. Here no cluster has more than four
    times their mean, so that this costs O(cells**2) instead of O(cells**2 k).

    Args:
      points: of an array, at least as many as cells.
      sums: their `prefix`.
      k: number of clusters, at most half of the cells.
      zero: whether one centroid is zero.
      cells: number of them.
    """
    groups = coarsen(points, sums, cells)
    costs = _costs(groups, longest_cluster(cells, k), zero=zero)
    used = jnp.max(jnp.where(groups.mass > 0, jnp.arange(1, cells + 1, dtype=jnp.int32), 0))
    rests = _fill_tables(costs, k, used)
    ends, about_zero = _trace_back(costs, rests, used)
    return centroids_between(points, sums, groups, ends, about_zero, zero=zero)


def longest_cluster(cells: int, k: int) -> int:
    """Return how many cells a cluster has at most."""
    return min(cells, _LONGEST * -(-cells // k))


def _costs(groups: Cells, longest: int, *, zero: bool) -> jax.Array:
    """Return the costs [longest, 1 or 2, cells] of clusters of 1, 2, ... cells from each on.

    About their mean and zero, with means from their first cell on, as `optimum` has them; infinite
    where there are not so many cells.
    """

    def grow(carry: tuple[jax.Array, ...], _: None):
        (mass, mean, about_mean, about_zero), (inside, new_mass, new_mean) = carry
        total = mass + new_mass
        distance = (new_mean.high - groups.mean.high) + (new_mean.low - groups.mean.low)
        delta = distance - mean
        fraction = new_mass / jnp.where(total > 0, total, 1.0)
        about_mean = about_mean + mass * fraction * jnp.square(delta)
        about_zero = about_zero + new_mass * jnp.square(new_mean.high)
        own = total, mean + delta * fraction, about_mean, about_zero
        rows = jnp.stack([about_mean, about_zero] if zero else [about_mean])
        rest = jax.tree.map(lambda x: jnp.pad(x[1:], (0, 1)), (inside, new_mass, new_mean))
        return (own, rest), jnp.where(inside, rows, jnp.inf)

    nothing = jnp.zeros(groups.mass.shape, jnp.float32)
    none = (nothing,) * 4
    cells = nothing == 0, groups.mass, groups.mean
    return loops.scan(grow, (none, cells), None, length=longest)[1]


def _fill_tables(costs: jax.Array, k: int, used: jax.Array) -> jax.Array:
    """Return the least costs [k, 1 or 2, cells + longest - 1] of 0 to k - 1 clusters of the rest.

    Of what is left after each cell, infinite beyond the last; see `optimum`. Cells from `used` on
    are empty, and need no cluster.
    """
    longest, layers, cells = costs.shape
    is_over = jnp.arange(cells, dtype=jnp.int32) >= used

    def least(own: jax.Array, then: jax.Array) -> jax.Array:
        totals = [own[i] + then[i : i + cells] for i in range(longest)]
        return functools.reduce(jnp.minimum, totals)

    def after(table: jax.Array, rest: jax.Array) -> jax.Array:
        table = jnp.where(is_over, rest[:, None], table)
        table = jnp.concatenate([table[:, 1:], rest[:, None]], axis=1)
        return jnp.pad(table, ((0, 0), (0, longest - 1)), constant_values=jnp.inf)

    def add(then: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        best = [least(costs[:, 0], own) for own in then]
        if layers == 2:
            best[1] = jnp.minimum(best[1], least(costs[:, 1], then[0]))
        return after(jnp.stack(best), rest), then

    rests = after_all(layers, k + 1)
    none = jnp.full((layers, cells), jnp.inf, jnp.float32)
    return loops.scan(add, after(none, rests[0]), rests[1:])[1]


def _trace_back(costs: jax.Array, rests: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the end [k] of each cluster, in cells, and which is about zero."""
    longest, layers, cells = costs.shape
    index = jnp.arange(longest, dtype=jnp.int32)

    def first(totals: jax.Array) -> tuple[jax.Array, jax.Array]:
        least = jnp.min(totals)
        return least, jnp.min(jnp.where(totals == least, index, longest - 1))

    def step(carry: tuple[jax.Array, jax.Array], rest: jax.Array):
        start, layer = carry
        own = costs.at[:, :, jnp.minimum(start, cells - 1)].get(mode="promise_in_bounds")
        then = rest.at[:, jnp.minimum(start, cells - 1) + index].get(mode="promise_in_bounds")
        least, end = first(own[:, 0] + then[layer])
        pinned = jnp.bool_(False)
        if layers == 2:
            about_zero, end_pinned = first(own[:, 1] + then[0])
            pinned = (layer == 1) & (about_zero < least)
            end = jnp.where(pinned, end_pinned, end)
        done = start >= used  # what zero is left, it is the centroid of no cell
        pinned = jnp.where(done, layer == 1, pinned)
        start = jnp.where(done, cells, jnp.minimum(start + end + 1, cells))
        return (start, jnp.where(pinned, 0, layer)), (start, pinned)

    begin = (jnp.int32(0), jnp.int32(layers - 1))
    _, (ends, pinned) = loops.scan(step, begin, rests, reverse=True)
    return ends[::-1], pinned[::-1]
