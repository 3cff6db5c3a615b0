"""Evaluates a jaxpr in which some values are packed weights.

Where a packed weight, or a view of one, meets an operation that knows it, the packed operation
takes its place: see `jaxquant.packing.rules`. What calls other jaxprs is rebuilt with the weights
packed inside. For all else the weight is unpacked, there and then. Operations without a packed
operand are bound as they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxquant.meshes import is_explicit
from jaxquant.packing.arrays import View, unpack_view
from jaxquant.packing.axes import stored_axes


class Use(NamedTuple):
    """What became of a packed weight at one place of a function."""

    path: str
    operation: str  # of JAX
    how: str  # "product", "transposed product", "convolution", "rows", "unpacked (in product)"
    shape: tuple[int, ...]  # of what the operation sees
    float_bytes: int  # of what is unpacked outside of a product; 0 of what stays packed
    summed: tuple[int, ...] = ()  # the weight's axes, from the end, that a product sums over
    shared: tuple[int, ...] = ()  # those that the other operand of the product has, too


Value = Any  # an array or a View
Rule = Callable[["Interpreter", JaxprEqn, list[Value]], "list[Value] | None"]


class Interpreter:
    """Evaluates jaxprs; keeps what it made of those that are called more than once.

    Attributes:
      rules: what to do with each operation of JAX on packed weights, by its name.
      uses: where packed weights were used, if that is asked for; else None.
    """

    def __init__(self, rules: Mapping[str, Rule], uses: list[Use] | None = None):
        """Start with nothing traced."""
        self.rules, self.uses = rules, uses
        self._jitted: dict[int, tuple[Any, Callable[..., Any]]] = {}

    def run(self, jaxpr: ClosedJaxpr | Jaxpr, operands: Sequence[Value]) -> list[Value]:
        """Return the results of a jaxpr, arrays or views."""
        jaxpr, constants = opened(jaxpr)
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= zip(jaxpr.invars, operands, strict=True)

        def read(atom: Any) -> Value:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            with equation.ctx.manager:
                values |= zip(equation.outvars, self._results(equation, operands), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def arrays(self, jaxpr: ClosedJaxpr | Jaxpr, operands: Sequence[Value]) -> list[jax.Array]:
        """Return the results of a jaxpr, unpacked."""
        return [self.unpacked(value, "result") for value in self.run(jaxpr, operands)]

    def unpacked(self, value: Value, operation: str) -> jax.Array:
        """Return an array as it is, and a view unpacked."""
        if not isinstance(value, View):
            return value
        self.note(value, operation, "unpacked", value.size * jnp.dtype(value.dtype).itemsize)
        return unpack_view(value)

    def note(
        self,
        view: View,
        operation: str,
        how: str,
        float_bytes: int = 0,
        summed: Sequence[int] = (),
        shared: Sequence[int] = (),
    ) -> None:
        """Keep a use of a weight, where that is asked for; axes are those of the view."""
        if self.uses is None:
            return
        sizes = view.packed.layers, view.packed.rows, view.packed.columns
        own = [
            stored_axes([piece for axis in axes for piece in view.axes[axis]], *sizes)
            for axes in (summed, shared)
        ]
        self.uses.append(Use(view.path or "", operation, how, view.shape, float_bytes, *own))

    def called(self, jaxpr: Any, name: str) -> Callable[..., Any]:
        """Return a jaxpr as a jitted function, the same one each time.

        So that of layers which call one function each is traced once, as JAX itself does.
        """
        if self.uses is not None:  # each call is a use
            return functools.partial(self.run, jaxpr)
        if id(jaxpr) not in self._jitted:

            def function(operands: list[Value]) -> list[Value]:
                return self.run(jaxpr, operands)

            function.__name__ = function.__qualname__ = name
            self._jitted[id(jaxpr)] = jaxpr, jax.jit(function)  # with what keeps the id alive
        return self._jitted[id(jaxpr)][1]

    def _results(self, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
        if not any(isinstance(value, View) for value in operands):
            return bound(equation, operands)
        name = equation.primitive.name
        rule = self.rules.get(name)
        made = rule(self, equation, operands) if rule else None
        if made is None:
            made = bound(equation, [self.unpacked(value, name) for value in operands])
        return made


def asks_for_sharding(equation: JaxprEqn) -> bool:
    """Return whether a result is to be sharded otherwise than operands say, on explicit axes."""
    wishes = (equation.params.get(name) for name in ("out_sharding", "sharding"))
    return any(wish is not None for wish in wishes) and is_explicit(result_type(equation))


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr and its constants, of a closed one or of one that has none."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def result_type(equation: JaxprEqn) -> Any:
    """Return the type of an equation's result."""
    return equation.outvars[0].aval


def bound(equation: JaxprEqn, operands: list[jax.Array]) -> list[jax.Array]:
    """Return the results of an equation on arrays."""
    primitive = equation.primitive
    made = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
    return list(made) if primitive.multiple_results else [made]


def is_view(value: Value) -> TypeGuard[View]:
    """Return whether a value is a packed weight."""
    return isinstance(value, View)


def filled(views: Sequence[Value | None], arrays: Sequence[jax.Array]) -> list[Value]:
    """Return the views, with the arrays in the places where there is none."""
    rest = iter(arrays)
    return [next(rest) if view is None else view for view in views]
