"""Loops that are branches."""

import functools

import jax
import jax.numpy as jnp

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
