"""Evaluates a jaxpr in which some values are packed weights.

Where a packed weight, or a view of one, meets an operation that knows it (`_RULES`), the packed
operation takes its place. What calls other jaxprs is rebuilt with the weights packed inside. For
all else the weight is unpacked, there and then. Operations without a packed operand are bound as
they are.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters import ad

from jaxquant.packing.arrays import View, unpack_view
from jaxquant.packing.axes import repeated, reshaped, stored_axes, transposed
from jaxquant.packing.ops import general


class Use(NamedTuple):
    """What became of a packed weight at one place of a function."""

    path: str
    operation: str  # of JAX
    how: str  # "product", "transposed product", "convolution", "rows", or "unpacked"
    shape: tuple[int, ...]  # of what the operation sees
    float_bytes: int  # of what is unpacked outside of a product; 0 of what stays packed
    summed: tuple[int, ...] = ()  # the weight's axes, from the end, that a product sums over
    shared: tuple[int, ...] = ()  # those that the other operand of the product has, too


Value = Any  # an array or a View
Rule = Callable[["Interpreter", JaxprEqn, list[Value]], "list[Value] | None"]


class Interpreter:
    """Evaluates jaxprs; keeps what it made of those that are called more than once.

    Attributes:
      uses: where packed weights were used, if that is asked for; else None.
    """

    def __init__(self, uses: list[Use] | None = None):
        """Start with nothing traced."""
        self.uses = uses
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
            return _bound(equation, operands)
        name = equation.primitive.name
        rule = _RULES.get(name)
        made = rule(self, equation, operands) if rule else None
        if made is None:
            made = _bound(equation, [self.unpacked(value, name) for value in operands])
        return made


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr and its constants, of a closed one or of one that has none."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _type(equation: JaxprEqn) -> Any:
    """Return the type of an equation's result."""
    return equation.outvars[0].aval


def _bound(equation: JaxprEqn, operands: list[jax.Array]) -> list[jax.Array]:
    """Return the results of an equation on arrays."""
    primitive = equation.primitive
    made = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
    return list(made) if primitive.multiple_results else [made]


def _is_view(value: Value) -> TypeGuard[View]:
    return isinstance(value, View)


# Views -------------------------------------------------------------------------------------------


