"""Loops that are branches."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import loops


def sort_if(flag, x):
    return loops.if_needed(flag, jnp.sort, x, x)


def test_what_is_not_needed_is_not_computed_before_the_loop():
    function = jax.jit(jax.vmap(sort_if))
    text = function.lower(jnp.zeros(3, bool), jnp.ones((3, 64))).compile().as_text()
    assert " sort(" in text and " sort(" not in text[text.index("\nENTRY ") :]


def test_it_gives_what_was_made_or_was_there():
    x = jnp.array([3.0, 1.0, 2.0])
    run = functools.partial(jax.jit(sort_if), x=x)
    assert run(jnp.bool_(True)).tolist() == [1, 2, 3] and run(jnp.bool_(False)).tolist() == [
        3,
        1,
        2,
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 224])
def test_rows_of_tables_come_out_in_order(rows):
    tree = {"a": jnp.arange(3 * rows).reshape(rows, 3), "b": jnp.arange(rows) % 3 == 0}
    for unstacked in (loops.unstacked, jax.jit(loops.unstacked)):
        found = unstacked(tree)
        assert len(found) == rows
        for place, row in enumerate(found):
            np.testing.assert_array_equal(row["a"], tree["a"][place])
            np.testing.assert_array_equal(row["b"], tree["b"][place])


def test_rows_of_tables_are_cut_by_kernels_that_are_alike():
    text = jax.jit(loops.unstacked).lower(jnp.zeros((36, 5))).compile().as_text()
    kernels = [part for part in text.split("\n\n") if "fused_computation" in part.split("(")[0]]
    plain = [re.sub(r", metadata=.*|%[\w.]+|param_[\d.]+", "", kernel) for kernel in kernels]
    # Whose two digits are the same number, and whose are two: XLA compiles what is alike once.
    assert len(plain) >= 36 and len({tuple(sorted(x.splitlines())) for x in plain}) <= 4
