"""Blocks of a leaf, each with a codebook of its own.

A leaf is cut into equal blocks by the number of them along each of its axes: one everywhere for the
whole leaf, all the entries of one axis for a codebook a channel, some of each for tiles. Tables of
the blocks, codebooks above all, are arrays `[*numbers of blocks, ...]`. An axis is split in two,
`[n] -> [blocks, n / blocks]`, which moves no data and keeps a sharding that divides. What is done
to each weight is done to all at once, with the tables broadcast (`elementwise`); what is done to
each block to a batch of them after the other (`by_batch`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering import passes
from jaxquant.clustering.codebooks import bounds, entries, pick
from jaxquant.clustering.points import taken
from jaxquant.meshes import compiled

_BATCH_WEIGHTS = 2**16  # that are worked on side by side: what they need besides is in the cache
_RUN = 16  # blocks along the last axis that stay together: they share lines of the cache


def are_runs(numbers: Sequence[int], sizes: Sequence[int]) -> bool:
    """Return whether blocks along some axes are runs of one length where these are made one axis.

    >>> are_runs((4, 3, 1), (4, 6, 5)), are_runs((1, 3), (4, 6))
    (True, False)
    """
    pairs = enumerate(zip(numbers, sizes, strict=True))
    first = next((axis for axis, (number, size) in pairs if number != size), len(numbers))
    return all(number == 1 for number in numbers[first + 1 :])


def numbers_of(codebook: tuple[int, ...], leaf: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many blocks there are along each axis of a leaf.

    Args:
      codebook: shape of the codebooks, `[*numbers, k]`, or `[k]` of a whole leaf.
      leaf: shape of the leaf.

    Raises:
      ValueError: for codebooks that do not fit.

    >>> numbers_of((1, 4, 16), (128, 64)), numbers_of((16,), (128, 64))
    ((1, 4), (1, 1))
    """
    *numbers, _ = codebook
    if not numbers:
        return (1,) * len(leaf)
    if len(numbers) != len(leaf) or any(
        number < 1 or size % number for number, size in zip(numbers, leaf, strict=True)
    ):
        raise ValueError(f"expected codebooks for weights of shape {leaf}, got shape {codebook}")
    return tuple(numbers)


def elementwise(function: Callable[..., Any], arrays: Sequence[Any], tables: Sequence[Any]) -> Any:
    """Call a function of weights and of their blocks' tables on all weights of a leaf at once.

    Nothing is moved in memory: the leaf is seen with its axes split, and the tables broadcast.

    Args:
      function: elementwise, of arrays of one shape and of tables `[...]` or `[..., *ones]`, whose
        own axes come first and whose others broadcast against the arrays; see `compiled` for what
        it has to be. Its results are of the arrays' shape.
      arrays: shaped like the leaf, or None.
      tables: trees of `[*numbers, ...]`, or of `[...]` for a whole leaf; first the codebooks.
    """
    call = tuple(arrays), tuple(tables)
    return compiled(_elementwise, *call, like=arrays[0], function=function)


def _elementwise(
    arrays: tuple[Any, ...], tables: tuple[Any, ...], *, function: Callable[..., Any]
) -> Any:
    shape, first = arrays[0].shape, jax.tree.leaves(tables)[0]
    if first.ndim == 1:
        return function(*arrays, *tables)
    views, aligned, _ = _aligned(arrays, tables, numbers_of(first.shape, shape))
    results = function(*views, *aligned)
    return jax.tree.map(lambda x: x.reshape(arrays[0].shape), results)


