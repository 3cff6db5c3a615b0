"""The product for CPU, of several vectors: a block of rows at a time, which stays in the cache.

Unpacking the whole weight first writes it to main memory and reads it back, at 20 times the bytes
of ternary codes.
"""

import functools

import jax
import jax.numpy as jnp

from jaxquant.codebooks import reconstruct
from jaxquant.ops import planes
from jaxquant.ops.reference import accumulator
from jaxquant.packing import PackedArray, byte_planes, unpack_planes

_ROWS = 32  # of bytes in a block
_MOST_SELECTS = 6  # centroids; above, reading a table is faster
_MOST_PLANES = 8  # above, unpacking all at once is faster


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether there is a product: few planes, few centroids or common ones."""
    del x
    few = packed.k <= _MOST_SELECTS or packed.codebook.size == packed.k
    return few and planes.has_codebooks(packed) and planes.count(packed.k) <= _MOST_PLANES


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider."""
    dtype = accumulator(x, packed)
    centroids = planes.centroids(packed).astype(dtype)
    codes = byte_planes(packed.codes, packed.k)
    rows = codes.shape[1]
    x = planes.inputs(x.astype(dtype), packed, 1)
    block = functools.partial(_block, x, codes, centroids)
    whole, rest = divmod(rows, _ROWS)
    # Starts with what is left over: a loop of no blocks could not be traced.
    y = block(rows - rest, rest)
    if whole:
        y = jax.lax.fori_loop(0, whole, lambda i, y: y + block(i * _ROWS, _ROWS), y)
    return y


def _block(
    x: jax.Array, codes: jax.Array, centroids: jax.Array, start: jax.Array | int, rows: int
) -> jax.Array:
    """Return what some rows of bytes add to [vectors, columns]."""
    k = len(centroids)
    x = jax.lax.dynamic_slice_in_dim(x, start, rows, axis=2)
    codes = jax.lax.dynamic_slice_in_dim(codes, start, rows, axis=1)
    parts = unpack_planes(list(codes), k)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if k <= _MOST_SELECTS:  # which XLA does while it unpacks, if nothing else stands between
        terms = [product(x[:, p], planes.select(c, centroids)) for p, c in enumerate(parts)]
        return functools.reduce(jnp.add, terms)
    values = reconstruct(jnp.concatenate(parts), centroids[:, 0])
    return product(x.reshape(len(x), -1), values)
