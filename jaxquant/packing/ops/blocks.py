"""The products for CPU: a block of columns, or of rows, at a time, which stays in the cache.

Unpacking the whole weight first writes it to main memory and reads it back, at 20 times the bytes
of ternary codes. And XLA on CPU starts what it can as early as it can: the weights of all layers,
which wait for no input, would be unpacked at once. A loop it starts when its inputs are there, and
the blocks of all loops share their memory.
"""

import math

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.packing.arrays import PackedArray, ProductArray
from jaxquant.packing.codes import byte_planes, unpack_planes
from jaxquant.packing.ops import planes, reference
from jaxquant.packing.parts import columns_of_a_block, decoded_rows, run_of_columns

_WEIGHTS = 2**18, 2**20  # unpacked at a time, at least and at most: 1 MB, which a cache holds, to 4
_OF_A_VECTOR = 2**11  # so many for each vector: what many take themselves, their weights may too


def supports(x: jax.Array, packed: PackedArray | ProductArray) -> bool:
    """Return whether there is a product: always."""
    del x, packed
    return True


def matmul(x: jax.Array, packed: PackedArray | ProductArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider."""
    (columns,) = packed.columns
    width = _width(x.shape[0], math.prod(packed.rows), columns, columns_of_a_block(packed))
    last = columns - width  # where the last block starts, over columns that were there before

    def block(number: jax.Array | int) -> PackedArray | ProductArray:
        return run_of_columns(packed, jnp.minimum(number * width, last), width)

    # Cut out a step ahead: XLA would not vectorize what unpacks bytes from a place that varies.
    def add(number: jax.Array, carry: tuple[jax.Array, PackedArray | ProductArray]):
        y, ahead = carry
        part, start = reference.matmul(x, ahead), jnp.minimum(number * width, last)
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=1), block(number + 1)

    y = jnp.zeros((x.shape[0], columns), reference.accumulator(x, packed))
    return loops.fori_loop(0, -(-columns // max(width, 1)), add, (y, block(0)))[0]


def _weights(vectors: int) -> int:
    """Return how many weights are unpacked at a time; for a symbolic number of vectors, few."""
    least, most = _WEIGHTS
    return max(least, min(most, _OF_A_VECTOR * vectors)) if isinstance(vectors, int) else least


def _width(vectors: int, rows: int, columns: int, own: int) -> int:
    """Return how many columns are unpacked at a time, where `own` columns make a block of a weight.

    Blocks of a weight are taken whole, or in pieces of a size that divides theirs.
    """
    # Two at least: a loop of one would not be left a loop.
    count = min(columns, max(2, -(-rows * columns // _weights(vectors))))
    width = -(-columns // max(count, 1))
    if own == columns:
        return width
    if own <= width:
        return -(-width // own) * own
    parts = (part for part in range(1, own + 1) if own % part == 0)
    return min(parts, key=lambda part: abs(math.log(part / width)))


def matmul_transposed(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, prod(rows)] from x [vectors, columns], in float32 or wider.

    Rows of bytes are taken some at a time, with all the rows of codes that they hold: row j of code
    plane p is row p B + j of the weight, see `packing.planes`.
    """
    codes, count = byte_planes(packed.codes, packed.k), planes.count(packed.k)
    length, columns = codes.shape[-2:]
    rows, dtype = math.prod(packed.rows), reference.accumulator(x, packed)
    # Two steps at least: a loop of one would not be left a loop.
    height = -(-length // min(length, max(2, -(-count * length * columns // _weights(x.shape[0])))))
    last = length - height

    def first(number: jax.Array | int) -> jax.Array:
        return jnp.minimum(number * height, last)

    def read(number: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(codes, first(number), height, axis=1)

    # Cut out a step ahead, as in `matmul`.
    def add(number: jax.Array, carry: tuple[jax.Array, jax.Array]):
        y, ahead = carry
        own = jnp.concatenate(unpack_planes(list(ahead), packed.k))
        rows_of_plane = first(number) + jnp.arange(height)
        places = jnp.arange(count)[:, None] * length + rows_of_plane[None]
        numbers = jnp.minimum(places.reshape(-1), rows - 1)  # bytes hold some codes of no row
        weights = decoded_rows(packed, own, numbers).astype(dtype)
        part = jnp.matmul(x.astype(dtype), weights.T, precision=jax.lax.Precision.HIGHEST)
        part = part.reshape(-1, count, height)
        y = jax.lax.dynamic_update_slice_in_dim(y, part, first(number), axis=2)
        return y, read(number + 1)

    y = jnp.zeros((x.shape[0], count, length), dtype)
    y, _ = loops.fori_loop(0, -(-length // height), add, (y, read(0)))
    return y.reshape(-1, count * length)[:, :rows]
