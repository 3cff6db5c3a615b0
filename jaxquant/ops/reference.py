"""The products in XLA: unpack, multiply. What every other implementation must equal."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.packing import PackedArray, ProductArray, unpack_node


def matmul(x: jax.Array, packed: PackedArray | ProductArray) -> jax.Array:
    """Return [..., columns] from x [..., prod(rows)], in float32 or wider."""
    dtype = accumulator(x, packed)
    weight = unpack_node(packed).reshape(math.prod(packed.rows), *packed.columns)
    return jnp.matmul(x.astype(dtype), weight.astype(dtype), precision=jax.lax.Precision.HIGHEST)


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


def each_axis(value: Sequence[int] | int, space: int) -> tuple[int, ...]:
    """Return a number for each axis of space, from those or from one for all."""
    return (value,) * space if isinstance(value, int) else tuple(value)


def common_dtype(*dtypes: Any) -> Any:
    """Return the dtype that all promote to, also where arithmetic must not promote by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def accumulator(x: jax.Array, packed: PackedArray | ProductArray) -> Any:
    """Return the dtype of products and sums."""
    return common_dtype(x.dtype, packed.dtype, jnp.float32)
