"""What the products share that unpack only a part of the weight at a time.

Row j of code plane p, of B rows each, is row p * B + j of the weight, and its bits stand at the
same place of the planes of bytes; see `packing.unpack_planes`. So a product is the sum over the
planes of a plane's inputs times the centroids of its codes, and any block of rows and columns can
be taken by itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.packing.arrays import PackedArray
from jaxquant.packing.codes import num_symbols, symbol, symbols_together
from jaxquant.packing.ops.reference import accumulator


def count(k: int) -> int:
    """Return how many planes of codes there are.

    >>> [count(k) for k in (2, 3, 5, 16, 17)]
    [8, 5, 24, 2, 8]
    """
    return symbol(k)[0] * symbols_together(k)


def has_codebooks(packed: PackedArray) -> bool:
    """Return whether there are `centroids`: no column in more than one block."""
    return packed.k > 1 and math.prod(packed.numbers[:-1]) == 1


def centroids(packed: PackedArray) -> jax.Array:
    """Return the codebooks as [k, columns], or as [k, 1] if there is one."""
    table = packed.centroids.reshape(-1, packed.k)
    together = math.prod(packed.columns) // len(table)
    return (table if len(table) == 1 else jnp.repeat(table, together, axis=0)).T


def operand_dtype(x: jax.Array, packed: PackedArray) -> Any:
    """Return the dtype of what matrix units multiply: bfloat16, if exact in sums of float32."""
    both = x.dtype == packed.dtype == jnp.bfloat16
    return jnp.bfloat16 if both else accumulator(x, packed)


def inputs(x: jax.Array, packed: PackedArray, multiple: int) -> jax.Array:
    """Return x [vectors, rows of codes] as [vectors, planes, rows], rows rounded up to a multiple.

    Zeros fill it up, which also take out what stands in bytes behind the last code.
    """
    planes = count(packed.k)
    rows = num_symbols(math.prod(packed.rows), packed.k) // symbols_together(packed.k)
    x = jnp.pad(x, ((0, 0), (0, planes * rows - x.shape[1]))).reshape(len(x), planes, rows)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -rows % multiple)))


def select(codes: jax.Array, centroids: Sequence[jax.Array] | jax.Array) -> jax.Array:
    """Return the centroid of each code, by comparing with every one: k - 1 selects."""
    values = centroids[0]
    for i in range(1, len(centroids)):
        values = jnp.where(codes == i, centroids[i], values)
    return jnp.broadcast_to(values, codes.shape)
