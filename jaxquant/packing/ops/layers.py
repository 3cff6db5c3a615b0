"""Flax Linen layers that run from packed kernels, without a change to the network."""

from collections.abc import Callable
from typing import Any

from jaxquant.packing.arrays import PackedArray, ProductArray, is_quantized
from jaxquant.packing.ops.api import conv, matmul
from jaxquant.packing.ops.reference import common_dtype

_OWN_PRODUCTS = (
    "dot_general",
    "dot_general_cls",
    "conv_general_dilated",
    "conv_general_dilated_cls",
)


def intercept_linen(
    next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
) -> Any:
    """Run `nn.Dense` and `nn.Conv` from a packed kernel, where they have one.

    For `flax.linen.intercept_methods`: `module.apply` then takes variables in which some kernels
    are PackedArrays, as `pack` and `load` make them, or ProductArrays, and no float kernel exists
    outside of the compiled product. Everything else in the network runs as it is.

    Raises:
      ValueError: for options of a layer that have no packed counterpart (circular padding, masks,
        products of its own); names the layer.

    >>> import flax.linen as nn, jax.numpy as jnp, jaxquant as jq
    >>> module, x = nn.Dense(4, use_bias=False), jnp.ones((2, 8))
    >>> kernel = jq.pack_array(jnp.ones((8, 4)), jnp.array([0.0, 1.0]))
    >>> with nn.intercept_methods(intercept_linen):
    ...     module.apply({"params": {"kernel": kernel}}, x).shape
    (2, 4)
    """
    import flax.linen as nn

    module = context.module
    if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
        return next_fun(*args, **kwargs)
    params = module.variables.get("params", {})
    if not is_quantized(params.get("kernel")):
        return next_fun(*args, **kwargs)
    product = _dense if isinstance(module, nn.Dense) else _conv
    return product(module, params, *args, **kwargs)


def _dense(module: Any, params: Any, inputs: Any) -> Any:
    kernel = params["kernel"]
    _check(module, kernel, (inputs.shape[-1], module.features))
    return _finish(module, params, matmul(_cast(module, inputs, kernel), kernel))


def _conv(module: Any, params: Any, inputs: Any) -> Any:
    kernel = params["kernel"]
    window = tuple(module.kernel_size)
    channels = inputs.shape[-1] // module.feature_group_count
    _check(module, kernel, (*window, channels, module.features))
    padding = zero_padding(module)
    batch = inputs.shape[: inputs.ndim - len(window) - 1]
    x = _cast(module, inputs, kernel).reshape(-1, *inputs.shape[len(batch) :])
    y = conv(
        x,
        kernel,
        window_strides=module.strides or 1,
        padding=padding,
        input_dilation=module.input_dilation or 1,
        kernel_dilation=module.kernel_dilation or 1,
        feature_group_count=module.feature_group_count,
    )
    return _finish(module, params, y.reshape(*batch, *y.shape[1:]))


def zero_padding(module: Any) -> str | tuple[tuple[int, int], ...]:
    """Return the padding of an `nn.Conv` as `conv` takes it.

    Raises:
      ValueError: for a mask, and padding that is not of zeros; names the layer.
    """
    padding = module.padding
    if module.mask is not None or padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
        raise ValueError(f"{_path(module)}: expected no mask, and padding of zeros, got {padding}")
    if isinstance(padding, int):
        return ((padding, padding),) * len(module.kernel_size)
    if isinstance(padding, str):
        return padding
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def _cast(module: Any, inputs: Any, kernel: PackedArray | ProductArray) -> Any:
    return inputs.astype(module.dtype or common_dtype(inputs.dtype, kernel.dtype))


def _finish(module: Any, params: Any, y: Any) -> Any:
    y = y.astype(module.dtype or y.dtype)
    return y + params["bias"].astype(y.dtype) if module.use_bias else y


def _check(module: Any, kernel: PackedArray | ProductArray, shape: tuple[int, ...]) -> None:
    own = [name for name in _OWN_PRODUCTS if getattr(module, name, None) is not None]
    if own:
        raise ValueError(f"{_path(module)}: expected no {own[0]}, which a packed kernel replaces")
    if kernel.shape != shape:
        raise ValueError(f"{_path(module)}: expected a kernel of shape {shape}, got {kernel.shape}")


def _path(module: Any) -> str:
    return "/".join(module.path) or type(module).__name__
