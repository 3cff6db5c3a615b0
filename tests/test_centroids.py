"""Centroid training: the chain rule, and weights that stay shared bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq

quantize_round = jax.jit(jq.quantize_round, static_argnums=0)


def after_rounds(shape=(40, 30), *, bits=3, rounds=(2, 3, 5), applied=1, rules=None, **options):
    params = {
        "bias": jnp.ones(3),
        "kernel": jax.random.normal(jax.random.key(0), shape, options.pop("dtype", jnp.float32)),
    }
    plan = jq.slq(params, bits=bits, rounds=rounds, rules=rules, **options)
    state = jq.init(plan, params)
    for _ in range(applied):
        params, state, _ = quantize_round(plan, params, state)
    return plan, params, state


def test_gradients_are_those_of_the_shared_variables():
    _, params, state = after_rounds(applied=2)
    kernel, codebook = params["kernel"], state.codebooks["kernel"]
    codes, frozen = jq.assign(kernel, codebook), state.frozen["kernel"]

    def loss(weights):
        return jnp.sum(
            jnp.sin(3 * weights) * jnp.linspace(0, 1, weights.size).reshape(weights.shape)
        )

    expected = jax.grad(lambda c: loss(jnp.where(frozen, c[codes], kernel)))(codebook)
    gradients = {"kernel": jax.grad(loss)(kernel), "bias": jnp.ones(3)}
    got = jax.jit(jq.centroid_gradients)(gradients, params, state)
    np.testing.assert_allclose(got["kernel"], expected, rtol=1e-4)
    assert int(jnp.sum(state.frozen_centroids["kernel"])) == 3
    np.testing.assert_array_equal(got["kernel"] != 0, state.frozen_centroids["kernel"])
    assert got["bias"].shape == ()


def test_a_gradient_of_ones_counts_the_members_with_an_axis_too():
    rules = (jq.LayerRule("kernel", axis=1),)
    _, params, state = after_rounds((64, 3, 5), bits=2, rounds=(1, 3), rules=rules)
    ones = jax.tree.map(jnp.ones_like, params)
    got = jq.centroid_gradients(ones, params, state)["kernel"]
    assert got.shape == state.codebooks["kernel"].shape == (1, 3, 1, 3)
    for i in range(3):
        frozen = int(jnp.sum(state.frozen["kernel"][:, i]))
        assert int(jnp.sum(got[:, i])) == frozen > 0
    moved, new = jq.set_centroids(params, state, jax.tree.map(lambda c: c * 1.5, state.codebooks))
    frozen = state.frozen["kernel"]
    np.testing.assert_array_equal(
        moved["kernel"], jnp.where(frozen, params["kernel"] * 1.5, params["kernel"])
    )
    np.testing.assert_array_equal(
        new.codebooks["kernel"],
        state.codebooks["kernel"] * jnp.where(state.frozen_centroids["kernel"], 1.5, 1.0),
    )


def test_what_is_not_frozen_does_not_count_and_a_nan_there_does_no_harm():
    _, params, state = after_rounds()
    frozen = state.frozen["kernel"]
    gradients = {"kernel": jnp.where(frozen, 1.0, jnp.nan), "bias": jnp.full(3, jnp.nan)}
    got = jq.centroid_gradients(gradients, params, state)["kernel"]
    assert float(jnp.sum(got)) == int(jnp.sum(frozen)) > 0


def test_a_pinned_zero_stays_zero():
    _, params, state = after_rounds(bits=2, rounds=(3,), zero=True)
    ones = jax.tree.map(jnp.ones_like, params)
    at_zero = np.asarray(state.codebooks["kernel"] == 0)
    assert at_zero.sum() == 1
    got = np.asarray(jq.centroid_gradients(ones, params, state)["kernel"])
    np.testing.assert_array_equal(got == 0, at_zero)
    moved, new = jq.set_centroids(params, state, jax.tree.map(lambda c: c + 0.25, state.codebooks))
    np.testing.assert_array_equal(new.codebooks["kernel"] == 0, at_zero)
    np.testing.assert_array_equal(moved["kernel"] == 0, params["kernel"] == 0)


@settings(max_examples=10, deadline=None)
@given(
    shift=st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    applied=st.integers(1, 3),
)
def test_weights_follow_their_centroids_and_later_rounds_keep_them(shift, dtype, applied):
    plan, params, state = after_rounds(dtype=dtype, applied=applied)
    codebooks = {**state.codebooks}
    codebooks["kernel"] = codebooks["kernel"].astype(jnp.float32) + jnp.array(shift, jnp.float32)
    moved, new = jax.jit(jq.set_centroids)(params, state, codebooks)
    kernel, frozen = np.asarray(moved["kernel"]), np.asarray(state.frozen["kernel"])
    codes = np.asarray(jq.assign(params["kernel"], state.codebooks["kernel"]))
    flags = np.asarray(state.frozen_centroids["kernel"])
    expected = np.where(
        flags, np.asarray(codebooks["kernel"].astype(dtype)), np.asarray(state.codebooks["kernel"])
    )
    np.testing.assert_array_equal(np.asarray(new.codebooks["kernel"]), expected)
    np.testing.assert_array_equal(kernel[frozen], expected[codes[frozen]])
    np.testing.assert_array_equal(kernel[~frozen], np.asarray(params["kernel"])[~frozen])
    for _ in range(3 - applied):
        moved, new, _ = quantize_round(plan, moved, new)
    np.testing.assert_array_equal(np.asarray(moved["kernel"])[frozen], kernel[frozen])
    assert bool(jq.is_on_codebook(moved, new)["kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((40, 30))}, "gradients: expected the leaves of the state, "),
        ({"kernel": jnp.zeros((4, 3)), "bias": 0.0}, "gradients: kernel: expected shape (40, 30)"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_by_name(change, message):
    _, params, state = after_rounds()
    with pytest.raises(ValueError, match=re.escape(message)):
        jq.centroid_gradients(change, params, state)


def test_codebooks_that_do_not_fit_are_refused_by_name():
    _, params, state = after_rounds()
    codebooks = {"kernel": jnp.zeros(4), "bias": jnp.zeros(())}
    with pytest.raises(ValueError, match=re.escape("codebooks: kernel: expected shape (5,)")):
        jq.set_centroids(params, state, codebooks)
