"""Gradients of convolutions that XLA on CPU computes slowly, in parts of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_PARTS = 8  # at most, of a batch; more are more code to compile
_PART_BYTES = 2**18  # at least, of a part's inputs


def in_parts(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Differentiate the `nn.Conv` layers of a network by parts of the batch, where that is faster.

    An interceptor for `flax.linen.intercept_methods`, for training steps. A layer's answer, and the
    gradient to its inputs, stay as they are. The gradient to its parameters is the sum of those of
    equal parts of the batch: XLA on CPU contracts over a batch slowly unless it fits in the cache.
    On other platforms and for small inputs nothing changes.
    `python -m benchmarks.training` times it.
    """
    module = context.module
    # A layer without a name is a copy that `_apply` made.
    if context.method_name != "__call__" or not isinstance(module, nn.Conv) or not module.path:
        return next_fun(*args, **kwargs)
    (x,) = args
    parts = _number_of_parts(x)
    if parts == 1:
        return next_fun(x)
    return _convolve(module.clone(parent=None), parts, module.variables["params"], x)


def _number_of_parts(x: jax.Array) -> int:
    most = min(_PARTS, x.nbytes // _PART_BYTES) if jax.default_backend() == "cpu" else 1
    return max((n for n in range(1, most + 1) if len(x) % n == 0), default=1)


def _apply(module: nn.Conv, params: Any, x: jax.Array) -> jax.Array:
    y: Any = module.apply({"params": params}, x)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(module: nn.Conv, parts: int, params: Any, x: jax.Array) -> jax.Array:
    del parts
    return _apply(module, params, x)


def _forward(
    module: nn.Conv, parts: int, params: Any, x: jax.Array
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    del parts
    return _apply(module, params, x), (params, x)


def _backward(
    module: nn.Conv, parts: int, saved: tuple[Any, jax.Array], gradient: jax.Array
) -> tuple[Any, jax.Array]:
    params, x = saved
    (to_x,) = jax.vjp(lambda x: _apply(module, params, x), x)[1](gradient)
    # Every n-th image, not a piece of the batch: where it is sharded, each device has its share.
    xs, gradients = (a.reshape(-1, parts, *a.shape[1:]) for a in (x, gradient))
    to_params = jax.tree.map(jnp.zeros_like, params)
    for part in range(parts):
        _, pull = jax.vjp(lambda params, x=xs[:, part]: _apply(module, params, x), params)
        to_params = jax.tree.map(jnp.add, to_params, pull(gradients[:, part])[0])
    return to_params, to_x


_convolve.defvjp(_forward, _backward)
