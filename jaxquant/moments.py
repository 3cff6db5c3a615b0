"""Second moments of what a layer's kernel is multiplied with."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.ops.reference import channels_last, each_axis

_PRECISION = jax.lax.Precision.HIGHEST


def input_moments(
    inputs: jax.Array,
    *,
    window: Sequence[int] = (),
    window_strides: Sequence[int] | int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    kernel_dilation: Sequence[int] | int = 1,
) -> jax.Array:
    """Return the mean of `x x^T` over everything that a layer's kernel is multiplied with.

    `quantize_round` takes it as `moments`. With D entries of x (channels, or window positions by
    channels, in the order of the kernel's rows), `|x^T v|**2` is `v^T moments v` in the mean: how
    much a change v of an output's weights changes what the layer answers. Means over several
    batches of equal size average to the mean over all.

    Args:
      inputs: [batch, *space, channels]; a dense layer has no space.
      window: of a convolution; () for a dense layer.
      window_strides, padding, kernel_dilation: of the convolution, see `jaxquant.conv`.

    Returns:
      [D, D] float32. Pure, under jit too; costs O(batch places D**2).

    Raises:
      ValueError: if the axes do not fit the window.

    >>> input_moments(jnp.array([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    rows = windows(inputs, window, window_strides, padding, kernel_dilation)
    rows = rows.reshape(-1, rows.shape[-1])
    return jnp.matmul(rows.T, rows, precision=_PRECISION) / rows.shape[0]


def windows(
    inputs: jax.Array,
    window: Sequence[int],
    window_strides: Sequence[int] | int,
    padding: str | Sequence[tuple[int, int]],
    kernel_dilation: Sequence[int] | int,
) -> jax.Array:
    """Return what the kernel is multiplied with, [batch, *places, positions channels] float32."""
    space, channels = len(window), inputs.shape[-1]
    if inputs.ndim != space + 2:
        raise ValueError(f"expected inputs of {space + 2} axes, got {inputs.shape}")
    rows = inputs.astype(jnp.float32)
    if window:
        rows = jax.lax.conv_general_dilated_patches(
            rows,
            tuple(window),
            each_axis(window_strides, space),
            padding if isinstance(padding, str) else [(low, high) for low, high in padding],
            rhs_dilation=each_axis(kernel_dilation, space),
            dimension_numbers=channels_last(space),
            precision=_PRECISION,
        )
    positions = math.prod(window)
    by_channel = rows.reshape(*rows.shape[:-1], channels, positions)
    return jnp.swapaxes(by_channel, -1, -2).reshape(rows.shape)
