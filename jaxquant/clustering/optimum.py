"""Optimal one-dimensional clusters of a histogram, by dynamic programming over coarse cells."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.histogram import Histogram, position_error, to_position, to_value


class Optimum(NamedTuple):
    """Exact optimum over contiguous cells, in units of bins; loss and moved are squares of them."""

    centroids: jax.Array  # [k] ascending, as weights
    loss: jax.Array  # of the cells' means
    moved: jax.Array  # upper bound of the squared distance from the entries to their cells' means


class _Cells(NamedTuple):
    mass: jax.Array  # [cells]
    mean: jax.Array  # [cells] positions
    spread: jax.Array  # scalar, squared distance from the entries to these means, at most


def optimum(
    statistic: Histogram, k: int, *, zero: bool = False, cells: int | None = None
) -> Optimum:
    """Return the best k clusters whose boundaries lie between coarse cells.

    Dynamic program `D[m, e] = min_s D[m-1, s] + cost[s, e]` with m clusters over the first e
    cells; O(cells**2 k). With `zero`, one cluster costs its squares about zero instead.
    """
    cells = max(512, 4 * k) if cells is None else cells
    groups = _coarsen(statistic, min(cells, statistic.mass.shape[0]))
    origin = to_position(statistic, jnp.float32(0.0))
    cost, cost_about_zero = _interval_costs(groups, origin)
    costs = jnp.stack([cost, cost_about_zero]) if zero else cost[None]
    tables = _fill_tables(costs, k)
    starts, ends, about_zero = _trace_back(costs, tables)
    positions = _interval_means(groups, starts, ends)
    centroids = jnp.where(about_zero, 0.0, to_value(statistic, positions))
    return Optimum(jnp.sort(centroids), tables[-1, -1, -1], groups.spread)


def _coarsen(statistic: Histogram, cells: int) -> _Cells:
    """Merge bins into cells, equal in a mix of mass and range.

    Cell density goes with the cube root of the weights' density, which makes the squared distance
    moved least (Panter & Dite, 1951). Few occupied bins get a cell each.
    """
    occupied = statistic.mass > 0
    mass = statistic.mass.astype(jnp.float32)
    bins = jnp.arange(mass.shape[0], dtype=jnp.float32)
    rank = jnp.cumsum(occupied) - 1
    last_occupied = jax.lax.cummax(jnp.where(occupied, bins, -1.0))
    stretch = bins - jnp.pad(last_occupied, (1, 0), constant_values=-1.0)[:-1]
    stretch = jnp.where(rank == 0, 1.0, stretch)  # a bin's weights stand for the gap below it too
    effort = jnp.cumsum(jnp.where(occupied, jnp.cbrt(mass * jnp.square(stretch)), 0.0))
    share = effort / jnp.maximum(effort[-1], jnp.finfo(jnp.float32).tiny)
    shared = jnp.clip(jnp.ceil(share * cells) - 1, 0, cells - 1).astype(jnp.int32)
    cell = jnp.where(rank[-1] < cells, jnp.clip(rank, 0, cells - 1), shared)
    sums = functools.partial(jax.ops.segment_sum, segment_ids=cell, num_segments=cells)
    # Relative to the first bin of the cell: sums of positions themselves would lose digits.
    anchor = jax.ops.segment_min(jnp.where(occupied, bins, jnp.inf), cell, num_segments=cells)
    anchor = jnp.where(jnp.isfinite(anchor), anchor, 0.0)
    total = sums(mass)
    divisor = jnp.where(total > 0, total, 1.0)
    offset = jnp.where(occupied, statistic.position - anchor[cell], 0.0)
    mean = sums(mass * offset) / divisor
    # Bhatia-Davis: entries of a unit interval with mean f have a variance of at most f (1 - f). The
    # mean itself is only known to within `error`.
    fraction, error = statistic.position - bins, position_error(statistic)
    single = statistic.mass == 1 if statistic.mass.dtype == jnp.int32 else jnp.zeros_like(occupied)
    within = jnp.where(single, 0.0, fraction * (1.0 - fraction) + error) + jnp.square(error)
    spread = jnp.sum(jnp.where(occupied, mass * (jnp.square(offset - mean[cell]) + within), 0.0))
    return _Cells(total, anchor + mean, spread)


def _interval_costs(groups: _Cells, origin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the costs [start, end] of a cluster of cells start..end-1, about its mean and zero.

    Grows all intervals by one cell at a time (Welford), since differences of prefix sums of
    squares would drown two modes that lie far apart.
    """
    cells = groups.mass.shape[0]
    starts = jnp.arange(cells + 1)

    def grow(carry: tuple[jax.Array, ...], cell: tuple[jax.Array, ...]):
        mass, mean, cost, about_zero = carry
        index, cell_mass, cell_mean = cell
        added = jnp.where(starts <= index, cell_mass, 0.0)
        total = mass + added
        delta = cell_mean - mean
        fraction = added / jnp.where(total > 0, total, 1.0)
        cost = cost + mass * fraction * jnp.square(delta)
        about_zero = about_zero + added * jnp.square(cell_mean - origin)
        carry = (total, mean + delta * fraction, cost, about_zero)
        return carry, (cost, about_zero)

    zeros = jnp.zeros(cells + 1, jnp.float32)
    rows = (jnp.arange(cells), groups.mass, groups.mean)
    _, columns = loops.scan(grow, (zeros,) * 4, rows)
    possible = starts[:, None] <= starts[None, :]

    def finish(column: jax.Array) -> jax.Array:
        full = jnp.concatenate([zeros[None], column]).T
        return jnp.where(possible, full, jnp.inf)

    return finish(columns[0]), finish(columns[1])


