"""Cluster one block: of small ones the sorted entries, of large ones bins, in one way.

What a round asks of clustering is `cluster_block`: the codebook of one block, and what its clusters
are under it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering import codebooks, native
from jaxquant.clustering.clusters import (
    MAX_SETTLES,
    Clusters,
    onto_equals,
    settle,
    weight_scale,
)
from jaxquant.clustering.codebooks import rounded, to_powers_of_two
from jaxquant.clustering.histogram import BINS, histogram, refined
from jaxquant.clustering.lloyd import MOST_PASSES, lloyd, pin
from jaxquant.clustering.optimum import Optimum, optimum
from jaxquant.clustering.options import IN_INDEX_ORDER, Clustering
from jaxquant.clustering.points import (
    MOST_COMPARES,
    Points,
    Prefix,
    count_up_to,
    edges_of,
    last_below_middles,
    masses,
    placed,
    prefix,
    prefix_sums,
    ranks,
    resolution,
    sorted_points,
    to_units,
)
from jaxquant.clustering.starts import short_clusters

_SMALL = 65535  # entries
_CELLS = 64, 96  # of small blocks at most, for a start from which Lloyd's passes go on
_UNRESOLVED = 2.0**-10  # of the loss, within bins, is too much
_PASSES = 16  # in a round on small blocks, at least: few weights are soon where they stay


class Solved(NamedTuple):
    """One block under its new codebook; squares are in units of the points."""

    centroids: jax.Array  # [k] of the dtype asked for
    clusters: Clusters
    best: jax.Array  # float32 scalar, exact optimum of entries that are moved to their cells' means
    moved: jax.Array  # float32 scalar, the squared distance moved, at most
    scale: jax.Array  # float32 scalar: one unit is 1 / scale
    weight: jax.Array  # float32 scalar that sample weights are divided by
    finite: jax.Array  # bool scalar, whether the entries and sample weights can be clustered

    def in_squares(self, x: jax.Array) -> jax.Array:
        """Return losses in squares of the block's own units; beyond float32 they are inf."""
        unit = 1.0 / self.scale
        return x * self.weight * unit * unit


class ClusteredBlock(NamedTuple):
    """One block under its new codebook."""

    centroids: jax.Array  # [k] of the codebook's dtype
    counts: jax.Array  # [k] int32, weights nearest to each
    losses: jax.Array  # [k] float32, (weighted) sum of squared distances; may overflow to inf
    norm: jax.Array  # float32 scalar, (weighted) sum of squares of the weights
    finite: jax.Array  # bool scalar, whether the weights and sample weights can be clustered


def no_clusters(numbers: tuple[int, ...], k: int, dtype: jax.typing.DTypeLike) -> ClusteredBlock:
    """Return zeros in the place of what is found of blocks, [*numbers, ...]."""
    return ClusteredBlock(
        centroids=jnp.zeros((*numbers, k), dtype),
        counts=jnp.zeros((*numbers, k), jnp.int32),
        losses=jnp.zeros((*numbers, k), jnp.float32),
        norm=jnp.zeros(numbers, jnp.float32),
        finite=jnp.zeros(numbers, bool),
    )


def is_small(size: int) -> bool:
    """Return whether blocks of `size` weights are solved raveled, many at a time.

    Call `cluster_block` on many of them by `blocks.by_batch`. Larger ones are read in pieces as
    they lie in memory: call it on one after the other.
    """
    return size <= _SMALL


def cluster_block(
    x: jax.Array,
    sample_weight: jax.Array | None,
    codebook: jax.Array,
    frozen: jax.Array,
    *,
    clustering: Clustering,
    dtype: jax.typing.DTypeLike,
    quick: bool = False,
) -> ClusteredBlock:
    """Cluster one block, from its codebook if a centroid of it is frozen, else anew.

    The centroids are rounded to `dtype`, and the clusters are those of the rounded ones.

    Args:
      x: [...] floating point, one block; [n] if it is small.
      sample_weight: non-negative, like `x`, or None.
      codebook: [k] the block's centroids of the last round.
      frozen: [k] bool, centroids that keep their value to the last bit.
      clustering: options, static.
      dtype: of the new codebook.
      quick: whether a small block takes few cells, if their number is not given, and few passes:
        one of very many.
    """
    k = codebook.shape[0]
    options = {"clustering": clustering, "dtype": dtype}

    def by_xla(*arrays: Any) -> ClusteredBlock:
        x, sample_weight, codebook, frozen = arrays
        solved = solve(x, sample_weight, k, codebook, frozen, **options, quick=quick)
        return ClusteredBlock(
            solved.centroids,
            solved.clusters.counts,
            solved.in_squares(solved.clusters.losses),
            solved.in_squares(solved.clusters.norm),
            solved.finite,
        )

    arrays = x, sample_weight, codebook, frozen
    if not (quick and is_small(x.size) and native.supports(x, k, clustering)):
        return by_xla(*arrays)
    return ClusteredBlock(*native.cluster(by_xla, *arrays, **options))


