"""Centroid training: the chain rule, and weights that stay shared bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import meshes

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def blocks_of(shape, numbers, k, dtype=jnp.float32):
    """Return weights on the codebooks of their blocks, a state, and where each has its centroid."""
    rng = np.random.default_rng(0)
    values = np.arange(1, k + 1) * rng.uniform(0.5, 1.0, (*numbers, 1))
    tables = jnp.asarray(rng.permuted(values, axis=-1), dtype)
    block = [np.arange(size) // (size // n) for size, n in zip(shape, numbers, strict=True)]
    where = (*np.ix_(*block), rng.integers(0, k, shape))
    state = jq.QuantState(
        codebooks={"w": tables},
        frozen={"w": jnp.asarray(rng.random(shape) < 0.8)},
        frozen_centroids={"w": jnp.asarray(rng.random(tables.shape) < 0.8)},
        round=jnp.int32(1),
    )
    return {"w": tables.astype(jnp.float32)[where]}, state, where


@pytest.mark.parametrize(
    ("shape", "numbers"), [((64, 32), (4, 32)), ((64, 32), (8, 2)), ((4, 6, 40), (2, 6, 8))]
)
def test_small_blocks_sum_their_own_gradients(shape, numbers, monkeypatch):
    monkeypatch.setattr("jaxquant.clustering.blocks._BATCH_WEIGHTS", 32)  # on each of 8 devices
    meshes._run.clear_cache()  # traced anew
    params, state, where = blocks_of(shape, numbers, 5)
    gradient = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = np.zeros((*numbers, 5))
    np.add.at(expected, where, np.where(state.frozen["w"], gradient, 0.0))
    expected = np.where(state.frozen_centroids["w"], expected, 0.0)
    got = jq.centroid_gradients({"w": gradient}, params, state)["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    moved, new = jq.set_centroids(params, state, {"w": 2 * state.codebooks["w"]})
    factor = np.where(state.frozen_centroids["w"], 2.0, 1.0)
    np.testing.assert_array_equal(new.codebooks["w"], factor * state.codebooks["w"])
    np.testing.assert_array_equal(
        moved["w"], params["w"] * np.where(state.frozen["w"], factor[where], 1.0)
    )


def test_many_small_blocks_take_no_more_than_a_few_times_their_weights():
    params, state, _ = blocks_of((256, 512), (32, 512), 4)
    compiled = jax.jit(jq.centroid_gradients).lower(params, params, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * params["w"].nbytes


def test_narrow_centroids_move_to_what_their_dtype_holds():
    params, state, where = blocks_of((16, 8), (2, 8), 5, jnp.float8_e4m3fn)
    wanted = {"w": 1.1 * state.codebooks["w"].astype(jnp.float32)}
    moved, new = jq.set_centroids(params, state, wanted)
    assert new.codebooks["w"].dtype == jnp.float8_e4m3fn
    flags = state.frozen_centroids["w"]
    expected = jnp.where(flags, wanted["w"].astype(jnp.float8_e4m3fn), state.codebooks["w"])
    np.testing.assert_array_equal(new.codebooks["w"], expected)
    shared = np.asarray(expected.astype(jnp.float32))[where]
    np.testing.assert_array_equal(moved["w"], np.where(state.frozen["w"], shared, params["w"]))


def test_scaled_blocks_are_refused_by_name():
    params, state, _ = blocks_of((16, 8), (1, 1), 5)
    scaled = state._replace(scales={"w": jnp.ones((2, 8, 1))})
    message = "w: expected blocks with centroids of their own, got one codebook with a scale"
    with pytest.raises(ValueError, match=message):
        jq.set_centroids(params, scaled, state.codebooks)
    with pytest.raises(ValueError, match=message):
        jq.centroid_gradients(params, params, scaled)
    jq.centroid_gradients(params, params, state._replace(scales={"w": jnp.zeros(())}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((40, 30))}, "gradients: expected the leaf bias, got kernel"),
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
