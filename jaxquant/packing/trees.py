"""Trees of packed weights: what `pack` makes of a quantized tree, and `unpack` of that."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxquant.meshes import compiled
from jaxquant.packing.arrays import (
    PackedArray,
    is_quantized,
    pack_array,
    unpack_array,
    unpack_node,
)
from jaxquant.rounds.state import QuantState, check_state, stored_tables
from jaxquant.trees import check_structure, leaves_with_paths, pure, replaced


def pack(params: Any, state: QuantState, *, inputs: Mapping[str, int] | None = None) -> Any:
    """Return the tree with every quantized leaf as a `PackedArray`; the others stay as they are.

    Five ternary codes take a byte, three of five centroids seven bits, one of 17 five; see
    `jaxquant.packing.codes`. What is in memory, or on a device, is really that small. For a file,
    which can be smaller still, see `save`.

    Args:
      params: tree of weights, every quantized leaf on its codebook: after the last round.
      state: from `quantize_round`.
      inputs: how many axes products with some weights sum over, by path: `plan.selection.inputs`
        where rules say so, or what `packed(function).inputs(...)` finds. Of the others it is all
        but the last.

    Returns:
      Tree with the structure of `params`, each quantized leaf a PackedArray node.

    Raises:
      ValueError: if the trees differ, a quantized leaf is not on its codebook, or inputs do not
        fit; names the leaf.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.arange(32.0).reshape(8, 4) % 3}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> jq.pack(params, state)["kernel"].codes.shape
    (2, 4)
    """
    given, params, state = params, pure(params, only_parameters=True), pure(state)
    check_state(state)
    check_structure(state.codebooks, params, "params to have the state's structure")
    pairs, own = leaves_with_paths(params), dict(inputs or {})
    unknown = sorted(own.keys() - {path for path, _ in pairs})
    if unknown:
        raise ValueError(f"inputs: expected paths of leaves, got {unknown[0]!r}")
    packed = [
        _pack_leaf(path, jnp.asarray(leaf), codebook, scale, own.get(path))
        if codebook.ndim
        else leaf
        for (path, leaf), codebook, scale in zip(pairs, *stored_tables(state), strict=True)
    ]
    packed = jax.tree.unflatten(jax.tree.structure(params), packed)
    return replaced(given, packed, only_parameters=True)


def _pack_leaf(
    path: str,
    weights: jax.Array,
    codebook: jax.Array,
    scale: jax.Array | None,
    inputs: int | None,
) -> PackedArray:
    codebook = codebook + jnp.zeros((), codebook.dtype)  # -0.0, which comes and goes, becomes 0.0
    try:
        packed = pack_array(weights, codebook, scale, inputs=inputs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    off = compiled(_count_other, packed, weights)
    if not isinstance(off, jax.core.Tracer) and off:
        raise ValueError(
            f"{path}: expected every weight on the codebook, as after the last round, "
            f"got {off} of {weights.size} that are not"
        )
    return packed


def _count_other(packed: PackedArray, weights: jax.Array) -> jax.Array:
    return jnp.sum(unpack_array(packed) != weights)


def unpack(packed: Any) -> Any:
    """Return the parameters that `pack` packed, equal bit for bit (a -0.0 comes back as 0.0).

    Args:
      packed: tree with PackedArray nodes, or ProductArrays.

    Returns:
      The tree with arrays in their place. Pure, under jit too.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.arange(32.0).reshape(8, 4) % 3}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> bool(jnp.all(unpack(pack(params, state))["kernel"] == params["kernel"]))
    True
    """

    return jax.tree.map(
        lambda node: unpack_node(node) if is_quantized(node) else node,
        packed,
        is_leaf=is_quantized,
    )
