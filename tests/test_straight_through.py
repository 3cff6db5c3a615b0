"""Weights that the loss sees quantized: values, gradients, codes that change, and the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from tests.cases import mostly_further, mostly_slow


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PARAMS = {"w": normal((16, 12)), "bias": jnp.ones(12)}
RULES = {
    "leaf": jq.LayerRule("w", k=4),
    "outputs": jq.LayerRule("w", k=3, block=(-1, 1)),
    "groups": jq.LayerRule("w", k=4, block=(8, 1), scaled=True),
}


def quantized(rule, rounds=(1,), params=PARAMS):
    plan = jq.slq(params, rounds=rounds, rules=[rule], init="quantile")  # quicker to compile
    params, state, _ = jax.jit(jq.quantize_round, static_argnums=0)(
        plan, params, jq.init(plan, params)
    )
    return plan, params, state


def tables_of(state):
    """Return the centroids of each weight's block, [16, 12, k]."""
    codebook = np.asarray(state.codebooks["w"])
    scale = 1.0 if state.scales is None else np.asarray(state.scales["w"], np.float32)
    table = codebook * scale
    table = table.reshape(*(1,) * (3 - table.ndim), *table.shape)
    for axis, size in enumerate((16, 12)):
        table = np.repeat(table, size // table.shape[axis], axis=axis)
    return table


@pytest.mark.parametrize("rule", mostly_further(RULES.values(), RULES["groups"]), ids=RULES)
def test_free_weights_are_seen_on_their_nearest_centroid_and_get_the_gradient(rule):
    plan, _, state = quantized(rule)
    state, gradient = jq.release(state), normal((16, 12), seed=1)
    seen, pull = jax.vjp(lambda params: jq.straight_through(plan, params, state), PARAMS)
    tables = tables_of(state)
    codes = np.abs(np.asarray(PARAMS["w"])[..., None] - tables).argmin(-1)
    expected = np.take_along_axis(tables, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(seen["w"], expected, rtol=1e-6)
    np.testing.assert_array_equal(seen["bias"], PARAMS["bias"])
    (back,) = pull({"w": gradient, "bias": jnp.ones(12)})
    np.testing.assert_array_equal(back["w"], gradient)


@pytest.mark.parametrize("rule", mostly_further(RULES.values(), RULES["groups"]), ids=RULES)
def test_centroids_and_scales_get_the_gradients_of_their_members(rule):
    plan, _, state = quantized(rule)
    state, gradient = jq.release(state), normal((16, 12), seed=1)

    def seen(codebooks, scales):
        own = state._replace(codebooks=codebooks, scales=scales)
        return jnp.sum(gradient * jq.straight_through(plan, PARAMS, own)["w"])

    found = jax.grad(seen, argnums=(0, 1))(state.codebooks, state.scales)
    tables = tables_of(state)
    codes = np.abs(np.asarray(PARAMS["w"])[..., None] - tables).argmin(-1)

    def shared(codebooks, scales):  # the same, by autodiff of a plain look-up
        own = tables_of_traced(codebooks["w"], None if scales is None else scales["w"])
        return jnp.sum(
            gradient * jnp.take_along_axis(own, jnp.asarray(codes)[..., None], -1)[..., 0]
        )

    expected = jax.grad(shared, argnums=(0, 1))(state.codebooks, state.scales)
    for got, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(
            got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2e-2, atol=1e-4
        )


def tables_of_traced(codebook, scale):
    table = codebook if scale is None else codebook * scale.astype(jnp.float32)
    table = table.reshape(*(1,) * (3 - table.ndim), *table.shape)
    for axis, size in enumerate((16, 12)):
        table = jnp.repeat(table, size // table.shape[axis], axis=axis)
    return table


@pytest.mark.parametrize("rule", mostly_further(RULES.values(), RULES["outputs"]), ids=RULES)
def test_at_a_temperature_weights_are_means_of_centroids_in_shares_by_distance(rule):
    plan, _, state = quantized(rule)
    state, gradient = jq.release(state), normal((16, 12), seed=1)

    def mixed(params, state, temperature):
        return jq.straight_through(plan, params, state, temperature=temperature)

    def plain(weights, codebooks):
        scales = None if state.scales is None else state.scales["w"]
        tables = tables_of_traced(codebooks, scales)
        apart = (tables_of(state).max(-1) - tables_of(state).min(-1)) / (tables.shape[-1] - 1)
        distances = (weights[..., None] - tables) / apart[..., None]
        return jnp.sum(jax.nn.softmax(-(distances**2) / 0.3) * tables, axis=-1)

    with jax.numpy_rank_promotion("allow"):
        expected, pull = jax.vjp(plain, PARAMS["w"], state.codebooks["w"])
        wanted = pull(gradient)
    seen, pull = jax.vjp(
        lambda weights, codebook: mixed(
            PARAMS | {"w": weights},
            state._replace(codebooks=state.codebooks | {"w": codebook}),
            0.3,
        )["w"],
        PARAMS["w"],
        state.codebooks["w"],
    )
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
    for got, own in zip(pull(gradient), wanted, strict=True):
        np.testing.assert_allclose(got, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", mostly_further(RULES.values(), RULES["groups"]), ids=RULES)
def test_a_temperature_that_falls_to_zero_compiles_once_and_ends_straight_through(rule):
    plan, _, state = quantized(rule)
    state, traces = jq.release(state), []

    @jax.jit
    def seen(params, temperature):
        traces.append(1)
        return jq.straight_through(plan, params, state, temperature=temperature)

    def gradient(temperature):
        return jax.grad(lambda params: jnp.sum(seen(params, temperature)["w"]))(PARAMS)["w"]

    hard = jq.straight_through(plan, PARAMS, state)
    far = [float(jnp.mean(jnp.abs(seen(PARAMS, t)["w"] - hard["w"]))) for t in (0.5, 0.1, 0.0)]
    assert far[0] > far[1] > far[2] == 0
    assert len(traces) == 1
    np.testing.assert_array_equal(gradient(0.0), 1)
    np.testing.assert_allclose(seen(PARAMS, 1e-9)["w"], hard["w"], rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.isfinite(gradient(1e-9)))


@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-11, 1e-20])
def test_next_to_zero_a_temperature_is_zero(temperature):
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)}
    plan = jq.slq(start, rounds=(1,), rules=[jq.LayerRule("w", k=4)])
    state = jq.release(jq.quantize_round(plan, start, jq.init(plan, start))[1])
    params = {"w": start["w"].at[0, 0].set(1e3)}  # far from all centroids

    @jax.jit
    def seen(params, temperature):
        return jq.straight_through(plan, params, state, temperature=temperature)["w"]

    cold = seen(params, jnp.float32(temperature))
    np.testing.assert_allclose(cold, seen(params, 0.0), rtol=1e-6)
    slope = jax.grad(lambda params: jnp.sum(seen(params, jnp.float32(temperature))))(params)["w"]
    assert jnp.all(jnp.isfinite(slope))


