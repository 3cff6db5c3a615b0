"""What calls other jaxprs: they are evaluated with the weights packed."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from jaxquant.packing.arrays import View
from jaxquant.packing.axes import LAYERS, is_whole
from jaxquant.packing.interpreter import Interpreter, Value, filled, is_view, opened
from jaxquant.packing.ops import general


def jit(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild a jitted function, with the shardings that it asks for."""
    params = equation.params
    constrained = _constrained(operands, params["in_shardings"])
    function = interpreter.called(params["jaxpr"], params["name"])
    return _constrained(function(constrained), params["out_shardings"])


def _constrained(values: Sequence[Value], shardings: Sequence[Any]) -> list[Value]:
    """Return the values with the shardings that a jitted function asks for."""
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not is_view(value)
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def inline(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Evaluate what a call calls."""
    return interpreter.run(equation.params["call_jaxpr"], operands)


def checkpoint(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild `jax.checkpoint`, by the same policy."""
    params = equation.params
    function = functools.partial(interpreter.run, params["jaxpr"])
    checkpointed = jax.checkpoint(
        lambda *operands: function(operands),
        prevent_cse=params["prevent_cse"],
        policy=params["policy"],
    )
    return checkpointed(*operands)


def scan(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild a scan: of what is stacked a step gets its layer, packed; rows, unpacked."""
    params = equation.params
    consts, carry, xs = _cut(operands, *_scan_sizes(params))
    body = params["jaxpr"]
    stays = _stays(body, len(consts), len(carry))
    carry, fixed = _settled(interpreter, carry, stays, "scan")
    numbers = jnp.arange(params["length"])
    stacks = [value.packed if is_view(value) and _is_stack(value) else None for value in xs]

    def step(carry: list[jax.Array], slices: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        number, layers, arrays = slices
        views = [
            _entry(interpreter, value, layer, number) if is_view(value) else None
            for value, layer in zip(xs, layers, strict=True)
        ]
        own = filled(views, arrays)
        made = interpreter.run(body, [*consts, *filled(fixed, carry), *own])
        after, ys = made[: len(fixed)], made[len(fixed) :]
        after = [value for value, kept in zip(after, fixed, strict=True) if kept is None]
        return (
            [interpreter.unpacked(value, "scan") for value in after],
            [interpreter.unpacked(value, "scan") for value in ys],
        )

    arrays = [value for value in xs if not is_view(value)]
    last, ys = jax.lax.scan(
        step,
        carry,
        (numbers, stacks, arrays),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*filled(fixed, last), *ys]


def _scan_sizes(params: Any) -> tuple[int, int]:
    """Return how many operands of a `scan` are constants, and how many are its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(constants), len(carry)


def _is_stack(view: View) -> bool:
    """Return whether the first axis is that of the stacked layers."""
    return len(view.packed.layers) == 1 and is_whole(view.axes, (0,), (LAYERS,))


def _entry(interpreter: Interpreter, view: View, layer: Any, number: jax.Array) -> Value:
    """Return an entry of the first axis: a layer, packed, where there are some; else rows."""
    if layer is not None:
        return dataclasses.replace(view, packed=layer, axes=view.axes[1:])
    made = general.take(view, 0, number)
    if made is None:
        return interpreter.unpacked(view, "scan")[number]
    if not is_view(made):
        interpreter.note(view, "scan", "rows")
    return made


def while_loop(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild a loop; weights that its carry hands on unchanged stay packed."""
    params = equation.params
    of_test, of_body, carry = _cut(operands, params["cond_nconsts"], params["body_nconsts"])
    body, test = params["body_jaxpr"], params["cond_jaxpr"]
    stays = _stays(body, len(of_body), len(carry))
    carry, fixed = _settled(interpreter, carry, stays, "while")

    def go_on(carry: list[jax.Array]) -> jax.Array:
        return interpreter.run(test, [*of_test, *filled(fixed, carry)])[0]

    def step(carry: list[jax.Array]) -> list[jax.Array]:
        made = interpreter.run(body, [*of_body, *filled(fixed, carry)])
        after = [value for value, kept in zip(made, fixed, strict=True) if kept is None]
        return [interpreter.unpacked(value, "while") for value in after]

    return filled(fixed, jax.lax.while_loop(go_on, step, carry))


def cond(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Rebuild a choice between branches."""
    index, *operands = operands
    branches = [
        functools.partial(interpreter.arrays, branch) for branch in equation.params["branches"]
    ]
    return jax.lax.switch(index, [lambda b=branch: b(operands) for branch in branches])


def _cut(values: list[Value], first: int, second: int) -> tuple[list, list, list]:
    return values[:first], values[first : first + second], values[first + second :]


def _settled(
    interpreter: Interpreter, carry: list[Value], stays: list[bool], operation: str
) -> tuple[list[jax.Array], list[View | None]]:
    """Return what of a loop's carry changes, as arrays, and the views that never do."""
    fixed = [
        value if is_view(value) and kept else None for value, kept in zip(carry, stays, strict=True)
    ]
    rest = [value for value, view in zip(carry, fixed, strict=True) if view is None]
    return [interpreter.unpacked(value, operation) for value in rest], fixed


def _stays(jaxpr: Any, first: int, count: int) -> list[bool]:
    """Return for each part of a loop's carry whether its body returns it as it is."""
    return [place == first + i for i, place in enumerate(_forwarded(jaxpr)[:count])]


def _forwarded(jaxpr: Any) -> list[int | None]:
    """Return for each result of a jaxpr which operand it is, through jitted functions; or None.

    JAX itself takes such parts out of a loop's carry, but for those that a jitted body returns.
    """
    jaxpr, _ = opened(jaxpr)
    places = {var: place for place, var in enumerate(jaxpr.invars)}

    def place_of(atom: Any) -> int | None:
        return None if isinstance(atom, Literal) else places.get(atom)

    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit":
            own = _forwarded(equation.params["jaxpr"])
            found = [None if i is None else place_of(equation.invars[i]) for i in own]
            pairs = zip(equation.outvars, found, strict=True)
            places |= {var: place for var, place in pairs if place is not None}
    return [place_of(atom) for atom in jaxpr.outvars]
