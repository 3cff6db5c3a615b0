"""The axes of a packed weight, seen in another order, split, merged or repeated.

A packed weight is layers by rows by columns, whatever the axes that make these three. An axis of a
view of it is a product of pieces: runs of layers, rows or columns, each of a size and a stride, the
slowest first. So a transposition or a reshape of a weight is another way to write its pieces down,
and no code has to move.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

LAYERS, ROWS, COLUMNS, REPEATED = "layers", "rows", "columns", "repeated"
PARTS = (LAYERS, ROWS, COLUMNS)


class Piece(NamedTuple):
    """Indices 0, stride, 2 stride, ... of a part of a weight; what is repeated has no part."""

    part: str
    size: int
    stride: int


Axis = tuple[Piece, ...]
Axes = tuple[Axis, ...]


def whole(layers: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Axes:
    """Return the axes of a weight as it is.

    >>> whole((), (3, 4), (5,))[0]
    (Piece(part='rows', size=3, stride=4),)
    """
    axes = []
    for part, sizes in zip(PARTS, (layers, rows, columns), strict=True):
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        pairs = zip(sizes, strides, strict=True)
        axes += [axis_of(Piece(part, size, stride)) for size, stride in pairs]
    return tuple(axes)


def shape_of(axes: Axes) -> tuple[int, ...]:
    """Return the size of each axis."""
    return tuple(math.prod(piece.size for piece in axis) for axis in axes)


def pieces_of(axes: Axes, *parts: str) -> Axis:
    """Return the pieces of some parts in the order in which they stand; of all without parts."""
    return tuple(p for p in itertools.chain(*axes) if not parts or p.part in parts)


def in_order(pieces: Sequence[Piece]) -> Axis:
    """Return the pieces in the order of the weight itself; what is repeated comes first."""
    places = {part: place for place, part in enumerate((REPEATED, *PARTS))}
    return tuple(sorted(pieces, key=lambda piece: (places[piece.part], -piece.stride)))


def transposed(axes: Axes, order: Sequence[int]) -> Axes:
    """Return the axes in another order."""
    return tuple(axes[axis] for axis in order)


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return axes of another shape over the same entries in the same order.

    None where an axis would hold a part of a piece that its size does not divide.

    >>> joined = reshaped(whole((), (6,), (4, 5)), (2, 3, 20))
    >>> shape_of(joined), reshaped(joined, (4, 30))
    ((2, 3, 20), None)
    """
    if 0 in (*shape_of(axes), *shape):
        return None
    left = [piece for axis in axes for piece in axis]
    made = []
    for size in shape:
        axis: list[Piece] = []
        while size > 1:
            if not left:
                return None
            piece = left.pop(0)
            if size % piece.size:
                if piece.size % size:
                    return None
                inner = piece.size // size
                left.insert(0, piece._replace(size=inner))
                piece = piece._replace(size=size, stride=piece.stride * inner)
            axis.append(piece)
            size //= piece.size
        made.append(axis_of(*axis))
    return None if left else tuple(made)


def repeated(axes: Axes, shape: Sequence[int], places: Sequence[int]) -> Axes:
    """Return the axes as `lax.broadcast_in_dim` does: at some places, all others new."""
    made = [axis_of(Piece(REPEATED, size, 0)) for size in shape]
    sizes = shape_of(axes)
    for axis, place in enumerate(places):
        if sizes[axis] == shape[place]:
            made[place] = axes[axis]
    return tuple(made)


def stored_axes(
    pieces: Sequence[Piece], layers: Sequence[int], rows: Sequence[int], columns: Sequence[int]
) -> tuple[int, ...]:
    """Return the axes of a weight, as it was packed, that some pieces are runs of, from the end.

    >>> stored_axes([Piece("rows", 3, 4)], (), (3, 4), (5,))
    (-3,)
    """
    axes, found = whole(layers, rows, columns), set()
    for piece in pieces:
        for axis, own in enumerate(axes):
            for run in own:
                first, end = piece.stride, piece.stride * piece.size
                if piece.part == run.part and first < run.stride * run.size and end > run.stride:
                    found.add(axis - len(axes))
    return tuple(sorted(found))


def is_whole(axes: Axes, own: Sequence[int], parts: Sequence[str]) -> bool:
    """Return whether some axes together are whole parts of the weight and nothing else."""
    pieces = pieces_of(tuple(axes[axis] for axis in own))
    wanted = pieces_of(axes, *parts)
    return bool(pieces) and sorted(pieces) == sorted(wanted)


def axis_of(*axis: Piece) -> Axis:
    """Return an axis with neighbours joined that are one run, and without pieces of one index."""
    made: list[Piece] = []
    for piece in axis:
        if isinstance(piece.size, int) and piece.size == 1:
            continue  # which a symbolic size may be, too
        before = made[-1] if made else None
        if before and before.part == piece.part and before.stride == piece.stride * piece.size:
            made[-1] = piece._replace(size=before.size * piece.size)
        else:
            made.append(piece)
    return tuple(made)
