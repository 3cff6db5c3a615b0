"""Which centroid a weight gets, by what the layer answers instead of by what is nearest.

Arrays only: one layer as a matrix [inputs, outputs] and the second moments of its inputs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops
from jaxquant.clustering.codebooks import assign, reconstruct

_PRECISION = jax.lax.Precision.HIGHEST
_DAMPING = 0.01  # of the mean second moment, as in GPTQ: inputs that hardly vary do not decide
_PASSES = 4  # over the weights, each with the centroids refitted to the codes of the last
_SWEEPS = 4  # of coordinate descent on the codes
_BLOCK = 64  # rows whose changes reach the others in one product of matrices


class Compensated(NamedTuple):
    """A layer of which all is frozen."""

    weights: jax.Array  # [D, N] float32
    codes: jax.Array  # [D, N] of the centroids; says something where a weight was free
    centroids: jax.Array  # [k] float32


def compensate(
    weights: jax.Array,
    frozen: jax.Array,
    centroids: jax.Array,
    movable: jax.Array,
    moments: jax.Array,
) -> Compensated:
    """Freeze all that is free of a layer such that its answers change least.

    Minimizes the mean of `|x^T (new - old)|**2` over inputs x of the given second moments:

    1. Input after input, a weight takes its nearest centroid, and the weights of the inputs that
       are still to come make up for it as well as they can: the optimal update of the Optimal
       Brain Surgeon in the order of GPTQ, the inputs of most energy first (Frantar et al., "GPTQ",
       ICLR 2023; "Optimal Brain Compression", NeurIPS 2022). An output that would answer worse than
       it does, at first with the nearest centroids, stays as it is.
    2. The movable centroids go to the least squares of these codes, and 1. begins again with them,
       a few times.
    3. Coordinate descent: each weight to the best centroid given all others, and the centroids once
       more to the least squares.

    So the error is never above that of the nearest centroids, but for rounding. Weights that are
    frozen already keep their value and take part in nothing.

    Args:
      weights: [D, N] float32.
      frozen: [D, N] bool.
      centroids: [k] float32.
      movable: [k] bool, centroids that may change: without members so far.
      moments: [D, D] float32, symmetric.

    Returns:
      Compensated. Cost O(D**2 N) for each of a few passes, and D**3.
    """
    rows = len(weights)
    padding = -rows % _BLOCK  # with inputs that are always zero and weights that are frozen
    order = jnp.argsort(jnp.diag(moments), descending=True)
    sorted_moments = jnp.pad(moments[order][:, order], ((0, padding), (0, padding)))
    layer = _Layer(
        jnp.pad(weights[order], ((0, padding), (0, 0))),
        jnp.pad(frozen[order], ((0, padding), (0, 0)), constant_values=True),
        sorted_moments,
        _spreading(sorted_moments),
    )
    nearest = Compensated(*_to_nearest(layer.weights, layer.frozen, centroids), centroids)

    def again(_: int, best: Compensated) -> Compensated:
        return _refit(layer, _better(layer, _by_input(layer, best.centroids), best), movable)

    passes = jnp.where(jnp.any(movable), _PASSES, 1)  # under the same centroids all are the same
    best = loops.fori_loop(0, passes, again, nearest)
    best = _refit(layer, _descend(layer, best), movable)
    back = jnp.argsort(order)
    return best._replace(weights=best.weights[:rows][back], codes=best.codes[:rows][back])


class _Layer(NamedTuple):
    """What does not change: rows by falling second moment, in whole blocks."""

    weights: jax.Array
    frozen: jax.Array
    moments: jax.Array
    spreading: jax.Array  # [D, D], above the diagonal: what later inputs take over from an input


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
    `state -= coupling[j, :, None] * change[None]` where `reached`. In blocks, whose changes reach
    the rows outside in one product of matrices.
    """
    size, outputs = state.shape

    def block(number: jax.Array, carry: tuple[jax.Array, tuple[jax.Array, ...]]):
        state, results = carry
        start = number * _BLOCK

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, _BLOCK)

        own, own_rows = cut(coupling), tuple(map(cut, rows))
        inside = jax.lax.dynamic_slice_in_dim(own, start, _BLOCK, axis=1)
        mask = cut(reached)

        def row(j: jax.Array, carry: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]):
            part, changes, found = carry
            change, *new = step(part[j], *(x[j] for x in own_rows))
            moved = inside[j][:, None] * change[None]
            part = part - jnp.where(mask, moved, 0.0)
            found = tuple(x.at[j].set(y) for x, y in zip(found, new, strict=True))
            return part, changes.at[j].set(change), found

        zeros = jnp.zeros((_BLOCK, outputs), jnp.float32)
        _, changes, found = loops.fori_loop(
            0, _BLOCK, row, (cut(state), zeros, tuple(map(cut, results)))
        )
        moved = jnp.matmul(own.T, changes, precision=_PRECISION)
        state = state - jnp.where(reached, moved, 0.0)
        results = tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
            for x, y in zip(results, found, strict=True)
        )
        return state, results

    shapes = jax.eval_shape(step, state[0], *(x[0] for x in rows))[1:]
    results = tuple(jnp.zeros((size, *x.shape), x.dtype) for x in shapes)
    return loops.fori_loop(0, size // _BLOCK, block, (state, results))[1]


def _by_input(layer: _Layer, centroids: jax.Array) -> Compensated:
    """Freeze one input's weights after the other; those that come later make up for them."""

    def step(weights: jax.Array, frozen: jax.Array) -> tuple[jax.Array, ...]:
        new = _to_nearest(weights, frozen, centroids)
        return weights - new[0], *new

    weights, codes = _by_rows(step, layer.spreading, layer.weights, ~layer.frozen, (layer.frozen,))
    return Compensated(weights, codes, centroids)


def _to_nearest(
    weights: jax.Array, frozen: jax.Array, centroids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return weights, those that are free on their nearest centroid, and its codes."""
    codes = assign(weights, centroids)
    return jnp.where(frozen, weights, reconstruct(codes, centroids)), codes


def _better(layer: _Layer, new: Compensated, old: Compensated) -> Compensated:
    """Return for each output the better of both, under the same centroids."""
    better = _error(layer, new) < _error(layer, old)  # not where it is NaN
    return old._replace(
        weights=jnp.where(better, new.weights, old.weights),
        codes=jnp.where(better, new.codes, old.codes),
    )


def _where(condition: jax.Array, new: Compensated, old: Compensated) -> Compensated:
    """Return one of two."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _error(layer: _Layer, found: Compensated) -> jax.Array:
    """Return the squared error of each output's answers, [N]."""
    off = found.weights - layer.weights
    return jnp.sum(off * jnp.matmul(layer.moments, off, precision=_PRECISION), axis=0)


def _refit(layer: _Layer, found: Compensated, movable: jax.Array) -> Compensated:
    """Move the movable centroids, if any, to the least squares of these codes; others stay."""
    refit = functools.partial(_least_squares, layer)
    return loops.cond(jnp.any(movable), refit, lambda found, _: found, found, movable)


def _least_squares(layer: _Layer, found: Compensated, movable: jax.Array) -> Compensated:
    k = found.centroids.shape[0]
    slots = jnp.where(~layer.frozen & movable[found.codes], found.codes, k).astype(jnp.int32)

    def sums(x: jax.Array) -> jax.Array:
        return jnp.zeros(k + 1, jnp.float32).at[slots].add(x)[:k]

    def row(code: jax.Array) -> jax.Array:  # one at a time: an array of the layer's size each
        members = (slots == code).astype(jnp.float32)
        return sums(jnp.matmul(layer.moments, members, precision=_PRECISION))

    off = found.weights - layer.weights
    slope = sums(jnp.matmul(layer.moments, off, precision=_PRECISION))
    gram = jax.lax.map(row, jnp.arange(k))
    used = jnp.diag(gram) > 0
    ridge = jnp.where(used, 1e-6 * jnp.diag(gram), 1.0)
    step = jnp.where(used, -jnp.linalg.solve(gram + jnp.diag(ridge), slope), 0.0)
    centroids = found.centroids + step
    weights = jnp.where(slots < k, centroids[jnp.minimum(slots, k - 1)], found.weights)
    new = found._replace(weights=weights, centroids=centroids)
    return _where(_error(layer, new).sum() < _error(layer, found).sum(), new, found)


def _descend(layer: _Layer, found: Compensated) -> Compensated:
    """Move each weight that was free to the best centroid given all others."""
    energy, centroids = jnp.diag(layer.moments), found.centroids

    def step(
        slope: jax.Array, weights: jax.Array, frozen: jax.Array, own: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        target = weights - slope / jnp.where(own > 0, own, 1.0)
        best = reconstruct(assign(target, centroids), centroids)
        new = jnp.where(frozen | (own <= 0), weights, best)
        return weights - new, new

    def sweep(_: int, weights: jax.Array) -> jax.Array:
        slope = jnp.matmul(layer.moments, weights - layer.weights, precision=_PRECISION)
        rows = (weights, layer.frozen, energy)
        return _by_rows(step, layer.moments, slope, jnp.ones_like(layer.frozen), rows)[0]

    weights = loops.fori_loop(0, _SWEEPS, sweep, found.weights)
    new = found._replace(weights=weights, codes=assign(weights, centroids))
    return _where(_error(layer, new).sum() < _error(layer, found).sum(), new, found)
