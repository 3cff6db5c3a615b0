"""The products in XLA: unpack, multiply. What every other implementation must equal."""

import functools
import math
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
    space = "DHW"[-(packed.ndim - 2) :]
    return jax.lax.conv_general_dilated(
        x.astype(dtype),
        unpack_node(packed).astype(dtype),
        window_strides=options["window_strides"],
        padding=options["padding"],
        lhs_dilation=options["input_dilation"],
        rhs_dilation=options["kernel_dilation"],
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=options["feature_group_count"],
    )


def common_dtype(*dtypes: Any) -> Any:
    """Return the dtype that all promote to, also where arithmetic must not promote by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def accumulator(x: jax.Array, packed: PackedArray | ProductArray) -> Any:
    """Return the dtype of products and sums."""
    return common_dtype(x.dtype, packed.dtype, jnp.float32)
