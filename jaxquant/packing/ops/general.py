"""Operations of `jax.lax` on views of packed weights.

Where a view cannot be used as it is, and has to be unpacked, the answer is None.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.packing.arrays import PackedArray, ProductArray, View, seen, unpack_view
from jaxquant.packing.axes import (
    COLUMNS,
    LAYERS,
    REPEATED,
    ROWS,
    Axes,
    Piece,
    axis_of,
    is_whole,
    pieces_of,
    whole,
)
from jaxquant.packing.ops.api import matmul
from jaxquant.packing.parts import columns_of, rows_of

Dimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


# Products ----------------------------------------------------------------------------------------


def product_part(view: View, contracted: Sequence[int], batch: Sequence[int]) -> str | None:
    """Return what a product sums over that the packed weight can be used in: rows or columns.

    Layers may be shared by both operands, all of them; or kept; or summed over, as axes of inputs
    whose entries have their own codebooks. None where the weight has to be unpacked.

    Args:
      view: of the weight.
      contracted: its axes that are summed over.
      batch: its axes that the other operand has, too.
    """
    if not view.packed.columns or not view.packed.size:
        return None
    shared = pieces_of(tuple(view.axes[axis] for axis in batch))
    kept = [axis for axis in range(view.ndim) if axis not in (*contracted, *batch)]
    own = pieces_of(tuple(view.axes[axis] for axis in kept))
    layers = set(pieces_of(view.axes, LAYERS))
    if any(piece.part in (ROWS, COLUMNS) for piece in shared) or pieces_of((own,), REPEATED):
        return None
    if layers & {*shared} not in (set(), layers):
        return None
    for others in ((), (LAYERS,)):
        for part in (ROWS, COLUMNS):
            if is_whole(view.axes, contracted, (part, *others)):
                return part
    return None


def dot_general(
    x: jax.Array, view: View, part: str, dimensions: Dimensions, dtype: Any, *, weight_first: bool
) -> jax.Array:
    """Return `jax.lax.dot_general` of an array and a weight.

    Args:
      x: an array.
      view: of the weight.
      part: of the weight that is summed over, from `product_part`.
      dimensions: contracted axes of x and of the view, and their batch axes.
      dtype: of the result.
      weight_first: whether the weight's own axes come before those of x in the result.
    """
    (x_contracted, contracted), (x_batch, batch) = dimensions
    free = [axis for axis in range(view.ndim) if axis not in (*contracted, *batch)]
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_contracted, *x_batch)]
    # A label for each piece of an axis of the weight, and for each free axis of x.
    pieces = dict(enumerate(pieces_of(view.axes)))
    labels, count = [], 0
    for axis in view.axes:
        labels.append(list(range(count, count + len(axis))))
        count += len(axis)
    summed, shared, own = (
        [label for axis in axes for label in labels[axis]] for axes in (contracted, batch, free)
    )
    of_x = {f"x{axis}": x.shape[axis] for axis in x_free}
    sizes = {label: piece.size for label, piece in pieces.items()} | of_x

    def stored(labels: Sequence[int], *parts: str) -> list[int]:
        chosen = [label for label in labels if pieces[label].part in parts]
        return sorted(chosen, key=lambda label: -pieces[label].stride)

    layers = stored(range(count), LAYERS)
    sum_layers = bool(layers) and layers[0] in summed
    repeated = [label for label in shared if pieces[label].part == REPEATED]
    x = _moved(x, range(x.ndim), (*x_batch, *x_free, *x_contracted))
    x = _shaped(x, [sizes[label] for label in (*shared, *of_x, *summed)])
    lead = [label for label in layers if label not in own]
    vectors = [*repeated, *of_x]
    wanted = [*lead, *vectors, *stored(summed, ROWS, COLUMNS)]
    x = _moved(x, [*shared, *of_x, *summed], wanted)
    outputs = stored(own, ROWS, COLUMNS)
    wide = jnp.promote_types(dtype, jnp.float32) if sum_layers else dtype
    y = _product(x, view, part, wide, len(lead), len(vectors))
    if sum_layers:
        y, layers = jnp.sum(y, axis=0).astype(dtype), []
    y = _shaped(y, [sizes[label] for label in (*layers, *vectors, *outputs)])
    middle = [*own, *of_x] if weight_first else [*of_x, *own]
    y = _moved(y, [*layers, *vectors, *outputs], [*shared, *middle])
    shapes = [view.shape[axis] for axis in free], list(of_x.values())
    first, second = shapes if weight_first else shapes[::-1]
    return _shaped(y, [*(view.shape[axis] for axis in batch), *first, *second])


def _moved(array: jax.Array, labels: Sequence[Any], wanted: Sequence[Any]) -> jax.Array:
    """Return an array whose axes have labels with its axes in the order of other labels."""
    order = [labels.index(label) for label in wanted]
    return array if order == list(range(array.ndim)) else array.transpose(order)


def _shaped(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    return array if array.shape == tuple(shape) else array.reshape(shape)


def _product(x: jax.Array, view: View, part: str, dtype: Any, lead: int, vectors: int) -> jax.Array:
    """Return [*layers, *vectors, outputs] from x [*layers, *vectors, *pieces summed over].

    Args:
      x: without axes of layers, it is multiplied with the weight of each layer.
      view: of the weight.
      part: of the weight, rows or columns, that is summed over.
      dtype: of the result.
      lead: number of axes of layers that x has.
      vectors: number of axes of vectors.
    """
    packed = view.packed
    inputs, outputs = packed.rows, packed.columns
    if part == COLUMNS:
        inputs, outputs = outputs, inputs
    layers = packed.layers

    def multiply(x: jax.Array, packed: PackedArray | ProductArray) -> jax.Array:
        weight = packed if part == ROWS else _transposed(packed)
        x = _shaped(x, (*x.shape[:vectors], *inputs))
        y = matmul(x, weight, preferred_element_type=dtype)
        return _shaped(y, (*x.shape[:vectors], math.prod(outputs)))

    stacked = [math.prod(layers)] if lead else []
    x = _shaped(x, (*stacked, *x.shape[lead : lead + vectors], math.prod(inputs)))
    if not layers:
        return multiply(x, packed)
    return jax.vmap(multiply, (0 if lead else None, 0))(x, packed)


def _transposed(packed: PackedArray | ProductArray) -> View:
    """Return a weight for `matmul` to sum over its columns."""
    axes = whole((), (math.prod(packed.rows),), (math.prod(packed.columns),))
    return View(packed=packed, axes=axes[::-1], dtype=packed.dtype)


def convolution(x: jax.Array, view: View, **options: Any) -> jax.Array:
    """Return `jax.lax.conv_general_dilated`; the kernel is unpacked for it, and not kept."""

    def convolve(x: jax.Array, view: View) -> jax.Array:
        return jax.lax.conv_general_dilated_p.bind(x, unpack_view(view), **options)

    return jax.checkpoint(convolve)(x, view)


# Views -------------------------------------------------------------------------------------------


def cast(view: View, dtype: Any) -> View | None:
    """Return a view in another dtype, rounded as the weight would be."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    packed = view.packed if _holds(dtype, view.packed.dtype) else narrowed(view.packed, dtype)
    return None if packed is None else dataclasses.replace(view, packed=packed, dtype=dtype)