def solve(
    x: jax.Array,
    sample_weight: jax.Array | None,
    k: int,
    start: jax.Array | None,
    frozen: jax.Array | None,
    *,
    clustering: Clustering,
    dtype: jax.typing.DTypeLike | None = None,
    certify: bool = False,
    quick: bool = False,
) -> Solved:
    """Cluster one block.

    Args:
      x: [...] floating point.
      sample_weight: non-negative, like `x`, or None.
      k: number of centroids.
      start: [k] where they start, or None for the named start.
      frozen: [k] bool, centroids that keep their value, or None.
      clustering: options.
      dtype: of the codebook, in a round: then the named start is taken where nothing is frozen, and
        the order of the centroids is left. None to cluster as `kmeans` does.
      certify: whether the optimum is computed though it is not the start.
      quick: see `cluster_block`.
    """

    def find(points: Points) -> tuple[jax.Array, jax.Array, Optimum]:
        few = quick and is_small(x.size)
        return _find(points, k, start, frozen, clustering, dtype is None, certify, few)

    entries = None
    if is_small(x.size):
        points, entries = sorted_points(x, sample_weight)
        centroids, fixed, best = find(points)
    else:
        points, centroids, fixed, best = _find_in_bins(x, sample_weight, k, find, clustering.bins)
    usable = is_usable(points, sample_weight)
    if clustering.powers_of_two:
        moved = to_powers_of_two(centroids)
        centroids = moved if frozen is None else jnp.where(frozen, centroids, moved)
    if clustering.powers_of_two or clustering.iterations == 0:
        fixed = jnp.ones_like(fixed)
    if dtype is not None:
        centroids = rounded(centroids, dtype)
        if frozen is not None and start is not None:
            centroids = jnp.where(frozen, start.astype(dtype), centroids)
    width = resolution(points)
    if is_small(x.size):
        centroids, clusters = _settle_sorted(points, entries, centroids, fixed, width, quick)
    else:
        centroids, clusters = settle(x, centroids, fixed, width, sample_weight, scale=points.scale)
    weight = weight_scale(sample_weight)
    usable &= jnp.isfinite(clusters.norm)  # XLA's extremes on CPU pass over NaN in long arrays
    return Solved(centroids, clusters, best.loss, best.moved, points.scale, weight, usable)


