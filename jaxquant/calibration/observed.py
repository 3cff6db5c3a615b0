"""Weights that are observed while a function runs: what meets them, and how much they matter.

An observed weight carries probes: arrays on which nothing depends, and whose gradients are what is
observed. Each use of a weight gives its share, as its rule for derivatives; differentiation adds up
the shares of all uses, through scans, branches, checkpoints and maps. The interpreter of
`jaxquant.packing` finds the uses: it takes an observed weight for a packed one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from jaxquant import loops
from jaxquant.calibration.moments import sum_of_products
from jaxquant.packing.arrays import View, seen, unpack_node
from jaxquant.packing.axes import (
    COLUMNS,
    LAYERS,
    REPEATED,
    ROWS,
    is_whole,
    pieces_of,
    whole,
)
from jaxquant.packing.function import Role
from jaxquant.packing.interpreter import Interpreter, Rule, Value, is_view
from jaxquant.packing.ops.general import kept_if, narrowed
from jaxquant.packing.ops.windows import Windows
from jaxquant.packing.parts import columns_of, rows_of
from jaxquant.packing.rules import RULES, views

_DENSE = Windows((), (), (), ())


class Probes(NamedTuple):
    """Zeros, and after differentiation what was observed of a weight.

    Layers that are stacked have an axis each, before the others.
    """

    squares: jax.Array  # [rows, columns] float32, sums of squared gradients; none if not wanted
    moments: jax.Array  # [G, D, D] float32, sums of products; none if not wanted
    count: jax.Array  # [] float32, how many vectors these are sums of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "probes", "members"),
    meta_fields=("rows", "columns", "part"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """A weight with its probes; a matrix of rows and columns for each layer, as packed ones are.

    Attributes:
      weight: [*layers, rows, columns].
      probes: what is observed.
      rows: sizes of the axes that make the rows.
      columns: sizes of the axes that make the columns.
      part: rows or columns, that products sum over; None if nothing is known of it.
      members: [*layers, outputs, G] float32, the share of each output in the mean of its group: a
        vector counts in the moments of a group as much as the gradients of what comes of it there.
        None if all count alike.
    """

    weight: jax.Array
    probes: Probes
    members: jax.Array | None
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    part: str | None

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the axes of stacked layers; () of a single one."""
        return self.weight.shape[:-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.layers, *self.rows, *self.columns)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weight.size

    @property
    def dtype(self) -> Any:
        """Of the weight."""
        return self.weight.dtype

    def __getitem__(self, index: jax.Array) -> "Observed":
        """Return a layer, or several in a stack."""
        return jax.tree.map(lambda x: x[index], self)


def observed(weight: jax.Array, probes: Probes, role: Role, groups: int) -> View:
    """Return a weight as the interpreter takes it.

    Args:
      weight: of any shape.
      probes: from `probes_of`.
      role: of the weight in the function.
      groups: of outputs at most that vectors count by; 0 if all count alike. See `_groups_of`.
    """
    layers, rows, columns = _parts(weight.shape, role)
    outputs, counts = math.prod(columns if role.inputs > 0 else rows), groups and role.inputs
    matrix = weight.reshape(*layers, math.prod(rows), math.prod(columns))
    own = Observed(
        weight=matrix,
        probes=probes,
        rows=rows,
        columns=columns,
        part=None if not role.inputs else ROWS if role.inputs > 0 else COLUMNS,
        members=_members(layers, outputs, _groups_of(outputs, groups)) if counts else None,
    )
    return View(packed=cast(Any, own), axes=whole(layers, rows, columns), dtype=weight.dtype)


def _observed_by(view: View) -> Observed:
    """Return the weight that a view shows, which here is no packed one."""
    return cast(Any, view.packed)


def _groups_of(outputs: int, most: int) -> int:
    """Return in how many groups, at most so many, some outputs can be cut evenly; 1 at least."""
    return next((n for n in range(min(most, outputs), 1, -1) if outputs % n == 0), 1)


def _members(layers: tuple[int, ...], outputs: int, groups: int) -> jax.Array:
    size = outputs // groups
    members = jnp.repeat(jnp.eye(groups, dtype=jnp.float32) / size, size, axis=0)
    return jnp.broadcast_to(members, (*layers, *members.shape))


