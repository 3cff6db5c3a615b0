"""Second moments of what a layer's kernel is multiplied with."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.meshes import compiled
from jaxquant.packing.ops.windows import Windows, padded, positions, window_options

_PRECISION = jax.lax.Precision.HIGHEST
_PART_BYTES = 2**28  # of windows; a batch whose windows take more goes in parts


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
      inputs: [..., channels] floating point of a dense layer, whatever axes are before the
        channels (batch, time); [batch, *space, channels] of a convolution, an axis of space for
        each of its window.
      window: of a convolution; () for a dense layer.
      window_strides, padding, kernel_dilation: of the convolution, see `jaxquant.conv`.

    Returns:
      [D, D] float32. Pure, under jit too; costs O(batch places D**2), in parts of the batch of 256
      MiB at most where they come out even.

    Raises:
      ValueError: if the axes do not fit the window.

    >>> input_moments(jnp.array([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """

    inputs = jnp.asarray(inputs)
    options = window_options(window, window_strides, padding, kernel_dilation)
    return compiled(_moments, inputs, options=options)


def _moments(inputs: jax.Array, *, options: Windows) -> jax.Array:
    places = jax.eval_shape(lambda: windows(inputs, options)).shape[:-1]
    total = sum_of_products(inputs, options)
    return total / jnp.asarray(math.prod(places), jnp.float32)  # which may be symbolic


def sum_of_products(
    inputs: jax.Array, options: Windows, energies: jax.Array | None = None
) -> jax.Array:
    """Return the sum of `x x^T` over everything that a layer's kernel is multiplied with.

    Args:
      inputs: as of `input_moments`.
      options: of the convolution; with an empty window those of a dense layer.
      energies: [*places, G] how much each of them counts, in each of several sums; None for all
        alike, in one sum.

    Returns:
      [D, D] float32; of several sums [G, D, D].
    """

    def products(parts: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        inputs, energies = parts
        rows = windows(inputs, options)
        rows = rows.reshape(-1, rows.shape[-1])
        if energies is None:
            return jnp.matmul(rows.T, rows, precision=_PRECISION)

        def weighed(_: None, own: jax.Array) -> tuple[None, jax.Array]:
            return None, jnp.matmul(rows.T, rows * own[:, None], precision=_PRECISION)

        # One after the other: all at once would take rows for each of them.
        return loops.scan(weighed, None, energies.reshape(len(rows), -1).T)[1]

    shape = jax.eval_shape(lambda: windows(inputs, options)).shape
    parts = _parts(shape)
    if parts == 1:
        return products((inputs, energies))

    def cut(x: jax.Array) -> jax.Array:
        # Every n-th entry, not a piece: where the batch is sharded, each device has its share.
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    split = jax.tree.map(cut, (inputs, energies))
    several = () if energies is None else energies.shape[-1:]
    zeros = jnp.zeros((*several, shape[-1], shape[-1]), jnp.float32)
    return loops.scan(lambda sums, part: (sums + products(part), None), zeros, split)[0]


def _parts(shape: tuple[int, ...]) -> int:
    """Return in how many parts a batch goes whose windows have a shape; all at once if unknown."""
    count, size = shape[0], 4 * math.prod(shape)
    if not isinstance(size, int):
        return 1
    fitting = (n for n in range(1, count) if count % n == 0 and size <= n * _PART_BYTES)
    return max(1, next(fitting, count))


def windows(inputs: jax.Array, options: Windows) -> jax.Array:
    """Return what the kernel is multiplied with, [batch, *places, positions channels] float32.

    Raises:
      ValueError: if the axes do not fit the window. A dense layer takes any before the channels.
    """
    space = len(options.window)
    if inputs.ndim != space + 2 if space else inputs.ndim < 2:
        wanted = space + 2 if space else "at least 2"
        raise ValueError(f"expected inputs of {wanted} axes, got {inputs.shape}")
    rows = inputs.astype(jnp.float32)
    if not space:
        return rows
    # Slices, one for each position: `conv_general_dilated_patches` multiplies by ones and zeros.
    return jnp.concatenate(positions(padded(rows, options), options), axis=-1)
