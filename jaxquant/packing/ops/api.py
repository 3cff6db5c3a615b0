"""The public products; what they mean is `jaxquant.packing.ops.reference`."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp

from jaxquant import checks
from jaxquant.packing.arrays import PackedArray, ProductArray
from jaxquant.packing.ops import blocks, lookup, mosaic, platform, reference, triton, windows, words

_PARTIAL = {
    "lookup": lookup,
    "blocks": blocks,
    "triton": triton,
    "mosaic": mosaic,
    "words": words,
}
IMPLEMENTATIONS = ("unpack", *_PARTIAL)
Product = Callable[[jax.Array, Any], jax.Array]
_OF_PLATFORM = {"cpu": ("words", "lookup", "blocks"), "gpu": ("triton",), "tpu": ("mosaic",)}
_FEW_FOR_WORDS = 16  # vectors; tables are read for each, a kernel is unpacked once for all
_FEW_VECTORS = 64  # more are bound by arithmetic, for which XLA's own product is the best on GPUs
_FEW_WEIGHTS = 2**14  # which are unpacked before a loop would start


def matmul(
    x: jax.Array,
    packed: PackedArray | ProductArray,
    *,
    implementation: str | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Return `x @ unpack(packed)`; if the weight is unpacked, then inside of this product only.

    The axes of the weight before its last one are summed over, with the last axes of x. Products
    and sums are in float32 (or float64, if x or the weight is). Differentiable by x, codebook and
    scale, in both modes; no float weight is kept for the backward pass. Runs under jit, vmap,
    scan and, as "unpack", on sharded arrays; on several devices the others need `jax.shard_map`.
    Exports for symbolic numbers of vectors, but not as "triton" and "mosaic".

    Args:
      x: [..., rows] floating point; `rows` may be several axes, as those of the weight.
      packed: weight [rows, columns]; a PackedArray or a ProductArray.
      implementation: one of `IMPLEMENTATIONS`; None: by platform and shape, so that a whole network
        is fast and takes no more memory than with floats; of a single product of several vectors
        on CPU, another may be faster.
      preferred_element_type: dtype of the result; None: that of `x @ weight`. Floats of eight
        bits, which JAX promotes to nothing, give way to wider ones, and two kinds of them to that
        of x.

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
    x, axes = jnp.asarray(x), len(packed.rows)
    if x.ndim < axes or x.shape[x.ndim - axes :] != packed.rows:
        raise ValueError(f"expected x of shape [..., {_text(packed.rows)}], got {x.shape}")
    dtype = preferred_element_type or reference.common_dtype(x.dtype, packed.dtype)
    vectors = math.prod(x.shape[: x.ndim - axes])
    chosen = implementation is None
    if implementation is None:
        implementation = _fastest(vectors, x, packed)
    elif implementation in _PARTIAL and not _supports(implementation, vectors, x, packed):
        raise ValueError(
            f"expected a product that {implementation!r} supports, got {_describe(packed)}, "
            f"x of {x.dtype} and shape {x.shape}; None chooses"
        )
    if isinstance(vectors, int) and vectors == 0:
        implementation = "unpack"  # all others count on one
    return _matmul(x, packed, implementation, chosen, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # outside of jit nothing compiles anew
def _matmul(
    x: jax.Array, packed: PackedArray | ProductArray, implementation: str, chosen: bool, dtype: Any
) -> jax.Array:
    batch = x.shape[: x.ndim - len(packed.rows)]
    x = x.reshape(*batch, math.prod(packed.rows))
    if implementation == "unpack":
        y = _remade(reference.matmul)(x, packed)
    else:
        product = _chosen_product(implementation) if chosen else _PARTIAL[implementation].matmul
        y = _partial_product(product, x.reshape(math.prod(batch), x.shape[-1]), packed)
    return y.reshape(*batch, *packed.columns).astype(dtype)


# What is unpacked for a product is unpacked again in the backward pass: kept for it, the float
# weights of all layers would add up.
_remade = jax.checkpoint


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _partial_product(
    product: Product, x: jax.Array, packed: PackedArray | ProductArray
) -> jax.Array:
    return product(x, packed)


@_partial_product.defjvp
def _partial_product_jvp(
    product: Product, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    _, tangent = jax.jvp(_remade(reference.matmul), primals, tangents)
    return _partial_product(product, *primals), tangent


@functools.cache
def _chosen_product(implementation: str) -> Product:
    """Return a product for which `vmap` over vectors chooses again: there are more of them then."""
    product = jax.custom_batching.custom_vmap(_PARTIAL[implementation].matmul)

    @product.def_vmap
    def of_batch(size: int, batched: Any, x: jax.Array, packed: Any) -> tuple[jax.Array, bool]:
        of_x, of_packed = batched
        if any(jax.tree.leaves(of_packed)):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
            return jax.vmap(_PARTIAL[implementation].matmul, axes)(x, packed), True
        x = x.reshape(*x.shape[:-1], *packed.rows)
        return matmul(x, packed, preferred_element_type=reference.accumulator(x, packed)), of_x

    return product


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
    channels = packed.rows[-1] * groups
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
    return (convolve if by_words else _remade(convolve))(x, packed).astype(dtype)


def _fastest(vectors: int, x: jax.Array, packed: PackedArray | ProductArray) -> str:
    """Return the implementation for so many vectors; a symbolic number of them may be any."""
    known = isinstance(vectors, int)
    if platform.is_one_device() and packed.size > _FEW_WEIGHTS:
        for name in _OF_PLATFORM.get(platform.name(), ()):
            if _supports(name, vectors, x, packed) and (
                name == "blocks" or (known and vectors <= _most_vectors(name, packed))
            ):
                return name
    return "unpack"  # which XLA takes apart as the arrays are


def _most_vectors(name: str, packed: PackedArray | ProductArray) -> int:
    if name == "lookup":  # what is read from a table is read for each, a weight unpacked for all
        return lookup.reads(packed.k)
    return _FEW_FOR_WORDS if name == "words" else _FEW_VECTORS


def _supports(name: str, vectors: int, x: jax.Array, packed: PackedArray | ProductArray) -> bool:
    if isinstance(packed, ProductArray) and name not in ("words", "blocks"):
        return False
    if name in ("triton", "mosaic") and not isinstance(vectors, int):
        return False  # what a kernel does follows from their number
    return _PARTIAL[name].supports(x, packed)


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


def _check_weight(packed: PackedArray | ProductArray) -> None:
    if isinstance(packed, ProductArray):
        return
    if not isinstance(packed, PackedArray):
        raise ValueError(f"expected a PackedArray or a ProductArray, got {type(packed).__name__}")
    if packed.codes.ndim > 2:
        raise ValueError(
            f"expected the weight of one layer, got stacked layers {packed.shape}: vmap or scan"
        )
    if not packed.columns:
        raise ValueError(f"expected a weight of two axes or more, got shape {packed.shape}")


def _text(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
