"""The algebra of views, against NumPy: reshaping and transposing what is really there."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.packing.arrays import seen
from jaxquant.packing.axes import (
    Piece,
    in_order,
    is_whole,
    pieces_of,
    repeated,
    reshaped,
    shape_of,
    stored_axes,
    transposed,
    whole,
)

SIZES = st.lists(st.integers(1, 4), max_size=2)


def numbered(axes, layers, rows, columns):
    """Return the number of each entry, as such axes show a weight of these sizes."""
    sizes = [math.prod(own) for own in (layers, rows, columns)]
    return np.asarray(seen(np.arange(math.prod(sizes)).reshape(sizes), axes))


@given(SIZES, st.lists(st.integers(1, 6), min_size=1, max_size=2), SIZES, st.data())
def test_views_show_what_numpy_does(layers, rows, columns, data):
    axes = whole(layers, rows, columns)
    expected = np.arange(math.prod((*layers, *rows, *columns))).reshape(*layers, *rows, *columns)
    assert shape_of(axes) == expected.shape
    for _ in range(3):
        order = data.draw(st.permutations(range(len(axes))))
        axes, expected = transposed(axes, order), expected.transpose(order)
        shape = data.draw(st.sampled_from(shapes_of(expected.size)))
        if (made := reshaped(axes, shape)) is not None:
            axes, expected = made, expected.reshape(shape)
        assert shape_of(axes) == expected.shape
    new = (*expected.shape[:1], 3, *expected.shape[1:])
    places = [i + (i > 0) for i in range(expected.ndim)]
    axes = repeated(axes, new, places)
    expected = np.broadcast_to(np.expand_dims(expected, 1), new)
    np.testing.assert_array_equal(numbered(axes, layers, rows, columns), expected)


def shapes_of(size):
    """Return some shapes of so many entries."""
    pairs = [(d, size // d) for d in range(1, size + 1) if size % d == 0]
    return [(size,), *pairs, *((a, 1, b) for a, b in pairs)]


def test_a_piece_that_would_be_cut_has_no_view():
    assert reshaped(whole((), (6,), (4,)), (4, 6)) is None
    assert reshaped(whole((), (6,), (4,)), (3, 8)) == (
        (Piece("rows", 3, 2),),
        (Piece("rows", 2, 1), Piece("columns", 4, 1)),
    )
    assert reshaped(whole((), (0,), (4,)), (4, 0)) is None


def test_parts_are_known_however_they_are_written():
    axes = whole((5,), (2, 3), (4,))
    assert is_whole(axes, (1, 2), ("rows",)) and is_whole(axes, (2, 1), ("rows",))
    assert not is_whole(axes, (1,), ("rows",)) and not is_whole(axes, (1, 2, 3), ("rows",))
    assert is_whole(axes, (0, 2, 1), ("rows", "layers"))
    split = reshaped(axes, (5, 6, 2, 2))
    assert is_whole(split, (2, 3), ("columns",)) and not is_whole(split, (2,), ("columns",))
    assert stored_axes(pieces_of(split[1:2]), (5,), (2, 3), (4,)) == (-3, -2)
    assert [piece.part for piece in in_order(pieces_of(axes[::-1]))] == [
        *("layers", "rows", "rows", "columns")
    ]
