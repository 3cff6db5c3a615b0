"""The clusters of a leaf: those of each block, or those that blocks share up to a scale of each."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.blocks import by_batch, elementwise, nearest, reduced
from jaxquant.clustering.options import Clustering
from jaxquant.clustering.solver import ClusteredBlock, cluster_block, is_small, no_clusters
from jaxquant.rounds.selection import Layer

_ALTERNATIONS = 6  # of codebook and scales
_FEW = 64  # codebooks that are clustered as carefully as one
_LARGEST = {"float8_e4m3fn": 224.0, "int8": 127.0}  # centroid at first, of those that have few


class ClusteredLeaf(NamedTuple):
    """A leaf under its new codebooks; tables are `[*numbers, ...]`, those of the codebooks."""

    clusters: ClusteredBlock
    scale: jax.Array | None  # as it is stored, or None where there is none


def cluster_leaf(
    weights: jax.Array,
    sensitivity: jax.Array | None,
    codebook: jax.Array,
    frozen_centroids: jax.Array,
    scale: jax.Array | None,
    *,
    layer: Layer,
    clustering: Clustering,
) -> ClusteredLeaf:
    """Cluster a leaf: from its codebooks where a centroid of them is frozen, else anew.

    With scales, what is clustered is each weight over its scale, weighed by the squared scale. A
    scale is found when nothing of its codebook is frozen, and stays. Where blocks share a codebook
    that is done by turns: the codebook for the scales, and for the codes each scale by least
    squares; the best of all turns is kept, so that no turn makes the error rise.

    Args:
      weights: the leaf.
      sensitivity: like the weights, non-negative, or None.
      codebook: `[*numbers, k]`, as it is stored.
      frozen_centroids: bool, like the codebook.
      scale: `[*numbers, 1]`, as it is stored, or None.
      layer: the leaf's setting.
      clustering: options.
    """
    if scale is None:
        found = _cluster_blocks(
            weights, sensitivity, codebook, frozen_centroids, layer=layer, clustering=clustering
        )
        return ClusteredLeaf(found, None)
    shared = tuple(axis for axis, number in enumerate(scale.shape) if number == 1)
    fresh = ~jnp.any(frozen_centroids, axis=shared, keepdims=True)
    scale = jnp.where(fresh, _first_scale(weights, layer).astype(scale.dtype), scale)
    solve = functools.partial(
        _cluster_scaled,
        weights,
        sensitivity,
        codebook,
        frozen_centroids,
        layer=layer,
        clustering=clustering,
    )
    if not layer.scaled:
        return ClusteredLeaf(solve(scale), scale)

    def turn(_: int, carry: tuple[jax.Array, ClusteredLeaf, jax.Array]):
        scale, best, least = carry
        found = ClusteredLeaf(solve(scale), scale)
        loss = jnp.sum(found.clusters.losses, axis=-1, keepdims=True)
        better = ~(loss >= least)  # NaN, of weights that are none, is told of
        best = jax.tree.map(functools.partial(_chosen, better), found, best)
        new = jnp.where(fresh, _best_scale(weights, sensitivity, found.clusters, scale), scale)
        return new, best, jnp.minimum(loss, least)

    *numbers, k = codebook.shape
    nothing = no_clusters(tuple(numbers), k, layer.centroid_dtype)
    start = scale, ClusteredLeaf(nothing, scale), jnp.full(fresh.shape, jnp.inf, jnp.float32)
    turns = jnp.where(jnp.any(fresh), _ALTERNATIONS, 1)
    return loops.fori_loop(0, turns, turn, start)[1]


def _cluster_blocks(
    weights: jax.Array,
    sensitivity: jax.Array | None,
    codebook: jax.Array,
    frozen_centroids: jax.Array,
    *,
    scale: jax.Array | None = None,
    layer: Layer,
    clustering: Clustering,
) -> ClusteredBlock:
    """Cluster the weights of each codebook, over its scale [*numbers, 1] if there is one."""
    numbers = codebook.shape[:-1]
    quick = math.prod(numbers) > _FEW
    small = is_small(math.prod(weights.shape) // math.prod(numbers))

    def solve(
        x: jax.Array, own: jax.Array | None, scale: jax.Array | None, *tables: jax.Array
    ) -> ClusteredBlock:
        x, own = jax.tree.map(jnp.ravel, (x, own)) if small else (x, own)
        x = x if scale is None else _divided(x, scale)
        dtype = jnp.dtype(layer.centroid_dtype)
        return cluster_block(x, own, *tables, clustering=clustering, dtype=dtype, quick=quick)

    return by_batch(solve, (weights, sensitivity), (scale, codebook, frozen_centroids), numbers)


def _cluster_scaled(
    weights: jax.Array,
    sensitivity: jax.Array | None,
    codebook: jax.Array,
    frozen_centroids: jax.Array,
    scale: jax.Array,
    *,
    layer: Layer,
    clustering: Clustering,
) -> ClusteredBlock:
    """Cluster the weights over their scales."""
    wide = scale.astype(jnp.float32)
    cluster = functools.partial(_cluster_blocks, layer=layer, clustering=clustering)
    tables = codebook, frozen_centroids
    if layer.scaled:  # a codebook of many scales
        of_blocks = jnp.broadcast_to(wide, (*layer.all_numbers, 1))
        over = elementwise(_divided, (weights,), (of_blocks,))
        importance = elementwise(_weighed, (weights, sensitivity), (jnp.square(of_blocks),))
        return cluster(over, importance, *tables)
    of_codebooks = jnp.broadcast_to(wide, (*codebook.shape[:-1], 1))
    found = cluster(weights, sensitivity, *tables, scale=of_codebooks)
    square = jnp.square(wide)
    return found._replace(losses=found.losses * square, norm=found.norm * square[..., 0])


def _divided(weights: jax.Array, scale: jax.Array) -> jax.Array:
    return weights.astype(jnp.float32) / scale[0]


def _weighed(weights: jax.Array, sensitivity: jax.Array | None, weight: jax.Array) -> jax.Array:
    """Return the weights' importance, in a block that weighs so much."""
    if sensitivity is None:
        return jnp.broadcast_to(weight[0], weights.shape)
    return weight[0] * sensitivity.astype(jnp.float32)


