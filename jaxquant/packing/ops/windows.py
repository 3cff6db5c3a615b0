"""The geometry of convolutions: which inputs a kernel is multiplied with, at which places."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.checks import whole_numbers


class Windows(NamedTuple):
    """What a convolution's kernel is multiplied with, as `jaxquant.conv` takes it."""

    window: tuple[int, ...]  # () for a dense layer
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def window_options(
    window: Sequence[int],
    window_strides: Sequence[int] | int,
    padding: str | Sequence[tuple[int, int]],
    kernel_dilation: Sequence[int] | int,
) -> Windows:
    """Return the options of a convolution in a form that can be hashed, its integers Python's."""
    each = functools.partial(each_axis, space=len(window))
    return Windows(
        each(window), each(window_strides), pads(padding, len(window)), each(kernel_dilation)
    )


def each_axis(value: Sequence[int] | int, space: int) -> tuple[int, ...]:
    """Return a number for each axis of space, from those or from one for all.

    Raises:
      ValueError: if they are not integers, of any type, or not one for each axis.
    """
    numbers = whole_numbers((value,) * space if np.ndim(value) == 0 else value)
    if numbers is None or len(numbers) != space:
        raise ValueError(f"expected an integer, or one for each of {space} axes, got {value!r}")
    return numbers


def pads(padding: Any, space: int) -> str | tuple[tuple[int, int], ...]:
    """Return padding in a form that can be hashed: a name, or (before, after) for each axis.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(padding, str):
        return padding
    if np.shape(padding) != (space, 2):
        raise ValueError(
            f"expected a name, or (before, after) for each of {space} axes, got {padding!r}"
        )
    return tuple((before, after) for before, after in (each_axis(pair, 2) for pair in padding))


def padded(x: jax.Array, options: Windows) -> jax.Array:
    """Return [batch, *space, channels] with the zeros around that the padding adds.

    Raises:
      ValueError: if no window fits.
    """
    reach, padding = _reach(options), options.padding
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, options.strides, padding)
    around = [(0, 0, 0), *((before, after, 0) for before, after in padding), (0, 0, 0)]
    wide = jax.lax.pad(x, np.zeros((), x.dtype), around)
    if any(size < own for size, own in zip(wide.shape[1:-1], reach, strict=True)):
        raise ValueError(f"expected windows of {tuple(reach)} to fit, got inputs {x.shape}")
    return wide


def positions(wide: jax.Array, options: Windows) -> list[jax.Array]:
    """Return for each position of the window what it sees, [batch, *places, channels].

    Args:
      wide: [batch, *space, channels] with its padding, see `padded`.
      options: of the convolution.
    """
    sizes = zip(wide.shape[1:-1], _reach(options), options.strides, strict=True)
    ends = [(size - own) // stride * stride + 1 for size, own, stride in sizes]
    starts = itertools.product(
        *(
            range(0, size * step, step)
            for size, step in zip(options.window, options.dilation, strict=True)
        )
    )

    def seen(start: tuple[int, ...]) -> jax.Array:
        limits = (first + end for first, end in zip(start, ends, strict=True))
        first, last = (0, *start, 0), (wide.shape[0], *limits, wide.shape[-1])
        return jax.lax.slice(wide, first, last, (1, *options.strides, 1))

    return [seen(start) for start in starts]


def _reach(options: Windows) -> list[int]:
    """Return the size of the window along each axis, its gaps included."""
    pairs = zip(options.window, options.dilation, strict=True)
    return [(size - 1) * step + 1 for size, step in pairs]