def _find(
    points: Points,
    k: int,
    start: jax.Array | None,
    frozen: jax.Array | None,
    clustering: Clustering,
    ordered: bool,
    certify: bool,
    quick: bool,
) -> tuple[jax.Array, jax.Array, Optimum]:
    """Return centroids as float32, which of them are fixed, and the optimum, if it is asked for."""
    sums = prefix(points)

    size = points.value.shape[0]
    few = max(2 * k, min(_CELLS[size >= 2048], size // 4))
    short = quick and clustering.cells is None and not certify and few <= size

    def best(points: Points, sums: Prefix) -> Optimum:
        return optimum(points, sums, k, zero=clustering.zero, cells=clustering.cells)

    unknown = jnp.float32(jnp.inf)
    solution = Optimum(jnp.zeros(k, jnp.float32), unknown, unknown)
    if certify:
        solution = best(points, sums)

    def named(points: Points, sums: Prefix) -> jax.Array:
        if clustering.init == "optimal" and short:
            found = short_clusters(points, sums, k, zero=clustering.zero, cells=few)
            return found * (1.0 / points.scale)
        if clustering.init == "optimal":
            found = solution if certify else best(points, sums)
            return found.centroids * (1.0 / points.scale)
        return named_start(points, k, clustering.init)

    if start is None:
        begin = named(points, sums)
    elif ordered:
        begin = start.astype(jnp.float32)
    else:
        anew = jnp.bool_(True) if frozen is None else ~jnp.any(frozen)
        begin = loops.if_needed(anew, named, start.astype(jnp.float32), points, sums)
    begin, fixed = pin(begin, frozen, zero=clustering.zero)
    most = max(_PASSES, size // 32) if quick else MOST_PASSES
    centroids = lloyd(points, begin, fixed, clustering.iterations, sums, most=most)
    if ordered and start is None and clustering.init not in IN_INDEX_ORDER:
        rank = ranks(centroids)
        centroids, fixed = placed(centroids, rank), placed(fixed, rank)
    return centroids, fixed, solution


def named_start(points: Points, k: int, name: str) -> jax.Array:
    """Return the [k] starting centroids that `name` stands for, one of `STARTS` but "optimal"."""
    start = {
        "quantile": codebooks.start_quantile,
        "linear": codebooks.start_linear,
        "power_of_two": codebooks.start_power_of_two,
        "inq": codebooks.start_inq,
        "ternary": codebooks.start_ternary,
    }[name]
    return start(points, k)


def is_usable(points: Points, sample_weight: jax.Array | None) -> jax.Array:
    """Return whether all entries are finite, and their weights, if any, finite and not negative."""
    finite = jnp.isfinite(points.low) & jnp.isfinite(points.high)
    if sample_weight is None:
        return finite
    return finite & jnp.isfinite(jnp.max(sample_weight)) & (jnp.min(sample_weight) >= 0)


# Large blocks ------------------------------------------------------------------------------------


def _find_in_bins(
    x: jax.Array, sample_weight: jax.Array | None, k: int, find: Any, bins: int
) -> tuple[Points, jax.Array, jax.Array, Optimum]:
    """Cluster on equal bins, and where these blur the entries once more on bins that do not."""
    if bins < BINS:
        points = histogram(x, sample_weight, bins=bins)
        return points, *find(points)

    def attempt(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        points, again = carry[0], carry[-1] > 0
        gather = functools.partial(refined, bins=bins)
        points = loops.if_needed(again, gather, points, x, sample_weight, points)
        found = find(points)
        more = ~again & _is_blurred(points, found[0])
        return points, *found, jnp.where(more, 1, -1).astype(jnp.int32)

    points = histogram(x, sample_weight, bins=bins)
    zeros, unknown = jnp.zeros(k, jnp.float32), jnp.float32(jnp.inf)
    nothing = zeros, zeros > 0, Optimum(zeros, unknown, unknown)
    carry = (points, *nothing, jnp.int32(0))
    *result, _ = loops.while_loop(lambda carry: carry[-1] >= 0, attempt, carry)
    return tuple(result)


def _is_blurred(points: Points, centroids: jax.Array) -> jax.Array:
    """Return whether what the bins hide is not small against the loss."""
    mass = masses(points)
    ascending = placed(to_units(points, centroids), ranks(centroids))
    edges = edges_of(points, ascending)
    begins = jnp.zeros(mass.shape, jnp.int32).at[edges[1:-1]].add(1, mode="drop")
    distance = points.value - ascending.at[jnp.cumsum(begins)].get(mode="promise_in_bounds")
    loss = jnp.sum(mass * jnp.square(distance))
    return jnp.sum(mass * points.within) > _UNRESOLVED * loss


# Small blocks ------------------------------------------------------------------------------------


def _settle_sorted(
    points: Points,
    entries: jax.Array | None,
    centroids: jax.Array,
    fixed: jax.Array,
    width: jax.Array,
    quick: bool,
) -> tuple[jax.Array, Clusters]:
    """Do what `clusters.settle` does, on sorted entries."""

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        centroids, _, passes, _ = carry
        runs = _runs(points.value, to_units(points, centroids))
        extremes = _extremes(points, runs.edges)
        moved, any_moved = onto_equals(centroids, *extremes, fixed, width)
        more = any_moved & (passes + 1 < MAX_SETTLES)
        return jnp.where(more, moved, centroids), (runs, extremes), passes + 1, more

    zeros = jnp.zeros(centroids.shape, jnp.float32)
    nowhere = zeros.astype(jnp.int32), zeros.astype(jnp.int32)
    nothing = _Runs(zeros, zeros[1:], nowhere), (zeros, zeros)
    carry = centroids, nothing, jnp.int32(0), jnp.bool_(True)
    centroids, (runs, extremes), *_ = loops.while_loop(lambda carry: carry[3], step, carry)
    nearest = codebooks.pick(points.value, runs.last, runs.ascending, side_by_side=quick)
    mass = masses(points)
    sums = prefix_sums(mass * jnp.square(points.value - nearest))
    begin, end = runs.edges
    high, low = (part.at[end].get() - part.at[begin].get() for part in sums)
    if entries is not None:
        begin, end = _runs(entries, to_units(points, centroids)).edges
    norm = jnp.sum(mass * jnp.square(points.value))
    return centroids, Clusters(end - begin, high + low, extremes[0], extremes[1], norm)


class _Runs(NamedTuple):
    ascending: jax.Array  # [k] centroids
    last: jax.Array  # [k - 1] values of all but the last of them
    edges: tuple[jax.Array, jax.Array]  # [k] from where to where each centroid's values go


def _runs(values: jax.Array, centroids: jax.Array) -> _Runs:
    """Return which of some ascending values are nearest to each centroid.

    As `assign` has it: of equal centroids the lowest index gets all.
    """
    rank = ranks(centroids)
    ascending = placed(centroids, rank)
    last = last_below_middles(ascending)
    edges = jnp.pad(count_up_to(values, last), (1, 1), constant_values=(0, values.shape[0]))
    method = "compare_all" if rank.shape[0] <= MOST_COMPARES else "scan"
    first = jnp.searchsorted(ascending, ascending, method=method)
    stop = jnp.searchsorted(ascending, ascending, side="right", method=method)
    end = edges.at[stop].get()
    begin = jnp.where(first == jnp.arange(rank.shape[0]), edges[:-1], end)
    return _Runs(ascending, last, (begin.at[rank].get(), end.at[rank].get()))


def _extremes(points: Points, runs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and largest entry of each run, as they are; inf and -inf of none."""
    begin, end = runs
    unit, size = 1.0 / points.scale, points.value.shape[0]
    low = points.value.at[jnp.minimum(begin, size - 1)].get() * unit
    high = points.value.at[jnp.maximum(end - 1, 0)].get() * unit
    some = end > begin
    return jnp.where(some, low, jnp.inf), jnp.where(some, high, -jnp.inf)
