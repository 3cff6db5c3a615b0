"""Matrix-vector products by table: look up what a byte of codes adds, instead of unpacking it.

A byte holds the codes of up to eight rows. For one input vector, what these rows add to a column is
a function of the byte alone; so for each row of bytes a table of 256 sums is made, once for all
columns, and a column is the sum of one entry from each. At k = 3 that is one read for five
products (compare product quantization; Wu et al., CVPR 2016). Where codes share a symbol that lies
in several bytes, the symbol takes the place of the byte: at k = 5 it is one read for three.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.ops.reference import accumulator
from jaxquant.packing import (
    PackedArray,
    byte_planes,
    field_widths,
    num_symbols,
    symbol,
    symbols_together,
    unpack_symbols,
)


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether there are tables: for one codebook of whole bytes or several codes a read."""
    del x
    digits, bits = symbol(packed.k)
    tables = bits > 0 and (digits > 1 or 8 % bits == 0)
    return packed.codebook.size == packed.k and tables


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider.

    Costs, for each vector, 256 sums and as many reads as columns for each row of bytes (or 128, for
    each row of symbols of seven bits).
    """
    dtype = accumulator(x, packed)
    centroids = packed.codebook.reshape(-1).astype(dtype)
    product = functools.partial(_vector, packed=packed, centroids=centroids)
    return jax.lax.map(product, x.astype(dtype))


def _vector(x: jax.Array, *, packed: PackedArray, centroids: jax.Array) -> jax.Array:
    """Return [columns] from x [rows]."""
    rows, k = math.prod(packed.rows), packed.k
    digits, bits = symbol(k)
    count = num_symbols(rows, k)
    x = jnp.pad(x, (0, digits * count - rows)).reshape(digits, count)
    if len(field_widths(bits)) == 1:
        x = x.reshape(digits * (8 // bits), -1)  # the codes of a byte, one below the other
        return _sum(packed.codes, x, centroids[_codes(k, 8)])
    symbols = unpack_symbols(list(byte_planes(packed.codes, k)), k)
    x = x.reshape(digits, symbols_together(k), -1)
    values = centroids[_codes(k, bits)]
    sums = [_sum(plane, x[:, p], values) for p, plane in enumerate(symbols)]
    return functools.reduce(jnp.add, sums)


def _codes(k: int, bits: int) -> np.ndarray:
    """Return the codes in each number of `bits` bits, [codes, 2**bits], as `packing` lays them out.

    The number is a symbol, or a byte of symbols.
    """
    digits, width = symbol(k)
    numbers = np.arange(2**bits)
    symbols = [numbers >> (width * i) & (2**width - 1) for i in range(bits // width)]
    # A symbol that no codes make does not occur: any code will do for it.
    return np.stack([s // k**d % k for d in range(digits) for s in symbols])


def _sum(numbers: jax.Array, x: jax.Array, values: jax.Array) -> jax.Array:
    """Return the sums [columns] over the rows of numbers, each standing for some codes.

    Row r of the table is what each number adds there: x[:, r] @ values, [codes] @ [codes, numbers].
    """
    table = jnp.matmul(x.T, values, precision=jax.lax.Precision.HIGHEST)
    entries = jnp.take_along_axis(
        table, numbers.astype(jnp.int32), axis=1, mode="promise_in_bounds"
    )
    return jnp.sum(entries, axis=0)