def rewrite(
    steps: Sequence[Callable[..., jax.Array]],
    arrays: Sequence[jax.Array],
    tables: Sequence[Any],
    numbers: tuple[int, ...],
) -> list[jax.Array]:
    """Replace `arrays[i] = steps[i](*arrays, *tables)`, one after the other.

    Each step reads what those before it made. Long leaves go through in pieces, in place: under
    jit, arrays that are donated take no memory but for a piece.

    Args:
      steps: functions as for `elementwise`.
      arrays: shaped like the leaf; the first ones are replaced.
      tables: trees of `[*numbers, ...]`.
      numbers: of blocks along each axis.
    """
    views, aligned, whole = _aligned(arrays, tables, numbers)
    view = views[0].shape
    axis, pieces, parts = passes.pieces_of(view)
    if pieces > 1 and numbers[-1] == arrays[0].shape[-1]:
        # A codebook for each entry of the last axis: few of them at a time stay in the cache.
        axis, pieces, parts = passes.in_columns(view) or (axis, pieces, parts)

    def cut(x: jax.Array, piece: jax.Array) -> jax.Array:
        place = x.ndim - len(view) - len(parts) + 2 + axis
        return jax.lax.dynamic_index_in_dim(x, piece, place, keepdims=False)

    def of_piece(table: jax.Array, piece: jax.Array) -> jax.Array:
        if whole:
            return table
        own = table.ndim - len(view)
        apart = parts if table.shape[own + axis] > 1 else (1,) * len(parts)
        shape = (*table.shape[: own + axis], *apart, *table.shape[own + axis + 1 :])
        return cut(table.reshape(shape), piece if apart[1] > 1 else jnp.int32(0))

    def body(piece: jax.Array, new: list[jax.Array]) -> list[jax.Array]:
        own = jax.tree.map(functools.partial(of_piece, piece=piece), aligned)
        for number, step in enumerate(steps):
            made = step(*(cut(x, piece) for x in new), *own)
            new[number] = jax.lax.dynamic_update_index_in_dim(new[number], made, piece, axis + 1)
        return new

    split = (*view[:axis], *parts, *view[axis + 1 :])
    new = [x.reshape(split) for x in views]
    new = body(jnp.int32(0), new) if pieces == 1 else loops.fori_loop(0, pieces, body, new)
    return [x.reshape(arrays[0].shape) for x in new]


def _aligned(
    arrays: Sequence[Any], tables: Sequence[Any], numbers: tuple[int, ...]
) -> tuple[list[Any], Any, bool]:
    """Return a leaf's arrays with cut axes split, tables that broadcast, and if it is not cut.

    The tables of a leaf that is not have only their own axes then.
    """
    shape = arrays[0].shape
    view, inside = _split(shape, numbers)
    cut = [axis for axis, number in enumerate(numbers) if number > 1]
    ones = tuple(1 if axis in inside else size for axis, size in enumerate(view)) if cut else ()

    def of_block(table: jax.Array) -> jax.Array:
        own = table.shape[len(shape) :]
        if cut:
            table = table.reshape(*(numbers[axis] for axis in cut), *own)
            table = jnp.moveaxis(table, range(len(cut), table.ndim), range(len(own)))
        return table.reshape(*own, *ones)

    views = [None if x is None else x.reshape(view) for x in arrays]
    return views, jax.tree.map(of_block, tables), not cut


