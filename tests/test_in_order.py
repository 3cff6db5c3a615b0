"""Layers that are quantized part by part, against the same steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.calibration.in_order import _parts


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PARAMS = {"b": normal((12, 16)), "a": normal((16, 12), seed=1), "bias": jnp.zeros(12)}
BATCHES = [normal((20, 12), seed=2), normal((20, 12), seed=3)]
RULES = [jq.LayerRule("b", k=3), jq.LayerRule("a", k=4, block=(-1, 1), scaled=True)]


def function(params, x):
    """Use b before a, whatever their names say."""
    return jnp.tanh(x @ params["b"]) @ params["a"] + params["bias"][None]


def plan_of(params=PARAMS, rules=RULES):
    return jq.slq(params, rounds=(1,), rules=rules, init="quantile")


def test_each_part_is_calibrated_behind_those_that_come_before():
    plan = plan_of()
    new, state = jq.quantize_in_order(plan, function, PARAMS, BATCHES, parts=2, guided=True)
    params = PARAMS
    for name, rule in zip("ba", RULES, strict=True):
        own = plan_of(rules=[rule])
        seen = jq.calibrate(function, params, BATCHES, rules=[rule], guided=True)
        params, one, _ = jq.quantize_round(own, params, jq.init(own, params), calibration=seen)
        np.testing.assert_array_equal(state.codebooks[name], one.codebooks[name])
    jax.tree.map(np.testing.assert_array_equal, new, params)
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))
    assert jnp.all(state.frozen["a"]) and jnp.all(state.frozen["b"])
    assert state.round == plan.num_rounds
    unpacked = jq.unpack(jq.pack(new, state))
    jax.tree.map(np.testing.assert_array_equal, unpacked, new)


@pytest.mark.slow
def test_one_part_is_a_round():
    plan = plan_of()
    new, state = jq.quantize_in_order(plan, function, PARAMS, BATCHES, parts=1)
    seen = jq.calibrate(function, PARAMS, BATCHES, rules=RULES)
    expected = jq.quantize_round(plan, PARAMS, jq.init(plan, PARAMS), calibration=seen)
    jax.tree.map(np.testing.assert_array_equal, (new, state), expected[:2])


def test_weights_that_no_product_uses_are_in_the_last_part():
    params = PARAMS | {"c": normal((16, 12), seed=4)}
    rules = [*RULES, jq.LayerRule("c", k=4, block=(-1, 1), scaled=True)]
    plan = plan_of(params, rules)
    parts = _parts(plan, function, params, BATCHES[0], 3)
    assert [[layer.path for layer in part] for part in parts] == [["b"], ["a", "c"]]
    new, state = jq.quantize_in_order(plan, function, params, BATCHES, parts=3)
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))


def test_a_plan_that_draws_has_its_key():
    params, key = {"b": PARAMS["b"]}, jax.random.key(3)
    plan = jq.slq(params, rounds=(1,), rules=RULES[:1], init="quantile", partition="random")
    new, state = jq.quantize_in_order(
        plan, lambda params, x: x @ params["b"], params, BATCHES, parts=1, key=key
    )
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected a plan of one round"):
        several = jq.slq(PARAMS, rounds=(1, 3), rules=RULES)
        jq.quantize_in_order(several, function, PARAMS, BATCHES, parts=2)
    for parts in (0, 3):
        with pytest.raises(ValueError, match=f"expected parts to be 1 to 2, got {parts}"):
            jq.quantize_in_order(plan_of(), function, PARAMS, BATCHES, parts=parts)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        jq.quantize_in_order(plan_of(), function, PARAMS, [], parts=2)


@pytest.mark.default_promotion
def test_models_of_nnx_are_given_by_their_state():
    model, x = nnx.Linear(12, 8, rngs=nnx.Rngs(0)), BATCHES[0]
    graph, start = nnx.split(model)
    plan = jq.slq(start, rounds=(1,), rules=[jq.LayerRule("kernel", k=3)])

    def forward(state, x):
        return nnx.merge(graph, state)(x)

    new, state = jq.quantize_in_order(plan, forward, start, [x], parts=1)
    assert len(np.unique(nnx.to_pure_dict(new)["kernel"])) == 3
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))
    with pytest.raises(ValueError, match="state of a model that is split"):
        jq.quantize_in_order(plan, lambda model, x: model(x), model, [x], parts=1)
