"""One-dimensional k-means of one array: optimal start, Lloyd passes, certificate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import checks
from jaxquant.clustering.histogram import BINS
from jaxquant.clustering.options import Clustering
from jaxquant.clustering.solver import Solved, solve
from jaxquant.meshes import compiled


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

    Minimizes `sum_i w_i (x_i - c[assign(x_i, c)])**2` on ascending points: boundaries by dynamic
    programming over coarse cells, then Lloyd passes by prefix sums until no point changes its
    cluster. An empty cluster keeps its value; a tie goes to the lower centroid. Clusters whose
    weights are all equal get exactly that value. Runs under jit, vmap and scan.

    The points are, below 65,536 entries, these themselves, sorted. Of a larger array they are the
    bins of a histogram, equal ones first; where these hide much of the loss, as with a far outlier
    or narrow modes far apart, once more bins that lie where the entries are. Values that share a
    bin are not told apart. Such an array is never raveled or sorted. Cost O(n k) compares and
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
      bins: bins of the histogram; fewer than 65,536 are not gathered again.
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
    start = None if init is None or isinstance(init, str) else init
    _check_centroids(k, start, frozen)
    clustering = Clustering(
        init=init if isinstance(init, str) else "optimal",
        iterations=iterations,
        zero=zero,
        bins=bins,
        cells=cells,
    )
    clustering.check(k)
    return compiled(
        _cluster,
        *(x, None if start is None else jnp.asarray(start), frozen, sample_weight),
        k=k,
        clustering=clustering,
    )


def _cluster(
    x: jax.Array,
    start: jax.Array | None,
    frozen: jax.Array | None,
    sample_weight: jax.Array | None,
    *,
    k: int,
    clustering: Clustering,
) -> KMeansResult:
    """Cluster from the centroids in `start`, or as the options say."""
    solved = solve(x, sample_weight, k, start, frozen, clustering=clustering, certify=True)
    loss = jnp.sum(solved.clusters.losses)
    finite = solved.finite
    return KMeansResult(
        centroids=jnp.where(finite, solved.centroids, jnp.nan),
        counts=solved.clusters.counts,
        loss=jnp.where(finite, solved.in_squares(loss), jnp.nan),
        gap=jnp.where(finite, _gap(loss, solved), jnp.nan),
    )


def _gap(loss: jax.Array, solved: Solved) -> jax.Array:
    root = jnp.sqrt(solved.best) - jnp.sqrt(solved.moved)
    bound = jnp.square(jnp.maximum(root, 0.0))
    gap = jnp.where(bound > 0, loss / jnp.where(bound > 0, bound, 1.0) - 1.0, jnp.inf)
    return jnp.where(loss == 0, 0.0, jnp.maximum(gap, 0.0))


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


def _check_centroids(k: int, init: Any, frozen: Any) -> None:
    centroids = None if init is None else jnp.asarray(init)
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
