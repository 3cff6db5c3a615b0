"""What moves, casts or cuts a weight, and changes nothing that its codes say."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxquant.packing.arrays import View
from jaxquant.packing.axes import repeated, reshaped, transposed
from jaxquant.packing.interpreter import (
    Interpreter,
    Value,
    asks_for_sharding,
    is_view,
    result_type,
)
from jaxquant.packing.ops import general


def reorder(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Apply a transposition."""
    view, order = operands[0], equation.params["permutation"]
    return [dataclasses.replace(view, axes=transposed(view.axes, order))]


def reshape(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    """Apply reshape, squeeze, expand_dims."""
    if not is_view(operands[0]) or asks_for_sharding(equation):
        return None
    axes, order = operands[0].axes, equation.params.get("dimensions")
    if equation.primitive.name == "reshape" and order is not None:
        axes = transposed(axes, order)
    axes = reshaped(axes, result_type(equation).shape)
    return None if axes is None else [dataclasses.replace(operands[0], axes=axes)]


def broadcast(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    """Apply `broadcast_in_dim`."""
    if not is_view(operands[0]) or asks_for_sharding(equation):
        return None
    places = equation.params["broadcast_dimensions"]
    axes = repeated(operands[0].axes, result_type(equation).shape, places)
    return [dataclasses.replace(operands[0], axes=axes)]


def cast(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    """Apply a cast to a dtype of floating point."""
    if asks_for_sharding(equation):
        return None
    view = general.cast(operands[0], equation.params["new_dtype"])
    return None if view is None else [view]


def keep(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    """Apply what changes no value: copies, barriers, wishes for a sharding."""
    if asks_for_sharding(equation):
        return None
    arrays = [value for value in operands if not is_view(value)]
    if arrays and equation.primitive.multiple_results:
        kept = iter(equation.primitive.bind(*arrays, **equation.params))
        return [value if is_view(value) else next(kept) for value in operands]
    return operands


def stop_gradient(_: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Apply `stop_gradient`."""
    (view,) = operands
    return [dataclasses.replace(view, packed=jax.lax.stop_gradient(view.packed))]


def cut(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value] | None:
    """Apply a slice."""
    params = equation.params
    steps = params["strides"] or (1,) * operands[0].ndim
    runs = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return _taken_apart(interpreter, equation, operands[0], [range(*run) for run in runs])


def split(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Apply a split into parts along an axis."""
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
    if made is not None and not is_view(made):
        interpreter.note(view, equation.primitive.name, "rows")
    return made


def dynamic_slice(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Apply a slice along one axis from a place that varies, kept in bounds."""
    view, *starts = operands
    if not is_view(view):
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
    if is_view(made):
        return [dataclasses.replace(made, axes=(*made.axes[:axis], (), *made.axes[axis:]))]
    return None if made is None else [jnp.expand_dims(made, axis)]


def _wide(numbers: jax.Array) -> jax.Array:
    """Return integers that can be compared with the sizes of weights, as those of bytes cannot."""
    return numbers.astype(jnp.int32) if numbers.dtype.itemsize < 4 else numbers


def gather(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Apply a gather along one axis of a weight, of whole entries of the others."""
    view, starts = operands
    if not is_view(view):
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
        if is_view(made) and not wanted.ndim and fill != fill:
            made = general.nan_unless(inside, made)  # one layer, if it is there
        else:
            made = interpreter.unpacked(made, equation.primitive.name)
            inside = inside.reshape(*(1,) * axis, *wanted.shape, *(1,) * (view.ndim - axis - 1))
            made = jnp.where(inside, made, jnp.asarray(fill, made.dtype))
    # The axes of the numbers stand where `axis` was; the result has the others at `offset_dims`.
    batch = list(range(axis, axis + wanted.ndim))
    kept = [i if i < axis else i - 1 + wanted.ndim for i in others]
    if not dimensions.collapsed_slice_dims:
        if is_view(made):
            axes = (*made.axes[: axis + wanted.ndim], (), *made.axes[axis + wanted.ndim :])
            made = dataclasses.replace(made, axes=axes)
        else:
            made = jnp.expand_dims(made, axis + wanted.ndim)
        kept = [i if i < axis else i + wanted.ndim for i in range(view.ndim)]
    offsets, order = iter(kept), []
    numbers_axes = iter(batch)
    for place in range(made.ndim):
        order.append(next(offsets) if place in dimensions.offset_dims else next(numbers_axes))
    if is_view(made):
        return [dataclasses.replace(made, axes=transposed(made.axes, order))]
    return [made.transpose(order)]
