"""Passes over long arrays in pieces, without a ravel and without a copy."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxquant import loops

_RUN = 64  # weights that lie together fill lines of the cache
_COLUMNS = 128  # entries of the last axis in a piece, at least: codebooks of each stay in the cache
_CHUNK = 1 << 20  # weights per step of a long pass: its temporaries stay in the cache


def fold(step: Callable[..., Any], carry: Any, *arrays: jax.Array, chunk: int | None = None) -> Any:
    """Accumulate `carry = step(carry, *pieces)` over all entries of equally shaped arrays.

    Long arrays go through in pieces of about `chunk` entries, a million for None, see `pieces_of`.
    """
    chunk = chunk or _CHUNK
    shape = arrays[0].shape
    size = math.prod(shape)
    axis, pieces, parts = pieces_of(shape, chunk)
    if pieces == 1:
        rows = shape[axis]
        unit = (1 if _contiguous(shape, axis) else _RUN) * math.ceil(size / chunk)
        main = rows - rows % unit
        if size <= 2 * chunk or main in (0, rows):
            return step(carry, *arrays)
        for start, end in ((0, main), (main, rows)):  # no good divisor: cut a tail off
            tail = (jax.lax.slice_in_dim(a, start, end, axis=axis) for a in arrays)
            carry = fold(step, carry, *tail, chunk=chunk)
        return carry
    split = (*shape[:axis], *parts, *shape[axis + 1 :])
    views = [a.reshape(split) for a in arrays]

    def body(i: jax.Array, carry: Any) -> Any:
        cut = functools.partial(jax.lax.dynamic_index_in_dim, index=i, axis=axis + 1)
        return step(carry, *(cut(view, keepdims=False) for view in views))

    return loops.fori_loop(0, pieces, body, carry)


def pieces_of(shape: tuple[int, ...], chunk: int | None = None) -> tuple[int, int, tuple[int, ...]]:
    """Return an axis, into how many pieces to cut it, and what it is split in for that.

    The split is (major, pieces, ...), with a major part for all devices where there is such an
    axis: an array sharded over it keeps its sharding. It is the first such axis, or the longest.
    There is one piece of a short array, and of one that has no good divisor.
    """
    chunk = chunk or _CHUNK
    size, longest = math.prod(shape), shape.index(max(shape))
    if size <= 2 * chunk:
        return longest, 1, (shape[longest], 1)
    wanted = math.ceil(size / chunk)

    def split(axis: int) -> tuple[int, ...]:
        run = 1 if _contiguous(shape, axis) else math.gcd(shape[axis], _RUN)  # that stay together
        pieces = _divisor_at_least(shape[axis] // run, wanted)
        return (shape[axis] // (run * pieces), pieces, *((run,) if run > 1 else ()))

    for axis in range(len(shape)):
        major, pieces, *_ = parts = split(axis)
        if wanted <= pieces <= 16 * wanted and major >= jax.device_count():
            return axis, pieces, parts
    _, pieces, *_ = parts = split(longest)
    if size // pieces < chunk // 16:
        return longest, 1, (shape[longest], 1)
    return longest, pieces, parts


def in_columns(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]] | None:
    """Return `pieces_of` that have few entries of the last axis each, or None where that is slow.

    Of all other axes they have all.
    """
    length, devices = shape[-1], jax.device_count()
    run = math.gcd(length, _RUN)
    if run < _RUN or length < _COLUMNS * devices:
        return None
    pieces = max(d for d in _divisors(length // run) if d <= length // (_COLUMNS * devices))
    return len(shape) - 1, pieces, (length // (run * pieces), pieces, run)


def _contiguous(shape: tuple[int, ...], axis: int) -> bool:
    return math.prod(shape[axis + 1 :]) >= _RUN


def _divisor_at_least(number: int, least: int) -> int:
    """Return the smallest divisor of `number` that is at least `least`, or `number`."""
    return min((d for d in _divisors(number) if d >= least), default=number)


def _divisors(number: int) -> list[int]:
    pairs = ((i, number // i) for i in range(1, math.isqrt(number) + 1) if number % i == 0)
    return [d for pair in pairs for d in pair]
