"""What a round leaves for the next, and what can be asked of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.clustering.blocks import nearest
from jaxquant.meshes import compiled
from jaxquant.trees import check_structure, pure


class QuantState(NamedTuple):
    """What the next round needs; trees have the structure of the parameters.

    A leaf that is left alone has a scalar zero as its codebook and a scalar False as its mask. A
    leaf with a codebook for each slice along an axis has them stacked, ones in place of the other
    axes.
    """

    codebooks: Any  # [k], or [.., slices, .., k], of the leaf's dtype; zeros before its first round
    frozen: Any  # bool, like the leaf: True = quantized = frozen
    frozen_centroids: Any  # bool, like the codebook: clusters that weights are frozen in
    round: jax.Array  # int32 scalar, the row of the schedule that comes next
    scales: Any = None  # [*numbers, 1] of leaves with scaled blocks, else a scalar zero; or no tree


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

    return jax.tree.map(check, params, state.codebooks)


def _is_on(leaf: jax.Array, codebook: jax.Array) -> jax.Array:
    return jnp.all(nearest(leaf, codebook) == leaf)
