"""One-dimensional k-means on a histogram: optimal start, Lloyd passes, certificate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import codebooks
from jaxquant.histogram import BINS, Histogram, bin_width, fold, histogram, to_position, to_value

STARTS = ("optimal", "quantile", "linear", "power_of_two")
_MAX_PASSES = 200
_SPREAD = 256  # partial sums a cluster: float32 keeps its digits over 1e8 weights


class KMeansResult(NamedTuple):
    """Clusters of one array, and how far from optimal they can be at most."""

    centroids: jax.Array  # [k] float32, ascending unless the start fixed an index order
    counts: jax.Array  # [k] int32, weights nearest to each centroid
    loss: jax.Array  # float32 scalar, (weighted) sum of squared distances to the nearest centroid
    gap: jax.Array  # float32 scalar, loss / (lower bound of the optimum) - 1; inf if unknown


class Clusters(NamedTuple):
    """What one layer's weights look like under a codebook."""

    counts: jax.Array  # [k] int32
    losses: jax.Array  # [k] float32, (weighted) sum of squared distances
    lows: jax.Array  # [k] smallest weight of each cluster; +inf where empty
    highs: jax.Array  # [k] largest weight; -inf where empty


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
    weights are all equal get exactly that value. Runs under jit, vmap and scan; `x` is never
    raveled, sorted or copied. Cost O(n k) compares and O(n + bins + cells**2 k) else; memory
    O(bins + cells**2) beyond `x`.

    The certificate: with every entry moved to the mean of its cell, W the squared distance moved
    and O the exact optimum of the moved entries (the dynamic program), no k centroids have a loss
    below `(sqrt(O) - sqrt(W))**2`. More cells make it tighter.

    Source: Xu et al., AAAI 2018 (clustering step); Wang & Song, R Journal 2011 (dynamic program).

    Args:
      x: [...] float32, bfloat16, float16 (float64 is clustered in float32); finite, not empty.
      k: number of clusters, at most `x.size`.
      init: [k] centroids to start from, kept in their index order, or one of "optimal" (default),
        "quantile", "linear" and "power_of_two" (index order 0, m, -m, m/2, ...; odd k).
      frozen: [k] bool, centroids that do not move; needs an array as `init`.
      sample_weight: non-negative, like `x`; all zero counts as all equal.
      zero: whether one centroid is exactly zero: the one that starts nearest to it.
      iterations: exactly this many Lloyd passes; None for as many as needed, at most 200.
      bins: bins of the histogram.
      cells: cells of the dynamic program; None for max(512, 4 k).

    Returns:
      KMeansResult. Centroids are float32 whatever the dtype of `x`.

    Raises:
      ValueError: for arguments that do not fit, and for NaN or infinite entries outside of jit
        (inside, they make the result NaN).

    >>> result = kmeans(jnp.array([1.0, 1.0, 2.0, 8.0, 8.0, 9.0]), 2)
    >>> result.counts
    Array([3, 3], dtype=int32)
    """
    x = jnp.asarray(x)
    _check_entries(x, k, sample_weight)
    _check_options(k, init, zero=zero, iterations=iterations, cells=cells)
    _check_centroids(k, init, frozen)
    statistic = histogram(x, sample_weight, bins=bins)
    solution = optimum(statistic, k, zero=zero, cells=cells)
    if init is None or (isinstance(init, str) and init == "optimal"):
        start = solution.centroids
    elif isinstance(init, str):
        start = named_start(statistic, k, init)
    else:
        start = jnp.asarray(init).astype(jnp.float32)
    start, fixed = pin(start, frozen, zero=zero)
    centroids = lloyd(statistic, start, fixed, iterations)
    if init is None or (isinstance(init, str) and init != "power_of_two"):
        order = jnp.argsort(centroids)
        centroids, fixed = centroids[order], fixed[order]
    clusters = measure(x, centroids, sample_weight)
    if iterations != 0:
        centroids, clusters = settle(centroids, fixed, clusters)
    loss = jnp.sum(clusters.losses)
    finite = jnp.isfinite(statistic.low) & jnp.isfinite(statistic.high)
    centroids = jnp.where(finite, centroids, jnp.nan)
    scale = _weight_scale(sample_weight) * bin_width(statistic) ** 2
    return KMeansResult(centroids, clusters.counts, loss, _gap(loss, solution, scale))


def _gap(loss: jax.Array, solution: "Optimum", scale: jax.Array) -> jax.Array:
    root = jnp.sqrt(solution.loss) - jnp.sqrt(solution.moved)
    bound = jnp.square(jnp.maximum(root, 0.0)) * scale
    gap = jnp.where(bound > 0, loss / jnp.where(bound > 0, bound, 1.0) - 1.0, jnp.inf)
    return jnp.where(loss == 0, 0.0, jnp.maximum(gap, 0.0))


def _weight_scale(sample_weight: jax.Array | None) -> jax.Array:
    """Return what the histogram divided sample weights by."""
    if sample_weight is None:
        return jnp.float32(1.0)
    largest = jnp.max(sample_weight).astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0)


# Starts ------------------------------------------------------------------------------------------


def named_start(statistic: Histogram, k: int, name: str, *, zero: bool = False) -> jax.Array:
    """Return the [k] starting centroids that `name`, one of `STARTS`, stands for."""
    if name == "optimal":
        return optimum(statistic, k, zero=zero).centroids
    start = {
        "quantile": codebooks.start_quantile,
        "linear": codebooks.start_linear,
        "power_of_two": codebooks.start_power_of_two,
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
        centroids, fixed = jnp.where(nearest, 0.0, centroids), fixed | nearest
    return centroids, fixed


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
    # Bhatia-Davis: entries of a unit interval with mean f have a variance of at most f (1 - f).
    fraction = statistic.position - bins
    single = statistic.mass == 1 if statistic.mass.dtype == jnp.int32 else jnp.zeros_like(occupied)
    within = jnp.where(single, 0.0, fraction * (1.0 - fraction))
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

    zeros = jnp.zeros(cells + 1)
    rows = (jnp.arange(cells), groups.mass, groups.mean)
    _, columns = jax.lax.scan(grow, (zeros,) * 4, rows)
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
    start = jnp.full((costs.shape[0], cells), jnp.inf).at[0, 0].set(0.0)

    def step(table: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        table = _advance(table, costs)
        return table, table

    _, tables = jax.lax.scan(step, start, None, length=k)
    return jnp.concatenate([start[None], tables])


def _trace_back(costs: jax.Array, tables: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return start, end and whether pinned to zero of the k clusters of the optimum."""
    layers, cells = tables.shape[1:]

    def step(carry: tuple[jax.Array, jax.Array], table: jax.Array):
        end, layer = carry
        totals = table[layer] + costs[0, :, end]
        start, pinned = jnp.argmin(totals), jnp.bool_(False)
        if layers == 2:
            about_zero = jnp.where(layer == 1, table[0] + costs[1, :, end], jnp.inf)
            pinned = jnp.min(about_zero) < jnp.min(totals)
            start = jnp.where(pinned, jnp.argmin(about_zero), start)
        return (start, jnp.where(pinned, 0, layer)), (start, end, pinned)

    last = (jnp.int32(cells - 1), jnp.int32(layers - 1))
    _, (starts, ends, pinned) = jax.lax.scan(step, last, tables[:-1], reverse=True)
    return starts, ends, pinned


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
        positions = jax.lax.fori_loop(0, iterations - 1, lambda _, p: update(p), positions)
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


