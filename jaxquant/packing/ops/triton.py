"""The product for NVIDIA GPUs, a Pallas kernel through Triton: codes are unpacked in registers.

A program takes a block of columns and a share of the rows, and walks down it: bytes from memory,
shifts, centroids, products. A few vectors are multiplied weight by weight, as memory is the limit
there; more go through the tensor cores. What the shares of the rows add up to is summed after, so
the result is the same in every run. On CPU the kernel is interpreted: exact and slow.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxquant import loops, platform
from jaxquant.packing.arrays import PackedArray
from jaxquant.packing.codes import byte_planes, unpack_planes
from jaxquant.packing.ops import planes
from jaxquant.packing.ops.reference import accumulator, output_like

_MOST_SELECTS = 4  # centroids; above, every weight reads the codebook, which the cache holds
_MOST_SINGLE = 4  # vectors; above, tensor cores, which take 16 or more at once
_ROWS = 32  # of bytes at a time
_PROGRAMS = 512  # wanted, a few for each multiprocessor


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether the kernel does this product: in float32."""
    return planes.has_codebooks(packed) and accumulator(x, packed) == jnp.float32


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32; see `supports`."""
    x = x.astype(planes.operand_dtype(x, packed))
    codes = byte_planes(packed.codes, packed.k)
    _, rows, columns = codes.shape
    vector_block = _vector_block(x, packed.k)
    column_block = 128 if len(x) <= _MOST_SINGLE else 64
    vectors, blocks = pl.cdiv(len(x), vector_block), pl.cdiv(columns, column_block)
    steps = pl.cdiv(rows, _ROWS)
    shares = max(1, min(steps, _PROGRAMS // (vectors * blocks)))
    steps = pl.cdiv(steps, shares)  # of each share
    inputs = planes.inputs(x, packed, shares * steps * _ROWS)
    inputs = jnp.pad(inputs, ((0, -len(x) % vector_block), (0, 0), (0, 0)))
    args = inputs, codes, planes.centroids(packed).astype(jnp.float32)
    y = pl.pallas_call(
        functools.partial(
            _kernel, k=packed.k, steps=steps, vector_block=vector_block, column_block=column_block
        ),
        out_shape=output_like((shares, len(inputs), columns), jnp.float32, args),
        grid=(vectors, blocks, shares),
        # Loads ahead of their use wait in shared memory, which those of many planes would exceed.
        compiler_params=plgpu.CompilerParams(
            num_warps=4, num_stages=3 if planes.count(packed.k) <= 8 else 1
        ),
        interpret=platform.name() == "cpu",
    )(*loops.varying_like(args, args))
    return jnp.sum(y, axis=0)[: len(x)]


def _vector_block(x: jax.Array, k: int) -> int:
    """Return how many vectors a program multiplies, a power of two."""
    if len(x) <= _MOST_SINGLE:
        return len(x)
    # Float32 products are unrolled, for each plane: compilation takes a minute if they are large.
    most = 64 if x.dtype == jnp.bfloat16 else pl.next_power_of_2(160 // planes.count(k))
    return max(16, min(64, most, pl.next_power_of_2(len(x))))


def _kernel(
    x_ref: Any,
    codes_ref: Any,
    codebook_ref: Any,
    y_ref: Any,
    *,
    k: int,
    steps: int,
    vector_block: int,
    column_block: int,
) -> None:
    fields, rows, columns = codes_ref.shape
    first_vector = pl.program_id(0) * vector_block
    first_column = pl.program_id(1) * column_block
    share = pl.program_id(2)
    block = pl.ds(first_column, column_block)
    in_columns = first_column + jnp.arange(column_block, dtype=jnp.int32) < columns
    single = vector_block <= _MOST_SINGLE
    decode = functools.partial(
        _select if k <= _MOST_SELECTS else _gather, codebook_ref, k, block, in_columns
    )

    def step(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        row = (share * steps + i) * _ROWS
        mask = (row + jnp.arange(_ROWS, dtype=jnp.int32) < rows)[:, None] & in_columns[None, :]
        loaded = [
            plgpu.load(codes_ref.at[jnp.int32(f), pl.ds(row, _ROWS), block], mask=mask, other=0)
            for f in range(fields)
        ]
        for p, codes in enumerate(unpack_planes([a.astype(jnp.int32) for a in loaded], k)):
            values = decode(codes)
            if single:
                for v in range(vector_block):
                    x = x_ref[first_vector + v, p, pl.ds(row, _ROWS)].astype(jnp.float32)
                    sums[v] += x[:, None] * values
            else:
                x = x_ref[pl.ds(first_vector, vector_block), p, pl.ds(row, _ROWS)]
                exact = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
                sums[0] += jnp.dot(
                    x,
                    values.astype(x.dtype),
                    precision=exact,
                    preferred_element_type=jnp.float32,
                )
        return sums

    if single:
        sums = [jnp.zeros((_ROWS, column_block), jnp.float32) for _ in range(vector_block)]
        for v, total in enumerate(jax.lax.fori_loop(0, steps, step, sums)):
            at = y_ref.at[share, first_vector + v, block]
            plgpu.store(at, jnp.sum(total, axis=0), mask=in_columns)
    else:
        sums = [jnp.zeros((vector_block, column_block), jnp.float32)]
        (total,) = jax.lax.fori_loop(0, steps, step, sums)
        at = y_ref.at[share, pl.ds(first_vector, vector_block), block]
        plgpu.store(at, total, mask=jnp.broadcast_to(in_columns[None, :], total.shape))


def _select(
    codebook_ref: Any, k: int, block: Any, in_columns: jax.Array, codes: jax.Array
) -> jax.Array:
    """Return the centroids of codes [rows, columns], comparing with every one."""
    if codebook_ref.shape[1] == 1:
        return planes.select(codes, [codebook_ref[i, 0] for i in range(k)])
    of_columns = [
        plgpu.load(codebook_ref.at[jnp.int32(i), block], mask=in_columns, other=0.0)
        for i in range(k)
    ]
    return planes.select(codes, [centroids[None, :] for centroids in of_columns])


def _gather(
    codebook_ref: Any, k: int, block: Any, in_columns: jax.Array, codes: jax.Array
) -> jax.Array:
    """Return the centroids of codes [rows, columns], reading them."""
    del k
    if codebook_ref.shape[1] == 1:
        return codebook_ref[codes, jnp.zeros_like(codes)]
    columns = jnp.where(in_columns, block.start + jnp.arange(block.size, dtype=jnp.int32), 0)
    return codebook_ref[codes, jnp.broadcast_to(columns[None, :], codes.shape)]