def _split(
    shape: tuple[int, ...], numbers: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a leaf's shape with each axis that is cut split in two, and which axes are inside.

    Blocks that have one entry along an axis have none inside.
    """
    view, inside = [], []
    for number, size in zip(numbers, shape, strict=True):
        if number > 1:
            view.append(number)
        if number < max(size, 2):
            inside.append(len(view))
            view.append(size // number)
    return tuple(view), tuple(inside)


def reduced(reduce: Callable[..., jax.Array], x: jax.Array, numbers: tuple[int, ...]) -> jax.Array:
    """Return a table `[*numbers]` of all entries of each block, by a reduction like `jnp.sum`."""
    view, inside = _split(x.shape, numbers)
    return reduce(x.reshape(view), axis=inside).reshape(numbers)


def by_batch(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    tables: Sequence[Any],
    numbers: tuple[int, ...],
) -> Any:
    """Call a function of one block on every block, a batch of them after the other.

    Results are tables. A batch takes its blocks from everywhere along an axis, so that a sharding
    of the leaf that does not cut blocks is one of the batch: each device works on blocks of its
    own.

    Args:
      function: of arrays of a block's shape, and of the block's entries of the tables.
      arrays: shaped like the leaf, or None.
      tables: trees of `[*numbers, ...]`.
      numbers: of blocks along each axis.
    """
    shape = arrays[0].shape
    if math.prod(numbers) == 1:
        own = jax.tree.map(lambda x: x.reshape(x.shape[len(shape) :]), list(tables))
        return jax.tree.map(lambda x: x.reshape(*numbers, *x.shape), function(*arrays, *own))
    tail = _tail(numbers, math.prod(shape))
    if tail is None:
        return _by_batch(function, arrays, tables, numbers)
    axis, count = tail  # no good divisor: cut some blocks off
    size = shape[axis] // numbers[axis]
    parts = []
    for start, end in ((0, numbers[axis] - count), (numbers[axis] - count, numbers[axis])):

        def cut(x: jax.Array, unit: int, start: int = start, end: int = end) -> jax.Array:
            return jax.lax.slice_in_dim(x, start * unit, end * unit, axis=axis)

        own = tuple(end - start if a == axis else number for a, number in enumerate(numbers))
        pieces = jax.tree.map(lambda x: cut(x, size), list(arrays))
        rows = jax.tree.map(lambda x: cut(x, 1), list(tables))
        parts.append(by_batch(function, pieces, rows, own))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=axis), *parts)


def _by_batch(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    tables: Sequence[Any],
    numbers: tuple[int, ...],
) -> Any:
    shape, axes = arrays[0].shape, range(len(numbers))
    inside = [size // number for size, number in zip(shape, numbers, strict=True)]
    pieces, runs = _pieces(numbers, shape)
    # The blocks along an axis as [major, pieces, run]: a batch is one of the pieces of each.
    parts = [(n // (p * run), p, run) for n, p, run in zip(numbers, pieces, runs, strict=True)]
    batch_shape = [major * run for major, _, run in parts if major * run > 1]

    def view(x: jax.Array, each: int) -> tuple[jax.Array, list[tuple[int, int]]]:
        """Return an array with its axes split in parts, and the axis and part of each it has now.

        Without those of one entry, for which XLA would copy the whole of it.
        """
        sizes = [(*part, size) for part, size in zip(parts, inside, strict=True)]
        kept = [(a, i) for a in axes for i in range(each) if sizes[a][i] > 1]
        return x.reshape(*(sizes[a][i] for a, i in kept), *x.shape[len(axes) :]), kept

    def cut(
        x: jax.Array,
        kept: list[tuple[int, int]],
        which: Sequence[jax.Array],
        inner: Sequence[int],
    ) -> jax.Array:
        """Return [*batch, *inner, ...]: only what is cut out is moved in memory."""
        for place, (axis, part) in enumerate(kept):
            if part == 1:
                x = jax.lax.dynamic_slice_in_dim(x, which[axis], 1, place)
        where = [place for place, (_, part) in enumerate(kept) if part < 3]
        within = [place for place, (_, part) in enumerate(kept) if part == 3]
        rest = x.shape[len(kept) :]
        x = x.transpose(*where, *within, *range(len(kept), x.ndim))
        return x.reshape(*batch_shape, *inner, *rest)

    own_arrays, of_arrays = jax.tree.flatten(list(arrays))
    own_tables, of_tables = jax.tree.flatten(list(tables))

    def batch(number: jax.Array) -> Any:
        index = [i.astype(jnp.int32) for i in jnp.unravel_index(number, pieces)]
        call = function
        for _ in batch_shape:
            call = jax.vmap(call)
        # Views are made here: made outside, XLA computes what they are of once more for them.
        own = of_arrays.unflatten([cut(*view(x, 4), index, inside) for x in own_arrays])
        return call(*own, *of_tables.unflatten([cut(*view(x, 3), index, ()) for x in own_tables]))

    count = jnp.arange(math.prod(pieces), dtype=jnp.int32)
    _, results = loops.scan(lambda _, number: (None, batch(number)), None, count)

    def joined(x: jax.Array) -> jax.Array:
        """Return [*numbers, ...] of results [pieces, *batch, ...]."""
        rest = x.shape[1 + len(batch_shape) :]
        x = x.reshape(*pieces, *(size for major, _, run in parts for size in (major, run)), *rest)
        first = len(numbers)
        order = [i for a in axes for i in (first + 2 * a, a, first + 2 * a + 1)]
        return x.transpose(*order, *range(3 * first, x.ndim)).reshape(*numbers, *rest)

    return jax.tree.map(joined, results)


def _pieces(
    numbers: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return into how many pieces the blocks along each axis are cut, and in which runs.

    Every device gets blocks of each batch where numbers allow it. Of one device the blocks of a
    batch lie together: its results are then in the order of all, and no table is transposed.
    """
    devices = jax.device_count()
    runs = [1] * len(numbers)
    if numbers[-1] == shape[-1]:
        runs[-1] = math.gcd(numbers[-1] // math.gcd(numbers[-1], devices), _RUN)
    wanted = -(-math.prod(shape) // (_BATCH_WEIGHTS * devices))
    pieces = [1] * len(numbers)
    order = list(range(len(numbers)))
    if devices > 1:
        order.sort(key=lambda axis: -numbers[axis])
    for axis in order:
        left = -(-wanted // math.prod(pieces))
        most = numbers[axis] // runs[axis]
        most //= math.gcd(most, devices)
        pieces[axis] = next(p for p in range(min(left, most), most + 1) if most % p == 0)
    if devices == 1:
        runs = [number // count for number, count in zip(numbers, pieces, strict=True)]
    return tuple(pieces), tuple(runs)


def _tail(numbers: tuple[int, ...], size: int) -> tuple[int, int] | None:
    """Return an axis and how many of its blocks to cut off, or None if they divide well."""
    wanted = -(-size // (_BATCH_WEIGHTS * jax.device_count()))
    axis = numbers.index(max(numbers))
    number = numbers[axis]
    divisors = [p for p in range(wanted, min(4 * wanted, number) + 1) if number % p == 0]
    unit = wanted * _RUN * jax.device_count()
    if wanted == 1 or divisors or number < 2 * unit:
        return None
    return axis, number % unit


def centroids_of(codebook: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
    """Return the centroids `[*numbers, k]` that a codebook and scales stand for.

    Args:
      codebook: `[k]` or `[*numbers, k]`, of any dtype; ones in place of numbers where blocks share
        one up to their scales.
      scale: `[*numbers, 1]`, or None.
      dtype: of the centroids, that of the weights.
    """
    if scale is None:
        return codebook.astype(dtype)
    return (codebook.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)


class Ordered(NamedTuple):
    """Codebooks in ascending order, see `codebooks.bounds`."""

    last: jax.Array  # [..., k - 1] float32 or float64, where a cluster ends
    codes: jax.Array  # [..., k] of its cluster


def in_order(codebooks: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Ordered:
    """Put codebooks [..., k] in ascending order, for weights of a dtype."""
    wide = jnp.float64 if jnp.float64 in (dtype, codebooks.dtype) else jnp.float32
    return Ordered(*bounds(codebooks.astype(wide)))


def at_codes(table: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the entries [..., k] of tables at the codes of the same codebooks."""
    return taken(table, codes)


def assigned(leaf: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Return for each weight the code of its nearest centroid; codebooks `[*numbers, k]`."""
    return compiled(_assigned, leaf, codebooks, like=leaf)


def _assigned(leaf: jax.Array, codebooks: jax.Array) -> jax.Array:
    return elementwise(pick, (leaf,), in_order(codebooks, leaf.dtype))


def nearest(leaf: jax.Array, codebooks: jax.Array, values: jax.Array | None = None) -> jax.Array:
    """Return the centroid nearest to each weight, of its block; codebooks `[*numbers, k]`.

    Or what `values`, a table like the codebooks, has in its place.
    """
    return compiled(_nearest, leaf, codebooks, values, like=leaf)


def _nearest(leaf: jax.Array, codebooks: jax.Array, values: jax.Array | None) -> jax.Array:
    last, codes = in_order(codebooks, leaf.dtype)
    table = at_codes(codebooks if values is None else values, codes)
    return elementwise(pick, (leaf,), (last, table))


def nearest_in_each(leaves: Sequence[jax.Array], codebooks: Sequence[jax.Array]) -> list[jax.Array]:
    """Return what `nearest` does of many leaves, a codebook each, by a short program.

    Codebooks of one shape and dtype are put in order by one kernel.
    """
    leaves, codebooks = list(leaves), list(codebooks)
    return compiled(_nearest_in_each, leaves, codebooks, like=leaves)


def _nearest_in_each(leaves: list[jax.Array], codebooks: list[jax.Array]) -> list[jax.Array]:
    alike: dict[Any, list[int]] = {}
    for place, (leaf, codebook) in enumerate(zip(leaves, codebooks, strict=True)):
        alike.setdefault((codebook.shape, codebook.dtype, leaf.dtype), []).append(place)
    found = list(leaves)
    for members in alike.values():
        together = jnp.stack([codebooks[place] for place in members])
        last, codes = in_order(together, leaves[members[0]].dtype)
        rows = loops.unstacked((last, at_codes(together, codes)))
        for place, row in zip(members, rows, strict=True):
            found[place] = elementwise(pick, (leaves[place],), row)
    return found


def reconstructed(codes: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Return the centroid of each code, of its block; codebooks `[*numbers, k]`."""
    return elementwise(_entries, (codes,), (codebooks,))


def _entries(codes: jax.Array, table: jax.Array) -> jax.Array:
    return entries(table, codes)
