"""What a round does to one block whose clusters are known: which weights take their centroid."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.blocks import per_block
from jaxquant.clustering.clusters import measure, weight_scale
from jaxquant.clustering.codebooks import assign, reconstruct
from jaxquant.clustering.passes import fold, rewrite
from jaxquant.rounds.compensation import compensate
from jaxquant.rounds.partition import threshold, weight_priority


class Shared(NamedTuple):
    """A block after a round."""

    weights: jax.Array
    frozen: jax.Array  # bool, like the weights
    centroids: jax.Array  # [k]
    frozen_centroids: jax.Array  # [k] bool
    frozen_share: jax.Array  # float32 scalar, of the weights


LEAF_SHAPED = Shared._make([True, True, False, False, False])  # the others are tables


def share_clusters(
    weights: jax.Array,
    frozen: jax.Array,
    centroids: jax.Array,
    frozen_centroids: jax.Array,
    new_centroids: jax.Array,
    chosen: jax.Array,
    active: jax.Array,
) -> Shared:
    """Freeze the chosen clusters if the layer is active: all their weights onto the centroids.

    Args:
      weights: [...] one block.
      frozen: bool, like the weights.
      centroids: [k], of the weights' dtype, as they were before the round.
      frozen_centroids: [k] bool, as they were.
      new_centroids: [k], of the weights' dtype.
      chosen: [k] bool, clusters that are frozen after the round.
      active: bool scalar.
    """
    moving = _with_equals(new_centroids, chosen & active)

    def joins(weights: jax.Array) -> jax.Array:
        return _flags_of(assign(weights, new_centroids), moving)

    weights, frozen = _freeze(joins, active, new_centroids, frozen, weights)
    still = jnp.where(active, chosen, frozen_centroids)
    return Shared(
        weights,
        frozen,
        jnp.where(active, new_centroids, centroids),
        still,
        count_frozen(frozen).astype(jnp.float32) / frozen.size,
    )


def share_weights(
    weights: jax.Array,
    frozen: jax.Array,
    sensitivity: jax.Array | None,
    noise: jax.Array | None,
    centroids: jax.Array,
    frozen_centroids: jax.Array,
    new_centroids: jax.Array,
    share: jax.Array,
    active: jax.Array,
    *,
    partition: str,
    fixed: bool,
) -> Shared:
    """Freeze weights, up to a share of the layer's, if it is active: those onto their centroids.

    Of equal priorities all freeze. A centroid of frozen weights is frozen too; with a `fixed`
    codebook every centroid is, from the layer's first round on.
    """
    extra = {"random": noise, "loss": sensitivity}.get(partition)
    extras = () if extra is None else (extra,)
    number = jnp.floor(share * frozen.size + 0.5).astype(jnp.int32)
    number = jnp.where(share < 1, number, frozen.size) - count_frozen(frozen)

    def rank(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return weight_priority(partition, weights, new_centroids, *extras)

    least = threshold(rank, (weights, *extras), frozen, number)

    def joins(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return (rank(weights, *extras) >= least) & (number > 0)

    weights, frozen = _freeze(joins, active, new_centroids, frozen, weights, *extras)
    count = count_frozen(frozen)
    if fixed:
        used = jnp.ones_like(frozen_centroids)
    else:  # sample weights of zero everywhere would count alike
        members = measure(weights, new_centroids, frozen.astype(jnp.float32))
        used = (members.lows < jnp.inf) & (count > 0)
    return Shared(
        weights,
        frozen,
        jnp.where(active, new_centroids, centroids),
        jnp.where(active, used, frozen_centroids),
        count.astype(jnp.float32) / frozen.size,
    )


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


def _with_equals(centroids: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return the chosen clusters, and those with the same centroid.

    Centroids that are equal (of bfloat16 weights, say) share their members' fate: which of them a
    weight gets depends on where it comes from.
    """
    equal = centroids[:, None] == centroids[None, :]
    return jnp.any(equal & chosen[None, :], axis=-1)


def _freeze(
    joins: Callable[..., jax.Array],
    active: jax.Array,
    centroids: jax.Array,
    frozen: jax.Array,
    weights: jax.Array,
    *extras: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Freeze the weights that join, in an active layer, and put what is frozen on its centroid."""

    def freeze(frozen: jax.Array, weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return frozen | (joins(weights, *extras) & active)

    def move(frozen: jax.Array, weights: jax.Array, *_: jax.Array) -> jax.Array:
        nearest = reconstruct(assign(weights, centroids), centroids)
        return jnp.where(frozen & active, nearest, weights)

    frozen, weights, *_ = rewrite((freeze, move), frozen, weights, *extras)
    return weights, frozen


def count_frozen(frozen: jax.Array) -> jax.Array:
    """Return the number of frozen weights, int32."""

    def count(number: jax.Array, frozen: jax.Array) -> jax.Array:
        return number + jnp.sum(frozen, dtype=jnp.int32)

    return fold(count, jnp.int32(0), frozen)  # of a whole mask XLA would write floats to memory


def _flags_of(codes: jax.Array, flags: jax.Array) -> jax.Array:
    """Return the flag of each code's cluster."""
    return flags.at[codes].get(mode="promise_in_bounds")
