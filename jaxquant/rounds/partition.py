"""Which clusters, or which weights, freeze next. Arrays only: no trees, no rounds."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxquant.clustering.passes import fold
from jaxquant.clustering.points import ranks
from jaxquant.clustering.solver import is_small

PARTITIONS = ("loss", "magnitude", "index", "random")
WEIGHT_PARTITIONS = ("loss", "magnitude", "random")
_DIGIT_BITS = 16  # of a weight's priority, which is sorted in two digits


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
      priorities: [..., k], larger is earlier.
      frozen: [..., k] bool.
      share: [...] in [0, 1], cumulative.

    Returns:
      [..., k] bool.

    >>> choose(jnp.array([1.0, 3.0, 2.0]), jnp.array([True, False, False]), jnp.float32(2 / 3))
    Array([ True,  True, False], dtype=bool)
    """
    amount = jnp.floor(share * priorities.shape[-1] + 0.5).astype(jnp.int32)[..., None]
    finite = jnp.minimum(priorities, jnp.finfo(jnp.float32).max)  # losses may overflow
    return frozen | (ranks(-jnp.where(frozen, jnp.inf, finite)) < amount)


def weight_priority(
    partition: str, weights: jax.Array, nearest: jax.Array, extra: jax.Array | None = None
) -> jax.Array:
    """Return how early each weight should freeze; larger is earlier. Elementwise.

    "magnitude": largest first, the "pruning-inspired" partition of INQ (Zhou et al., 2017, section
    2.2); "random": uniform; "loss": largest squared distance to its centroid first.

    Args:
      partition: one of `WEIGHT_PARTITIONS`.
      weights: [...] finite.
      nearest: [...] the nearest centroid of each weight, for "loss".
      extra: [...] random bits uint32 for "random"; the weights' sensitivities, or None, for "loss".

    Returns:
      [...] uint32.

    >>> priorities = weight_priority("magnitude", jnp.array([-3.0, 1.0, 2.0]), jnp.zeros(3))
    >>> jnp.argsort(priorities, descending=True)
    Array([0, 2, 1], dtype=int32)
    """
    if partition == "random" and extra is not None:
        return extra
    if partition not in ("magnitude", "loss"):
        raise ValueError(
            f"expected a partition among {WEIGHT_PARTITIONS}, with bits for random, "
            f"got {partition!r}"
        )
    size = jnp.abs(weights.astype(jnp.float32))
    if partition == "loss":
        size = jnp.square(weights.astype(jnp.float32) - nearest.astype(jnp.float32))
        size = size if extra is None else size * extra.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(size, jnp.uint32)  # sorts as floats >= 0 do


def threshold(
    priorities: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    frozen: jax.Array,
    amount: jax.Array,
) -> jax.Array:
    """Return the `amount`-th largest priority among the weights that are not frozen.

    Exact; by a sort of few weights. Of many, by counting two digits of 16 bits: two passes over
    the weights, and of arrays that are split over devices only the counts are sent.

    Args:
      priorities: elementwise function of the arrays' pieces, uint32.
      arrays: of the weights' shape.
      frozen: bool, of the same shape.
      amount: int32 scalar, from 1 to the number of weights that are not frozen.

    Returns:
      uint32 scalar.

    >>> x = jnp.array([5, 9, 7, 8], jnp.uint32)
    >>> threshold(lambda x: x, [x], jnp.array([False, True, False, False]), 2)
    Array(7, dtype=uint32)
    """
    if is_small(frozen.size):
        ranked = jnp.sort(jnp.where(frozen, jnp.uint32(0), priorities(*arrays)).reshape(-1))
        place = jnp.clip(frozen.size - amount, 0, frozen.size - 1)
        return ranked.at[place].get(mode="promise_in_bounds")
    mask = jnp.uint32(2**_DIGIT_BITS - 1)

    def counts(digit: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> jax.Array:
        def step(sums: jax.Array, frozen: jax.Array, *pieces: jax.Array) -> jax.Array:
            value, counted = digit(priorities(*pieces))
            return sums.at[value].add((counted & ~frozen).astype(jnp.int32))

        return fold(step, jnp.zeros(2**_DIGIT_BITS, jnp.int32), frozen, *arrays)

    def pick(counts: jax.Array, amount: jax.Array) -> tuple[jax.Array, jax.Array]:
        at_least = jnp.cumsum(counts[::-1])[::-1]
        digit = jnp.sum(at_least >= amount) - 1
        return digit.astype(jnp.uint32), amount - (at_least[digit] - counts[digit])

    high, left = pick(counts(lambda p: (p >> _DIGIT_BITS, p >= 0)), amount)
    low, _ = pick(counts(lambda p: (p & mask, (p >> _DIGIT_BITS) == high)), left)
    return (high << _DIGIT_BITS) | low
