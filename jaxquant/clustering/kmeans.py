"""One-dimensional k-means on a histogram: optimal start, Lloyd passes, certificate."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import checks, loops
from jaxquant.clustering import codebooks
from jaxquant.clustering.clusters import settle, weight_scale
from jaxquant.clustering.histogram import (
    BINS,
    Histogram,
    bin_width,
    histogram,
    to_position,
    to_value,
)
from jaxquant.clustering.optimum import Optimum, optimum
from jaxquant.meshes import compiled

STARTS = ("optimal", "quantile", "linear", "power_of_two", "inq", "ternary")
_IN_INDEX_ORDER = ("power_of_two", "inq")
_MAX_PASSES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """How weights are clustered: the options of `kmeans` and of plans, under the same names.

    Raises:
      ValueError: for options that do not fit.

    >>> Clustering(zero=True, iterations=10).iterations
    10
    """

    init: str = "optimal"
    """Where the centroids start, if none is given or frozen; one of `STARTS`, see `kmeans`."""
    iterations: int | None = None
    """Exactly this many Lloyd passes, 0 to keep the start; None for as many as needed."""
    zero: bool = False
    """Whether one centroid is exactly zero: the one that starts nearest to it."""
    powers_of_two: bool = False
    """Whether each centroid is moved to the nearest of 0 and +-2**n in the end."""
    bins: int = BINS
    """Bins of the histogram of a large array."""
    cells: int | None = None
    """Cells of the dynamic program of the optimal start; None for as many as the array needs."""

    def __post_init__(self) -> None:
        """Check the options, and make them Python's."""
        check_start(self.init)
        cells = None if self.cells is None else checks.integer("cells", self.cells, least=1)
        checked = {
            "iterations": check_iterations(self.iterations),
            "zero": bool(self.zero),
            "powers_of_two": bool(self.powers_of_two),
            "bins": checks.integer("bins", self.bins, least=1),
            "cells": cells,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check(self, k: int) -> None:
        """Raise a ValueError if `k` centroids cannot be clustered so."""
        check_start(self.init, k)
        checks.integer("bins", self.bins, least=k)
        if self.cells is not None:
            checks.integer("cells", self.cells, least=k)


class KMeansResult(NamedTuple):
    """Clusters of one array, and how far from optimal they can be at most."""

    centroids: jax.Array  # [k] float32, ascending unless the start fixed an index order
    counts: jax.Array  # [k] int32, weights nearest to each centroid
    loss: jax.Array  # float32 scalar, (weighted) sum of squared distances to the nearest centroid
    gap: jax.Array  # float32 scalar, loss / (lower bound of the optimum) - 1; inf if unknown


def kmeans(
    x: jax.Array,
    k: int,
    *,
    init: jax.Array | str | None = None,
    frozen: jax.Array | None = None,
    sample_weight: jax.Array | None = None,
    zero: bool = False,
    iterations: int | None = None,
    bins: int = BINS,
    cells: int | None = None,
) -> KMeansResult:
    """Cluster the entries of `x` into `k` clusters of least squared error.

    Minimizes `sum_i w_i (x_i - c[assign(x_i, c)])**2` on a histogram of `x`: boundaries by dynamic
    programming over coarse cells, then Lloyd passes by prefix sums until no bin changes its
    cluster. An empty cluster keeps its value; a tie goes to the lower centroid. Clusters whose
    weights are all equal get exactly that value; values that share a bin are not told apart. Runs
    under jit, vmap and scan; `x` is never raveled or sorted. Cost O(n k) compares and
    O(n + bins + cells**2 k) else; memory O(bins + cells**2) beyond `x`, and a copy of a long `x`
    that does not divide into pieces, or whose longest axis is its last (on CPU; up to 1.8 copies).

    The certificate: with every entry moved to the mean of its cell, W the squared distance moved
    and O the exact optimum of the moved entries (the dynamic program), no k centroids have a loss
    below `(sqrt(O) - sqrt(W))**2`. More cells make it tighter.

    Source: Xu et al., AAAI 2018 (clustering step); Wang & Song, R Journal 2011 (dynamic program).

    Args:
      x: [...] float32, bfloat16, float16 (float64 is clustered in float32); finite, not empty.
      k: number of clusters, at most `x.size`.
      init: [k] centroids to start from, kept in their index order, or one of "optimal" (default),
        "quantile", "linear", "power_of_two" and "inq" (index order 0, m, -m, m/2, ...; odd k; they
        differ in m, see `codebooks`) and "ternary" (the optimal -a, 0, a; k = 3). With
        `iterations=0` the start is the codebook.
      frozen: [k] bool, centroids that do not move; needs an array as `init`.
      sample_weight: non-negative, like `x`; all zero counts as all equal.
      zero: whether one centroid is exactly zero: the one that starts nearest to it.
      iterations: exactly this many Lloyd passes; None for as many as needed, at most 200.
      bins: bins of the histogram.
      cells: cells of the dynamic program; None for max(512, 4 k).

    Returns:
      KMeansResult. Centroids are float32 whatever the dtype of `x`.

    Raises:
      ValueError: for arguments that do not fit, and for NaN or infinite entries, or negative
        sample weights, outside of jit (inside, they make the result NaN).

    >>> result = kmeans(jnp.array([1.0, 1.0, 2.0, 8.0, 8.0, 9.0]), 2)
    >>> result.counts
    Array([3, 3], dtype=int32)
    """
    x = jnp.asarray(x)
    sample_weight = None if sample_weight is None else jnp.asarray(sample_weight)
    frozen = None if frozen is None else jnp.asarray(frozen)
    k = checks.integer("k", k, least=1)
    _check_entries(x, k, sample_weight)
    named = "optimal" if init is None else init if isinstance(init, str) else None
    if named:
        check_start(named, k)
    _check_centroids(k, init, frozen)
    return compiled(
        _cluster,
        *(x, None if named else jnp.asarray(init), frozen, sample_weight),
        k=k,
        named=named,
        zero=bool(zero),
        iterations=check_iterations(iterations),
        bins=checks.integer("bins", bins, least=k),
        cells=None if cells is None else checks.integer("cells", cells, least=k),
    )


def _cluster(
    x: jax.Array,
    start: jax.Array | None,
    frozen: jax.Array | None,
    sample_weight: jax.Array | None,
    *,
    k: int,
    named: str | None,
    zero: bool,
    iterations: int | None,
    bins: int,
    cells: int | None,
) -> KMeansResult:
    """Cluster from the centroids in `start`, or from those that are `named`."""
    statistic = histogram(x, sample_weight, bins=bins)
    solution = optimum(statistic, k, zero=zero, cells=cells)
    if start is not None:
        start = start.astype(jnp.float32)
    elif named == "optimal":
        start = solution.centroids
    else:
        start = named_start(statistic, k, str(named))
    start, fixed = pin(start, frozen, zero=zero)
    centroids = lloyd(statistic, start, fixed, iterations)
    if named is not None and named not in _IN_INDEX_ORDER:
        order = jnp.argsort(centroids)
        centroids, fixed = centroids[order], fixed[order]
    if iterations == 0:
        fixed = jnp.ones_like(fixed)
    width = bin_width(statistic)
    centroids, clusters = settle(x, centroids, fixed, width, sample_weight, unit=width)
    loss = jnp.sum(clusters.losses)  # in squares of bins: no overflow whatever the scale of x
    total = loss * weight_scale(sample_weight) * width * width
    finite = is_usable(statistic, sample_weight)
    return KMeansResult(
        centroids=jnp.where(finite, centroids, jnp.nan),
        counts=clusters.counts,
        loss=jnp.where(finite, total, jnp.nan),
        gap=jnp.where(finite, _gap(loss, solution), jnp.nan),
    )


def is_usable(statistic: Histogram, sample_weight: jax.Array | None) -> jax.Array:
    """Return whether all entries are finite, and their weights, if any, finite and not negative."""
    finite = jnp.isfinite(statistic.low) & jnp.isfinite(statistic.high)
    if sample_weight is None:
        return finite
    return finite & jnp.isfinite(jnp.max(sample_weight)) & (jnp.min(sample_weight) >= 0)


def _gap(loss: jax.Array, solution: "Optimum") -> jax.Array:
    root = jnp.sqrt(solution.loss) - jnp.sqrt(solution.moved)
    bound = jnp.square(jnp.maximum(root, 0.0))
    gap = jnp.where(bound > 0, loss / jnp.where(bound > 0, bound, 1.0) - 1.0, jnp.inf)
    return jnp.where(loss == 0, 0.0, jnp.maximum(gap, 0.0))


# Starts ------------------------------------------------------------------------------------------


def named_start(
    statistic: Histogram, k: int, name: str, *, zero: bool = False, cells: int | None = None
) -> jax.Array:
    """Return the [k] starting centroids that `name`, one of `STARTS`, stands for."""
    if name == "optimal":
        return optimum(statistic, k, zero=zero, cells=cells).centroids
    start = {
        "quantile": codebooks.start_quantile,
        "linear": codebooks.start_linear,
        "power_of_two": codebooks.start_power_of_two,
        "inq": codebooks.start_inq,
        "ternary": codebooks.start_ternary,
    }[name]
    return start(statistic, k)


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


# Lloyd -------------------------------------------------------------------------------------------


def lloyd(
    statistic: Histogram, start: jax.Array, fixed: jax.Array, iterations: int | None = None
) -> jax.Array:
    """Return the centroids after Lloyd passes over the histogram; index order is kept.

    Args:
      statistic: of the weights.
      start: [k] float32 centroids.
      fixed: [k] bool, centroids that must not move.
      iterations: exact number of passes, or None to pass until no bin changes its cluster.
    """
    if iterations == 0:
        return start
    order = jnp.argsort(start)  # Lloyd passes never change the order
    positions, still = to_position(statistic, start[order]), fixed[order]
    prefix = _prefix_sums(statistic)

    def update(positions: jax.Array) -> jax.Array:
        return jnp.where(still, positions, _means(statistic, prefix, positions))

    if iterations is None:
        positions = _until_stable(statistic, update, positions)
    else:
        positions = loops.fori_loop(0, iterations - 1, lambda _, p: update(p), positions)
    means = _precise_means(statistic, positions)
    moved = jnp.where(still, start[order], to_value(statistic, means))
    return jnp.zeros_like(start).at[order].set(moved)


class _Prefix(NamedTuple):
    mass: jax.Array  # [bins + 1], exact where counts are
    moment: jax.Array  # [bins + 1], about the reference
    reference: jax.Array  # mean position


def _prefix_sums(statistic: Histogram) -> _Prefix:
    mass = statistic.mass.astype(jnp.float32)
    reference = jnp.sum(mass / jnp.sum(mass) * statistic.position)
    moment = jnp.cumsum(mass * (statistic.position - reference))
    return _Prefix(jnp.pad(jnp.cumsum(statistic.mass), (1, 0)), jnp.pad(moment, (1, 0)), reference)


def _edges(statistic: Histogram, positions: jax.Array) -> jax.Array:
    """Return the [k + 1] first bins of each of the clusters of ascending centroids."""
    bins = statistic.mass.shape[0]
    middle = positions[1:] * 0.5 + positions[:-1] * 0.5
    bin_of_middle = jnp.clip(jnp.floor(middle), 0, bins - 1).astype(jnp.int32)
    below = statistic.position[bin_of_middle] <= middle
    return jnp.pad(bin_of_middle + below.astype(jnp.int32), (1, 1), constant_values=(0, bins))


def _means(statistic: Histogram, prefix: _Prefix, positions: jax.Array) -> jax.Array:
    edges = _edges(statistic, positions)
    mass = jnp.diff(prefix.mass[edges]).astype(jnp.float32)
    moment = jnp.diff(prefix.moment[edges])
    means = prefix.reference + moment / jnp.where(mass > 0, mass, 1.0)
    return jnp.where(mass > 0, means, positions)


def _precise_means(statistic: Histogram, positions: jax.Array) -> jax.Array:
    """Return the clusters' means, summed about the centroids: no digits lost to cancellation."""
    edges = _edges(statistic, positions)
    bins = jnp.arange(statistic.mass.shape[0])

    def one(cluster: tuple[jax.Array, ...]) -> jax.Array:
        first, last, centroid = cluster
        mass = jnp.where((bins >= first) & (bins < last), statistic.mass, 0).astype(jnp.float32)
        total = jnp.sum(mass)
        shift = jnp.sum(mass * (statistic.position - centroid))
        return jnp.where(total > 0, centroid + shift / jnp.where(total > 0, total, 1.0), centroid)

    return jax.lax.map(one, (edges[:-1], edges[1:], positions))


def _until_stable(
    statistic: Histogram, update: Callable[[jax.Array], jax.Array], positions: jax.Array
) -> jax.Array:
    def unstable(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return carry[2] & (carry[1] < _MAX_PASSES)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]):
        positions, passes, _ = carry
        new = update(positions)
        changed = jnp.any(_edges(statistic, new) != _edges(statistic, positions))
        return new, passes + 1, changed

    return loops.while_loop(unstable, step, (positions, jnp.int32(0), jnp.bool_(True)))[0]