def probes_of(
    shape: Sequence[int], role: Role, *, sensitivity: bool, moments: bool, groups: int
) -> Probes:
    """Return the probes of a weight before anything is observed.

    Args:
      shape: of the weight.
      role: of the weight in the function; with 0 inputs nothing is known of its products.
      sensitivity: whether squared gradients are wanted.
      moments: whether sums of products are.
      groups: as for `observed`.
    """
    layers, rows, columns = _parts(shape, role)
    summed, outputs = map(math.prod, (rows, columns) if role.inputs > 0 else (columns, rows))
    inputs = summed if moments and role.inputs else 0
    size = (math.prod(rows), math.prod(columns)) if sensitivity else (0, 0)
    return Probes(
        squares=jnp.zeros((*layers, *size), jnp.float32),
        moments=jnp.zeros((*layers, _groups_of(outputs, groups), inputs, inputs), jnp.float32),
        count=jnp.zeros(layers, jnp.float32),
    )


def _parts(shape: Sequence[int], role: Role) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of the axes of layers, rows and columns."""
    layers, own = tuple(shape[: int(role.is_stack)]), tuple(shape[int(role.is_stack) :])
    inputs = role.inputs or len(own) - 1
    return layers, own[:inputs], own[inputs:]  # of the last axes, if negative: they are columns


# Uses of a weight --------------------------------------------------------------------------------


class _Arrays(NamedTuple):
    """What of an observed weight a use depends on."""

    weight: jax.Array
    probes: Probes
    members: jax.Array | None  # [outputs, G], see `Observed`


def _use(
    apply: Callable[..., jax.Array],
    share: Callable[..., Probes],
    x: jax.Array | None,
    arrays: _Arrays,
) -> jax.Array:
    """Return `apply(x, weight)`, whose backward pass gives the probes their shares.

    Args:
      apply: linear in each argument.
      share: returns it from x, the weight, the members of groups of outputs, and the gradient.
      x: what meets the weight, or None.
      arrays: of the weight; it gets no gradient itself.
    """

    @jax.custom_vjp
    def use(x: Any, arrays: _Arrays) -> jax.Array:
        return apply(x, arrays.weight)

    def forward(x: Any, arrays: _Arrays) -> tuple[jax.Array, Any]:
        return use(x, arrays), (x, arrays.weight, arrays.members, arrays.probes.count)

    def backward(kept: Any, gradient: jax.Array) -> tuple[Any, _Arrays]:
        x, weight, members, _ = kept
        back = None
        if x is not None:
            (back,) = jax.linear_transpose(lambda x: apply(x, weight), x)(gradient)
        found = loops.varying_like(share(x, weight, members, gradient), (kept, gradient))
        weight, members = jax.tree.map(jnp.zeros_like, (weight, members))
        return back, _Arrays(weight, found, members)

    use.defvjp(forward, backward)
    return use(x, arrays)


def _shown(view: View) -> _Arrays:
    """Return the weight as a view shows it, and its probe of squares likewise."""
    own = _observed_by(view)
    weight, squares = seen(own.weight, view.axes).astype(view.dtype), own.probes.squares
    if squares.size:
        squares = seen(squares, view.axes)
    members = own.members
    if members is not None:
        members = members.reshape(-1, *members.shape[-2:])[0]  # of all layers the same
    return _Arrays(weight, own.probes._replace(squares=squares), members)


def _zeros(probes: Probes) -> Probes:
    return jax.tree.map(jnp.zeros_like, probes)


@unpack_node.register
def _(own: Observed) -> jax.Array:
    """Return the weight for a use that nothing is known of: its gradient as a whole is squared."""

    def share(_: None, weight: jax.Array, members: None, gradient: jax.Array) -> Probes:
        del weight, members
        found = _zeros(own.probes)
        if not found.squares.size:
            return found
        return found._replace(squares=jnp.square(gradient.astype(jnp.float32)))

    arrays = _Arrays(own.weight, own.probes, None)
    return _use(lambda _, weight: weight, share, None, arrays).reshape(own.shape)


@narrowed.register
def _(own: Observed, dtype: Any) -> Observed:
    return dataclasses.replace(own, weight=own.weight.astype(dtype))


@kept_if.register
def _(own: Observed, flag: jax.Array) -> Observed:
    weight = jnp.where(flag, own.weight, jnp.asarray(jnp.nan, own.dtype))
    return dataclasses.replace(own, weight=weight)


@rows_of.register
def _(own: Observed, numbers: jax.Array) -> Observed:
    return _taken(own, ROWS, numbers)


@columns_of.register
def _(own: Observed, numbers: jax.Array) -> Observed:
    return _taken(own, COLUMNS, numbers)


def _taken(own: Observed, part: str, numbers: jax.Array) -> Observed:
    """Return some rows or columns; moments are those of whole inputs, whatever the outputs."""

    def take(x: Any, axis: int) -> Any:
        return jnp.take(x, numbers, axis=axis) if x is not None and x.size else x

    axis, are_inputs = (-2 if part == ROWS else -1), own.part == part
    return dataclasses.replace(
        own,
        weight=take(own.weight, axis),
        probes=own.probes._replace(squares=take(own.probes.squares, axis)),
        members=None if are_inputs else take(own.members, -2),
        part=None if are_inputs else own.part,
        **{part: numbers.shape},
    )


# Rules -------------------------------------------------------------------------------------------


def _dot_general(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Multiply, and observe."""
    (left, right), params = operands, equation.params
    (contracted, other_contracted), (batch, other_batch) = params["dimension_numbers"]
    weight_first = is_view(left)
    view, x = (left, right) if weight_first else (right, left)
    if weight_first and is_view(right):  # two weights: the second is unpacked
        x = interpreter.unpacked(right, equation.primitive.name)
    own = (other_contracted, other_batch), (contracted, batch)
    of_x, of_view = own if weight_first else own[::-1]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None

    def multiply(x: jax.Array, weight: jax.Array, **changes: Any) -> jax.Array:
        pair = (weight, x) if weight_first else (x, weight)
        return equation.primitive.bind(*pair, **params | changes)

    wide = functools.partial(multiply, preferred_element_type=jnp.dtype(jnp.float32))
    seen_by = None
    if _sums_whole_part(view, *of_view):
        sides = _Sides(view, of_x, of_view, weight_first)
        seen_by = functools.partial(_products, sides)
    return [_observe(multiply, wide, seen_by, x, view)]


