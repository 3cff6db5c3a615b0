"""What a round does to one block whose clusters are known: which weights take their centroid."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.blocks import per_block
from jaxquant.clustering.clusters import measure, weight_scale
from jaxquant.clustering.codebooks import pick, reconstruct
from jaxquant.clustering.passes import fold, rewrite
from jaxquant.rounds.compensation import compensate
from jaxquant.rounds.partition import threshold, weight_priority


class Codebook(NamedTuple):
    """The clusters of a block in ascending order, see `codebooks.bounds`."""

    last: jax.Array  # [k - 1] float32 or float64, where a cluster ends
    centroids: jax.Array  # [k] of the weights' dtype


def share_clusters(
    weights: jax.Array, frozen: jax.Array, codebook: Codebook, moving: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Freeze clusters of a block: all their weights onto the centroids.

    Args:
      weights: [...] one block.
      frozen: bool, like the weights.
      codebook: of the block.
      moving: [k] bool, clusters in ascending order that are frozen after the round.
      active: bool scalar, whether anything may change.

    Returns:
      Weights and mask, new, and how many are frozen.
    """
    moving = moving & active

    def joins(weights: jax.Array) -> jax.Array:
        return pick(weights, codebook.last, moving)

    return _freeze(joins, active, codebook, frozen, weights)


def share_weights(
    weights: jax.Array,
    frozen: jax.Array,
    sensitivity: jax.Array | None,
    noise: jax.Array | None,
    codebook: Codebook,
    share: jax.Array,
    active: jax.Array,
    *,
    partition: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Freeze weights, up to a share of the block's, if it is active: those onto their centroids.

    Of equal priorities all freeze.

    Args:
      weights: [...] one block.
      frozen: bool, like the weights.
      sensitivity: like the weights, or None.
      noise: random bits, uint32 like the weights, for `partition="random"`.
      codebook: of the block.
      share: scalar in [0, 1].
      active: bool scalar.
      partition: one of `partition.WEIGHT_PARTITIONS`.

    Returns:
      Weights and mask, new, and how many are frozen.
    """
    extra = {"random": noise, "loss": sensitivity}.get(partition)
    extras = () if extra is None else (extra,)
    number = jnp.floor(share * frozen.size + 0.5).astype(jnp.int32)
    number = jnp.where(share < 1, number, frozen.size) - _count_frozen(frozen)

    def rank(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return weight_priority(partition, weights, codebook.centroids, *extras)

    least = threshold(rank, (weights, *extras), frozen, number)

    def joins(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return (rank(weights, *extras) >= least) & (number > 0)

    return _freeze(joins, active, codebook, frozen, weights, *extras)


def used_centroids(weights: jax.Array, frozen: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return which centroids of a block frozen weights are on, [k] bool."""
    # Sample weights of zero everywhere would count alike.
    members = measure(weights, centroids, frozen.astype(jnp.float32))
    return (members.lows < jnp.inf) & jnp.any(frozen)


def free_loss(
    weights: jax.Array, frozen: jax.Array, sensitivity: jax.Array | None, centroids: jax.Array
) -> jax.Array:
    """Return the (weighted) loss of the weights of a block that are not frozen, float32 scalar."""
    importance = jnp.where(frozen, 0.0, jnp.float32(1.0) if sensitivity is None else sensitivity)
    return jnp.sum(measure(weights, centroids, importance).losses) * weight_scale(importance)


def compensated(
    weights: jax.Array,
    frozen: jax.Array,
    near: jax.Array,
    centroids: jax.Array,
    fixed: jax.Array,
    whole: jax.Array,
    moments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the weights and the centroids of a layer that is to answer as well as it can.

    Args:
      weights: [..., N] the layer as it was before the round.
      frozen: bool, like the weights, as it was.
      near: like the weights, all that freezes on its nearest centroid.
      centroids: [*numbers, k] of the layer's blocks; those that move are rounded to their dtype.
      fixed: bool, like the centroids, those that keep their value.
      whole: bool scalar, whether nothing of the layer is free after the round; else it is `near`.
      moments: [D, D] float32.
    """

    def close() -> tuple[jax.Array, jax.Array]:
        found = compensate(weights, frozen, centroids, ~fixed, moments)
        shared = per_block(reconstruct, (found.codes,), (found.centroids.astype(weights.dtype),))
        return jnp.where(frozen, weights, shared), found.centroids

    return loops.cond(whole, close, lambda: (near, centroids))


def with_equals(centroids: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return the chosen clusters [..., k], and those with the same centroid.

    Centroids that are equal (of bfloat16 weights, say) share their members' fate: which of them a
    weight gets depends on where it comes from.
    """
    equal = centroids[..., :, None] == centroids[..., None, :]
    return jnp.any(equal & chosen[..., None, :], axis=-1)


def _freeze(
    joins: Callable[..., jax.Array],
    active: jax.Array,
    codebook: Codebook,
    frozen: jax.Array,
    weights: jax.Array,
    *extras: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Freeze the weights that join, in an active block, and put what is frozen on its centroid."""

    def freeze(frozen: jax.Array, weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return frozen | (joins(weights, *extras) & active)

    def move(frozen: jax.Array, weights: jax.Array, *_: jax.Array) -> jax.Array:
        return jnp.where(frozen & active, pick(weights, *codebook), weights)

    frozen, weights, *_ = rewrite((freeze, move), frozen, weights, *extras)
    return weights, frozen, _count_frozen(frozen)


def _count_frozen(frozen: jax.Array) -> jax.Array:
    """Return the number of frozen weights, int32."""

    def count(number: jax.Array, frozen: jax.Array) -> jax.Array:
        return number + jnp.sum(frozen, dtype=jnp.int32)

    return fold(count, jnp.int32(0), frozen)  # of a whole mask XLA would write floats to memory
