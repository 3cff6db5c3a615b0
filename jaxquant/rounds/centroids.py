"""Training the centroids of frozen clusters: their weights move together, and stay shared."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import checks
from jaxquant.clustering.blocks import by_batch, nearest, numbers_of
from jaxquant.clustering.clusters import partial_sums, spread
from jaxquant.clustering.codebooks import assign
from jaxquant.clustering.passes import fold
from jaxquant.meshes import compiled
from jaxquant.rounds.state import QuantState, check_state
from jaxquant.trees import check_leaves, leaves_with_paths, pure, replaced


def centroid_gradients(gradients: Any, params: Any, state: QuantState) -> Any:
    """Return the derivative by each centroid: the sum over the frozen weights that share it.

    By the chain rule, for a loss in which every frozen weight of a cluster is the same variable.
    Free weights do not count, so a cluster that is not frozen has a zero. So has a centroid that is
    exactly zero: it is pinned (or carries nothing to scale), and its weights stay zero.

    A sum over n members makes steps about n times as long as those of single weights. Divided by
    the square root of the members, as the step size of LSQ is, it can share their learning rate
    (Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.2):
    `centroid_gradients` of a tree of ones counts the members.

    Args:
      gradients: tree like `params`, by each weight.
      params: tree of weights, frozen ones equal to a centroid of `state` (`quantize_round`).
      state: as after `quantize_round`.

    Returns:
      Tree like `state.codebooks`, float32; leaves left alone have a scalar zero. Pure, under jit
      too; costs one pass over the weights and their gradients.

    Raises:
      ValueError: if a leaf of `gradients` or `params` does not fit the state, or has scaled
        blocks; names it.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.array([[0.0, 1.0], [2.0, 2.0]])}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> gradients = {"kernel": jnp.array([[5.0, 1.0], [10.0, 20.0]])}
    >>> jq.centroid_gradients(gradients, params, state)["kernel"].tolist()
    [0.0, 1.0, 30.0]
    """

    def leaf(weights: Any, gradient: Any, frozen: Any, codebook: Any, moves: Any) -> jax.Array:
        if not codebook.ndim:
            return jnp.zeros((), jnp.float32)
        return compiled(sums_of_blocks, (weights, gradient, frozen), (codebook, moves))

    gradients, params = (pure(x, only_parameters=True) for x in (gradients, params))
    state = pure(state)
    _check_state(state)
    shapes = _shapes(state.frozen)
    check_leaves("gradients", gradients, shapes)
    check_leaves("params", params, shapes)
    return jax.tree.map(leaf, params, gradients, state.frozen, state.codebooks, _movable(state))


def _sums(
    weights: jax.Array,
    gradient: jax.Array,
    frozen: jax.Array,
    centroids: jax.Array,
    moves: jax.Array,
) -> jax.Array:
    """Return the sums [k] of one codebook, float32."""
    k = centroids.shape[0]
    parts = partial_sums(weights.size)

    def step(sums: jax.Array, weights: jax.Array, gradient: jax.Array, frozen: jax.Array):
        codes = assign(weights, centroids).astype(jnp.int32)
        slot = codes * parts + spread(weights.shape, parts)
        # `where`, not a product: a free weight's NaN is not the centroid's.
        part = jnp.where(frozen, gradient.astype(jnp.float32), 0.0)
        return sums.at[slot].add(part, mode="promise_in_bounds")

    sums = fold(step, jnp.zeros(k * parts, jnp.float32), weights, gradient, frozen)
    return jnp.where(moves, jnp.sum(sums.reshape(k, parts), axis=1), 0.0)


def sums_of_blocks(arrays: tuple[jax.Array, ...], tables: tuple[jax.Array, ...]) -> jax.Array:
    """Return the sum of gradients over the members of each centroid, float32.

    Args:
      arrays: weights, gradients, and which of them count.
      tables: [k] or [*numbers, k]: the centroids, and which of them get a sum.
    """
    shape = tables[0].shape
    numbers = numbers_of(shape, arrays[0].shape)
    own = [table.reshape(*numbers, shape[-1]) for table in tables]
    return by_batch(_sums, arrays, own, numbers).reshape(shape)


def set_centroids(params: Any, state: QuantState, codebooks: Any) -> tuple[Any, QuantState]:
    """Move the centroids of frozen clusters, and every weight that shares one along with it.

    Weights stay on their codebook bit for bit, and in their cluster. Clusters that are not frozen
    and centroids that are exactly zero keep their value. In half precision, small moves are lost to
    rounding: keep the codebooks that the optimizer sees in float32.

    Args:
      params: tree of weights, frozen ones equal to a centroid of `state`.
      state: as after `quantize_round`.
      codebooks: tree like `state.codebooks`, of any floating dtype.

    Returns:
      New params and state. Pure, under jit too; costs a pass over the weights.

    Raises:
      ValueError: if a leaf of `params` or `codebooks` does not fit the state, or has scaled blocks;
        names it.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.array([[0.0, 1.0], [2.0, 2.0]])}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> params, state = jq.set_centroids(params, state, {"kernel": jnp.array([0.0, 1.5, 2.5])})
    >>> params["kernel"].tolist()
    [[0.0, 1.5], [2.5, 2.5]]
    """

    def leaf(weights: Any, frozen: Any, old: Any, new: Any) -> jax.Array:
        if not old.ndim:
            return weights
        return compiled(_moved, weights, frozen, old, new, like=weights)

    given, params = params, pure(params, only_parameters=True)
    state, codebooks = pure(state), pure(codebooks)
    _check_state(state)
    check_leaves("params", params, _shapes(state.frozen))
    check_leaves("codebooks", codebooks, _shapes(state.codebooks))
    checks.values({f"codebooks: {path}": leaf for path, leaf in leaves_with_paths(codebooks)})
    moved = jax.tree.map(
        lambda old, new, moves: jnp.where(moves, jnp.asarray(new).astype(old.dtype), old),
        state.codebooks,
        codebooks,
        _movable(state),
    )
    params = jax.tree.map(leaf, params, state.frozen, state.codebooks, moved)
    return replaced(given, params, only_parameters=True), state._replace(codebooks=moved)


def _moved(weights: jax.Array, frozen: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(weights.dtype)  # from that of the centroids, which may be narrower
    return jnp.where(frozen, nearest(weights, old, new), weights)


def _movable(state: QuantState) -> Any:
    return jax.tree.map(
        lambda codebook, frozen: frozen & (codebook != 0), state.codebooks, state.frozen_centroids
    )


def _check_state(state: QuantState) -> None:
    """Refuse what is no state, and leaves whose centroids are products of two variables."""
    check_state(state)
    scales = [] if state.scales is None else leaves_with_paths(state.scales)
    scaled = [path for path, scale in scales if jnp.ndim(scale)]
    if scaled:
        raise ValueError(
            f"{scaled[0]}: expected blocks with centroids of their own, got one codebook with a "
            "scale for each block: leave it out of training centroids, or quantize it without "
            "`scaled`"
        )


def _shapes(tree: Any) -> list[tuple[str, tuple[int, ...] | None]]:
    """Return what `check_leaves` expects: any shape where a leaf is left alone, a scalar here."""
    return [(path, leaf.shape if leaf.ndim else None) for path, leaf in leaves_with_paths(tree)]