def _convolve(
    interpreter: Interpreter, equation: JaxprEqn, operands: list[Value]
) -> list[Value] | None:
    """Convolve, and observe."""
    del interpreter
    x, view = operands
    if is_view(x) or not is_view(view) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    params = equation.params

    def convolve(x: jax.Array, weight: jax.Array, **changes: Any) -> jax.Array:
        return equation.primitive.bind(x, weight, **params | changes)

    wide = functools.partial(convolve, preferred_element_type=jnp.dtype(jnp.float32))
    _, *summed = params["dimension_numbers"].rhs_spec
    seen_by = None
    ungrouped = params["feature_group_count"] == params["batch_group_count"] == 1
    if ungrouped and _sums_whole_part(view, summed, ()):
        seen_by = functools.partial(_window_products, view, params)
    return [_observe(convolve, wide, seen_by, x, view)]


OBSERVING: Mapping[str, Rule] = RULES | {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolve,
    "stop_gradient": views.keep,
    # What is observed is of the function itself, not of its own rules for derivatives.
    "custom_jvp_call": lambda run, equation, operands: run.run(
        equation.params["call_jaxpr"], operands
    ),
    "custom_vjp_call": lambda run, equation, operands: run.run(
        equation.params["call_jaxpr"], operands
    ),
}


def _observe(
    apply: Callable[..., jax.Array],
    wide: Callable[..., jax.Array],
    products: Callable[..., tuple[jax.Array, jax.Array]] | None,
    x: jax.Array,
    view: View,
) -> jax.Array:
    """Return `apply(x, weight)`.

    Args:
      apply: bilinear.
      wide: the same in float32.
      products: returns, from x, the gradient and the members of groups of outputs, moments and
        count as the probes have them.
      x: what meets the weight.
      view: of the weight.
    """
    arrays = _shown(view)

    def share(
        x: jax.Array, weight: jax.Array, members: jax.Array | None, gradient: jax.Array
    ) -> Probes:
        x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)

        def of_squares(weight: jax.Array) -> jax.Array:
            return wide(jnp.square(x), weight)

        found = _zeros(arrays.probes)
        if found.squares.size:
            _, pull = jax.vjp(of_squares, weight.astype(jnp.float32))
            (squares,) = pull(jnp.square(gradient))
            found = found._replace(squares=squares)
        if products is not None and found.moments.size:
            moments, count = products(x, gradient, members)
            found = found._replace(moments=moments, count=count)
        return found

    return _use(apply, share, x, arrays)


# Moments -----------------------------------------------------------------------------------------


def _sums_whole_part(view: View, contracted: Sequence[int], batch: Sequence[int]) -> bool:
    """Return whether a product sums over the part that moments are of, layer by layer."""
    part = _observed_by(view).part
    if part is None or not is_whole(view.axes, contracted, (part,)):
        return False
    shared = pieces_of(tuple(view.axes[axis] for axis in batch))
    layers = set(pieces_of(view.axes, LAYERS))
    return layers & {*shared} in (set(), layers) and not any(
        piece.part in (ROWS, COLUMNS) for piece in shared
    )


class _Sides(NamedTuple):
    """A product of an array and a weight."""

    view: View
    of_x: tuple[Sequence[int], Sequence[int]]  # its contracted and its batch axes
    of_view: tuple[Sequence[int], Sequence[int]]  # those of the weight
    weight_first: bool