def test_frozen_weights_are_what_they_are_at_any_temperature():
    plan, params, state = quantized(RULES["leaf"], rounds=(2, 4))
    frozen = np.asarray(state.frozen["w"])
    seen, pull = jax.vjp(
        lambda params: jq.straight_through(plan, params, state, temperature=0.2), params
    )
    np.testing.assert_array_equal(seen["w"][frozen], params["w"][frozen])
    (back,) = pull(jax.tree.map(jnp.ones_like, params))
    np.testing.assert_array_equal(back["w"][frozen], 0)
    assert np.any(back["w"][~frozen] != 0)


def test_frozen_weights_are_what_they_are_and_get_nothing():
    plan, params, state = quantized(RULES["leaf"], rounds=(2, 4))
    frozen = np.asarray(state.frozen["w"])
    assert 0 < frozen.mean() < 1
    seen, pull = jax.vjp(lambda params: jq.straight_through(plan, params, state), params)
    np.testing.assert_array_equal(seen["w"][frozen], params["w"][frozen])
    (back,) = pull(jax.tree.map(jnp.ones_like, params))
    np.testing.assert_array_equal(back["w"], ~frozen)
    codebook = jax.grad(
        lambda tables: jnp.sum(
            jq.straight_through(plan, params, state._replace(codebooks=tables))["w"]
        )
    )(state.codebooks)["w"]
    assert float(jnp.sum(codebook)) == pytest.approx((~frozen).sum())


