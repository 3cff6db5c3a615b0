"""Parts of a packed weight: layers and columns packed as they are, rows unpacked by themselves."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.clustering.blocks import are_runs
from jaxquant.packing.arrays import PackedArray, ProductArray, decoded
from jaxquant.packing.codes import unpack_rows


@functools.singledispatch
def rows_of(packed: PackedArray, numbers: jax.Array) -> Any:
    """Return some rows of one layer, unpacked; of the others nothing is read.

    A class of weights whose rows stay what they are registers its way.

    Args:
      packed: without stacked layers.
      numbers: [n] integers in [0, prod(rows)).

    Returns:
      [n, *columns] of the weight's dtype. Costs a pass over n rows of bytes.
    """
    codes = unpack_rows(packed.codes, numbers, math.prod(packed.rows), packed.k)
    return decoded_rows(packed, codes, numbers)


def decoded_rows(packed: PackedArray, codes: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return the weights [n, *columns] of codes [n, columns] of the rows of such numbers."""
    axes = len(packed.rows)

    def of_rows(table: jax.Array) -> jax.Array:
        own, others = table.shape[:axes], table.shape[axes:]
        if math.prod(own) == 1:
            return table.reshape(1, *others)
        return table.reshape(-1, *others)[_blocks(packed.rows, own, numbers)]

    tables = _with_tables(packed, of_rows)
    codes = codes.reshape(*numbers.shape, *packed.columns)
    return decoded(codes, tables.codebook, tables.scale, packed.dtype)


@functools.singledispatch
def columns_of(packed: PackedArray, numbers: jax.Array) -> Any:
    """Return some columns of a weight, packed, on one axis.

    Args:
      packed: weight, layers may be stacked.
      numbers: [n] integers in [0, prod(columns)).
    """
    axes = len(packed.layers) + len(packed.rows)

    def of_columns(table: jax.Array) -> jax.Array:
        own, along = table.shape[:axes], table.shape[axes:-1]
        table = table.reshape(*own, -1, table.shape[-1])
        if math.prod(along) == 1:
            return table
        return jnp.take(table, _blocks(packed.columns, along, numbers), axis=axes)

    codes = jnp.take(packed.codes, numbers, axis=-1)
    return _with_tables(packed, of_columns, codes=codes, columns=numbers.shape)


def with_one_axis_of_columns(packed: PackedArray | ProductArray) -> PackedArray | ProductArray:
    """Return one layer with its columns on one axis, which blocks cut into runs of equal length."""
    if isinstance(packed, ProductArray) or len(packed.columns) == 1:
        return packed
    axes = len(packed.rows)

    def joined(table: jax.Array) -> jax.Array:
        own, along = table.shape[:axes], table.shape[axes:-1]
        if not are_runs(along, packed.columns):  # a block lies in several places
            for axis, (number, size) in enumerate(zip(along, packed.columns, strict=True)):
                table = jnp.repeat(table, size // number, axis=axes + axis)
        return table.reshape(*own, -1, table.shape[-1])

    return _with_tables(packed, joined, columns=(math.prod(packed.columns),))


def run_of_columns(
    packed: PackedArray | ProductArray, start: jax.Array, width: int
) -> PackedArray | ProductArray:
    """Return some columns that lie side by side: whole blocks, or columns of one.

    Args:
      packed: one layer with its columns on one axis.
      start: number of the first column.
      width: how many.
    """
    if isinstance(packed, ProductArray):
        codes = run_of_columns(packed.codes, start, width)
        return dataclasses.replace(packed, codes=codes)
    own = columns_of_a_block(packed)

    def of_blocks(table: jax.Array) -> jax.Array:
        if table.shape[-2] == 1:
            return table
        return jax.lax.dynamic_slice_in_dim(table, start // own, max(1, width // own), axis=-2)

    codes = jax.lax.dynamic_slice_in_dim(packed.codes, start, width, axis=1)
    return _with_tables(packed, of_blocks, codes=codes, columns=(width,))


def columns_of_a_block(packed: PackedArray | ProductArray) -> int:
    """Return how many columns make a block of the weight; of one block along them, all."""
    (columns,) = packed.columns
    number = packed.numbers[-1] if isinstance(packed, PackedArray) else 1
    return columns // number


def _with_tables(
    packed: PackedArray, function: Callable[[jax.Array], jax.Array], **changes: Any
) -> PackedArray:
    """Return the weight with what a function makes of tables [*numbers, k] and other changes."""

    def made(table: jax.Array) -> jax.Array:
        return table if table.ndim == 1 else function(table)  # which serves all blocks

    scale = None if packed.scale is None else made(packed.scale)
    return dataclasses.replace(packed, codebook=made(packed.codebook), scale=scale, **changes)


def _blocks(sizes: tuple[int, ...], counts: tuple[int, ...], numbers: jax.Array) -> jax.Array:
    """Return of which block each entry of some axes is, in the order of the blocks along them."""
    blocks, inner, before = jnp.zeros_like(numbers), 1, 1
    for size, count in reversed(list(zip(sizes, counts, strict=True))):
        blocks += numbers // inner % size // (size // count) * before
        inner, before = inner * size, before * count
    return blocks
