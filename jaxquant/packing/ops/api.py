"""The public products; what they mean is `jaxquant.packing.ops.reference`."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import checks, cpp
from jaxquant.packing.arrays import PackedArray, ProductArray, View
from jaxquant.packing.axes import whole
from jaxquant.packing.ops import choice, reference, windows, words
from jaxquant.packing.ops.choice import IMPLEMENTATIONS
from jaxquant.packing.ops.primitive import product
from jaxquant.packing.parts import with_one_axis_of_columns


def matmul(
    x: jax.Array,
    packed: PackedArray | ProductArray | View,
    *,
    implementation: str | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Return `x @ unpack(packed)`; if the weight is unpacked, then inside of this product only.

    The rows of the weight (all axes but its last, if it was packed without `inputs`) are summed
    over, with the last axes of x; of `packed.T` the columns are, from the same codes. Products and
    sums are in float32 (or float64, if x or the weight is). Differentiable by x, codebook and
    scale, in both modes; no float weight is kept for the backward pass. Runs under jit, vmap,
    scan and, as "unpack", on sharded arrays; on several devices the others need `jax.shard_map`.
    Exports for symbolic numbers of vectors, but not as "triton" and "mosaic".

    Args:
      x: [..., rows] floating point; `rows` may be several axes, as those of the weight.
      packed: weight [rows, columns]; a PackedArray or a ProductArray, or the `.T` of one of two
        axes.
      implementation: one of `IMPLEMENTATIONS`; None: by platform and shape, so that a whole network
        is fast and takes no more memory than with floats; of a single product of several vectors
        on CPU, another may be faster.
      preferred_element_type: dtype of the result; None: that of `x @ weight`. Floats of eight
        bits, which JAX promotes to nothing, give way to wider ones, and two kinds of them to that
        of x.

    Returns:
      [..., columns], or [..., rows].

    Raises:
      ValueError: if the shapes do not fit, or the implementation is unknown or not for it.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> packed = jq.pack_array(jnp.eye(6), jnp.array([-1.0, 0.0, 1.0]))
    >>> matmul(jnp.arange(6.0), packed).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    _check_implementation(implementation)
    packed, transposed = _weight(packed)
    inputs = packed.columns if transposed else packed.rows
    x, axes = jnp.asarray(x), len(inputs)
    if x.ndim < axes or x.shape[x.ndim - axes :] != inputs:
        raise ValueError(f"expected x of shape [..., {_text(inputs)}], got {x.shape}")
    dtype = preferred_element_type or reference.common_dtype(x.dtype, packed.dtype)
    vectors = math.prod(x.shape[: x.ndim - axes])
    chosen = implementation is None
    if implementation is None:
        implementation = choice.fastest(vectors, x, packed, transposed)
    elif implementation != "unpack" and not choice.supports(
        implementation, vectors, x, packed, transposed
    ):
        raise ValueError(
            f"expected a product that {implementation!r} supports, got {_describe(packed)}, "
            f"{'transposed, ' * transposed}x of {x.dtype} and shape {x.shape}; None chooses"
        )
    if isinstance(vectors, int) and vectors == 0:
        implementation = "unpack"  # all others count on one
    return _matmul(x, packed, implementation, chosen, transposed, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))  # outside of jit nothing compiles anew
def _matmul(
    x: jax.Array,
    packed: PackedArray | ProductArray,
    implementation: str,
    chosen: bool,
    transposed: bool,
    dtype: Any,
) -> jax.Array:
    inputs, outputs = packed.rows, packed.columns
    if transposed:
        inputs, outputs = outputs, inputs
    batch = x.shape[: x.ndim - len(inputs)]
    if implementation == "unpack":  # which leaves the axes to XLA, as they may be spread
        x = x.reshape(*batch, math.prod(inputs))
    else:
        packed = with_one_axis_of_columns(packed)
        x = x.reshape(math.prod(batch), math.prod(inputs))
    y = product(x, packed, name=implementation, chosen=chosen, transposed=transposed)
    return y.reshape(*batch, *outputs).astype(dtype)


def conv(
    x: jax.Array,
    packed: PackedArray | ProductArray,
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
      packed: kernel [*window, channels / feature_group_count, features]; a PackedArray or a
        ProductArray.
      window_strides: one number, or one for each axis of space.
      padding: "SAME", "VALID", or (before, after) for each axis of space.
      input_dilation: like `window_strides`.
      kernel_dilation: like `window_strides`.
      feature_group_count: groups of channels.
      implementation: "unpack", "words" (of a ProductArray, without input dilation or groups), or
        None.
      preferred_element_type: dtype of the result; None: as for `matmul`.

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
    if implementation not in (None, "unpack", "words"):
        raise ValueError(
            f"expected implementation to be unpack, words or None, got {implementation!r}"
        )
    _check_weight(packed)
    x, space = jnp.asarray(x), packed.ndim - 2
    if space < 1 or x.ndim != packed.ndim:
        raise ValueError(f"expected x of {packed.ndim} axes, one or more of space, got {x.shape}")
    groups = checks.integer("feature_group_count", feature_group_count, least=1)
    channels = packed.shape[-2] * groups
    if x.shape[-1] != channels:
        raise ValueError(f"expected x with {channels} channels last, got {x.shape}")

    each = functools.partial(windows.each_axis, space=space)
    dtype = preferred_element_type or reference.common_dtype(x.dtype, packed.dtype)
    options: dict[str, Any] = {
        "window_strides": each(window_strides),
        "padding": windows.pads(padding, space),
        "kernel_dilation": each(kernel_dilation),
    }
    dilation = each(input_dilation)
    if implementation != "words":
        options |= {"input_dilation": dilation, "feature_group_count": groups}
    elif not isinstance(packed, ProductArray) or groups != 1 or set(dilation) != {1}:
        raise ValueError(
            "expected a ProductArray, no input dilation and no groups for 'words', got "
            f"{type(packed).__name__}, {input_dilation} and {groups}"
        )
    return _conv(x, packed, implementation == "words", jnp.dtype(dtype), tuple(options.items()))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _conv(
    x: jax.Array,
    packed: PackedArray | ProductArray,
    by_words: bool,
    dtype: Any,
    options: tuple[tuple[str, Any], ...],
) -> jax.Array:
    convolve = functools.partial(words.conv if by_words else reference.conv, **dict(options))
    # As in products: an unpacked kernel is not kept for the backward pass.
    return (convolve if by_words else jax.checkpoint(convolve))(x, packed).astype(dtype)


def _describe(packed: PackedArray | ProductArray) -> str:
    if isinstance(packed, ProductArray):
        return f"words of shape {packed.words.shape} and {packed.dtype}"
    return f"k={packed.k}, codebooks of shape {packed.codebook.shape} for {packed.dtype}"


def _check_implementation(implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"expected implementation to be one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {implementation!r}"
        )
    if implementation == "native" and (missing := cpp.missing()) is not None:
        raise ValueError(f"expected native products for implementation='native', but {missing}")


def _weight(packed: PackedArray | ProductArray | View) -> tuple[PackedArray | ProductArray, bool]:
    """Return the weight, and whether its columns are summed over: of a transposed weight."""
    transposed = False
    if isinstance(packed, View):
        sides = (math.prod(packed.packed.rows),), (math.prod(packed.packed.columns),)
        matrix = whole((), *sides)
        if packed.packed.layers or packed.axes not in (matrix, matrix[::-1]):
            raise ValueError(f"expected a weight or a transposed matrix, got {packed}")
        packed, transposed = packed.packed, packed.axes != matrix
    _check_weight(packed)
    return packed, transposed


def _check_weight(packed: PackedArray | ProductArray) -> None:
    if isinstance(packed, ProductArray):
        return
    if not isinstance(packed, PackedArray):
        raise ValueError(f"expected a PackedArray or a ProductArray, got {type(packed).__name__}")
    if packed.layers:
        raise ValueError(
            f"expected the weight of one layer, got stacked layers {packed.shape}: vmap or scan"
        )
    if not packed.columns:
        raise ValueError(f"expected a weight of two axes or more, got shape {packed.shape}")


def _text(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
