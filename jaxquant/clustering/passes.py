"""Passes over long arrays in pieces, without a ravel and without a copy."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxquant import loops

_CHUNK = 1 << 20  # weights per step of a long pass: its temporaries stay in the cache


def fold(step: Callable[..., Any], carry: Any, *arrays: jax.Array) -> Any:
    """Accumulate `carry = step(carry, *pieces)` over all entries of equally shaped arrays.

    Long arrays go through in pieces of about a million entries. The longest axis is cut, along its
    minor part, so that an array sharded over this axis keeps its sharding.
    """
    shape = arrays[0].shape
    size = math.prod(shape)
    if size <= 2 * _CHUNK:
        return step(carry, *arrays)
    axis, pieces, split = _split(shape)
    if size // pieces < _CHUNK // 16:  # no good divisor: cut a tail off
        rows = shape[axis]
        unit = (1 if _contiguous(shape, axis) else 1024) * math.ceil(size / _CHUNK)
        main = rows - rows % unit
        if main in (0, rows):
            return step(carry, *arrays)
        for start, end in ((0, main), (main, rows)):
            parts = (jax.lax.slice_in_dim(a, start, end, axis=axis) for a in arrays)
            carry = fold(step, carry, *parts)
        return carry
    views = [a.reshape(split) for a in arrays]

    def body(i: jax.Array, carry: Any) -> Any:
        cut = functools.partial(jax.lax.dynamic_index_in_dim, index=i, axis=axis + 1)
        return step(carry, *(cut(view, keepdims=False) for view in views))

    return loops.fori_loop(0, pieces, body, carry)


def rewrite(steps: Sequence[Callable[..., jax.Array]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Replace `arrays[i] = steps[i](*arrays)`, one after the other, each reading the ones before.

    Steps are elementwise. Long arrays go through in pieces as in `fold`, in place: under jit, those
    that are donated take no memory but for a piece. (What else reads them must come before, by
    dependency, or XLA keeps a copy for it.)
    """
    shape = arrays[0].shape
    size = math.prod(shape)
    axis, pieces, split = _split(shape)
    if size <= 2 * _CHUNK or size // pieces < _CHUNK // 16:
        new = list(arrays)
        for i, step in enumerate(steps):
            new[i] = step(*new)
        return tuple(new)

    def body(piece: jax.Array, views: list[jax.Array]) -> list[jax.Array]:
        cut = functools.partial(
            jax.lax.dynamic_index_in_dim, index=piece, axis=axis + 1, keepdims=False
        )
        for i, step in enumerate(steps):
            new = step(*map(cut, views))
            views[i] = jax.lax.dynamic_update_index_in_dim(views[i], new, piece, axis + 1)
        return views

    views = loops.fori_loop(0, pieces, body, [a.reshape(split) for a in arrays])
    return tuple(view.reshape(shape) for view in views)


def _split(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Return the longest axis, into how many pieces to cut it, and the shape with it cut so."""
    axis = shape.index(max(shape))
    rows = shape[axis]
    run = 1 if _contiguous(shape, axis) else math.gcd(rows, 1024)  # rows that stay together
    pieces = _divisor_at_least(rows // run, math.ceil(math.prod(shape) / _CHUNK))
    inner = (run,) if run > 1 else ()
    return axis, pieces, (*shape[:axis], rows // (run * pieces), pieces, *inner, *shape[axis + 1 :])


def _contiguous(shape: tuple[int, ...], axis: int) -> bool:
    return math.prod(shape[axis + 1 :]) >= 64


def _divisor_at_least(number: int, least: int) -> int:
    """Return the smallest divisor of `number` that is at least `least`, or `number`."""
    divisors = (
        d for i in range(1, math.isqrt(number) + 1) if number % i == 0 for d in (i, number // i)
    )
    return min((d for d in divisors if d >= least), default=number)