def test_a_layer_that_has_no_codebook_stays_float():
    plan = jq.slq(PARAMS, rules=[RULES["leaf"]])
    seen = jq.straight_through(plan, PARAMS, jq.init(plan, PARAMS))
    np.testing.assert_array_equal(seen["w"], PARAMS["w"])
    warm = jq.straight_through(plan, PARAMS, jq.init(plan, PARAMS), temperature=0.5)
    np.testing.assert_array_equal(warm["w"], PARAMS["w"])


STACK = {"w": normal((3, 8, 8), seed=5)}


def stack_after(rounds, scaled):
    """Return a stack of which each round quantizes one slice more."""
    rule = jq.LayerRule("w", k=3, axis=0)
    if scaled:
        rule = jq.LayerRule("w", k=3, block=(1, -1, 1), scaled=True)
    plan = jq.mlq(STACK, groups=3, rules=[rule], init="quantile")
    params, state = STACK, jq.init(plan, STACK)
    for _ in range(rounds):
        params, state, _ = jq.quantize_round(plan, params, state)
    return plan, params, state


@pytest.mark.parametrize(
    ("temperature", "scaled"), [(0.0, False), (0.1, False), pytest.param(0.1, True)]
)
def test_a_slice_that_has_no_codebook_stays_float(temperature, scaled):
    plan, params, state = stack_after(1, scaled)
    seen = jq.straight_through(plan, params, state, temperature=temperature)["w"]
    begun = np.abs(np.asarray(state.codebooks["w"])).max(axis=(1, 2, 3)) > 0
    assert begun.tolist() == [True, False, False]
    np.testing.assert_array_equal(seen[~begun], STACK["w"][~begun])
    assert bool(jnp.any(seen[0] != STACK["w"][0]))
    for own in (state, jq.release(state)):
        with pytest.raises(ValueError, match="w: expected a codebook for all weights, got no"):
            jq.settle(plan, params, own)


def test_what_settles_without_a_codebook_under_jit_stays_free_and_the_next_round_freezes_it():
    plan, params, state = stack_after(1, scaled=False)
    settled, done = jax.jit(jq.settle, static_argnums=0)(plan, params, state)
    assert np.asarray(done.frozen["w"]).all(axis=(1, 2)).tolist() == [True, False, False]
    np.testing.assert_array_equal(settled["w"][1:], STACK["w"][1:])
    last, whole, _ = jq.quantize_round(plan, settled, done)
    assert bool(jnp.all(whole.frozen["w"]))
    np.testing.assert_array_equal(last["w"][0], settled["w"][0])
    np.testing.assert_array_equal(jq.unpack(jq.pack(last, whole))["w"], last["w"])


def test_weights_that_began_as_zeros_are_settled_as_zeros_or_refused():
    zeros = {"w": jnp.zeros((8, 8))}
    plan, params, state = quantized(jq.LayerRule("w", k=3), params=zeros)
    settled, done = jq.settle(plan, params, jq.release(state))
    assert bool(jnp.all(done.frozen["w"])) and not jnp.any(settled["w"])
    moved = {"w": params["w"].at[0, 0].set(0.01)}
    with pytest.raises(ValueError, match="w: expected a codebook for all weights, got none for 64"):
        jq.settle(plan, moved, jq.release(state))
    with pytest.raises(ValueError, match="w: expected a codebook for all weights"):
        jq.settle(plan, moved, jq.init(plan, moved))


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_a_weight_that_is_no_number_is_seen(temperature):
    plan, params, state = quantized(RULES["leaf"])
    broken = params | {"w": params["w"].at[1, 2].set(jnp.nan)}
    seen = jq.straight_through(plan, broken, jq.release(state), temperature=temperature)["w"]
    assert np.argwhere(np.isnan(seen)).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="expected finite values in w"):
        jq.settle(plan, broken, jq.release(state))


