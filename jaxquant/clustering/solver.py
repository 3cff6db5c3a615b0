"""What a round asks of clustering: the codebook of one block, and what its clusters are then."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.clusters import settle, weight_scale
from jaxquant.clustering.codebooks import rounded, to_powers_of_two
from jaxquant.clustering.histogram import bin_width, histogram
from jaxquant.clustering.kmeans import Clustering, is_usable, lloyd, named_start, pin

_SMALL = 0  # weights


class ClusteredBlock(NamedTuple):
    """One block under its new codebook."""

    centroids: jax.Array  # [k] of the codebook's dtype
    counts: jax.Array  # [k] int32, weights nearest to each
    losses: jax.Array  # [k] float32, (weighted) sum of squared distances; may overflow to inf
    norm: jax.Array  # float32 scalar, (weighted) sum of squares of the weights
    finite: jax.Array  # bool scalar, whether the weights and sample weights can be clustered


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
    """
    k = codebook.shape[0]
    statistic = histogram(x, sample_weight, bins=clustering.bins)
    start = loops.cond(
        jnp.any(frozen),
        lambda: codebook.astype(jnp.float32),
        lambda: named_start(
            statistic, k, clustering.init, zero=clustering.zero, cells=clustering.cells
        ),
    )
    start, fixed = pin(start, frozen, zero=clustering.zero)
    centroids = lloyd(statistic, start, fixed, clustering.iterations)
    if clustering.powers_of_two:
        centroids = jnp.where(frozen, centroids, to_powers_of_two(centroids))
    if clustering.powers_of_two or clustering.iterations == 0:
        fixed = jnp.ones_like(fixed)
    centroids = jnp.where(frozen, codebook.astype(dtype), rounded(centroids, dtype))
    centroids, clusters = settle(x, centroids, fixed, bin_width(statistic), sample_weight)
    scale = weight_scale(sample_weight)
    return ClusteredBlock(
        centroids,
        clusters.counts,
        clusters.losses * scale,
        clusters.norm * scale,
        is_usable(statistic, sample_weight),
    )
