"""The product for CPU: a block of rows at a time, which stays in the cache.

Unpacking the whole weight first writes it to main memory and reads it back, at 20 times the bytes
of ternary codes. What XLA makes of a block depends on how the codes lie in their bytes; the choices
below are those that `python -m benchmarks.matmul` finds fast.
"""

import functools

import jax
import jax.numpy as jnp

from jaxquant.codebooks import reconstruct
from jaxquant.ops import planes
from jaxquant.ops.reference import accumulator
from jaxquant.packing import PackedArray, byte_planes, unpack_planes

_SELECTS = range(2, 7)  # k whose codes are compared with every centroid; of others, a table is read
_HALF_BYTES = range(12, 17)  # k with two codes a byte
_SIX_BITS = range(33, 65)  # k whose codes take six bits: slower than unpacking all at once
_MOST_PLANES = 8  # above, that is so too
_WEIGHTS = 2**20  # unpacked at a time, 4 MB: the cache holds them, and a step has enough work


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether there is a product: few planes, few centroids or common ones."""
    del x
    fast = planes.count(packed.k) <= _MOST_PLANES and packed.k not in _SIX_BITS
    few = packed.k in _SELECTS or packed.codebook.size == packed.k
    return fast and few and planes.has_codebooks(packed)


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32 or wider."""
    dtype = accumulator(x, packed)
    centroids = planes.centroids(packed).astype(dtype)
    codes = byte_planes(packed.codes, packed.k)
    x = planes.inputs(x.astype(dtype), packed, 1)
    separate = packed.k in (*_SELECTS, *_HALF_BYTES)
    width = codes.shape[2] * (1 if separate else planes.count(packed.k))
    step = max(1, _WEIGHTS // max(1, width))
    whole, rest = divmod(codes.shape[1], step)
    block = functools.partial(_separate if separate else _together, x, codes, centroids)
    # Starts with what is left over: a loop of no blocks could not be traced.
    y = block(whole * step, rest)
    if whole:
        y = jax.lax.fori_loop(0, whole, lambda i, y: y + block(i * step, step), y)
    return y


def _separate(
    x: jax.Array, codes: jax.Array, centroids: jax.Array, start: jax.Array | int, rows: int
) -> jax.Array:
    """Return what some rows of bytes add to [vectors, columns], a product for each plane.

    So that XLA reads bytes, unpacks and decodes in a single pass.
    """
    x, parts = _cut(x, codes, len(centroids), start, rows)
    if len(centroids) in _SELECTS:
        values = [planes.select(part, centroids) for part in parts]
    else:
        values = [reconstruct(part, centroids[:, 0]) for part in parts]
    return functools.reduce(jnp.add, [_product(x[:, p], v) for p, v in enumerate(values)])


def _together(
    x: jax.Array, codes: jax.Array, centroids: jax.Array, start: jax.Array | int, rows: int
) -> jax.Array:
    """Return what some rows of bytes add to [vectors, columns], one product for all planes.

    Codes whose bits come from several bytes would be put together again for every use.
    """
    x, parts = _cut(x, codes, len(centroids), start, rows)
    return _product(x.reshape(len(x), -1), reconstruct(jnp.concatenate(parts), centroids[:, 0]))


def _cut(
    x: jax.Array, codes: jax.Array, k: int, start: jax.Array | int, rows: int
) -> tuple[jax.Array, list[jax.Array]]:
    x = jax.lax.dynamic_slice_in_dim(x, start, rows, axis=2)
    codes = jax.lax.dynamic_slice_in_dim(codes, start, rows, axis=1)
    return x, unpack_planes(list(codes), k)


def _product(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.matmul(x, values, precision=jax.lax.Precision.HIGHEST)
