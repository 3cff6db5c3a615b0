"""Products and convolutions with a weight."""

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxquant.packing.arrays import View, unpack_view
from jaxquant.packing.axes import COLUMNS, ROWS
from jaxquant.packing.interpreter import (
    Interpreter,
    Value,
    asks_for_sharding,
    is_view,
    result_type,
)
from jaxquant.packing.ops import general

_HOW = {ROWS: "product", COLUMNS: "transposed product", None: "unpacked in product"}


def dot_general(interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Multiply packed, or with the weight unpacked inside of this product."""
    (left, right), params, name = operands, equation.params, equation.primitive.name
    (contracted, other_contracted), (batch, other_batch) = params["dimension_numbers"]
    weight_first = is_view(left)
    view, x = (left, right) if weight_first else (right, left)
    if weight_first and is_view(right):  # two weights: the second is unpacked
        x = interpreter.unpacked(right, name)
    own = (other_contracted, other_batch), (contracted, batch)
    (x_contracted, x_batch), (view_contracted, view_batch) = own if weight_first else own[::-1]
    dtype = result_type(equation).dtype
    part = None
    if jnp.issubdtype(x.dtype, jnp.floating) and not asks_for_sharding(equation):
        part = general.product_part(view, view_contracted, view_batch)
    interpreter.note(view, name, _HOW[part], 0, view_contracted, view_batch)
    if part is not None:
        dimensions = (x_contracted, view_contracted), (x_batch, view_batch)
        return [general.dot_general(x, view, part, dimensions, dtype, weight_first=weight_first)]

    def multiply(x: jax.Array, view: View) -> jax.Array:
        weight = unpack_view(view)
        pair = (weight, x) if weight_first else (x, weight)
        return equation.primitive.bind(*pair, **params)

    return [jax.checkpoint(multiply)(x, view)]  # not kept for the backward pass


def convolve(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Convolve with a kernel that is unpacked for it."""
    x, view = operands
    if is_view(x) or not is_view(view):
        return None
    _, *summed = equation.params["dimension_numbers"].rhs_spec
    interpreter.note(view, equation.primitive.name, "convolution", 0, summed)
    return [general.convolution(x, view, **equation.params)]
