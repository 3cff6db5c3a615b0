"""A native call as one operation of JAX, with another function in its place where it cannot be.

A file that `jax.export` writes runs where there may be no native code, and names of calls in it are
no promise. Under `vmap` a native call gets all there is to do at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxquant import loops


def call_or(
    native: Callable[..., Sequence[jax.Array]],
    otherwise: Callable[..., Sequence[jax.Array]],
    operands: Sequence[jax.Array | None],
    results: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Return what a native call makes of arrays, or another function where it cannot be.

    Args:
      native: of arrays [mapped, ...], to such results.
      otherwise: of the arrays without the first axis.
      operands: the arrays; None stays None.
      results: their shapes and dtypes, without a first axis.
    """
    arrays, structure = jax.tree.flatten(loops.varying_like(list(operands), list(operands)))

    def of_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: function(*structure.unflatten(arrays))

    return _call.bind(
        *arrays,
        native=of_arrays(native),
        otherwise=of_arrays(otherwise),
        results=tuple((result.shape, result.dtype) for result in results),
        mapped=0,
    )


def _mapped(function: Callable[..., Any], mapped: int) -> Callable[..., Any]:
    for _ in range(mapped):
        function = jax.vmap(function)
    return function


def _run_otherwise(*operands: jax.Array, otherwise: Any, mapped: int, **_: Any) -> list[jax.Array]:
    return list(_mapped(otherwise, mapped)(*operands))


def _run(*operands: jax.Array, native: Any, results: Any, mapped: int, **_: Any) -> list[jax.Array]:
    axes = operands[0].shape[:mapped]
    flat = [x.reshape(math.prod(axes), *x.shape[mapped:]) for x in operands]
    return [
        made.astype(dtype).reshape(*axes, *shape)
        for made, (shape, dtype) in zip(native(*flat), results, strict=True)
    ]


def _shapes(first: Any, *_: Any, results: Any, mapped: int, **__: Any) -> list[Any]:
    axes = first.shape[:mapped]
    return [
        first.update(shape=(*axes, *shape), dtype=dtype, weak_type=False)
        for shape, dtype in results
    ]


def _tangents(primals: Any, tangents: Any, **options: Any) -> tuple[Any, Any]:
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(lambda *x: _run_otherwise(*x, **options), primals, tangents)


def _batched(args: Any, axes: Any, **options: Any) -> tuple[Any, list[int]]:
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    args = [batching.bdim_at_front(x, axis, size) for x, axis in zip(args, axes, strict=True)]
    made = _call.bind(*args, **(options | {"mapped": options["mapped"] + 1}))
    return made, [0] * len(made)


def _lower(context: Any, *args: Any, **options: Any) -> Any:
    exported = context.module_context.lowering_parameters.for_export
    function = _run_otherwise if exported else _run
    return mlir.lower_fun(function, multiple_results=True)(context, *args, **options)


_call = Primitive("native_call")
_call.multiple_results = True
_call.def_impl(jax.jit(_run, static_argnames=("native", "otherwise", "results", "mapped")))
_call.def_abstract_eval(_shapes)
ad.primitive_jvps[_call] = _tangents
batching.primitive_batchers[_call] = _batched
mlir.register_lowering(_call, _lower)