def _until_stable(statistic: Histogram, update, positions: jax.Array) -> jax.Array:
    def unstable(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return carry[2] & (carry[1] < _MAX_PASSES)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]):
        positions, passes, _ = carry
        new = update(positions)
        changed = jnp.any(_edges(statistic, new) != _edges(statistic, positions))
        return new, passes + 1, changed

    return jax.lax.while_loop(unstable, step, (positions, 0, jnp.bool_(True)))[0]


# Measures on the weights themselves ---------------------------------------------------------------


def measure(x: jax.Array, centroids: jax.Array, sample_weight: jax.Array | None = None) -> Clusters:
    """Return counts, losses and extremes of the clusters of `x` under `centroids`; one pass."""
    k = centroids.shape[0]
    centroids = centroids.astype(jnp.float32)
    weights = () if sample_weight is None else (sample_weight,)
    slots = jnp.zeros(k * _SPREAD)
    none = Clusters(
        jnp.zeros(k * _SPREAD, jnp.int32),
        slots,
        jnp.full(k, jnp.inf, x.dtype),
        jnp.full(k, -jnp.inf, x.dtype),
    )

    def step(sums: Clusters, piece: jax.Array, *weight: jax.Array) -> Clusters:
        codes = codebooks.assign(piece, centroids)
        loss = jnp.square(piece.astype(jnp.float32) - codebooks.reconstruct(codes, centroids))
        if weight:
            loss = loss * weight[0].astype(jnp.float32)
        slot = codes.astype(jnp.int32) * _SPREAD + _spread(piece.shape)
        mode = "promise_in_bounds"
        return Clusters(
            sums.counts.at[slot].add(1, mode=mode),
            sums.losses.at[slot].add(loss, mode=mode),
            sums.lows.at[codes].min(piece, mode=mode),
            sums.highs.at[codes].max(piece, mode=mode),
        )

    sums = fold(step, none, x, *weights)
    return sums._replace(
        counts=jnp.sum(sums.counts.reshape(k, _SPREAD), axis=1),
        losses=jnp.sum(sums.losses.reshape(k, _SPREAD), axis=1),
    )


