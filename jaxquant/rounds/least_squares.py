"""Least squares of what a layer answers, in unknowns of which its weights are a linear function."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import loops

PRECISION = jax.lax.Precision.HIGHEST
_GAIN = 1e-4  # of the error: what a step has to gain for another


class System(NamedTuple):
    """Unknowns [R, C, n], of which weights are a linear function."""

    weights_of: Callable[[jax.Array], jax.Array]  # [D, N], zeros where weights do not move
    sums: Callable[[jax.Array], jax.Array]  # its transpose
    diagonal: jax.Array  # of each unknown, how much its square costs: a preconditioner
    steps: int  # at most


class _Gradients(NamedTuple):
    """Conjugate gradients on their way; a system for each block of outputs."""

    number: jax.Array  # int32
    unknowns: jax.Array  # [R, C, n]
    rest: jax.Array  # like the unknowns, half the descent of the error
    direction: jax.Array  # like the unknowns
    square: jax.Array  # [1, C, 1], of what rests, scaled
    gain: jax.Array  # of the last step, in all blocks


def answers(moments: jax.Array, off: jax.Array) -> jax.Array:
    """Return `moments @ off`, of each group of outputs with moments of its own.

    Args:
      moments: [G, M, D] float32.
      off: [D, N]; the N outputs are G runs of equal length.

    Returns:
      [M, N].
    """
    groups, outputs = len(moments), off.shape[1]
    if groups == 1:
        return jnp.matmul(moments[0], off, precision=PRECISION)
    apart = off.reshape(len(off), groups, -1)
    found = jnp.einsum("gmd,dgn->mgn", moments, apart, precision=PRECISION)
    return found.reshape(-1, outputs)


def of_outputs(values: jax.Array, outputs: int) -> jax.Array:
    """Return values [..., G] of groups of outputs for each of N outputs, [..., N]."""
    return jnp.repeat(values, outputs // values.shape[-1], axis=-1)


def solve(moments: jax.Array, off: jax.Array, unknowns: jax.Array, system: System) -> jax.Array:
    """Return the unknowns of least squared answers `sum(off * answers(moments, off))`.

    By conjugate gradients; blocks of outputs, on axis 1, are systems of their own.

    Args:
      moments: [G, D, D] float32, of the inputs, symmetric; see `answers`.
      off: [D, N] how far weights are off, under these unknowns.
      unknowns: [R, C, n] where they begin.
      system: what weights are of them.
    """

    def slopes(off: jax.Array) -> jax.Array:
        return system.sums(answers(moments, off))

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=(0, 2), keepdims=True)  # [1, C, 1]

    def over(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)

    def step(carry: _Gradients) -> _Gradients:
        reached = slopes(system.weights_of(carry.direction))
        length = over(carry.square, dot(carry.direction, reached))
        rest = carry.rest - length * reached
        scaled = over(rest, system.diagonal)
        square = dot(rest, scaled)
        return _Gradients(
            carry.number + 1,
            carry.unknowns + length * carry.direction,
            rest,
            scaled + over(square, carry.square) * carry.direction,
            square,
            jnp.sum(length * carry.square),
        )

    wrong = answers(moments, off)
    rest, error = -system.sums(wrong), jnp.sum(off * wrong)
    scaled = over(rest, system.diagonal)
    start = _Gradients(jnp.int32(0), unknowns, rest, scaled, dot(rest, scaled), error)

    def goes_on(carry: _Gradients) -> jax.Array:
        return (carry.number < system.steps) & (carry.gain > _GAIN * error)

    return loops.while_loop(goes_on, step, start).unknowns
