"""What arguments have to be: whole numbers, and values that can be clustered."""

import functools
import operator
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def whole_number(value: Any) -> int | None:
    """Return an integer of any type, NumPy's and JAX's too, as Python's; None if it is none.

    >>> [whole_number(value) for value in (jnp.int32(3), True, 3.0)]
    [3, None, None]
    """
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        return None


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """Return some integers, in a sequence or an array, as Python's; None if they are others."""
    try:
        numbers = [whole_number(value) for value in values]
    except TypeError:
        return None
    known = tuple(number for number in numbers if number is not None)
    return known if len(known) == len(numbers) else None


def integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Return a whole number of any type, NumPy's too, as Python's.

    Raises:
      ValueError: for other values, bools among them, and for numbers out of range; gives the name.

    >>> integer("k", np.int64(3), least=1)
    3
    """
    wanted = f"an integer of at least {least}" if most is None else f"{least} to {most}"
    number = whole_number(value)
    if number is None or number < least or (most is not None and number > most):
        raise ValueError(f"expected {name} to be {wanted}, got {value!r}")
    return number


def key(name: str, value: Any) -> None:
    """Raise a ValueError for what is no key of `jax.random`."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise ValueError(f"expected {name} to be a key, as jax.random.key(0), got {value!r:.50}")


def values(arrays: Mapping[str, jax.Array], *, nonnegative: Collection[str] = ()) -> None:
    """Refuse arrays that cannot be clustered, if they can be looked at: not while tracing.

    Args:
      arrays: [...] floating point, by name.
      nonnegative: names of those that must not be below zero either.

    Raises:
      ValueError: for NaN, infinite or negative entries; gives the first array's name.
    """
    known = {name: x for name, x in arrays.items() if not isinstance(x, jax.core.Tracer)}
    signed = tuple(name not in nonnegative for name in known)
    counts = _count_unusable(signed, list(known.values()))
    for (name, array), (unknown, negative) in zip(known.items(), counts, strict=True):
        # While something else is traced, what is counted of known arrays is not known either.
        if isinstance(unknown, jax.core.Tracer):
            return
        if int(unknown):
            raise ValueError(
                f"expected finite values in {name}, got {unknown} NaN or infinite of {array.size}"
            )
        if int(negative):
            raise ValueError(f"expected {name} >= 0, got {negative} negative of {array.size}")


@functools.partial(jax.jit, static_argnums=0)
def _count_unusable(
    signed: tuple[bool, ...], arrays: list[jax.Array]
) -> list[tuple[jax.Array, jax.Array]]:
    """Return how many entries are NaN or infinite, and how many negative where none may be."""
    return [
        (jnp.sum(~jnp.isfinite(x)), jnp.int32(0) if any_sign else jnp.sum(x < 0))
        for x, any_sign in zip(arrays, signed, strict=True)
    ]
