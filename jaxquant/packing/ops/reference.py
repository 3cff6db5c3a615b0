"""The products in XLA: unpack, multiply. What every other implementation must equal."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.packing.arrays import PackedArray, ProductArray, unpack_node


def matmul(x: jax.Array, packed: PackedArray | ProductArray) -> jax.Array:
    """Return [..., columns] from x [..., prod(rows)], in float32 or wider."""
    dtype = accumulator(x, packed)
    weight = unpack_node(packed).reshape(math.prod(packed.rows), math.prod(packed.columns))
    return jnp.matmul(x.astype(dtype), weight.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def matmul_transposed(x: jax.Array, packed: PackedArray | ProductArray) -> jax.Array:
    """Return [..., prod(rows)] from x [..., prod(columns)], in float32 or wider."""
    dtype = accumulator(x, packed)
    weight = unpack_node(packed).reshape(math.prod(packed.rows), math.prod(packed.columns))
    return jnp.matmul(x.astype(dtype), weight.T.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def conv(x: jax.Array, packed: PackedArray | ProductArray, **options: Any) -> jax.Array:
    """Return [batch, *space, features] from x [batch, *space, channels], in float32 or wider."""
    dtype = accumulator(x, packed)
    return jax.lax.conv_general_dilated(
        x.astype(dtype),
        unpack_node(packed).astype(dtype),
        window_strides=options["window_strides"],
        padding=options["padding"],
        lhs_dilation=options["input_dilation"],
        rhs_dilation=options["kernel_dilation"],
        dimension_numbers=channels_last(packed.ndim - 2),
        feature_group_count=options["feature_group_count"],
    )


def channels_last(space: int) -> tuple[str, str, str]:
    """Return the layout of inputs, kernel and outputs with so many axes of space."""
    axes = "DHW"[-space:]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def common_dtype(*dtypes: Any) -> Any:
    """Return the dtype that all promote to, also where arithmetic must not promote by itself.

    Floats of eight bits or less, which JAX promotes to nothing, give way to all others; among
    themselves to the first.
    """
    wide = [dtype for dtype in map(jnp.dtype, dtypes) if not _is_narrow(dtype)]
    if not wide:
        return jnp.dtype(dtypes[0])
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, wide)


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1


def accumulator(x: jax.Array, packed: PackedArray | ProductArray) -> Any:
    """Return the dtype of products and sums."""
    return common_dtype(x.dtype, packed.dtype, jnp.float32)


def output_like(shape: tuple[int, ...], dtype: Any, arrays: Any) -> jax.ShapeDtypeStruct:
    """Return what a kernel says of its output, which varies as the arrays do."""
    varying = loops.varying_like(jnp.zeros((), dtype), arrays)
    axes = jax.typeof(varying).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
