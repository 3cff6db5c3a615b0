"""What a round does to blocks whose clusters are known: which weights take their centroid."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.blocks import are_runs, centroids_of, reconstructed
from jaxquant.clustering.clusters import measure, weight_scale
from jaxquant.clustering.codebooks import pick
from jaxquant.clustering.passes import fold
from jaxquant.rounds.compensation import compensate
from jaxquant.rounds.partition import threshold, weight_priority


class Codebook(NamedTuple):
    """The clusters of a block in ascending order, see `codebooks.bounds`."""

    last: jax.Array  # [k - 1, ...] float32 or float64, where a cluster ends
    centroids: jax.Array  # [k, ...] of the weights' dtype


def join_clusters(
    frozen: jax.Array,
    weights: jax.Array,
    codebook: Codebook,
    moving: jax.Array,
    active: jax.Array,
) -> jax.Array:
    """Return which weights are frozen once some clusters are, bool. Elementwise.

    Args:
      frozen: [...] bool, as it was.
      weights: [...].
      codebook: of their blocks.
      moving: [k, ...] bool, the clusters in ascending order; none where a block is not active.
      active: [...] bool, whether anything of a block may change.
    """
    del active
    return frozen | pick(weights, codebook.last, moving, short=True)


def join_weights(
    frozen: jax.Array,
    weights: jax.Array,
    *extra_and_tables: Any,
    partition: str,
) -> jax.Array:
    """Return which weights are frozen once those of at least some priority are. Elementwise.

    Args:
      frozen: [...] bool, as it was.
      weights: [...].
      extra_and_tables: what `weight_priority` wants besides, if it does; then the codebook, and
        from `least_priority` the least priority of a block that freezes and whether any does, not
        where it is not active.
      partition: one of `partition.WEIGHT_PARTITIONS`.
    """
    *extra, codebook, (least, some), _ = extra_and_tables
    rank = weight_priority(partition, weights, pick(weights, *codebook), *extra)
    return frozen | ((rank >= least) & some)


def share_centroids(frozen: jax.Array, weights: jax.Array, *others: Any) -> jax.Array:
    """Return the weights, those frozen in an active block on their centroids. Elementwise.

    Arguments as for `join_clusters`; others may stand before the codebook.
    """
    codebook, _, active = others[-3:]
    return jnp.where(frozen & active, pick(weights, *codebook, short=True), weights)


def least_priority(
    frozen: jax.Array, weights: jax.Array, *extra_and_tables: Any, partition: str
) -> tuple[jax.Array, jax.Array]:
    """Return which weights of a block freeze, up to a share of it: of what priority, and if any.

    Of equal priorities all freeze.

    Args:
      frozen: [...] bool, one block.
      weights: [...].
      extra_and_tables: what `weight_priority` wants besides, if it does; then the block's codebook,
        and the share, a scalar in [0, 1].
      partition: one of `partition.WEIGHT_PARTITIONS`.

    Returns:
      uint32 scalar and bool scalar.
    """
    *extras, codebook, share = extra_and_tables
    number = jnp.floor(share * frozen.size + 0.5).astype(jnp.int32)
    number = jnp.where(share < 1, number, frozen.size) - count_frozen(frozen)

    def rank(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return weight_priority(partition, weights, pick(weights, *codebook), *extras)

    return threshold(rank, (weights, *extras), frozen, number), number > 0


def count_frozen(frozen: jax.Array) -> jax.Array:
    """Return the number of frozen weights of a block, int32."""

    def count(number: jax.Array, frozen: jax.Array) -> jax.Array:
        return number + jnp.sum(frozen, dtype=jnp.int32)

    return fold(count, jnp.int32(0), frozen)  # of a whole mask XLA would write integers to memory


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
    codebook: jax.Array,
    scale: jax.Array | None,
    fixed: jax.Array,
    whole: jax.Array,
    moments: jax.Array,
    *,
    input_axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return weights, codebooks and scales of a layer that is to answer as well as it can.

    Args:
      weights: [...] the layer as it was before the round.
      frozen: bool, like the weights, as it was.
      near: like the weights, all that freezes on its nearest centroid.
      codebook: [*numbers, k] of the layer's blocks; centroids that move are rounded to its dtype.
      scale: [*numbers, 1] that the codebooks are times, or None.
      fixed: bool, like the codebook, the centroids that keep their value.
      whole: bool scalar, whether nothing of the layer is free after the round; else it is `near`.
      moments: [D, D] float32.
      input_axes: those that the D inputs are of; all others are of outputs.
    """
    others = tuple(axis for axis in range(weights.ndim) if axis not in input_axes)
    order = (*input_axes, *others)
    back = tuple(order.index(axis) for axis in range(weights.ndim))

    def inputs_first(x: jax.Array) -> jax.Array:
        """Return weights [inputs, outputs], or a table of their blocks, with one axis of outputs.

        Blocks cut it into as many runs, see `can_join`.
        """
        rest = tuple(range(weights.ndim, x.ndim))
        x = x.transpose((*order, *rest))
        return x.reshape(*x.shape[: len(input_axes)], -1, *x.shape[weights.ndim :])

    def as_before(x: jax.Array, like: jax.Array) -> jax.Array:
        rest = tuple(range(weights.ndim, like.ndim))
        return x.reshape([like.shape[axis] for axis in (*order, *rest)]).transpose((*back, *rest))

    def close() -> tuple[jax.Array, jax.Array, jax.Array | None]:
        layer, mask = inputs_first(weights), inputs_first(frozen)
        tables, movable = inputs_first(codebook), inputs_first(~fixed)
        own_scale = None if scale is None else inputs_first(scale)
        found = compensate(layer, mask, tables, movable, moments, own_scale)
        new = as_before(found.codebook, codebook)
        new_scale = None
        if scale is not None and found.scale is not None:
            new_scale = as_before(found.scale, scale)
        centroids = centroids_of(new, new_scale, weights.dtype)
        shared = reconstructed(as_before(found.codes, weights), centroids)
        return jnp.where(frozen, weights, shared), new, new_scale

    return loops.cond(whole, close, lambda: (near, codebook, scale))


def can_join(sizes: tuple[int, ...], numbers: tuple[int, ...], input_axes: tuple[int, ...]) -> bool:
    """Return whether blocks stay runs of equal length where all axes of outputs are made one."""
    outputs = [axis for axis in range(len(sizes)) if axis not in input_axes]
    return are_runs([numbers[axis] for axis in outputs], [sizes[axis] for axis in outputs])


def with_equals(centroids: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return the chosen clusters [..., k], and those with the same centroid.

    Centroids that are equal (of bfloat16 weights, say) share their members' fate: which of them a
    weight gets depends on where it comes from.
    """
    equal = centroids[..., :, None] == centroids[..., None, :]
    return jnp.any(equal & chosen[..., None, :], axis=-1)