@functools.singledispatch
def narrowed(packed: PackedArray, dtype: Any) -> Any:
    """Return a weight rounded to a dtype, packed; None where it cannot be, so."""
    if packed.scale is None:
        codebook = packed.codebook.astype(packed.dtype).astype(dtype)
        return dataclasses.replace(packed, codebook=codebook, dtype=dtype)
    if _holds(packed.dtype, jnp.float32):
        return packed.astype(dtype)  # codebook times scale is rounded once, from float32
    return None


@narrowed.register
def _(packed: ProductArray, dtype: Any) -> ProductArray:
    return dataclasses.replace(packed, words=packed.words.astype(dtype))


def _holds(wide: Any, narrow: Any) -> bool:
    """Return whether a floating dtype has all values of another."""
    ours, theirs = jnp.finfo(wide), jnp.finfo(narrow)
    return (
        ours.nmant >= theirs.nmant and ours.maxexp >= theirs.maxexp and ours.minexp <= theirs.minexp
    )


def take(view: View, axis: int, numbers: jax.Array) -> View | jax.Array | None:
    """Return entries of one axis: layers and columns stay packed, of rows these are unpacked.

    Args:
      view: of the weight.
      axis: of the view.
      numbers: [...] integers in bounds, scalar or several.

    Returns:
      [*axes before, *axes of numbers, *axes behind].
    """
    parts = {piece.part for piece in view.axes[axis]}
    if len(parts) != 1 or isinstance(view.packed, ProductArray) or 0 in numbers.shape:
        return None
    (part,) = parts
    flat = numbers.reshape(-1)
    # Which entries of the whole part these are, times those of its pieces in other axes.
    rest = _others(view, axis, part)
    inner, first = 1, jnp.zeros_like(flat)
    for piece in reversed(view.axes[axis]):
        first += flat // inner % piece.size * piece.stride
        inner *= piece.size
    before, behind = view.axes[:axis], view.axes[axis + 1 :]
    if part == REPEATED or (part == LAYERS and rest):
        return None
    if part == LAYERS and not numbers.ndim:
        packed = view.packed[first[0]]
        return dataclasses.replace(view, packed=packed, axes=(*before, *behind))
    if part == LAYERS:
        packed = view.packed[first]
        return _renewed(view, packed, axis, part, numbers.shape, rest)
    places = first
    for piece in rest:
        others = jnp.arange(piece.size) * piece.stride
        places = (places[:, None] + others[None]).reshape(-1)
    if part == COLUMNS:
        return _renewed(view, columns_of(view.packed, places), axis, part, numbers.shape, rest)
    if view.packed.layers:
        rows = jax.vmap(lambda packed: rows_of(packed, places))(view.packed)
    else:
        rows = rows_of(view.packed, places)
    if not isinstance(rows, jax.Array):
        return _renewed(view, rows, axis, part, numbers.shape, rest)
    axes = _renumbered(view, axis, ROWS, flat.shape, rest)
    shown = seen(rows, axes).astype(view.dtype)
    return shown.reshape(*shown.shape[:axis], *numbers.shape, *shown.shape[axis + 1 :])


