"""The product for CPU: a block of columns at a time, which stays in the cache.

Unpacking the whole weight first writes it to main memory and reads it back, at 20 times the bytes
of ternary codes. And XLA on CPU starts what it can as early as it can: the weights of all layers,
which wait for no input, would be unpacked at once. A loop it starts when its inputs are there, and
the blocks of all loops share their memory.
"""

import dataclasses
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
    width = _width(math.prod(packed.rows), columns, _block_columns(packed))
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


def _width(rows: int, columns: int, own: int) -> int:
    """Return how many columns are unpacked at a time, where `own` columns make a block of a weight.

    Blocks of a weight are taken whole, or in pieces of a size that divides theirs.
    """
    # Two at least: a loop of one would not be left a loop.
    count = min(columns, max(2, -(-rows * columns // _WEIGHTS)))
    width = -(-columns // max(count, 1))
    if own == columns:
        return width
    if own <= width:
        return -(-width // own) * own
    parts = (part for part in range(1, own + 1) if own % part == 0)
    return min(parts, key=lambda part: abs(math.log(part / width)))


def _block_columns(packed: PackedArray | ProductArray) -> int:
    """Return how many columns make a block of the weight; of one block along them, all."""
    (columns,) = packed.columns
    number = packed.numbers[-1] if isinstance(packed, PackedArray) else 1
    return columns // number


def cut(
    packed: PackedArray | ProductArray, start: jax.Array, width: int
) -> PackedArray | ProductArray:
    """Return some columns of a weight, from the first on: whole blocks, or columns of one."""
    if isinstance(packed, ProductArray):
        return dataclasses.replace(packed, codes=cut(packed.codes, start, width))
    own = _block_columns(packed)

    def of_blocks(table: jax.Array | None) -> jax.Array | None:
        if table is None or table.ndim == 1 or table.shape[-2] == 1:
            return table
        return jax.lax.dynamic_slice_in_dim(table, start // own, max(1, width // own), axis=-2)

    return dataclasses.replace(
        packed,
        codes=jax.lax.dynamic_slice_in_dim(packed.codes, start, width, axis=1),
        codebook=of_blocks(packed.codebook),
        scale=of_blocks(packed.scale),
        columns=(width,),
    )
