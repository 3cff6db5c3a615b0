"""Matrix-vector products by table: look up what a byte of codes adds, instead of unpacking it.

A byte holds the codes of up to eight rows. For one input vector, what these rows add to a column is
a function of the byte alone; so for each row of bytes a table of 256 sums is made, once for all
columns, and a column is the sum of one entry from each. At k = 3 that is one read for five
products (compare product quantization; Wu et al., CVPR 2016). Where codes share a symbol that lies
in several bytes, the symbol takes the place of the byte: at k = 5 it is one read for three.

All is done in loops over few rows, whose tables the innermost cache holds. XLA on CPU starts what
it can as early as it can, so only what a loop needs anew in each step takes no memory in between:
the loops of all layers share theirs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import loops
from jaxquant.packing.arrays import PackedArray
from jaxquant.packing.codes import (
    byte_planes,
    field_widths,
    num_symbols,
    symbol,
    symbols_together,
    unpack_symbols,
)
from jaxquant.packing.ops.reference import accumulator

_READS = 16  # of tables in a step, for each column: fewer take more steps, more exceed the cache


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether there are tables: of one codebook; columns may have scales, if not rounded."""
    del x
    if packed.k == 1 or packed.codebook.size > packed.k:
        return False
    wide = packed.dtype in (jnp.float32, jnp.float64)
    return math.prod(packed.numbers if not wide else packed.numbers[:-1]) == 1


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider.

    Costs, for each vector, 256 sums and as many reads as columns for each row of bytes (or 2**bits
    sums, for each row of symbols).
    """
    dtype = accumulator(x, packed)
    is_one = math.prod(packed.numbers) == 1
    centroids = (packed.centroids if is_one else packed.codebook).reshape(-1).astype(dtype)
    product = functools.partial(_vector, packed=packed, centroids=centroids)
    y = jax.lax.map(product, x.astype(dtype))
    if is_one or packed.scale is None:
        return y
    together = y.shape[-1] // packed.numbers[-1]
    return y * jnp.repeat(packed.scale.reshape(-1).astype(dtype), together)[None]


def reads(k: int) -> int:
    """Return how many codes a read from a table stands for.

    >>> [reads(k) for k in (2, 3, 5, 16, 17)]
    [8, 5, 3, 2, 1]
    """
    digits, bits = symbol(k)
    return digits * (8 // bits if _is_in_bytes(k) else 1)


def _vector(x: jax.Array, *, packed: PackedArray, centroids: jax.Array) -> jax.Array:
    """Return [columns] from x [rows]."""
    k = packed.k
    digits, bits = symbol(k)
    count = num_symbols(len(x), k)
    x = jnp.pad(x, (0, digits * count - len(x))).reshape(digits, count)
    if not _is_in_bytes(k):
        planes = byte_planes(packed.codes, k)
        inputs = jnp.moveaxis(x.reshape(digits, symbols_together(k), -1), 0, 1)
        return _sum_of_symbols(inputs, centroids[_codes(k, digits, bits, bits)], planes, k)
    width, *upper = field_widths(bits)
    inputs = x.reshape(digits * 8 // width, -1)  # the codes of a byte, one below the other
    y = _sum_of_bytes(inputs, centroids[_codes(k, digits, width, 8)], packed.codes, 0)
    if upper:
        last = (centroids[-1] - centroids[0]) * jnp.asarray(_codes(2, 1, 1, 8), x.dtype)
        y += _sum_of_bytes(x.reshape(8, -1), last, packed.codes, inputs.shape[1])
    return y


def _is_in_bytes(k: int) -> bool:
    """Return whether the codes' part in a product is a sum over the bytes that hold them.

    So it is if symbols are not cut, and if they are cut in two, the upper part a bit that the last
    code alone has: it takes the first centroid away and adds the last.
    """
    digits, bits = symbol(k)
    width, *upper = field_widths(bits) or [0]
    return not upper or (digits, upper, k) == (1, [1], 2**width + 1)


def _codes(k: int, digits: int, width: int, bits: int) -> np.ndarray:
    """Return the codes in each number of `bits` bits, [codes, 2**bits], as `packing` lays them out.

    The number is a symbol of so many digits and bits, or a byte of several of such a width.
    """
    numbers = np.arange(2**bits)
    symbols = [numbers >> (width * i) & (2**width - 1) for i in range(bits // width)]
    # A symbol that no codes make does not occur: any code will do for it.
    return np.stack([s // k**d % k for d in range(digits) for s in symbols])


def _sum_of_bytes(x: jax.Array, values: jax.Array, codes: jax.Array, first: int) -> jax.Array:
    """Return the sums [columns] over rows of bytes.

    Args:
      x: [codes, rows], the inputs of the codes in a byte.
      values: [codes, 256], what they stand for in each byte.
      codes: [..., columns], rows of bytes.
      first: number of the first row.
    """
    length = x.shape[1]
    rows = min(_READS, length)

    def add(step: jax.Array, y: jax.Array) -> jax.Array:
        start = first + _start(step, rows, length)
        numbers = jax.lax.dynamic_slice_in_dim(codes, start, rows)
        return _add_entries(y, _table(x, values, step, rows), numbers)

    y = jnp.zeros(codes.shape[1], x.dtype)
    return loops.fori_loop(0, -(-length // rows), add, y)


def _sum_of_symbols(x: jax.Array, values: jax.Array, codes: jax.Array, k: int) -> jax.Array:
    """Return the sums [columns] over planes of symbols.

    Args:
      x: [planes, digits, rows], the inputs of the codes in a symbol.
      values: [digits, symbols], what they stand for in each symbol.
      codes: [byte planes, rows, columns].
      k: number of centroids.
    """
    planes, _, length = x.shape
    rows = min(max(1, _READS // planes), length)

    def read(step: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(codes, _start(step, rows, length), rows, axis=1)

    def unpack(read: jax.Array) -> jax.Array:
        return jnp.stack(unpack_symbols(list(read), k))

    # A step unpacks for the next what that before has read: XLA would not vectorize what unpacks
    # from a place that varies, and would unpack for every table what it reads in the same step.
    def add(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        y, numbers, ahead = carry
        table = _table(x, values, step, rows)
        y = _add_entries(y, *(a.reshape(planes * rows, -1) for a in (table, numbers)))
        return y, unpack(ahead), read(step + 2)

    y = jnp.zeros(codes.shape[2], x.dtype)
    start = y, unpack(read(0)), read(1)
    return loops.fori_loop(0, -(-length // rows), add, start)[0]


def _start(step: jax.Array | int, rows: int, length: int) -> jax.Array:
    """Return the first row of a step; the last step goes over rows that were there before."""
    return jnp.minimum(step * rows, length - rows)


def _table(x: jax.Array, values: jax.Array, step: jax.Array, rows: int) -> jax.Array:
    """Return what each number adds in the rows of a step, [..., rows, numbers]."""
    start = _start(step, rows, x.shape[-1])
    x = jax.lax.dynamic_slice_in_dim(x, start, rows, axis=x.ndim - 1)
    x = jnp.where(start + jnp.arange(rows) < step * rows, 0, x)
    return jnp.einsum("...cr,cn->...rn", x, values, precision=jax.lax.Precision.HIGHEST)


def _add_entries(y: jax.Array, table: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return y [columns] plus the entries of the table's rows that the rows of numbers name.

    Row by row: XLA is slow at reading from all rows by one gather.
    """
    for row, codes in zip(table, numbers, strict=True):
        y += row.at[codes].get(mode="promise_in_bounds")
    return y
