"""The public products; what they mean is `jaxquant.ops.reference`."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxquant.ops import lookup, reference
from jaxquant.packing import PackedArray

IMPLEMENTATIONS = ("unpack", "lookup")


def matmul(
    x: jax.Array,
    packed: PackedArray,
    *,
    implementation: str | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Return `x @ unpack(packed)`; if the weight is unpacked, then inside of this product only.

    The axes of the weight before its last one are summed over, with the last axes of x. Products
    and sums are in float32 (or float64, if x or the codebook is). Differentiable by x and by the
    codebook; runs under jit, vmap, scan and on sharded arrays.

    Args:
      x: [..., rows] floating point; `rows` may be several axes, as those of the weight.
      packed: weight [rows, columns].
      implementation: one of `IMPLEMENTATIONS`; None: the fastest that the platform has.
      preferred_element_type: dtype of the result; None: that of `x @ weight`.

    Returns:
      [..., columns].

    Raises:
      ValueError: if the shapes do not fit, or the implementation is unknown or not for it.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> packed = jq.pack_array(jnp.eye(6), jnp.array([-1.0, 0.0, 1.0]))
    >>> matmul(jnp.arange(6.0), packed).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    _check_implementation(implementation)
    _check_weight(packed)
    axes = len(packed.rows)
    if x.ndim < axes or x.shape[x.ndim - axes :] != packed.rows:
        raise ValueError(f"expected x of shape [..., {_text(packed.rows)}], got {x.shape}")
    dtype = preferred_element_type or reference.common_dtype(x.dtype, packed.dtype)
    flat = x.reshape(*x.shape[: x.ndim - axes], math.prod(packed.rows))
    if implementation is None:
        implementation = _fastest(flat, packed)
    if implementation == "lookup" and not lookup.supports(packed):
        raise ValueError(
            f"expected a codebook that 'lookup' supports, got k={packed.k} and codebooks of shape "
            f"{packed.codebook.shape}; None chooses"
        )
    product = lookup.matmul if implementation == "lookup" else reference.matmul
    return product(flat, packed).astype(dtype)


def conv(
    x: jax.Array,
    packed: PackedArray,
    *,
    window_strides: Sequence[int] | int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    input_dilation: Sequence[int] | int = 1,
    kernel_dilation: Sequence[int] | int = 1,
    feature_group_count: int = 1,
    implementation: str | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Return the convolution of x with the unpacked kernel.

    As `jax.lax.conv_general_dilated` with channels last. A convolution uses each weight once a
    pixel, so it is bound by arithmetic where a matrix-vector product is bound by memory: packing
    makes the kernel smaller, not the convolution faster.

    Args:
      x: [batch, *space, channels] floating point.
      packed: kernel [*window, channels / feature_group_count, features].
      window_strides: one number, or one for each axis of space.
      padding: "SAME", "VALID", or (before, after) for each axis of space.
      input_dilation: like `window_strides`.
      kernel_dilation: like `window_strides`.
      feature_group_count: groups of channels.
      implementation: "unpack" or None.
      preferred_element_type: dtype of the result; None: that which x and the codebook promote to.

    Returns:
      [batch, *space, features].

    Raises:
      ValueError: if the shapes do not fit, or the implementation is unknown.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> kernel = jnp.ones((3, 3, 1, 2))
    >>> packed = jq.pack_array(kernel, jnp.array([0.0, 1.0]))
    >>> conv(jnp.ones((1, 4, 4, 1)), packed, padding="VALID").shape
    (1, 2, 2, 2)
    """
    if implementation not in (None, "unpack"):
        raise ValueError(f"expected implementation to be unpack or None, got {implementation!r}")
    _check_weight(packed)
    space = packed.ndim - 2
    if space < 1 or x.ndim != packed.ndim:
        raise ValueError(f"expected x of {packed.ndim} axes, one or more of space, got {x.shape}")
    if x.shape[-1] != packed.rows[-1] * feature_group_count:
        channels = packed.rows[-1] * feature_group_count
        raise ValueError(f"expected x with {channels} channels last, got {x.shape}")

    def each(value: Sequence[int] | int) -> tuple[int, ...]:
        return (value,) * space if isinstance(value, int) else tuple(value)

    dtype = preferred_element_type or reference.common_dtype(x.dtype, packed.dtype)
    return reference.conv(
        x,
        packed,
        window_strides=each(window_strides),
        padding=padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        input_dilation=each(input_dilation),
        kernel_dilation=each(kernel_dilation),
        feature_group_count=feature_group_count,
    ).astype(dtype)


def _fastest(x: jax.Array, packed: PackedArray) -> str:
    # Of several vectors, XLA on CPU no longer fuses the reading of a table and the sum.
    single = math.prod(x.shape[:-1]) == 1
    on_cpu = jax.default_backend() == "cpu"
    return "lookup" if on_cpu and single and lookup.supports(packed) else "unpack"


def _check_implementation(implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"expected implementation to be one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {implementation!r}"
        )


def _check_weight(packed: PackedArray) -> None:
    if not isinstance(packed, PackedArray):
        raise ValueError(f"expected a PackedArray, got {type(packed).__name__}")
    if packed.codes.ndim > 2:
        raise ValueError(
            f"expected the weight of one layer, got stacked layers {packed.shape}: vmap or scan"
        )
    if not packed.columns:
        raise ValueError(f"expected a weight of two axes or more, got shape {packed.shape}")


def _text(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