def _advance(table: jax.Array, costs: jax.Array) -> jax.Array:
    """Add one cluster: table [used zero, end] from tables of one cluster less."""
    free = jnp.min(table[:, :, None] + costs[:1], axis=1)
    if costs.shape[0] == 1:
        return free
    pinned = jnp.min(table[0][:, None] + costs[1], axis=0)
    return free.at[1].min(pinned)


def _fill_tables(costs: jax.Array, k: int) -> jax.Array:
    """Return tables [k + 1, 1 or 2, cells + 1]: least cost of m clusters, without and with zero."""
    cells = costs.shape[-1]
    start = jnp.full((costs.shape[0], cells), jnp.inf, jnp.float32).at[0, 0].set(0.0)

    def step(table: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        table = _advance(table, costs)
        return table, table

    _, tables = loops.scan(step, start, None, length=k)
    return jnp.concatenate([start[None], tables])


def _trace_back(costs: jax.Array, tables: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return start, end and whether pinned to zero of the k clusters of the optimum."""
    layers, cells = tables.shape[1:]

    def step(carry: tuple[jax.Array, jax.Array], table: jax.Array):
        end, layer = carry
        totals = table[layer] + costs[0, :, end]
        start, pinned = _argmin(totals), jnp.bool_(False)
        if layers == 2:
            about_zero = jnp.where(layer == 1, table[0] + costs[1, :, end], jnp.inf)
            pinned = jnp.min(about_zero) < jnp.min(totals)
            start = jnp.where(pinned, _argmin(about_zero), start)
        return (start, jnp.where(pinned, 0, layer)), (start, end, pinned)

    last = (jnp.int32(cells - 1), jnp.int32(layers - 1))
    _, (starts, ends, pinned) = loops.scan(step, last, tables[:-1], reverse=True)
    return starts, ends, pinned


def _argmin(x: jax.Array) -> jax.Array:
    return jnp.argmin(x).astype(jnp.int32)  # int64 under jax_enable_x64


def _interval_means(groups: _Cells, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """Return the mean position of each interval; an empty one takes that of the one below."""
    cells = jnp.arange(groups.mass.shape[0])
    inside = (cells[None] >= starts[:, None]) & (cells[None] < ends[:, None])
    mass = jnp.where(inside, groups.mass[None], 0.0)
    total = jnp.sum(mass, axis=1)
    anchor = groups.mean[jnp.clip(starts, 0, cells.shape[0] - 1)]
    offset = jnp.sum(mass * (groups.mean[None] - anchor[:, None]), axis=1)
    means = anchor + offset / jnp.where(total > 0, total, 1.0)
    filled = jax.lax.cummax(jnp.where(total > 0, means, -jnp.inf))
    return jnp.where(jnp.isfinite(filled), filled, groups.mean[0])
