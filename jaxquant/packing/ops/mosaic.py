"""The product for TPU, a Pallas kernel: blocks of codes are unpacked in on-chip memory.

The bytes of a block come from main memory once, become float weights in registers, and are
multiplied by the matrix unit. So main memory moves packed bytes only, and no float weight exists
outside of the block at hand. On CPU the kernel is interpreted: exact and slow.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant import loops, platform
from jaxquant.packing.arrays import PackedArray
from jaxquant.packing.codes import byte_planes, unpack_planes
from jaxquant.packing.ops import planes
from jaxquant.packing.ops.reference import accumulator, output_like

_LANES = 128  # columns of a register, and the longest table that one gather reads
_ROWS, _COLUMNS, _VECTORS = 256, 256, 128  # of a block, the rows in bytes
_MOST_SELECTS = 17  # above, a gather; below about here it has no lead


def supports(x: jax.Array, packed: PackedArray) -> bool:
    """Return whether the kernel does this product: float32, few centroids or common ones."""
    few = packed.k <= _MOST_SELECTS or math.prod(packed.numbers) == 1
    return few and planes.has_codebooks(packed) and accumulator(x, packed) == jnp.float32


def matmul(x: jax.Array, packed: PackedArray) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], in float32; see `supports`."""
    x = x.astype(planes.operand_dtype(x, packed))
    codes = byte_planes(packed.codes, packed.k)
    fields, rows, columns = codes.shape
    row_block = min(_ROWS, _round_up(rows, _LANES))
    column_block = min(_COLUMNS, _round_up(columns, _LANES))
    vector_block = min(_VECTORS, _round_up(len(x), 16))
    table, table_spec = _table(packed, column_block)
    inputs = jnp.pad(
        planes.inputs(x, packed, row_block), ((0, -len(x) % vector_block), (0, 0), (0, 0))
    )
    inputs = jnp.moveaxis(inputs, 1, 0)
    args = inputs, codes, table
    y = pl.pallas_call(
        functools.partial(_kernel, k=packed.k),
        out_shape=output_like((inputs.shape[1], columns), jnp.float32, args),
        grid=(
            inputs.shape[1] // vector_block,
            pl.cdiv(columns, column_block),
            inputs.shape[2] // row_block,
        ),
        in_specs=[
            pl.BlockSpec((len(inputs), vector_block, row_block), lambda b, c, r: (0, b, r)),
            pl.BlockSpec((fields, row_block, column_block), lambda b, c, r: (0, r, c)),
            table_spec,
        ],
        out_specs=pl.BlockSpec((vector_block, column_block), lambda b, c, r: (b, c)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=platform.name() == "cpu",
    )(*loops.varying_like(args, args))
    return y[: len(x)]


def _table(packed: PackedArray, column_block: int) -> tuple[jax.Array, pl.BlockSpec]:
    """Return the centroids as the kernel reads them: by [k, column], or in rows of `_LANES`."""
    table = planes.centroids(packed).astype(jnp.float32)
    k, columns = table.shape
    if k > _MOST_SELECTS:
        table = jnp.pad(table[:, 0], (0, -k % _LANES)).reshape(-1, _LANES)
    elif columns == 1:
        table = jnp.broadcast_to(table, (k, column_block))
    else:
        return table, pl.BlockSpec((k, column_block), lambda b, c, r: (0, c))
    return table, pl.BlockSpec(table.shape, lambda b, c, r: (0, 0))


def _kernel(x_ref: Any, codes_ref: Any, table_ref: Any, y_ref: Any, *, k: int) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    fields = [codes_ref[i].astype(jnp.int32) for i in range(codes_ref.shape[0])]
    for i, codes in enumerate(unpack_planes(fields, k)):
        if k > _MOST_SELECTS:
            values = _gather(codes, table_ref, k)
        else:
            values = planes.select(codes, [table_ref[j : j + 1, :] for j in range(k)])
        x = x_ref[i]
        y_ref[...] += jnp.dot(
            x,
            values.astype(x.dtype),
            precision=None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )


def _gather(codes: jax.Array, table_ref: jax.Array, k: int) -> jax.Array:
    """Return the centroids of codes [rows, columns], `_LANES` columns and centroids at a time."""
    rows, columns = codes.shape
    parts = []
    for start in range(0, columns, _LANES):
        part, values = codes[:, start : start + _LANES], None
        for i in range(pl.cdiv(k, _LANES)):
            table = jnp.broadcast_to(table_ref[i : i + 1, :], (rows, _LANES))
            found = jnp.take_along_axis(table, part & 127, axis=1)
            values = found if values is None else jnp.where(part >> 7 == i, found, values)
        parts.append(values)
    return jnp.concatenate(parts, axis=1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
