"""Which centroid a weight gets, by what the layer answers instead of by what is nearest.

Arrays only: the kernel of one layer, the codebooks of its blocks and the second moments of its
inputs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import loops
from jaxquant.clustering.blocks import assigned, centroids_of, nearest, numbers_of
from jaxquant.clustering.codebooks import MOST_COMPARES, last_below_middles
from jaxquant.rounds.least_squares import System, answers, of_outputs, solve

_DAMPING = 0.01  # of the mean second moment, as in GPTQ: inputs that hardly vary do not decide
_PASSES = 4  # over the weights, each with the centroids refitted to the codes of the last
_SWEEPS = 4  # of coordinate descent on the codes
_BLOCK = 64  # rows whose changes reach the others in one product of matrices
_SCALE_STEPS = 8  # of least squares for scales, of which those of an output meet in its answers
_MEMBERS = 2**12  # of a partial sum: float32 keeps its digits, and a GPU does not wait for one cell


class Compensated(NamedTuple):
    """A layer of which all is frozen."""

    weights: jax.Array  # [..., N] float32
    codes: jax.Array  # [..., N] of the centroids; says something where a weight was frozen
    codebook: jax.Array  # [*numbers, k] or [k], of the dtype that it had
    scale: jax.Array | None  # [*numbers, 1] or [1], of the dtype that it had


def compensate(
    weights: jax.Array,
    frozen: jax.Array,
    codebook: jax.Array,
    movable: jax.Array,
    moments: jax.Array,
    scale: jax.Array | None = None,
) -> Compensated:
    """Freeze all that is free of a layer such that its answers change least.

    Minimizes the mean of `|x^T (new - old)|**2` over inputs x of the given second moments:

    1. Input after input, a weight takes its nearest centroid, and the weights of the inputs that
       are still to come make up for it as well as they can: the optimal update of the Optimal
       Brain Surgeon in the order of GPTQ, the inputs of most energy first (Frantar et al., "GPTQ",
       ICLR 2023; "Optimal Brain Compression", NeurIPS 2022). An output that would answer worse than
       it does, at first with the nearest centroids, stays as it is.
    2. The movable centroids go to the least squares of these codes, then the scales, and 1. begins
       again with them, a few times.
    3. Coordinate descent: each weight to the best centroid given all others, and the centroids and
       scales once more to the least squares.

    So the error is never above that of the nearest centroids, but for rounding: of every output
    where no centroid moves, else of all outputs together that share codebooks. Weights that are
    frozen already keep their value and take part in nothing. An input keeps the codebooks of its
    block, whenever its turn comes; blocks along outputs are layers of their own.

    The least squares are conjugate gradients, at most k steps of them for centroids: with one block
    of inputs that is all it takes, of several blocks each step gains.

    Args:
      weights: [..., N] floating point, the leaf as it is: D inputs (channels, or window positions
        by channels) of N outputs.
      frozen: [..., N] bool.
      codebook: [*numbers, k] of the leaf's blocks, or [k] of a single one; floating point. Moved
        centroids are rounded to this dtype. Beside scales with a one in place of a number along
        axes whose blocks share it: along all of inputs, or none.
      movable: bool, like `codebook`: those that may change, without members so far.
      moments: [D, D] float32, symmetric; or [G, D, D], of each of G runs of outputs, equally long,
        those that matter for them.
      scale: [*numbers, 1] of each block, what its codebook is times; it moves where all centroids
        do that are not zero. Moved ones are rounded to its dtype. None stands for ones.

    Returns:
      Compensated. Cost O(D**2 N) for each of a few passes, of k more at most where centroids may
      move, and G D**3; memory a few times that of the weights and of the moments, in float32.

    Raises:
      ValueError: for centroids that do not fit the weights.

    >>> weights = jnp.array([[0.4], [0.4]])
    >>> both = jnp.ones((2, 2))  # two inputs that are always equal: what one lacks, the other has
    >>> zeros = jnp.zeros((2, 1), bool)
    >>> fixed = jnp.zeros(2, bool)
    >>> compensate(weights, zeros, jnp.array([0.0, 1.0]), fixed, both).weights.tolist()
    [[0.0], [1.0]]
    """
    shape, inputs = weights.shape, math.prod(weights.shape[:-1])
    original, k = weights.astype(jnp.float32), codebook.shape[-1]
    tables = centroids_of(codebook, scale, jnp.float32)
    numbers = numbers_of(tables.shape, shape)
    start = jnp.where(frozen, original, nearest(original, tables))
    moments = moments.reshape(-1, inputs, inputs)
    order = jnp.argsort(jnp.sum(_energies(moments), axis=1), descending=True)
    padding = -inputs % _BLOCK  # with inputs that are always zero and weights that are frozen

    def rows(x: jax.Array, fill: bool | float = 0) -> jax.Array:
        x = x.reshape(inputs, *x.shape[len(shape) - 1 :])[order]
        return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)

    def by_blocks(table: jax.Array) -> jax.Array:
        """Return a table with one axis for the blocks of inputs, and one for those of outputs."""
        return table.reshape(-1, table.shape[-2] if table.ndim > 1 else 1, table.shape[-1])

    sorted_moments = moments[:, order][:, :, order]
    sorted_moments = jnp.pad(sorted_moments, ((0, 0), (0, padding), (0, padding)))
    layer = _Layer(
        rows(original),
        rows(frozen, fill=True),
        sorted_moments,
        # One by one: XLA on CPU solves a batch of triangular systems without LAPACK.
        loops.scan(lambda _, own: (None, _spreading(own)), None, sorted_moments)[1],
        rows(jnp.asarray(_groups(shape, numbers), jnp.int32)),
        by_blocks(movable),
        jnp.bool_(scale is not None) & jnp.all(movable | (codebook == 0)),
    )
    scales = (
        jnp.ones((1, 1, 1), jnp.float32) if scale is None else by_blocks(scale).astype(jnp.float32)
    )
    scales = jnp.broadcast_to(scales, (math.prod(numbers[:-1]), numbers[-1], 1))
    dtypes = codebook.dtype, jnp.float32 if scale is None else scale.dtype
    found = _Found(rows(start), by_blocks(codebook).astype(jnp.float32), scales)

    passes = jnp.where(jnp.any(movable), _PASSES, 1)  # under the same centroids all are the same

    def turn(number: jax.Array, best: _Found) -> _Found:
        best = _better(layer, _moved(layer, best, descends=number >= passes), best)
        return _refit(layer, best, *dtypes)

    found = loops.fori_loop(0, passes + 1, turn, found)
    new = found.weights[:inputs][jnp.argsort(order)].reshape(shape)
    codes = assigned(
        new, found.tables.reshape(*numbers, k) if tables.ndim > 1 else found.tables[0, 0]
    )
    moved = found.codebook.reshape(codebook.shape).astype(codebook.dtype)
    return Compensated(
        new,
        codes,
        jnp.where(movable, moved, codebook),
        None if scale is None else _moved_scale(layer, found.scale, scale),
    )


def _moved_scale(layer: "_Layer", new: jax.Array, scale: jax.Array) -> jax.Array:
    """Return scales in the shape and the dtype that they had."""
    if new.size != scale.size:  # one for all blocks, which does not move
        return scale
    return jnp.where(layer.scale_moves, new.reshape(scale.shape).astype(scale.dtype), scale)


class _Layer(NamedTuple):
    """What does not change: rows by falling second moment, in whole blocks."""

    weights: jax.Array  # [D, N]
    frozen: jax.Array  # [D, N]
    moments: jax.Array  # [G, D, D], of each group of outputs
    spreading: jax.Array  # [G, D, D], above the diagonal: what later inputs take over from an input
    groups: jax.Array  # [D] int32, which of the R blocks of inputs an input is of
    movable: jax.Array  # like the codebook
    scale_moves: jax.Array  # []


class _Found(NamedTuple):
    weights: jax.Array  # [D, N], those that were free on a centroid of their block
    codebook: jax.Array  # [R, C, k] float32, or [1, 1, k] of all blocks
    scale: jax.Array  # [R, C, 1] float32

    @property
    def tables(self) -> jax.Array:
        """The centroids of each block, [R, C, k]."""
        return self.codebook * self.scale


def _groups(shape: tuple[int, ...], numbers: tuple[int, ...]) -> np.ndarray:
    """Return the block of each input, int [...] of the axes before the outputs'.

    Blocks count as in a table `[*numbers, k]` of which all axes of inputs are raveled.
    """
    groups = np.zeros((), int)
    for size, number in zip(shape[:-1], numbers[:-1], strict=True):
        groups = groups[..., None] * number + np.arange(size) // (size // number)
    return groups


def _energies(moments: jax.Array) -> jax.Array:
    """Return the second moment of each input, [D, G]."""
    return jnp.diagonal(moments, axis1=1, axis2=2).T


def _spreading(moments: jax.Array) -> jax.Array:
    """Return how the optimal update spreads an input's error over the inputs after it.

    The rows of U over their diagonal, where `U^T U` is the inverse of the damped moments and U is
    upper triangular. With the moments as `R R^T`, R upper triangular, U is the inverse of R.
    """
    energy, identity = jnp.diag(moments), jnp.eye(len(moments), dtype=jnp.float32)
    mean = jnp.sum(energy) / jnp.maximum(jnp.sum(energy > 0, dtype=jnp.float32), 1.0)
    damped = moments + jnp.where(mean > 0, _DAMPING * mean, 1.0) * identity
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    inverse = jax.scipy.linalg.solve_triangular(upper, identity, lower=False)
    return jnp.triu(inverse / jnp.diag(inverse)[:, None], 1)


def _by_rows(
    step: Callable[..., tuple[jax.Array, ...]],
    coupling: jax.Array,
    state: jax.Array,
    reached: jax.Array,
    rows: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Go through the rows of a state that each row's change reaches; return the steps' results.

    `change, *results = step(state[j], *(x[j] for x in rows))`, then
    `state -= coupling[j, :, None] * change[None]` where `reached`, with the coupling of each group
    of outputs. In blocks, whose changes reach the rows outside in one product of matrices.
    """
    size, outputs = state.shape

    def block(number: jax.Array, carry: tuple[jax.Array, tuple[jax.Array, ...]]):
        state, results = carry
        start = number * _BLOCK

        def cut(x: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, _BLOCK, axis)

        own, own_rows = cut(coupling, 1), tuple(map(cut, rows))
        inside = cut(own, 2)
        mask = cut(reached)

        def row(j: jax.Array, carry: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]):
            part, changes, found = carry
            change, *new = step(part[j], *(x[j] for x in own_rows))
            # Written and read again, or XLA on CPU fuses the whole step into each row of `moved`.
            changes = changes.at[j].set(change)
            moved = inside[:, j].T[:, :, None] * changes[j].reshape(1, len(inside), -1)
            moved = moved.reshape(part.shape)
            part = part - jnp.where(mask, moved, 0.0)
            found = tuple(x.at[j].set(y) for x, y in zip(found, new, strict=True))
            return part, changes, found

        zeros = jnp.zeros((_BLOCK, outputs), jnp.float32)
        _, changes, found = loops.fori_loop(
            0, _BLOCK, row, (cut(state), zeros, tuple(map(cut, results)))
        )
        moved = answers(own.mT, changes)
        state = state - jnp.where(reached, moved, 0.0)
        results = tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
            for x, y in zip(results, found, strict=True)
        )
        return state, results

    shapes = jax.eval_shape(step, state[0], *(x[0] for x in rows))[1:]
    results = tuple(jnp.zeros((size, *x.shape), x.dtype) for x in shapes)
    return loops.fori_loop(0, size // _BLOCK, block, (state, results))[1]


class _Tables(NamedTuple):
    """Codebooks in ascending order; blocks of outputs last: a row is compared as a whole."""

    bounds: jax.Array  # [R, k - 1, C], the last float that is not above the middle of neighbours
    values: jax.Array  # [R, k, C]
    codes: jax.Array  # [R, k, C] int32


def _tables(centroids: jax.Array) -> _Tables:
    codes = jnp.argsort(centroids, axis=-1)
    values = jnp.take_along_axis(centroids, codes, axis=-1)
    bounds = last_below_middles(values)
    codes = codes.astype(jnp.int32)
    return _Tables(*(jnp.moveaxis(x, -1, 1) for x in (bounds, values, codes)))


def _look_up(row: jax.Array, group: jax.Array, bounds: jax.Array, results: jax.Array) -> jax.Array:
    """Return the entry of `results` [R, k, C] that is of each weight's nearest centroid, [N]."""
    outputs, (_, count, blocks) = row.shape, bounds.shape
    row = row.reshape(blocks, -1)

    def entry(table: jax.Array, number: int) -> jax.Array:
        # On its own: of all numbers at once, XLA on CPU does not fuse the slice well.
        start = (group, jnp.int32(number), jnp.int32(0))
        return jax.lax.dynamic_slice(table, start, (1, 1, blocks)).reshape(blocks, 1)

    if count > MOST_COMPARES:
        rank = jax.vmap(lambda own, x: jnp.searchsorted(own, x, method="scan_unrolled"))
        ranks = rank(bounds[group].T, row)
        found = jnp.take_along_axis(results[group].T, ranks, axis=1)
    else:
        found = jnp.broadcast_to(entry(results, 0), row.shape)
        for number in range(count):
            found = jnp.where(row > entry(bounds, number), entry(results, number + 1), found)
    return found.reshape(outputs)


def _moved(layer: _Layer, found: _Found, *, descends: jax.Array) -> _Found:
    """Return weights on other centroids, in one of two ways, which are one program.

    Args:
      layer: what does not change.
      found: where coordinate descent begins; the centroids of both.
      descends: whether each weight that was free goes to the best centroid given all others, a few
        times. Else one input's weights freeze after the other, from those of the layer, and those
        that come later make up for them.
    """
    energies, tables = _energies(layer.moments), _tables(found.tables)
    coupling = jnp.where(descends, layer.moments, layer.spreading)
    reached = descends | ~layer.frozen

    def step(
        state: jax.Array, weights: jax.Array, frozen: jax.Array, own: jax.Array, group: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Take the weights of an input, or their slope, to centroids."""
        own = of_outputs(own, len(weights))
        before = jnp.where(descends, weights, state)
        target = jnp.where(descends, weights - state / jnp.where(own > 0, own, 1.0), state)
        best = _look_up(target, group, tables.bounds, tables.values)
        new = jnp.where(frozen | (descends & (own <= 0)), before, best)
        return before - new, new

    def sweep(_: int, weights: jax.Array) -> jax.Array:
        state = loops.cond(
            descends,
            lambda weights: answers(layer.moments, weights - layer.weights),
            lambda _: layer.weights,
            weights,
        )
        rows = (weights, layer.frozen, energies, layer.groups)
        return _by_rows(step, coupling, state, reached, rows)[0]

    sweeps = jnp.where(descends, _SWEEPS, 1)
    return found._replace(weights=loops.fori_loop(0, sweeps, sweep, found.weights))


def _error(layer: _Layer, found: _Found) -> jax.Array:
    """Return the squared error of each output's answers, [N]."""
    off = found.weights - layer.weights
    return jnp.sum(off * answers(layer.moments, off), axis=0)


def _better(layer: _Layer, new: _Found, old: _Found) -> _Found:
    """Return for each output the better of both, under the same centroids."""
    better = _error(layer, new) < _error(layer, old)  # not where it is NaN
    return old._replace(weights=jnp.where(better, new.weights, old.weights))


def _refit(
    layer: _Layer, found: _Found, dtype: jnp.dtype, scale_dtype: jax.typing.DTypeLike
) -> _Found:
    """Move the movable centroids, then the scales, to the least squares of these codes, if any."""

    def refit(found: _Found) -> _Found:
        codes = _codes(layer, found)
        found = _refit_codebook(layer, found, codes, dtype)
        return loops.cond(
            layer.scale_moves,
            lambda found: _refit_scale(layer, found, codes, scale_dtype),
            lambda found: found,
            found,
        )

    return loops.cond(jnp.any(layer.movable), refit, lambda found: found, found)


def _refit_codebook(layer: _Layer, found: _Found, codes: jax.Array, dtype: jnp.dtype) -> _Found:
    """Return the least squares of the movable centroids, rounded to their dtype."""
    shape, shared = found.tables.shape, found.codebook.shape != found.tables.shape
    slots = _slots(layer, codes, shape)
    movable = jnp.broadcast_to(layer.movable, shape).reshape(-1)
    moves = ~layer.frozen & movable.at[slots].get(mode="promise_in_bounds")
    slots = jnp.where(moves, slots, movable.size)

    def weights_of(codebook: jax.Array) -> jax.Array:
        tables = (codebook * found.scale).reshape(-1)
        return tables.at[slots].get(mode="fill", fill_value=0.0)

    def sums(x: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the sum over the weights of each centroid that moves, like the codebook."""
        own = _sums(shape, slots, x) * scale
        return jnp.sum(own, axis=(0, 1), keepdims=True) if shared else own

    energies = of_outputs(_energies(layer.moments), slots.shape[1])
    system = System(
        weights_of,
        lambda x: sums(x, found.scale),
        sums(energies, jnp.square(found.scale)),
        steps=shape[-1],
    )
    codebook = solve(layer.moments, found.weights - layer.weights, found.codebook, system)
    codebook = codebook.astype(dtype).astype(jnp.float32)
    codebook = jnp.where(layer.movable, codebook, found.codebook)
    weights = jnp.where(moves, weights_of(codebook), found.weights)
    new = found._replace(weights=weights, codebook=codebook)
    return _better_blocks(layer, new, found, codebook.shape[1])


def _refit_scale(
    layer: _Layer, found: _Found, codes: jax.Array, dtype: jax.typing.DTypeLike
) -> _Found:
    """Return the least squares of the scales, rounded to their dtype."""
    blocks, shape = found.scale.shape[1], found.tables.shape
    centroids = jnp.broadcast_to(found.codebook, shape).reshape(-1)
    units = centroids.at[_slots(layer, codes, shape)].get(mode="promise_in_bounds")
    units = jnp.where(layer.frozen, 0.0, units)

    def weights_of(scale: jax.Array) -> jax.Array:
        return jnp.repeat(scale[layer.groups, :, 0], units.shape[1] // blocks, axis=1) * units

    def sums(x: jax.Array) -> jax.Array:
        """Return the sum over each block, like the scales."""
        by_row = jnp.sum((x * units).reshape(len(units), blocks, -1), axis=-1)
        return jnp.zeros(found.scale.shape[:2], jnp.float32).at[layer.groups].add(by_row)[..., None]

    energies = of_outputs(_energies(layer.moments), units.shape[1]) * units
    system = System(weights_of, sums, sums(energies), steps=_SCALE_STEPS)
    scale = solve(layer.moments, found.weights - layer.weights, found.scale, system)
    scale = scale.astype(dtype).astype(jnp.float32)
    scale = jnp.where(scale > 0, scale, found.scale)
    weights = jnp.where(layer.frozen, found.weights, weights_of(scale))
    return _better_blocks(layer, found._replace(weights=weights, scale=scale), found, blocks)


def _better_blocks(layer: _Layer, new: _Found, old: _Found, blocks: int) -> _Found:
    """Return the better of both for each of some blocks of outputs."""

    def by_block(found: _Found) -> jax.Array:
        return jnp.sum(_error(layer, found).reshape(blocks, -1), axis=1)

    better = by_block(new) < by_block(old)

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        """Return entries of a table; one that more than a block shares has not changed."""
        return jnp.where(better[:, None], new, old) if old.shape[1] >= blocks else old

    outputs = jnp.repeat(better, new.weights.shape[1] // blocks)
    weights = jnp.where(outputs, new.weights, old.weights)
    return _Found(weights, chosen(new.codebook, old.codebook), chosen(new.scale, old.scale))


def _codes(layer: _Layer, found: _Found) -> jax.Array:
    """Return the code of each weight in the table of its block, [D, N] int32."""
    tables = _tables(found.tables)

    def row(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, group = item
        return _look_up(weights, group, tables.bounds, tables.codes)

    return loops.scan(lambda _, item: (None, row(item)), None, (found.weights, layer.groups))[1]


def _slots(layer: _Layer, codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return where each weight's centroid is in tables [R, C, k], raveled."""
    _, blocks, k = shape
    outputs = codes.shape[1]
    block = jnp.arange(outputs, dtype=jnp.int32) // (outputs // blocks)
    return (layer.groups[:, None] * blocks + block[None]) * k + codes


def _sums(shape: tuple[int, ...], slots: jax.Array, x: jax.Array) -> jax.Array:
    """Return the sum of `x` over the weights of each slot of tables [R, C, k]; others drop."""
    size, outputs = math.prod(shape), x.shape[1]
    parts = max(1, min(outputs, x.size * shape[-1] // (size * _MEMBERS)))
    part = jnp.arange(outputs, dtype=jnp.int32)[None] % parts
    zeros = jnp.zeros(size * parts, jnp.float32)
    sums = zeros.at[slots * parts + part].add(x, mode="drop")
    return jnp.sum(sums.reshape(*shape, parts), axis=-1)