def test_zeros_that_are_pinned_get_no_gradient():
    params = {"w": jnp.concatenate([jnp.zeros((8, 8)), jnp.ones((8, 8)), -jnp.ones((8, 8))])}
    plan, _, state = quantized(jq.LayerRule("w", k=3), params=params)
    state = jq.release(state)
    found = jax.grad(
        lambda tables: jnp.sum(
            jq.straight_through(plan, params, state._replace(codebooks=tables))["w"]
        )
    )(state.codebooks)["w"]
    np.testing.assert_array_equal(found, np.where(state.codebooks["w"] == 0, 0.0, 64.0))
    warm = jax.grad(
        lambda tables: jnp.sum(
            jq.straight_through(plan, params, state._replace(codebooks=tables), temperature=0.5)[
                "w"
            ]
        )
    )(state.codebooks)["w"]
    np.testing.assert_array_equal(warm == 0, state.codebooks["w"] == 0)


@pytest.mark.parametrize("rule", mostly_slow(RULES.values(), RULES["groups"]))
def test_after_training_it_settles_where_the_network_saw_it(rule):
    plan, params, state = quantized(rule)
    target = normal((16, 12), seed=2)
    state, tx = jq.release(state), optax.sgd(0.05)

    @jax.jit
    def step(params, opt_state, state):
        def loss(params):
            return jnp.sum((jq.straight_through(plan, params, state)["w"] - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = tx.init(params), []
    for _ in range(30):
        params, opt_state, value = step(params, opt_state, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]  # which takes other codes: the codebook stays
    seen = jq.straight_through(plan, params, state)
    final, done = jq.settle(plan, params, state)
    np.testing.assert_array_equal(final["w"], seen["w"])
    np.testing.assert_array_equal(final["bias"], params["bias"])
    assert all(jax.tree.leaves(jq.is_on_codebook(final, done)))
    assert jnp.all(done.frozen["w"])
    assert done.round == plan.num_rounds
    np.testing.assert_array_equal(jq.unpack(jq.pack(final, done))["w"], final["w"])
    again, *_ = jq.quantize_round(plan, final, done)
    np.testing.assert_array_equal(again["w"], final["w"])


@given(st.integers(0, 1000))
def test_what_stands_on_its_centroid_stays_when_it_is_released(seed):
    params = {"w": normal((16, 12), seed), "bias": jnp.ones(12)}
    plan, params, state = quantized(RULES["outputs"], params=params)
    released = jq.release(state)
    assert not jnp.any(released.frozen["w"])
    assert not jnp.any(released.frozen_centroids["w"])
    np.testing.assert_array_equal(jq.straight_through(plan, params, released)["w"], params["w"])


def test_bad_input_is_named():
    plan, params, state = quantized(RULES["leaf"])
    with pytest.raises(ValueError, match="params: w: expected shape"):
        jq.straight_through(plan, params | {"w": jnp.ones((4, 4))}, state)
    with pytest.raises(ValueError, match=r"expected a jq\.QuantState"):
        jq.release(params)
    with pytest.raises(ValueError, match="temperature of at least 0, got -1"):
        jq.straight_through(plan, params, state, temperature=-1)
    with pytest.raises(ValueError, match="temperature of at least 0, got nan"):
        jq.straight_through(plan, params, state, temperature=np.nan)
    with pytest.raises(ValueError, match=r"scalar temperature, got shape \(2,\)"):
        jq.straight_through(plan, params, state, temperature=np.ones(2))
    other = quantized(RULES["outputs"])[2]
    with pytest.raises(ValueError, match=r"state\.codebooks: w: expected shape"):
        jq.settle(plan, params, other)
