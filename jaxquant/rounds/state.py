"""What a round leaves for the next, and what can be asked of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.clustering.blocks import centroids_of, nearest
from jaxquant.meshes import compiled
from jaxquant.trees import check_structure, pure


class QuantState(NamedTuple):
    """What the next round needs; trees have the structure of the parameters.

    A leaf that is left alone has scalars: a zero as its codebook, a False as its masks. A leaf that
    is cut into blocks has the codebooks of its blocks, `[*numbers of blocks along each axis, k]`.
    Where it has scales, its codebook is one for many blocks, with ones in place of their numbers,
    and the centroids of a block are the codebook times the block's scale: see `block_codebooks`.
    """

    codebooks: Any  # [k], or [*numbers, k], as they are stored; zeros before its first round
    frozen: Any  # bool, like the leaf: True = quantized = frozen
    frozen_centroids: Any  # bool, like the codebook: clusters that weights are frozen in
    round: jax.Array  # int32 scalar, the row of the schedule that comes next
    scales: Any = None  # [*numbers, 1] of the leaves that have some; None where none has


def block_codebooks(state: QuantState, params: Any) -> Any:
    """Return the centroids of every block of every leaf, in the dtype of the leaf.

    Args:
      state: of the structure of the parameters.
      params: tree of weights; only dtypes are read.

    Returns:
      Tree of `[k]` or `[*numbers, k]`; scalars for leaves that are left alone.
    """
    rows = zip(*stored_tables(state), jax.tree.leaves(params), strict=True)
    return jax.tree.structure(state.codebooks).unflatten(
        [
            centroids_of(codebook, scale, leaf.dtype) if codebook.ndim else codebook
            for codebook, scale, leaf in rows
        ]
    )


def stored_tables(state: QuantState) -> tuple[list[jax.Array], list[jax.Array | None]]:
    """Return for each leaf its codebooks as they are stored, and its scale or None."""
    codebooks = jax.tree.leaves(state.codebooks)
    if state.scales is None:
        return codebooks, [None] * len(codebooks)
    return codebooks, [scale if scale.ndim else None for scale in jax.tree.leaves(state.scales)]


def check_state(state: Any) -> None:
    """Refuse what is no `QuantState`: checkpoints that are restored by structure alone lose types.

    Raises:
      ValueError: says what it is.
    """
    if not isinstance(state, QuantState):
        raise ValueError(
            f"expected a jq.QuantState, got {type(state).__name__} (restored without its type? "
            "Restore into jq.init(plan, params))"
        )


def is_on_codebook(params: Any, state: QuantState) -> Any:
    """Return for each leaf whether every weight equals a centroid of its codebook, bit for bit.

    A leaf that is left alone has nothing to be off: True. (-0.0 equals 0.0.)

    Args:
      params: tree of weights.
      state: of the same structure.

    Returns:
      Tree of scalar bools.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4) % 3}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> bool(is_on_codebook(params, state)["kernel"])
    True
    """

    params, state = pure(params, only_parameters=True), pure(state)
    check_state(state)
    check_structure(state.codebooks, params, "params to have the state's structure")

    def check(leaf: jax.Array, codebook: jax.Array) -> jax.Array:
        return compiled(_is_on, leaf, codebook) if codebook.ndim else jnp.bool_(True)

    return jax.tree.map(check, params, block_codebooks(state, params))


def _is_on(leaf: jax.Array, codebook: jax.Array) -> jax.Array:
    return jnp.all(nearest(leaf, codebook) == leaf)
