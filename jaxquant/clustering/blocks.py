"""Blocks of a leaf, each with a codebook of its own.

A leaf is cut into equal blocks by the number of them along each of its axes: one everywhere for the
whole leaf, all the entries of one axis for a codebook a channel, some of each for tiles. Tables of
the blocks, codebooks above all, are arrays `[*numbers of blocks, ...]`. An axis is split in two,
`[n] -> [blocks, n / blocks]`, which moves no data and keeps a sharding that divides; `vmap` over
the axes of blocks does the rest, so a function of one block knows nothing about others.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.codebooks import assign, reconstruct
from jaxquant.meshes import compiled

_BATCH_WEIGHTS = 2**16  # that are worked on side by side: what they need besides is in the cache
_RUN = 16  # blocks along the last axis that stay together: they share lines of the cache


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


def per_block(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    tables: Sequence[Any],
    *,
    leaf_shaped: Any = True,
    **options: Any,
) -> Any:
    """Call a function of one block on every block of a leaf.

    Args:
      function: of arrays of a block's shape, and of the block's entries of the tables; see
        `compiled` for what it has to be.
      arrays: shaped like the leaf, or None.
      tables: trees of `[*numbers, ...]`, or of `[...]` for a whole leaf; first the codebooks.
      leaf_shaped: whether results are shaped like the block, and become like the leaf; else they
        become tables, `[*numbers, ...]`, without numbers if the tables have none. A bool for all
        results, or a tree of them that is a prefix of the results.
      options: more arguments of the function, hashable.
    """
    return compiled(
        _per_block,
        *(tuple(arrays), tuple(tables)),
        like=jax.tree.map(lambda flag: arrays[0] if flag else None, leaf_shaped),
        function=function,
        leaf_shaped=leaf_shaped,
        options=tuple(sorted(options.items())),
    )


def _per_block(
    arrays: tuple[Any, ...],
    tables: tuple[Any, ...],
    *,
    function: Callable[..., Any],
    leaf_shaped: Any,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    call = functools.partial(function, **dict(options))
    shape = arrays[0].shape
    first = jax.tree.leaves(tables)[0]
    if first.ndim == 1:
        return call(*arrays, *tables)
    numbers = numbers_of(first.shape, shape)
    cut = [axis for axis, number in enumerate(numbers) if number > 1]
    sizes = [[n, size // n] if n > 1 else [size] for n, size in zip(numbers, shape, strict=True)]
    view = tuple(itertools.chain(*sizes))
    counts = [numbers[axis] for axis in cut]
    views = jax.tree.map(lambda x: x.reshape(view), arrays)
    rows = jax.tree.map(lambda x: x.reshape(*counts, *x.shape[len(shape) :]), tables)
    for axis in reversed(cut):  # the loops around have taken the axes of blocks before this one
        out_axes = jax.tree.map(lambda flag, axis=axis: axis if flag else 0, leaf_shaped)
        call = jax.vmap(call, in_axes=(axis,) * len(views) + (0,) * len(rows), out_axes=out_axes)

    def whole(flag: bool, results: Any) -> Any:
        if flag:
            return jax.tree.map(lambda x: x.reshape(shape), results)
        return jax.tree.map(lambda x: x.reshape(*numbers, *x.shape[len(cut) :]), results)

    return jax.tree.map(whole, leaf_shaped, call(*views, *rows))


def by_batch(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    tables: Sequence[Any],
    numbers: tuple[int, ...],
) -> Any:
    """Call a function of one block on every block, a batch of them after the other.

    As `per_block` for results that are tables, where what a block needs besides is more than the
    block itself. A batch takes its blocks from everywhere along an axis, so that a sharding of the
    leaf that does not cut blocks is one of the batch: each device works on blocks of its own.

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
    views, rows = [view(x, 4) for x in own_arrays], [view(x, 3) for x in own_tables]

    def batch(number: jax.Array) -> Any:
        index = [i.astype(jnp.int32) for i in jnp.unravel_index(number, pieces)]
        call = function
        for _ in batch_shape:
            call = jax.vmap(call)
        own = of_arrays.unflatten([cut(x, kept, index, inside) for x, kept in views])
        return call(*own, *of_tables.unflatten([cut(x, kept, index, ()) for x, kept in rows]))

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

    Every device gets blocks of each batch where numbers allow it.
    """
    devices = jax.device_count()
    runs = [1] * len(numbers)
    if numbers[-1] == shape[-1]:
        runs[-1] = math.gcd(numbers[-1] // math.gcd(numbers[-1], devices), _RUN)
    wanted = -(-math.prod(shape) // (_BATCH_WEIGHTS * devices))
    pieces = [1] * len(numbers)
    for axis in sorted(range(len(numbers)), key=lambda axis: -numbers[axis]):
        left = -(-wanted // math.prod(pieces))
        most = numbers[axis] // runs[axis]
        most //= math.gcd(most, devices)
        pieces[axis] = next(p for p in range(min(left, most), most + 1) if most % p == 0)
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


def nearest(leaf: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Return the centroid nearest to each weight, of its block; codebooks `[*numbers, k]`."""
    return per_block(_nearest, (leaf,), (codebooks,))


def _nearest(weights: jax.Array, centroids: jax.Array) -> jax.Array:
    return reconstruct(assign(weights, centroids), centroids)