def _reordered(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    view, order = operands[0], equation.params["permutation"]
    return [_with_axes(view, transposed(view.axes, order))]


def _with_axes(view: View, axes: Any) -> View:
    return View(packed=view.packed, axes=axes, dtype=view.dtype, path=view.path)


def _of_shape(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    """Apply reshape, squeeze, expand_dims."""
    if not _is_view(operands[0]):
        return None
    axes, order = operands[0].axes, equation.params.get("dimensions")
    if equation.primitive.name == "reshape" and order is not None:
        axes = transposed(axes, order)
    axes = reshaped(axes, _type(equation).shape)
    return None if axes is None else [_with_axes(operands[0], axes)]


def _broadcast(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    if not _is_view(operands[0]):
        return None
    places = equation.params["broadcast_dimensions"]
    axes = repeated(operands[0].axes, _type(equation).shape, places)
    return [_with_axes(operands[0], axes)]


def _cast(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    view = general.cast(operands[0], equation.params["new_dtype"])
    return None if view is None else [view]


def _same(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Apply what changes no value: copies, barriers, wishes for a sharding."""
    arrays = [value for value in operands if not _is_view(value)]
    if arrays and equation.primitive.multiple_results:
        kept = iter(equation.primitive.bind(*arrays, **equation.params))
        return [value if _is_view(value) else next(kept) for value in operands]
    return operands


def _constant(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Apply `stop_gradient`."""
    (view,) = operands
    return [dataclasses.replace(view, packed=jax.lax.stop_gradient(view.packed))]


def _sliced(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    params = equation.params
    steps = params["strides"] or (1,) * operands[0].ndim
    runs = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return _taken_apart(interpreter, equation, operands[0], [range(*run) for run in runs])


def _split(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    (view,), axis, made, start = operands, equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        runs = [range(n) for n in view.shape]
        runs[axis] = range(start, start + size)
        part = _taken_apart(interpreter, equation, view, runs)
        if part is None:
            return None
        made += part
        start += size
    return made


def _taken_apart(
    interpreter: Interpreter, equation: JaxprEqn, view: View, runs: Sequence[range]
) -> list[Value] | None:
    """Return the entries of each axis that are asked for."""
    wanted = [(i, run) for i, run in enumerate(runs) if len(run) != view.shape[i]]
    if len(wanted) > 1:
        return None
    for axis, run in wanted:
        made = _take(interpreter, equation, view, axis, jnp.asarray(run, jnp.int32))
        return None if made is None else [made]
    return [view]


def _take(
    interpreter: Interpreter, equation: JaxprEqn, view: View, axis: int, numbers: jax.Array
) -> Value | None:
    made = general.take(view, axis, numbers)
    if made is not None and not _is_view(made):
        interpreter.note(view, equation.primitive.name, "rows")
    return made


def _dynamically_sliced(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    view, *starts = operands
    if not _is_view(view):
        return None
    sizes = equation.params["slice_sizes"]
    cut = [axis for axis in range(view.ndim) if sizes[axis] != view.shape[axis]]
    if len(cut) != 1:
        return None if cut else [view]
    (axis,) = cut
    start = jnp.clip(_wide(starts[axis]), 0, view.shape[axis] - sizes[axis]).astype(jnp.int32)
    if sizes[axis] > 1:
        made = _take(interpreter, equation, view, axis, start + jnp.arange(sizes[axis]))
        return None if made is None else [made]
    made = _take(interpreter, equation, view, axis, start)  # one layer stays one
    if _is_view(made):
        return [_with_axes(made, (*made.axes[:axis], (), *made.axes[axis:]))]
    return None if made is None else [jnp.expand_dims(made, axis)]


def _wide(numbers: jax.Array) -> jax.Array:
    """Return integers that can be compared with the sizes of weights, as those of bytes cannot."""
    return numbers.astype(jnp.int32) if numbers.dtype.itemsize < 4 else numbers


def _gathered(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Apply a gather along one axis of a weight, of whole entries of the others."""
    view, starts = operands
    if not _is_view(view):
        return None
    params = equation.params
    dimensions, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(dimensions.start_index_map) != 1 or dimensions.operand_batching_dims:
        return None
    (axis,) = dimensions.start_index_map
    others = [i for i in range(view.ndim) if i != axis]
    if sizes[axis] != 1 or any(sizes[i] != view.shape[i] for i in others):
        return None
    if dimensions.collapsed_slice_dims not in ((), (axis,)):
        return None
    wanted = _wide(starts[..., 0])
    numbers = jnp.clip(wanted, 0, view.shape[axis] - 1).astype(jnp.int32)
    made: Value = _take(interpreter, equation, view, axis, numbers)
    if made is None:
        return None
    mode = jax.lax.GatherScatterMode
    if params["mode"] not in (mode.CLIP, mode.PROMISE_IN_BOUNDS):
        fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
        inside = (wanted >= 0) & (wanted < view.shape[axis])
        if _is_view(made) and not wanted.ndim and fill != fill:
            made = general.nan_unless(inside, made)  # one layer, if it is there
        else:
            made = interpreter.unpacked(made, equation.primitive.name)
            inside = inside.reshape(*(1,) * axis, *wanted.shape, *(1,) * (view.ndim - axis - 1))
            made = jnp.where(inside, made, jnp.asarray(fill, made.dtype))
    # The axes of the numbers stand where `axis` was; the result has the others at `offset_dims`.
    batch = list(range(axis, axis + wanted.ndim))
    kept = [i if i < axis else i - 1 + wanted.ndim for i in others]
    if not dimensions.collapsed_slice_dims:
        if _is_view(made):
            axes = (*made.axes[: axis + wanted.ndim], (), *made.axes[axis + wanted.ndim :])
            made = _with_axes(made, axes)
        else:
            made = jnp.expand_dims(made, axis + wanted.ndim)
        kept = [i if i < axis else i + wanted.ndim for i in range(view.ndim)]
    offsets, order = iter(kept), []
    numbers_axes = iter(batch)
    for place in range(made.ndim):
        order.append(next(offsets) if place in dimensions.offset_dims else next(numbers_axes))
    if _is_view(made):
        return [_with_axes(made, transposed(made.axes, order))]
    return [made.transpose(order)]


# Products ----------------------------------------------------------------------------------------


def _product(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    (left, right), params, name = operands, equation.params, equation.primitive.name
    (contracted, other_contracted), (batch, other_batch) = params["dimension_numbers"]
    weight_first = _is_view(left)
    view, x = (left, right) if weight_first else (right, left)
    if weight_first and _is_view(right):  # two weights: the second is unpacked
        x = interpreter.unpacked(right, name)
    own = (other_contracted, other_batch), (contracted, batch)
    (x_contracted, x_batch), (view_contracted, view_batch) = own if weight_first else own[::-1]
    dtype = _type(equation).dtype
    part = general.product_part(view, view_contracted, view_batch)
    made = None
    if part is not None and jnp.issubdtype(x.dtype, jnp.floating):
        dimensions = (x_contracted, view_contracted), (x_batch, view_batch)
        made = general.dot_general(x, view, dimensions, dtype, weight_first=weight_first)
    how = {general.ROWS: "product", general.COLUMNS: "transposed product"}.get(part or "")
    how = "unpacked in product" if made is None or how is None else how
    interpreter.note(view, name, how, 0, view_contracted, view_batch)
    if made is not None:
        return [made]

    def multiply(x: jax.Array, view: View) -> jax.Array:
        weight = unpack_view(view)
        pair = (weight, x) if weight_first else (x, weight)
        return equation.primitive.bind(*pair, **params)

    return [jax.checkpoint(multiply)(x, view)]  # not kept for the backward pass


def _convolution(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    x, view = operands
    if _is_view(x) or not _is_view(view):
        return None
    interpreter.note(view, equation.primitive.name, "convolution")
    return [general.convolution(x, view, **equation.params)]


# What calls other jaxprs -------------------------------------------------------------------------


def _jit(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    params = equation.params
    constrained = _constrained(operands, params["in_shardings"])
    function = interpreter.called(params["jaxpr"], params["name"])
    return _constrained(function(constrained), params["out_shardings"])


def _constrained(values: Sequence[Value], shardings: Sequence[Any]) -> list[Value]:
    """Return the values with the shardings that a jitted function asks for."""
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not _is_view(value)
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def _inlined(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    return interpreter.run(equation.params["call_jaxpr"], operands)


def _remat(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    params = equation.params
    function = functools.partial(interpreter.run, params["jaxpr"])
    checkpointed = jax.checkpoint(
        lambda *operands: function(operands),
        prevent_cse=params["prevent_cse"],
        policy=params["policy"],
    )
    return checkpointed(*operands)


def _scan(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    params = equation.params
    consts, carry, xs = _cut(operands, *_scan_sizes(params))
    body = params["jaxpr"]
    stays = _forwarded(body, len(consts), len(carry))
    carry, fixed = _settled(interpreter, carry, stays, "scan")
    numbers = jnp.arange(params["length"])

    def step(carry: list[jax.Array], slices: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        number, arrays = slices
        views = [_layer(interpreter, value, number) if _is_view(value) else None for value in xs]
        own = _filled(views, arrays)
        made = interpreter.run(body, [*consts, *_filled(fixed, carry), *own])
        after, ys = made[: len(fixed)], made[len(fixed) :]
        after = [value for value, kept in zip(after, fixed, strict=True) if kept is None]
        return (
            [interpreter.unpacked(value, "scan") for value in after],
            [interpreter.unpacked(value, "scan") for value in ys],
        )

    arrays = [value for value in xs if not _is_view(value)]
    last, ys = jax.lax.scan(
        step,
        carry,
        (numbers, arrays),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*_filled(fixed, last), *ys]


def _scan_sizes(params: Any) -> tuple[int, int]:
    """Return how many operands of a `scan` are constants, and how many are its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(constants), len(carry)


def _layer(interpreter: Interpreter, view: View, number: jax.Array) -> Value:
    """Return an entry of the first axis: packed of a layer, unpacked of rows."""
    made = general.take(view, 0, number)
    if made is None:
        return interpreter.unpacked(view, "scan")[number]
    if not _is_view(made):
        interpreter.note(view, "scan", "rows")
    return made


def _while(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    params = equation.params
    of_test, of_body, carry = _cut(operands, params["cond_nconsts"], params["body_nconsts"])
    body, test = params["body_jaxpr"], params["cond_jaxpr"]
    stays = _forwarded(body, len(of_body), len(carry))
    carry, fixed = _settled(interpreter, carry, stays, "while")

    def go_on(carry: list[jax.Array]) -> jax.Array:
        return interpreter.run(test, [*of_test, *_filled(fixed, carry)])[0]

    def step(carry: list[jax.Array]) -> list[jax.Array]:
        made = interpreter.run(body, [*of_body, *_filled(fixed, carry)])
        after = [value for value, kept in zip(made, fixed, strict=True) if kept is None]
        return [interpreter.unpacked(value, "while") for value in after]

    return _filled(fixed, jax.lax.while_loop(go_on, step, carry))


def _cond(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    index, *operands = operands
    branches = [
        functools.partial(interpreter.arrays, branch) for branch in equation.params["branches"]
    ]
    return jax.lax.switch(index, [lambda b=branch: b(operands) for branch in branches])


def _cut(values: list[Value], first: int, second: int) -> tuple[list, list, list]:
    return values[:first], values[first : first + second], values[first + second :]


def _filled(views: Sequence[Value | None], arrays: Sequence[jax.Array]) -> list[Value]:
    """Return the views, with the arrays in the places where there is none."""
    rest = iter(arrays)
    return [next(rest) if view is None else view for view in views]


def _settled(
    interpreter: Interpreter, carry: list[Value], stays: list[bool], operation: str
) -> tuple[list[jax.Array], list[View | None]]:
    """Return what of a loop's carry changes, as arrays, and the views that never do."""
    fixed = [
        value if _is_view(value) and kept else None
        for value, kept in zip(carry, stays, strict=True)
    ]
    rest = [value for value, view in zip(carry, fixed, strict=True) if view is None]
    return [interpreter.unpacked(value, operation) for value in rest], fixed


def _forwarded(jaxpr: Any, first: int, count: int) -> list[bool]:
    """Return for each part of a loop's carry whether its body returns it as it is."""
    jaxpr, _ = opened(jaxpr)
    sources = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit":
            inner, _ = opened(equation.params["jaxpr"])
            places = {var: place for place, var in enumerate(inner.invars)}
            for own, var in zip(equation.outvars, inner.outvars, strict=True):
                if not isinstance(var, Literal) and var in places:
                    source = equation.invars[places[var]]
                    sources[own] = (
                        source if isinstance(source, Literal) else sources.get(source, source)
                    )
    outvars = jaxpr.outvars[:count]
    return [
        not isinstance(var, Literal) and sources.get(var, var) is jaxpr.invars[first + i]
        for i, var in enumerate(outvars)
    ]


# Functions with derivatives of their own ---------------------------------------------------------


def _custom_jvp(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, rule = equation.primitive.get_bind_params(equation.params)["subfuns"]
    call_jaxpr, is_symbolic = equation.params["call_jaxpr"], equation.params["symbolic_zeros"]
    views, arrays = _apart(operands)
    avals = [var.aval for var in equation.invars]

    @jax.custom_jvp
    def function(views: list[View | None], *arrays: jax.Array) -> list[jax.Array]:
        return interpreter.arrays(call_jaxpr, _filled(views, arrays))

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
            tangents = _filled(known, nonzero)
            return [_instantiated(value) for value in rule.call_wrapped(*primals, *tangents)]

        nonzero = [tangent for tangent in given if not _is_zero(tangent)]
        made = _traced(interpreter, derived, avals, _filled(views, arrays), nonzero)
        return made[: len(made) // 2], made[len(made) // 2 :]

    function.defjvp(with_tangents, symbolic_zeros=True)
    return function(views, *arrays)


def _custom_vjp(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, forward, backward = equation.primitive.get_bind_params(equation.params)["subfuns"]
    call_jaxpr, out_trees = equation.params["call_jaxpr"], equation.params["out_trees"]
    views, arrays = _apart(operands)
    avals, count = [var.aval for var in equation.invars], len(equation.outvars)

    @jax.custom_vjp
    def function(views: list[View | None], arrays: list[jax.Array]) -> list[jax.Array]:
        return interpreter.arrays(call_jaxpr, _filled(views, arrays))

    def keep(views: Any, arrays: Any) -> tuple[list[jax.Array], Any]:
        of_views, of_arrays = _perturbed(views), _perturbed(arrays)
        views, arrays = _values(views), _values(arrays)
        rest = iter(of_arrays)
        flags = [
            next(rest) if view is None else flag for view, flag in zip(views, of_views, strict=True)
        ]

        def both(primals: list[Any], _: Any) -> list[Any]:
            return forward.call_wrapped(*itertools.chain(*zip(primals, flags, strict=True)))

        values = _filled(views, arrays)
        made = _traced(interpreter, both, avals, values, [], packed=True)
        residuals, results = made[: len(made) - count], made[len(made) - count :]
        rest = iter(residuals)
        residuals = [next(rest) if i is None else values[i] for i in out_trees()[2]]
        residuals = [r if hasattr(r, "dtype") else _Known(r) for r in residuals]  # of Python
        return [interpreter.unpacked(value, "custom_vjp") for value in results], (residuals, views)

    def give_back(kept: Any, cotangents: list[Any]) -> tuple[list[Any], list[Any]]:
        residuals, views = kept
        known = [r.value if isinstance(r, _Known) else None for r in residuals]
        zeros = [c if _is_zero(c) else None for c in cotangents]

        def own(residuals: list[Any], nonzero: list[Any]) -> list[Any]:
            given = _filled(zeros, nonzero)
            made = backward.call_wrapped(*_filled(known, residuals), *given)
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
    views = [value if _is_view(value) else None for value in operands]
    return views, [value for value in operands if not _is_view(value)]


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


_RULES: dict[str, Rule] = {
    "transpose": _reordered,
    "reshape": _of_shape,
    "squeeze": _of_shape,
    "expand_dims": _of_shape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "optimization_barrier": _same,
    "stop_gradient": _constant,
    "sharding_constraint": _same,
    "slice": _sliced,
    "split": _split,
    "dynamic_slice": _dynamically_sliced,
    "gather": _gathered,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "jit": _jit,
    "closed_call": _inlined,
    "core_call": _inlined,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}