def _products(
    sides: _Sides, x: jax.Array, gradient: jax.Array, members: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return moments and count of a product: of each layer, where they are stacked."""
    view = sides.view
    own = _observed_by(view)
    (x_contracted, x_batch), (contracted, batch) = sides.of_x, sides.of_view
    free = [axis for axis in range(view.ndim) if axis not in (*contracted, *batch)]
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_contracted, *x_batch)]
    # A label for each piece of an axis of the weight, and for each free axis of x.
    pieces = dict(enumerate(pieces_of(view.axes)))
    labels = iter(pieces)
    by_axis = [[next(labels) for _ in axis] for axis in view.axes]
    shared, outputs, summed = (
        [label for axis in axes for label in by_axis[axis]] for axes in (batch, free, contracted)
    )
    vectors: list[Any] = [f"x{axis}" for axis in x_free]
    sizes: dict[Any, int] = {label: piece.size for label, piece in pieces.items()}
    sizes |= {name: x.shape[axis] for name, axis in zip(vectors, x_free, strict=True)}

    def stored(labels: Sequence[int], *parts: str) -> list[int]:
        chosen = [label for label in labels if pieces[label].part in parts]
        return sorted(chosen, key=lambda label: -pieces[label].stride)

    def arranged(array: jax.Array, labels: Sequence[Any], *wanted: Sequence[Any]) -> jax.Array:
        """Return an array whose axes have labels with an axis for each group of them."""
        array = array.reshape([sizes[label] for label in labels])
        array = array.transpose([labels.index(label) for group in wanted for label in group])
        return array.reshape([math.prod(sizes[label] for label in group) for group in wanted])

    rows = [*(label for label in shared if pieces[label].part == REPEATED), *vectors]
    x = x.transpose((*x_batch, *x_free, *x_contracted))
    x = arranged(
        x, [*shared, *vectors, *summed], stored(shared, LAYERS), rows, stored(summed, ROWS, COLUMNS)
    )
    middle = [*outputs, *vectors] if sides.weight_first else [*vectors, *outputs]
    layers = stored([*shared, *outputs], LAYERS)
    gradient = arranged(gradient, [*shared, *middle], layers, rows, stored(outputs, ROWS, COLUMNS))

    def of_layer(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return sum_of_products(x, _DENSE, _energies(gradient, members))

    every = 0 if len(x) == len(gradient) else None  # of layers that are not shared, x is the same
    moments = jax.vmap(of_layer, (every, 0))(x if every == 0 else x[0], gradient)
    count = jnp.broadcast_to(jnp.float32(gradient.shape[1]), own.layers)
    return moments.reshape(own.probes.moments.shape), count


def _window_products(
    view: View,
    params: Mapping[str, Any],
    x: jax.Array,
    gradient: jax.Array,
    members: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return moments and count of a convolution."""
    own = _observed_by(view)
    inputs_spec, kernel_spec, outputs_spec = params["dimension_numbers"]
    (batch, feature, *space), (features, *summed) = inputs_spec, kernel_spec
    x = x.transpose((batch, *space, feature))
    gaps = [(0, 0, 0), *((0, 0, gap - 1) for gap in params["lhs_dilation"]), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.float32(0), gaps)
    channel, *spatial = summed
    window = tuple(view.shape[axis] for axis in spatial)
    options = Windows(
        window,
        tuple(params["window_strides"]),
        tuple(tuple(pair) for pair in params["padding"]),
        tuple(params["rhs_dilation"]),
    )
    out_batch, out_feature, *out_space = outputs_spec
    gradient = gradient.transpose((out_batch, *out_space, out_feature))
    if members is not None:
        members = members[np.argsort(_as_stored(view, (features,)))]  # as the gradient has outputs
    moments = sum_of_products(x, options, _energies(gradient, members))
    order = _as_stored(view, (*spatial, channel))
    moments = moments[..., order[:, None], order]
    moments = moments.reshape(own.probes.moments.shape)
    return moments, jnp.float32(math.prod(gradient.shape[:-1]))


def _as_stored(view: View, axes: Sequence[int]) -> np.ndarray:
    """Return the places, in some axes of a view as one, of what they show in the order stored."""
    pieces = pieces_of(tuple(view.axes[axis] for axis in axes))
    sizes = [piece.size for piece in pieces]
    stored = sorted(range(len(pieces)), key=lambda place: -pieces[place].stride)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(stored).ravel()


def _energies(gradient: jax.Array, members: jax.Array | None) -> jax.Array | None:
    """Return how much each vector counts for each group of outputs, [..., G]; None for all alike.

    Args:
      gradient: [..., outputs].
      members: [outputs, G], in the same order.
    """
    if members is None:
        return None
    return jnp.matmul(jnp.square(gradient), members, precision=jax.lax.Precision.HIGHEST)
