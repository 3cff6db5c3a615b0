"""Matrix-vector products by table: look up what a byte of codes adds, instead of unpacking it.

A byte holds the codes of up to eight rows. For one input vector, what these rows add to a column is
a function of the byte alone; so for each row of bytes a table of 256 sums is made, once for all
columns, and a column is the sum of one entry from each. At k = 3 that is one read for five
products (compare product quantization; Wu et al., CVPR 2016).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.ops.reference import accumulator
from jaxquant.packing import PackedArray, field_widths, num_symbols, symbol


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether there are tables for the codebook: one for all weights, whole bytes of codes.

    k = 17 is the one of several fields that has: its fifth bit is set only in the code 16.
    """
    del x
    single = len(field_widths(symbol(packed.k)[1])) == 1
    return packed.codebook.size == packed.k and (single or packed.k == 17)


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider.

    Costs, for each vector, 256 sums and as many reads as columns for each row of bytes.
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
    if k != 17:
        return _sum(packed.codes, _by_byte(x, 8 // bits), centroids[_digits(k, digits, bits)])
    # Four low bits a code, two codes a byte: all but the code 16, which looks like a 0.
    low = count // 2
    most = _sum(packed.codes[:low], _by_byte(x, 2), centroids[_digits(16, 1, 4)])
    extra = jnp.stack([jnp.zeros_like(centroids[0]), centroids[16] - centroids[0]])
    return most + _sum(packed.codes[low:], _by_byte(x, 8), extra[_digits(2, 1, 1)])


def _digits(k: int, digits: int, bits: int) -> np.ndarray:
    """Return the codes in each byte, [digits * symbols, 256], as `packing` lays them out."""
    symbols = [np.arange(256) >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    # A symbol that no codes make does not occur: any code will do for it.
    return np.stack([s // k**d % k for d in range(digits) for s in symbols])


def _by_byte(x: jax.Array, symbols: int) -> jax.Array:
    """Sort inputs [digits, count] by the byte that holds their code: [bytes, digits * symbols]."""
    digits, count = x.shape
    return x.reshape(digits * symbols, count // symbols).T


def _sum(codes: jax.Array, x: jax.Array, values: jax.Array) -> jax.Array:
    """Sum over the rows of bytes: table[row, byte], table = x [rows, codes] @ values [codes, 256].

    Returns [columns].
    """
    table = jnp.matmul(x, values, precision=jax.lax.Precision.HIGHEST)
    entries = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=1, mode="promise_in_bounds")
    return jnp.sum(entries, axis=0)
