"""Which clusters freeze next. Arrays only: nothing here knows about trees or rounds."""

import jax
import jax.numpy as jnp

PARTITIONS = ("loss", "magnitude", "index", "random")


def priority(
    partition: str, losses: jax.Array, centroids: jax.Array, *, key: jax.Array | None = None
) -> jax.Array:
    """Return how early each cluster should freeze; larger is earlier.

    "loss": largest quantization loss first, since those weights need the most compensation (Xu et
    al., 2018); "magnitude": largest |centroid| first; "index": codebook order, the authors'
    released code; "random": uniform, needs `key`.

    Args:
      partition: one of `PARTITIONS`.
      losses: [..., k] sum of squares of each cluster.
      centroids: [..., k].
      key: typed key for "random".

    Returns:
      [..., k] float32.

    >>> priority("magnitude", jnp.zeros(3), jnp.array([-2.0, 0.0, 1.0]))
    Array([2., 0., 1.], dtype=float32)
    """
    if partition == "loss":
        return losses.astype(jnp.float32)
    if partition == "magnitude":
        return jnp.abs(centroids).astype(jnp.float32)
    if partition == "index":
        order = -jnp.arange(losses.shape[-1], dtype=jnp.float32)
        return jnp.broadcast_to(jnp.expand_dims(order, range(losses.ndim - 1)), losses.shape)
    if partition == "random" and key is not None:
        return jax.random.uniform(key, losses.shape)
    raise ValueError(f"expected a partition among {PARTITIONS}, with a key for random")


def choose(priorities: jax.Array, frozen: jax.Array, share: jax.Array) -> jax.Array:
    """Freeze clusters, the frozen ones first and then by priority, up to a share of all.

    A share of s freezes `round(s k)` clusters; ties of priority go to the lower index. What is
    frozen stays frozen.

    Args:
      priorities: [k], larger is earlier.
      frozen: [k] bool.
      share: scalar in [0, 1], cumulative.

    Returns:
      [k] bool.

    >>> choose(jnp.array([1.0, 3.0, 2.0]), jnp.array([True, False, False]), jnp.float32(2 / 3))
    Array([ True,  True, False], dtype=bool)
    """
    amount = jnp.floor(share * priorities.shape[0] + 0.5).astype(jnp.int32)
    finite = jnp.minimum(priorities, jnp.finfo(jnp.float32).max)  # losses may overflow
    order = jnp.argsort(jnp.where(frozen, jnp.inf, finite), descending=True, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
    return frozen | (rank < amount)
