"""The product for CPU: a block of columns at a time, which stays in the cache.

Unpacking the whole weight first writes it to main memory and reads it back, at 20 times the bytes
of ternary codes. And XLA on CPU starts what it can as early as it can: the weights of all layers,
which wait for no input, would be unpacked at once. A loop it starts when its inputs are there, and
the blocks of all loops share their memory.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.packing.arrays import PackedArray, ProductArray
from jaxquant.packing.ops import reference

_WEIGHTS = 2**18  # unpacked at a time, 1 MB: the cache of one core holds them


def supports(x: jax.Array, packed: PackedArray | ProductArray) -> bool:
    """Return whether there is a product: always."""
    del x, packed
    return True


def matmul(x: jax.Array, packed: PackedArray | ProductArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider."""
    (columns,) = packed.columns
    # Two blocks at least: a loop of one would not be left a loop.
    count = min(columns, max(2, -(-math.prod(packed.rows) * columns // _WEIGHTS)))
    width = -(-columns // max(count, 1))
    last = columns - width  # where the last block starts, over columns that were there before

    def block(number: jax.Array | int) -> PackedArray | ProductArray:
        return cut(packed, jnp.minimum(number * width, last), width)

    # Cut out a step ahead: XLA would not vectorize what unpacks bytes from a place that varies.
    def add(number: jax.Array, carry: tuple[jax.Array, PackedArray | ProductArray]):
        y, ahead = carry
        part, start = reference.matmul(x, ahead), jnp.minimum(number * width, last)
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=1), block(number + 1)

    y = jnp.zeros((x.shape[0], columns), reference.accumulator(x, packed))
    return loops.fori_loop(0, -(-columns // max(width, 1)), add, (y, block(0)))[0]


def cut(
    packed: PackedArray | ProductArray, start: jax.Array, width: int
) -> PackedArray | ProductArray:
    """Return some columns of a weight, from the first on."""
    if isinstance(packed, ProductArray):
        return dataclasses.replace(packed, codes=cut(packed.codes, start, width))
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width)
    codebook = packed.codebook
    if codebook.ndim > 1 and (codebook.shape[-2],) == packed.columns:  # one for each column
        codebook = take(codebook, axis=codebook.ndim - 2)
    return dataclasses.replace(
        packed, codes=take(packed.codes, axis=1), codebook=codebook, columns=(width,)
    )