def nan_unless(flag: jax.Array, view: View) -> View:
    """Return a view of a weight that is all NaN unless a flag is set."""
    return dataclasses.replace(view, packed=kept_if(view.packed, flag))


@functools.singledispatch
def kept_if(packed: PackedArray, flag: jax.Array) -> Any:
    """Return a weight where a flag is set, else NaN everywhere."""

    def kept(table: jax.Array) -> jax.Array:
        return jnp.where(flag, table, jnp.asarray(jnp.nan, table.dtype))

    if packed.scale is None:
        return dataclasses.replace(packed, codebook=kept(packed.codebook))
    return dataclasses.replace(packed, scale=kept(packed.scale))


def _others(view: View, axis: int, part: str) -> list[Piece]:
    """Return the pieces of a part in the other axes, slowest first."""
    others = tuple(own for i, own in enumerate(view.axes) if i != axis)
    return sorted(pieces_of(others, part), key=lambda piece: -piece.stride)


def _renumbered(
    view: View, axis: int, part: str, shape: tuple[int, ...], rest: Sequence[Piece]
) -> Axes:
    """Return the axes where a part is now the numbers along an axis times its other pieces."""
    sizes = [*shape, *(piece.size for piece in rest)]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    new = dict(zip(rest, strides[len(shape) :], strict=True))

    def own(axis: tuple[Piece, ...]) -> tuple[Piece, ...]:
        return tuple(p._replace(stride=new[p]) if p.part == part else p for p in axis)

    pairs = zip(shape, strides[: len(shape)], strict=True)
    taken = [axis_of(Piece(part, size, stride)) for size, stride in pairs]
    before, behind = view.axes[:axis], view.axes[axis + 1 :]
    return (*map(own, before), *taken, *map(own, behind))


def _renewed(
    view: View,
    packed: PackedArray,
    axis: int,
    part: str,
    shape: tuple[int, ...],
    rest: Sequence[Piece],
) -> View:
    axes = _renumbered(view, axis, part, shape, rest)
    return dataclasses.replace(view, packed=packed, axes=axes)