def _spread(shape: tuple[int, ...]) -> jax.Array:
    """Number the entries round-robin, without a ravel."""
    number = jnp.zeros(shape, jnp.int32)
    stride = 1
    for axis in reversed(range(len(shape))):
        number += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * (stride % _SPREAD)
        stride *= shape[axis]
    return number % _SPREAD


def settle(
    centroids: jax.Array, fixed: jax.Array, clusters: Clusters
) -> tuple[jax.Array, Clusters]:
    """Put the centroid of a cluster of equal weights exactly onto them.

    The histogram resolves a position to 2**-24 of the range; this makes a layer that has at most
    k distinct values a fixed point, bit for bit.
    """
    constant = (clusters.lows == clusters.highs) & ~fixed
    centroids = jnp.where(constant, clusters.lows.astype(jnp.float32), centroids)
    return centroids, clusters._replace(losses=jnp.where(constant, 0.0, clusters.losses))


# Checks ------------------------------------------------------------------------------------------


def _check_entries(x: jax.Array, k: int, sample_weight: jax.Array | None) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating-point weights, got {x.dtype}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"expected k to be a positive integer, got {k!r}")
    if k > x.size:
        raise ValueError(f"expected at most as many centroids as weights, got k={k}, size={x.size}")
    if x.size >= 2**31:
        raise ValueError(f"expected fewer than 2**31 weights in one codebook, got {x.size}")
    check_finite("x", x)
    if sample_weight is None:
        return
    if jnp.shape(sample_weight) != x.shape:
        raise ValueError(
            f"expected sample_weight of shape {x.shape}, got {jnp.shape(sample_weight)}"
        )
    check_finite("sample_weight", sample_weight)
    if not isinstance(sample_weight, jax.core.Tracer) and jnp.min(sample_weight) < 0:
        raise ValueError("expected sample_weight >= 0, got negative entries")


def check_finite(name: str, x: jax.Array) -> None:
    """Raise a ValueError that names `x` if it holds NaN or infinities; traced arrays pass."""
    if isinstance(x, jax.core.Tracer):
        return
    bad = x.size - int(jnp.sum(jnp.isfinite(x)))
    if bad:
        raise ValueError(f"expected finite values in {name}, got {bad} NaN or infinite of {x.size}")


def check_options(*, init: object, zero: object, iterations: object, k: int) -> None:
    """Raise a ValueError for clustering options that cannot work for `k` centroids."""
    del zero
    if isinstance(init, str) and init not in STARTS:
        raise ValueError(f"expected init to be one of {', '.join(STARTS)}, got {init!r}")
    if isinstance(init, str) and init == "power_of_two" and k % 2 == 0:
        raise ValueError(f"expected an odd k for init='power_of_two', got {k}")
    if iterations is not None and (not isinstance(iterations, int) or iterations < 0):
        raise ValueError(f"expected iterations to be None or at least 0, got {iterations!r}")


def _check_options(k: int, init: object, *, zero: bool, iterations: object, cells: object) -> None:
    check_options(init=init, zero=zero, iterations=iterations, k=k)
    if cells is not None and (not isinstance(cells, int) or cells < k):
        raise ValueError(f"expected cells to be None or at least k={k}, got {cells!r}")


def _check_centroids(k: int, init: object, frozen: object) -> None:
    array = init is not None and not isinstance(init, str)
    if array and jnp.shape(init) != (k,):
        raise ValueError(f"expected init of shape ({k},), got {jnp.shape(init)}")
    if frozen is None:
        return
    if not array:
        raise ValueError("expected an array as init where frozen is given")
    if jnp.shape(frozen) != (k,) or jnp.asarray(frozen).dtype != bool:
        raise ValueError(f"expected frozen to be bool of shape ({k},), got {jnp.shape(frozen)}")