# Checks ------------------------------------------------------------------------------------------


def _check_entries(x: jax.Array, k: int, sample_weight: jax.Array | None) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating-point weights, got {x.dtype}")
    if k > x.size:
        raise ValueError(f"expected at most as many centroids as weights, got k={k}, size={x.size}")
    if x.size >= 2**31:
        raise ValueError(f"expected fewer than 2**31 weights in one codebook, got {x.size}")
    if sample_weight is None:
        checks.values({"x": x})
        return
    if jnp.shape(sample_weight) != x.shape:
        raise ValueError(
            f"expected sample_weight of shape {x.shape}, got {jnp.shape(sample_weight)}"
        )
    named = {"x": x, "sample_weight": sample_weight}
    checks.values(named, nonnegative=("sample_weight",))


def check_start(name: object, k: int | None = None) -> None:
    """Raise a ValueError for a name of no start, or of one that `k` centroids cannot have."""
    if name not in STARTS:
        raise ValueError(f"expected init to be one of {', '.join(STARTS)}, got {name!r}")
    if k is not None and name in _IN_INDEX_ORDER and k % 2 == 0:
        raise ValueError(f"expected an odd k for init={name!r}, got {k}")
    if k not in (None, 3) and name == "ternary":
        raise ValueError(f"expected k = 3 for init='ternary', got {k}")


def check_iterations(iterations: Any) -> int | None:
    """Return the number of Lloyd passes, or None, or raise a ValueError."""
    return None if iterations is None else checks.integer("iterations", iterations, least=0)


def _check_centroids(k: int, init: Any, frozen: Any) -> None:
    centroids = None if init is None or isinstance(init, str) else jnp.asarray(init)
    if centroids is not None:
        if centroids.shape != (k,):
            raise ValueError(f"expected init of shape ({k},), got {centroids.shape}")
        checks.values({"init": centroids})
    if frozen is None:
        return
    if centroids is None:
        raise ValueError("expected an array as init where frozen is given")
    flags = jnp.asarray(frozen)
    if flags.shape != (k,) or flags.dtype != bool:
        raise ValueError(
            f"expected frozen to be bool of shape ({k},), got {flags.dtype} of {flags.shape}"
        )
