"""Loops and branches that also run inside of `jax.shard_map`, where types say what differs.

There an array is of another type if it may differ from device to device, and a loop wants its
carry to keep its type: zeros, which are the same everywhere, to which a device adds its own weights
do not. Here what a loop starts from, and what branches return, is marked as differing where it has
to be. Outside of `jax.shard_map` these are the functions of `jax.lax` of the same names.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def fori_loop(lower: Any, upper: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """Return what `jax.lax.fori_loop` does."""
    start = _settled(lambda carry: body(lower, carry), start)
    return jax.lax.fori_loop(lower, upper, body, start)


def while_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], start: Any) -> Any:
    """Return what `jax.lax.while_loop` does."""
    return jax.lax.while_loop(condition, body, _settled(body, start))


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Return what `jax.lax.scan` does."""

    def first(carry: Any) -> Any:
        return step(carry, jax.tree.map(lambda x: x[0], xs))[0]

    return jax.lax.scan(step, _settled(first, start), xs, **options)


def cond(
    flag: jax.Array, then: Callable[..., Any], other: Callable[..., Any], *operands: Any
) -> Any:
    """Return what `jax.lax.cond` does."""
    return jax.lax.cond(flag, *_alike((then, other), operands), *operands)


def switch(index: jax.Array, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """Return what `jax.lax.switch` does."""
    return jax.lax.switch(index, _alike(branches, operands), *operands)


def _alike(
    branches: Sequence[Callable[..., Any]], operands: tuple[Any, ...]
) -> Sequence[Callable[..., Any]]:
    """Return branches whose results are of the same types."""
    if not _is_manual():
        return branches
    shapes = [jax.eval_shape(branch, *operands) for branch in branches]

    def alike(branch: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *operands: _varying(branch(*operands), *shapes)

    return [alike(branch) for branch in branches]


def if_needed(flag: jax.Array, make: Callable[..., Any], otherwise: Any, *operands: Any) -> Any:
    """Return what `make` returns of operands where a flag is set, else arrays that are there.

    Under vmap `make` runs if any of the batch needs it, which of `cond` both branches do always.
    Arrays that it works on must be operands: what depends on others alone XLA takes out of the
    loop that this is, and computes always.
    """

    def step(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        flag, own = jax.lax.optimization_barrier((carry[0], operands))
        return flag & False, make(*own)

    return while_loop(lambda carry: carry[0], step, (flag, otherwise))[1]


def unstacked(tree: Any) -> list[Any]:
    """Return the rows of tables [rows, ...], as many trees, so that compiling stays short.

    XLA compiles a kernel for each slice at a place that it knows: of hundreds of leaves these take
    longer than all else that a round is. Kernels that read their place from memory are one for
    all rows. So the place is made of two digits, which come out of a loop, where they are not
    constants. Cost: a slice a row, and about as many copies of a number.

    >>> [row.tolist() for row in unstacked(jnp.arange(6).reshape(3, 2))]
    [[0, 1], [2, 3], [4, 5]]
    """
    rows = len(jax.tree.leaves(tree)[0])
    if rows == 1:
        return [jax.tree.map(lambda x: x[0], tree)]
    base = math.isqrt(rows - 1) + 1

    def shift(digit: jax.Array, digits: list[jax.Array]) -> list[jax.Array]:
        return [*digits[1:], digit.astype(jnp.uint32)]  # which no operations check for a sign

    digits = jax.lax.fori_loop(0, base, shift, [jnp.uint32(0)] * base)

    def row(place: int) -> Any:
        index = digits[place // base] * base + digits[place % base]
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), tree
        )

    return [row(place) for place in range(rows)]


def varying_like(tree: Any, arrays: Any) -> Any:
    """Return a tree of arrays that vary along all the axes along which some of `arrays` does."""
    axes = frozenset().union(*_axes(arrays))
    return jax.tree.map(lambda leaf: _marked(leaf, axes), tree)


def _settled(step: Callable[[Any], Any], start: Any) -> Any:
    """Return a start whose types a step keeps."""
    if not _is_manual():
        return start
    while True:  # ends: what varies only grows
        new = _varying(start, jax.eval_shape(step, start))
        if _axes(new) == _axes(start):
            return start
        start = new


def _is_manual() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _axes(tree: Any) -> list[frozenset[str]]:
    return [_varies_over(leaf) for leaf in jax.tree.leaves(tree)]


def _varies_over(leaf: Any) -> frozenset[str]:
    """Return the axes of the mesh along which an array, or a shape of one, may differ."""
    return jax.typeof(leaf).manual_axis_type.varying


def _varying(tree: Any, *like: Any) -> Any:
    """Return a tree that varies along all the axes that it does, or the same leaf of another."""

    def mark(leaf: Any, *others: Any) -> Any:
        return _marked(leaf, frozenset().union(*map(_varies_over, others)))

    return jax.tree.map(mark, tree, *like)


def _marked(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _varies_over(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf
