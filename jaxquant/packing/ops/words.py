"""Products with a `ProductArray` from tables of its words: the test-time computation of Q-CNN.

For each subspace, the products of the input's piece with all K words, once; an output is a sum of
entries of these tables, one for each subspace (and position of the window). C K + M C' additions
and multiplications for a product of C inputs and C' outputs, in place of C C' (Wu et al., CVPR
2016, section 3.1). No float kernel exists.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.packing.arrays import PackedArray, ProductArray, product_codes
from jaxquant.packing.ops.reference import accumulator
from jaxquant.packing.ops.windows import Windows, padded, positions


def supports(x: jax.Array, packed: PackedArray | ProductArray) -> bool:
    """Return whether this can multiply by such a weight."""
    del x
    return isinstance(packed, ProductArray) and packed.ndim == 2


def matmul(x: jax.Array, packed: ProductArray) -> jax.Array:
    """Return [batch, columns] from x [batch, rows], for a weight without a window."""
    subspaces, _, length = packed.words.shape
    dtype = accumulator(x, packed)
    pieces = jnp.moveaxis(x.astype(dtype).reshape(-1, subspaces, length), 1, 0)

    def add(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        piece, words, codes = inputs
        return total + _look_up(_table(piece, words), codes), None

    start = jnp.zeros((x.shape[0], packed.shape[-1]), dtype)
    inputs = pieces, packed.words.astype(dtype), product_codes(packed)
    return loops.scan(add, start, inputs)[0]


def conv(
    x: jax.Array,
    packed: ProductArray,
    *,
    window_strides: tuple[int, ...],
    padding: Any,
    kernel_dilation: tuple[int, ...],
) -> jax.Array:
    """Return [batch, *space, features] from x [batch, *space, channels], channels last."""
    *window, _, _ = packed.shape
    subspaces, _, length = packed.words.shape
    dtype = accumulator(x, packed)
    options = Windows(tuple(window), window_strides, padding, kernel_dilation)
    # A table of padding is zero, as it should be: pad what the tables are made from.
    x = padded(x.astype(dtype), options)
    pieces = jnp.moveaxis(x.reshape(*x.shape[:-1], subspaces, length), -2, 0)
    space = jax.eval_shape(lambda: positions(x, options)[0]).shape[1:-1]

    def add(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        piece, words, codes = inputs
        seen = positions(_table(piece, words), options)
        for part, own in zip(seen, codes.reshape(len(seen), -1), strict=True):
            total += _look_up(part, own)
        return total, None

    codes = jnp.moveaxis(product_codes(packed), -2, 0)
    start = jnp.zeros((x.shape[0], *space, packed.shape[-1]), dtype)
    return loops.scan(add, start, (pieces, packed.words.astype(dtype), codes))[0]


def _table(piece: jax.Array, words: jax.Array) -> jax.Array:
    """Return the products [..., K] of inputs [..., D] with the words [K, D]."""
    return jnp.matmul(piece, words.T, precision=jax.lax.Precision.HIGHEST)


def _look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the entries [..., features] of tables [..., K] that the codes [features] name."""
    return table.at[..., codes].get(mode="promise_in_bounds")