def _first_scale(weights: jax.Array, layer: Layer) -> jax.Array:
    """Return scales by which no weight is larger than the largest centroid should be."""
    largest = reduced(jnp.max, jnp.abs(weights.astype(jnp.float32)), layer.scale_numbers)[..., None]
    return jnp.where(largest > 0, largest / _LARGEST.get(layer.centroid_dtype, 1.0), 1.0)


def _best_scale(
    weights: jax.Array, sensitivity: jax.Array | None, found: ClusteredBlock, scale: jax.Array
) -> jax.Array:
    """Return the scales of least squares for the codes that weights have under the old ones.

    Of `sum h (w - s c)**2` the s that makes it least.
    """
    centroids = found.centroids.astype(jnp.float32)
    tables = jnp.broadcast_to(centroids, (*scale.shape[:-1], centroids.shape[-1]))
    wide = scale.astype(jnp.float32)
    shared = nearest(elementwise(_divided, (weights,), (wide,)), tables)
    importance = jnp.float32(1.0) if sensitivity is None else sensitivity.astype(jnp.float32)
    numbers = scale.shape[:-1]
    squares = reduced(jnp.sum, importance * jnp.square(shared), numbers)[..., None]
    products = reduced(jnp.sum, importance * weights.astype(jnp.float32) * shared, numbers)
    best = products[..., None] / jnp.where(squares > 0, squares, 1.0)
    return jnp.where((squares > 0) & (best > 0), best, wide).astype(scale.dtype)


def _chosen(better: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return new entries of a table where `better`, [*numbers, 1], says so."""
    return jnp.where(better if new.ndim == better.ndim else better[..., 0], new, old)
