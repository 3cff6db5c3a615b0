"""Functions with derivatives of their own: they are evaluated, and so are their rules."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn
from jax.interpreters import ad

from jaxquant.packing.arrays import View, unpack_view
from jaxquant.packing.interpreter import Interpreter, Value, filled, is_view


def custom_jvp(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild a function with its rule for tangents, both on packed weights."""
    _, rule = equation.primitive.get_bind_params(equation.params)["subfuns"]
    call_jaxpr, is_symbolic = equation.params["call_jaxpr"], equation.params["symbolic_zeros"]
    views, arrays = _apart(operands)
    avals = [var.aval for var in equation.invars]

    @jax.custom_jvp
    def function(views: list[View | None], *arrays: jax.Array) -> list[jax.Array]:
        return interpreter.arrays(call_jaxpr, filled(views, arrays))

    def with_tangents(primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        (views, *arrays), (view_tangents, *array_tangents) = primals, tangents
        rest = iter(array_tangents)
        given = [
            next(rest) if view is None else _weight_tangent(view, tangent)
            for view, tangent in zip(views, view_tangents, strict=True)
        ]
        zeros = [
            aval.to_tangent_aval() if _is_zero(tangent) else None
            for tangent, aval in zip(given, avals, strict=True)
        ]

        def derived(primals: list[Any], nonzero: list[Any]) -> list[Any]:
            known = [aval if aval is None else _zero(aval, is_symbolic) for aval in zeros]
            tangents = filled(known, nonzero)
            return [_instantiated(value) for value in rule.call_wrapped(*primals, *tangents)]

        nonzero = [tangent for tangent in given if not _is_zero(tangent)]
        made = _traced(interpreter, derived, avals, filled(views, arrays), nonzero)
        return made[: len(made) // 2], made[len(made) // 2 :]

    function.defjvp(with_tangents, symbolic_zeros=True)
    return function(views, *arrays)


def custom_vjp(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild a function with its rule for cotangents, both on packed weights."""
    _, forward, backward = equation.primitive.get_bind_params(equation.params)["subfuns"]
    call_jaxpr, out_trees = equation.params["call_jaxpr"], equation.params["out_trees"]
    views, arrays = _apart(operands)
    avals, count = [var.aval for var in equation.invars], len(equation.outvars)

    @jax.custom_vjp
    def function(views: list[View | None], arrays: list[jax.Array]) -> list[jax.Array]:
        return interpreter.arrays(call_jaxpr, filled(views, arrays))

    def keep(views: Any, arrays: Any) -> tuple[list[jax.Array], Any]:
        of_views, of_arrays = _perturbed(views), _perturbed(arrays)
        views, arrays = _values(views), _values(arrays)
        rest = iter(of_arrays)
        flags = [
            next(rest) if view is None else flag for view, flag in zip(views, of_views, strict=True)
        ]

        def both(primals: list[Any], _: Any) -> list[Any]:
            return forward.call_wrapped(*itertools.chain(*zip(primals, flags, strict=True)))

        values = filled(views, arrays)
        made = _traced(interpreter, both, avals, values, [], packed=True)
        residuals, results = made[: len(made) - count], made[len(made) - count :]
        rest = iter(residuals)
        residuals = [next(rest) if i is None else values[i] for i in out_trees()[2]]
        residuals = [r if hasattr(r, "dtype") else _Known(r) for r in residuals]  # of Python
        return [interpreter.unpacked(value, "custom_vjp") for value in results], (residuals, views)

    def give_back(kept: Any, cotangents: list[Any]) -> tuple[list[Any], list[Any]]:
        residuals, views = kept
        # What JAX makes of scalar constants are numbers with a dtype, without a shape.
        residuals = [
            r if isinstance(r, _Known) or hasattr(r, "shape") else jnp.asarray(r, r.dtype)
            for r in residuals
        ]
        known = [r.value if isinstance(r, _Known) else None for r in residuals]
        zeros = [c if _is_zero(c) else None for c in cotangents]

        def own(residuals: list[Any], nonzero: list[Any]) -> list[Any]:
            given = filled(zeros, nonzero)
            made = backward.call_wrapped(*filled(known, residuals), *given)
            made = made[0] if isinstance(made, tuple) else made  # beside logs, in JAX 0.12
            return [_instantiated(value) for value in made]

        traced = [r for r in residuals if not isinstance(r, _Known)]
        nonzero = [c for c in cotangents if not _is_zero(c)]
        made = _traced(interpreter, own, traced, traced, nonzero)
        by_view = [
            None if view is None else jax.vjp(unpack_view, view)[1](cotangent)[0]
            for view, cotangent in zip(views, made, strict=True)
        ]
        by_array = [c for c, view in zip(made, views, strict=True) if view is None]
        return by_view, by_array

    function.defvjp(keep, give_back, symbolic_zeros=True)
    return function(views, arrays)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known while tracing, and no array of a program."""

    value: Any


def _weight_tangent(view: View | None, tangent: Any) -> Any:
    """Return the tangent of what a view shows, symbolic where those of its tables are zero."""
    if view is None:
        return None
    leaves, structure = jax.tree.flatten(tangent, is_leaf=_is_zero)
    if all(_is_zero(leaf) or leaf.dtype == jax.dtypes.float0 for leaf in leaves):
        aval = jax.eval_shape(unpack_view, view)
        return jax.custom_derivatives.SymbolicZero(ShapedArray(aval.shape, aval.dtype))
    tangent = structure.unflatten([_instantiated(leaf) for leaf in leaves])
    return jax.jvp(unpack_view, (view,), (tangent,))[1]


def _is_zero(value: Any) -> bool:
    return isinstance(value, jax.custom_derivatives.SymbolicZero | ad.Zero)


def _zero(aval: Any, is_symbolic: bool) -> Any:
    zero = jax.custom_derivatives.SymbolicZero(aval)
    return zero if is_symbolic else _instantiated(zero)


def _instantiated(value: Any) -> Any:
    if not _is_zero(value):
        return value
    if value.aval.dtype == jax.dtypes.float0:
        return np.zeros(value.aval.shape, jax.dtypes.float0)
    return jnp.zeros(value.aval.shape, value.aval.dtype)


def _perturbed(tree: Any) -> list[bool]:
    """Return for each entry of a list whether derivatives by some of it are asked for."""
    return [
        any(leaf.perturbed for leaf in jax.tree.leaves(node, is_leaf=_is_primal)) for node in tree
    ]


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _apart(operands: list[Value]) -> tuple[list[View | None], list[jax.Array]]:
    views = [value if is_view(value) else None for value in operands]
    return views, [value for value in operands if not is_view(value)]


def _traced(
    interpreter: Interpreter,
    function: Callable[[list[Any], list[Any]], list[Any]],
    kinds: Sequence[Any],
    values: Sequence[Value],
    arrays: Sequence[jax.Array],
    packed: bool = False,
) -> list[Value]:
    """Return what a function of weights makes of packed ones, and of more arrays."""
    shapes = [jax.ShapeDtypeStruct(kind.shape, kind.dtype) for kind in kinds]
    jaxpr = jax.make_jaxpr(function)(shapes, list(arrays))
    run = interpreter.run if packed else interpreter.arrays
    return run(jaxpr, [*values, *arrays])
