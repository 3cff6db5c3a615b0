"""Optimal one-dimensional clusters of points, by dynamic programming over coarse cells."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.points import (
    DoubleFloat,
    Points,
    Prefix,
    between,
    count_up_to,
    masses,
    means,
    placed,
    prefix_sums,
    ranks,
)

_CAPPINGS = 6


class Optimum(NamedTuple):
    """Exact optimum over contiguous cells, in the units of the points, losses in their squares."""

    centroids: jax.Array  # [k] ascending
    loss: jax.Array  # of the cells' means
    moved: jax.Array  # upper bound of the squared distance from the entries to their cells' means


class Cells(NamedTuple):
    """Neighbouring points of an array, merged."""

    edges: jax.Array  # [cells + 1] first points
    mass: jax.Array  # [cells]
    mean: DoubleFloat  # [cells]
    moved: jax.Array  # scalar, squared distance from the entries to these means, at most


def optimum(
    points: Points, sums: Prefix, k: int, *, zero: bool = False, cells: int | None = None
) -> Optimum:
    """Return the best k clusters whose boundaries lie between coarse cells.

    Dynamic program `D[m, s] = min_e cost[s, e] + D[m-1, e]` with m clusters over the cells from s
    on; O(cells**2 k). With `zero`, one cluster costs its squares about zero instead.

    Args:
      points: of an array.
      sums: their `prefix`.
      k: number of clusters.
      zero: whether one centroid is zero.
      cells: number of them, at most; None for max(512, 4 k).
    """
    groups = coarsen(points, sums, _cells(points.value.shape[0], k, cells))
    costs = _interval_costs(groups, zero=zero)
    tables = _fill_tables(costs, k)
    ends, about_zero, loss = _trace_back(costs, tables)
    centroids = centroids_between(points, sums, groups, ends, about_zero, zero=zero)
    return Optimum(centroids, loss, groups.moved)


def centroids_between(
    points: Points,
    sums: Prefix,
    groups: Cells,
    ends: jax.Array,
    about_zero: jax.Array,
    *,
    zero: bool,
) -> jax.Array:
    """Return the centroids [k] of clusters that end at some cells, ascending."""
    inner = groups.edges.at[ends].get(mode="promise_in_bounds")
    edges = jnp.pad(inner, (1, 0))
    centroids = means(sums, edges, jnp.float32(-jnp.inf)).high
    filled = jax.lax.cummax(centroids)  # an empty cluster takes the centroid below
    centroids = jnp.where(jnp.isfinite(filled), filled, points.value[0])
    centroids = jnp.where(about_zero, 0.0, centroids)
    return placed(centroids, ranks(centroids)) if zero else centroids


def _cells(size: int, k: int, cells: int | None) -> int:
    """Return the number of cells for some points."""
    return min(max(512, 4 * k) if cells is None else cells, size)


def coarsen(points: Points, sums: Prefix, cells: int) -> Cells:
    """Merge points into cells, equal in a mix of mass and range.

    Cell density goes with the cube root of the weights' density, which makes the squared distance
    moved least (Panter & Dite, 1951); no gap, however wide, counts for more than a cell. Few
    distinct points get a cell each.
    """
    gap = jnp.diff(points.value, prepend=points.value[:1])
    mass = masses(points)
    effort = _cube_root(mass * jnp.square(gap))
    # The cap falls from one step to the next, so that there are never more shares than this.
    shares = cells - 0.5
    cap = jnp.sum(effort) / max(shares - 1.0, 0.5)
    effort = jnp.concatenate([jnp.maximum(effort[:1], jnp.inf), effort[1:]])  # begins a cell
    cap = loops.fori_loop(
        0, _CAPPINGS, lambda _, cap: jnp.sum(jnp.minimum(effort, cap)) / shares, cap
    )
    distinct = jnp.sum(gap > 0, dtype=jnp.int32) + 1
    few = distinct <= cells
    share = jnp.minimum(effort, cap) / jnp.where(cap > 0, cap, 1.0)
    level = prefix_sums(jnp.where(few, (gap > 0).astype(jnp.float32), share)).high[1:]
    cell = jnp.where(few, level, jnp.ceil(level) - 1.0).astype(jnp.int32)
    cell = jnp.clip(cell, 0, cells - 1)
    inner = count_up_to(cell, jnp.arange(cells - 1, dtype=jnp.int32))
    edges = jnp.pad(inner, (1, 1), constant_values=(0, cell.shape[0]))
    mean = means(sums, edges, points.value.at[jnp.minimum(edges[:-1], cell.shape[0] - 1)].get())
    high, low = (part.at[cell].get(mode="promise_in_bounds") for part in mean)
    distance = (points.value - high) - low
    # An error of a point's value, and the rounding of means, move it to whatever other: with
    # (a + e)**2 <= a**2 (1 + h) + e**2 (1 + 1 / h).
    rounding = jnp.square(points.value * 2.0**-32) * 1025.0
    moved = jnp.sum(mass * (jnp.square(distance) * (1.0 + 2.0**-10) + points.within + rounding))
    return Cells(edges, between(sums.mass, edges).high, mean, moved)


def _cube_root(x: jax.Array) -> jax.Array:
    """Return the cube root to a few percent, of positive numbers, cheaply; 0 of 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    root = jax.lax.bitcast_convert_type(bits // 3 + 709921077, jnp.float32)
    return jnp.where(x > 0, root, 0.0)


def _interval_costs(groups: Cells, *, zero: bool) -> jax.Array:
    """Return the costs [last, 1 or 2, first] of a cluster of cells, about its mean and zero.

    Grows all intervals by one cell at a time (Welford), since differences of prefix sums of
    squares would drown two modes that lie far apart. Means are counted from an interval's first
    cell on: far from zero floats are too coarse for them.
    """
    cells = groups.mass.shape[0]
    starts = jnp.arange(cells, dtype=jnp.int32)

    def grow(carry: tuple[jax.Array, ...], cell: tuple[jax.Array, jax.Array, DoubleFloat]):
        mass, mean, about_mean, about_zero = carry
        index, cell_mass, cell_mean = cell
        distance = (cell_mean.high - groups.mean.high) + (cell_mean.low - groups.mean.low)
        inside, before = starts <= index, starts < index
        total = jnp.where(inside, mass + cell_mass, 0.0)
        delta = distance - mean
        fraction = cell_mass / jnp.where(total > 0, total, 1.0)
        cost = about_mean + mass * fraction * jnp.square(delta)
        about_mean = jnp.where(before, cost, jnp.where(inside, 0.0, jnp.inf))
        mean = jnp.where(before, mean + delta * fraction, 0.0)
        if not zero:
            return (total, mean, about_mean, about_zero), about_mean[None]
        cost = jnp.where(before, about_zero, 0.0) + cell_mass * jnp.square(cell_mean.high)
        about_zero = jnp.where(inside, cost, jnp.inf)
        return (total, mean, about_mean, about_zero), jnp.stack([about_mean, about_zero])

    zeros = jnp.zeros(cells, jnp.float32)
    start = (zeros, zeros, zeros, zeros if zero else jnp.float32(0.0))
    _, rows = loops.scan(grow, start, (starts, groups.mass, groups.mean))
    return rows


def _fill_tables(costs: jax.Array, k: int) -> jax.Array:
    """Return the least costs [k, 1 or 2, cells] of 0 to k - 1 clusters of the cells from each on.

    The second is that with a cluster about zero among them. Of 0 cells it is infinite: no cluster
    is empty, unless all cells are used up.
    """
    cells, layers = costs.shape[:2]
    own = [costs[:, layer] for layer in range(layers)]

    def add(table: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Put a first cluster before those of a table, of which `rest` costs no cells."""
        after = jnp.concatenate([table[:, 1:], rest[:, None]], axis=1)[:, :, None]
        best = [jnp.min(own[0] + then, axis=0) for then in after]
        if layers == 2:
            best[1] = jnp.minimum(best[1], jnp.min(own[1] + after[0], axis=0))
        return jnp.stack(best), table

    none = jnp.full((layers, cells), jnp.inf, jnp.float32)
    return loops.scan(add, none, after_all(layers, k))[1]


def after_all(layers: int, k: int) -> jax.Array:
    """Return the cost [k, 1 or 2] of 0 to k - 1 clusters of no cells."""
    cost = jnp.zeros((k, layers), jnp.float32)
    return cost if layers == 1 else cost.at[0, 1].set(jnp.inf)


def _trace_back(costs: jax.Array, tables: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the end [k] of each cluster of the optimum, in cells, which is about zero, the cost.

    A cluster that starts after the last cell ends there, too.
    """
    cells, layers = costs.shape[:2]
    ends = jnp.arange(cells, dtype=jnp.int32)  # the last cell of a cluster
    after = jnp.concatenate([tables[:, :, 1:], after_all(layers, tables.shape[0])[:, :, None]], 2)

    def first(totals: jax.Array) -> tuple[jax.Array, jax.Array]:
        least = jnp.min(totals)
        return least, jnp.min(jnp.where(totals == least, ends, cells - 1))

    def step(carry: tuple[jax.Array, jax.Array], rest: jax.Array):
        start, layer = carry
        own = costs.at[:, :, jnp.minimum(start, cells - 1)].get(mode="promise_in_bounds")
        least, end = first(own[:, 0] + rest[layer])
        pinned = jnp.bool_(False)
        if layers == 2:
            about_zero, end_pinned = first(own[:, 1] + rest[0])
            pinned = (layer == 1) & (about_zero < least)
            end, least = jnp.where(pinned, end_pinned, end), jnp.where(pinned, about_zero, least)
        done = start == cells  # what zero is left, it is the centroid of no cell
        pinned = jnp.where(done, layer == 1, pinned)
        start = jnp.where(done, cells, end + 1)
        return (start, jnp.where(pinned, 0, layer)), (start, pinned, least)

    start = (jnp.int32(0), jnp.int32(layers - 1))
    _, (found, pinned, least) = loops.scan(step, start, after, reverse=True)
    return found[::-1], pinned[::-1], least[-1]
