"""A whole plan inside an optimizer: the loop does not change, and frozen means frozen."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import contrib

import jaxquant as jq
from tests.cases import mostly_slow

SHAPES = {"a": {"kernel": (12, 8), "bias": (8,)}, "b": {"kernel": (12, 8)}}  # one program for both
QUICK = {"init": "quantile"}  # to compile
ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)
PLAN = jq.mlq(ABSTRACT, groups=2, **QUICK)  # four rounds of ternary
STEPS = (3, 1, 4, 10)
TOTAL = sum(STEPS)
STARTS = [0, 3, 4, 8]


def tree(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), ABSTRACT)


def loss(params, target):
    errors = jax.tree.map(
        lambda p, t: jnp.sum(jnp.square((p - t).astype(jnp.float32))), params, target
    )
    return jax.tree.reduce(jnp.add, errors)


def make_step(tx, *, gradient_dtype=None, traces=None):
    @jax.jit
    def step(params, state, target):
        if traces is not None:
            traces.append(None)
        grads = jax.grad(loss)(params, target)
        if gradient_dtype:
            grads = jax.tree.map(lambda g: g.astype(gradient_dtype), grads)
        updates, state = tx.update(grads, state, params)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, *, dtype="float32", steps=TOTAL, **options):
    """Return the parameters and states after each step, those at the start first."""
    step, params = make_step(tx, **options), tree(0, dtype)
    history = [(params, tx.init(params))]
    for i in range(steps):
        history.append(step(*history[-1], tree(1 + i, dtype)))
    return history


def assert_quantized(history, landed):
    """Check the last parameters, and that nothing frozen moved in the steps from `landed` on."""
    params, state = history[-1]
    quant = jq.quant_state(state)
    assert int(quant.round) == PLAN.num_rounds
    assert all(map(bool, jax.tree.leaves(jq.is_on_codebook(params, quant))))
    for name in ("a", "b"):
        assert len(np.unique(np.asarray(params[name]["kernel"], np.float64))) <= 3
        assert bool(jnp.all(quant.frozen[name]["kernel"]))
    kernels = [{n: p[n]["kernel"] for n in p} for p, _ in history[landed:]]
    for kernel in kernels:
        chex.assert_trees_all_equal(kernel, kernels[-1])
    before, after = (p["a"]["bias"] for p, _ in (history[-3], history[-1]))
    assert bool(jnp.any(before != after)), "free weights have to move on"


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "sgd": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=4),
    "muon": lambda: contrib.muon(0.05),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.05), 0.05),
}
incremental = functools.partial(jq.incremental, plan=PLAN, steps_per_round=STEPS)


@pytest.mark.default_promotion
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw", "schedule_free"))
def test_every_weight_ends_on_its_codebook_and_stays(name, dtype):
    assert_quantized(run(incremental(OPTIMIZERS[name]()), dtype=dtype), STARTS[-1] + 4)


def inject(make):
    @optax.inject_hyperparams
    def factory(learning_rate):
        return incremental(make(learning_rate))

    return factory(learning_rate=0.05)


@pytest.mark.default_promotion
@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(
            optax.apply_if_finite(incremental(optax.adamw(0.05)), max_consecutive_errors=3),
            marks=pytest.mark.slow,
        ),
        inject(optax.adamw),
        pytest.param(incremental(optax.MultiSteps(optax.adamw(0.05), 2)), marks=pytest.mark.slow),
        incremental(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05))),
    ],
    ids=["apply_if_finite", "inject_hyperparams", "multi_steps_inside", "clipped"],
)
def test_every_weight_ends_on_its_codebook_inside_wrappers(tx, dtype):
    history = run(tx, dtype=dtype)
    assert_quantized(history, STARTS[-1] + 4)


@pytest.mark.default_promotion
def test_multi_steps_outside_counts_the_updates_that_it_makes():
    steps = optax.MultiSteps(incremental(optax.adamw(0.05)), 2)
    tx = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    history = run(tx, steps=2 * TOTAL)
    rounds = [int(jq.quant_state(state).round) for _, state in history]
    assert [rounds.index(r) for r in (1, 2, 3, 4)] == [2 * (start + 1) for start in STARTS]
    assert_quantized(history, 2 * (STARTS[-1] + 4))


def test_updates_narrower_than_the_weights_land_too():
    history = run(incremental(optax.sgd(0.01, momentum=0.9)), gradient_dtype="bfloat16")
    assert_quantized(history, STARTS[-1] + 6)
    with pytest.raises(ValueError, match="of float32 or bfloat16 at 'a/kernel', got float16"):
        run(incremental(optax.sgd(0.01)), gradient_dtype="float16", steps=1)


def test_it_is_the_loop_of_rounds_and_frozen_updates():
    inner = optax.sgd(0.01, momentum=0.9)
    history = run(incremental(inner))
    tx = optax.chain(inner, jq.freeze_quantized())
    params = tree(0)
    quant, state = jq.init(PLAN, params), tx.init(params)
    quantize = jax.jit(jq.quantize_round, static_argnums=0)
    for i in range(TOTAL):
        if i in STARTS:
            params, quant, _ = quantize(PLAN, params, quant)
        else:
            grads = jax.grad(loss)(params, tree(1 + i))
            updates, state = tx.update(grads, state, params, frozen=quant.frozen)
            params = optax.apply_updates(params, updates)
        got, got_state = history[i + 1]
        got_quant = jq.quant_state(got_state)
        chex.assert_trees_all_equal(got_quant.frozen, quant.frozen)
        assert int(got_quant.round) == int(quant.round)
        chex.assert_trees_all_close(got, params, rtol=1e-5, atol=1e-6)


# What is frozen, and what is not finite -----------------------------------------------------------


@pytest.mark.default_promotion
@pytest.mark.parametrize("frozen", mostly_slow([100.0, np.nan], 100.0))
def test_global_norm_clipping_does_not_count_what_is_frozen(frozen):
    """A round freezes a third of the weights; the others' gradients have a norm below 1."""
    params = {"w": jnp.linspace(-1.0, 1.0, 60).reshape(6, 10)}
    tx = jq.incremental(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
        jq.slq(params, bits=2, rounds=(1, 3), **QUICK),
        9,
    )
    update = jax.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    mask = state.quant.frozen["w"]
    updates, _ = update({"w": jnp.where(mask, frozen, 0.01)}, state, params)
    assert 0 < jnp.sum(mask) < 60
    np.testing.assert_allclose(updates["w"][~mask], -0.01, rtol=1e-6)
    np.testing.assert_allclose(updates["w"][mask], 0.0, atol=1e-6)  # landing


@pytest.mark.default_promotion
def test_a_restart_begins_from_free_weights():
    params = {"w": jnp.linspace(-1.0, 1.0, 60).reshape(6, 10)}
    tx = jq.incremental(
        contrib.dog(1.0, ("distance", 0.001)),
        jq.slq(params, bits=2, rounds=(1, 3), **QUICK),
        9,
        restart=True,
    )
    update = jax.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    updates, state = update(params, state, params)
    mask = state.quant.frozen["w"]
    assert float(jnp.max(jnp.abs(updates["w"][~mask]))) < 0.002  # and not as far as frozen weights


@pytest.mark.default_promotion
def test_the_state_tells_which_layers_a_round_skipped():
    tx = incremental(optax.sgd(0.01))
    update = jax.jit(tx.update)
    params = tree(0)
    state = tx.init(params)
    assert not any(map(np.any, jax.tree.leaves(optax.tree.get(state, "skipped"))))
    broken = jax.tree.map(jnp.array, params)
    broken["a"]["kernel"] = params["a"]["kernel"].at[0, 0].set(jnp.inf)
    updates, state = update(tree(1), state, broken)  # the round of a's boundaries
    np.testing.assert_array_equal(updates["a"]["kernel"], 0.0)  # left as it was, the infinity too
    skipped = optax.tree.get(state, "skipped")
    assert skipped["a"]["kernel"] and not skipped["b"]["kernel"] and not skipped["a"]["bias"]
    assert jax.tree.structure(skipped) == jax.tree.structure(params)
    params = optax.apply_updates(broken, updates)
    for i in range(1, STARTS[-1] + 1):
        if i == STARTS[2] - 1:
            assert optax.tree.get(state, "skipped")["a"]["kernel"]  # it has to catch up
            params["a"]["kernel"] = tree(0)["a"]["kernel"]  # repaired
        updates, state = update(tree(1 + i), state, params)
        params = optax.apply_updates(params, updates)
    assert not optax.tree.get(state, "skipped")["a"]["kernel"]
    assert bool(jnp.all(state.quant.frozen["a"]["kernel"]))


@pytest.mark.default_promotion
def test_a_stack_tells_it_of_each_layer_and_keeps_it_after_the_last_round():
    params = {"w": jnp.linspace(-1.0, 1.0, 120).reshape(2, 6, 10)}
    plan = jq.mlq(params, groups=1, rules=[jq.LayerRule("w", axis=0)], **QUICK)
    tx = jq.incremental(optax.apply_if_finite(optax.sgd(0.1), 3), plan, 1)
    params["w"] = params["w"].at[1, 0, 0].set(jnp.nan)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert state.skipped["w"].tolist() == [False, True]
    assert jnp.all(state.quant.frozen["w"][0]) and not jnp.any(state.quant.frozen["w"][1])


# Inside of optax ----------------------------------------------------------------------------------


def test_map_params_finds_the_masks_and_moments():
    tx = incremental(optax.adam(0.1))
    state = tx.init(tree(0))
    specs = jax.tree.map(lambda x: f"like {x.shape}", tree(0))
    got = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "other"
    )
    assert got.quant.frozen == specs == optax.tree.get(got, "mu")
    assert got.quant.codebooks == got.quant.round == got.step == got.skipped == "other"
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@pytest.mark.default_promotion
@pytest.mark.parametrize("name", ["partition", "masked"])
def test_a_part_of_the_parameters_fits_if_what_it_lacks_is_left_alone(name):
    kernels = jax.tree.map(lambda x: x.ndim > 1, ABSTRACT)
    inner = incremental(optax.adamw(0.05))
    if name == "masked":
        tx = optax.chain(
            optax.masked(inner, kernels),
            optax.masked(optax.sgd(0.01), jax.tree.map(lambda x: not x, kernels)),
        )
    else:
        labels = jax.tree.map(lambda x: "kernels" if x else "rest", kernels)
        tx = optax.partition({"kernels": inner, "rest": optax.sgd(0.01)}, labels)
    history = run(tx)
    params, state = history[-1]
    for name in ("a", "b"):
        assert len(np.unique(params[name]["kernel"])) == 3
    assert int(jq.quant_state(state).round) == PLAN.num_rounds
    whole = jq.quant_state(state, params)
    assert jax.tree.structure(whole.frozen) == jax.tree.structure(params)
    packed = jq.pack(params, whole)
    chex.assert_trees_all_equal(jq.unpack(packed), params)
    assert {layer.path for layer in jq.report(params, whole).quantized} == {"a/kernel", "b/kernel"}
    with pytest.raises(ValueError, match="params: expected a leaf b/kernel, got none"):
        jq.quant_state(state, {"a": params["a"]})
    assert bool(jnp.any(history[-2][0]["a"]["bias"] != params["a"]["bias"]))
    with pytest.raises(ValueError, match="params: expected the leaf a/kernel, got b/kernel"):
        incremental(optax.sgd(0.1)).init({"b": tree(0)["b"]})


def test_the_whole_run_is_traced_once():
    traces = []
    run(incremental(optax.adamw(0.05)), traces=traces)
    assert len(traces) == 1


@pytest.mark.parametrize("restart", [False, True])
def test_restart_starts_the_inner_schedule_anew_in_each_round(restart):
    rates = optax.linear_schedule(1.0, 0.0, 100)
    history = run(incremental(optax.sgd(rates), restart=restart))
    counts = [int(optax.tree.get(state, "count")) for _, state in history]
    if restart:
        expected = [0] + [i for n in STEPS for i in range(n)]
    else:
        expected = [0, *np.cumsum([i not in STARTS for i in range(TOTAL)])]
    assert counts == expected


def test_a_number_of_steps_serves_for_all_rounds():
    tx = jq.incremental(optax.sgd(0.01), PLAN, 2)
    rounds = [int(state.quant.round) for _, state in run(tx, steps=9)]
    assert rounds == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]


def test_a_run_goes_on_from_its_state_bit_for_bit():
    tx = incremental(optax.adamw(0.05))
    history = run(tx)
    for cut in (4, 9):
        params, state = jax.tree.map(np.asarray, history[cut])  # as from a checkpoint
        step = make_step(tx)
        for i in range(cut, TOTAL):
            params, state = step(params, state, tree(1 + i))
        chex.assert_trees_all_equal((params, state), history[-1])


SHORTER = jq.mlq(ABSTRACT, groups=2, order="boundaries_together", **QUICK)  # three rounds
SHARES = {
    "long": jq.inq(ABSTRACT, bits=2, shares=(0.2, 0.4, 1.0)),
    "short": jq.inq(ABSTRACT, bits=2, shares=(1.0,)),
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(PLAN, SHORTER, id="mlq", marks=pytest.mark.slow),
        pytest.param(SHARES["long"], SHARES["short"], id="inq"),
    ],
)
def test_a_run_that_goes_on_by_a_plan_of_fewer_rounds_is_finished(before, after):
    history = run(jq.incremental(optax.adam(0.01), before, 4), steps=4 * (before.num_rounds - 1))
    params, state = history[-1]
    assert int(state.quant.round) >= after.num_rounds
    step = make_step(jq.incremental(optax.adam(0.01), after, 2))
    for i in range(6):  # long after this plan's own last round
        params, state = step(params, state, tree(50 + i))
    assert bool(jnp.all(state.quant.frozen["a"]["kernel"]))
    assert all(map(bool, jax.tree.leaves(jq.is_on_codebook(params, state.quant))))
    assert int(state.quant.round) == after.num_rounds
    for _ in range(2):
        new, state = step(params, state, tree(9))
        chex.assert_trees_all_equal(new["b"], params["b"])
        params = new


@pytest.mark.slow
def test_scan_over_steps_and_vmap_over_networks_give_the_same():
    tx = incremental(optax.sgd(0.01, momentum=0.9))
    targets = jax.tree.map(lambda *x: jnp.stack(x), *(tree(1 + i) for i in range(TOTAL)))

    def whole(params):
        def body(carry, target):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, target), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), targets)[0]

    expected, _ = run(tx)[-1]
    both = jax.tree.map(lambda *x: jnp.stack(x), tree(0), tree(50))
    params, state = jax.jit(jax.vmap(whole))(both)
    first = jax.tree.map(lambda x: x[0], params)
    chex.assert_trees_all_close(first, expected, rtol=1e-4, atol=1e-5)
    assert bool(
        jnp.all(jax.vmap(lambda p, s: jq.is_on_codebook(p, s.quant)["b"]["kernel"])(params, state))
    )


@pytest.mark.slow
def test_sensitivity_weighs_the_rounds():
    tx = incremental(optax.sgd(0.0))
    params, sensitivity = tree(0), jax.tree.map(jnp.square, tree(7))
    update = jax.jit(tx.update)
    _, state = update(tree(1), tx.init(params), params, sensitivity=sensitivity)
    quantize = jax.jit(jq.quantize_round, static_argnums=0)
    _, expected, _ = quantize(PLAN, params, jq.init(PLAN, params), sensitivity=sensitivity)
    chex.assert_trees_all_equal(state.quant.frozen, expected.frozen)
    chex.assert_trees_all_equal(state.quant.codebooks, expected.codebooks)
    _, plain = update(tree(1), tx.init(params), params)
    found, weighted = (q.codebooks["a"]["kernel"] for q in (plain.quant, expected))
    assert not bool(jnp.allclose(found, weighted))


def test_random_partitions_differ_from_key_to_key():
    plan = jq.mlq(ABSTRACT, groups=1, partition="random", **QUICK)

    @jax.jit
    def freeze(key, updates, params):
        tx = jq.incremental(optax.sgd(0.1), plan, 2, key=key)
        _, state = tx.update(updates, tx.init(params), params)
        return state.quant.frozen["a"]["kernel"]

    masks = [np.asarray(freeze(jax.random.key(seed), tree(1), tree(0))) for seed in range(4)]
    assert any((mask != masks[0]).any() for mask in masks)
    with pytest.raises(ValueError, match="expected a key for partition='random'"):
        jq.incremental(optax.sgd(0.1), plan, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_masks_and_moments_are_sharded_as_the_weights(axis_type):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    spec = {"a": {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}}
    spec["b"] = {"kernel": PartitionSpec(None, "x")}
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
    tx = incremental(optax.adamw(0.05))
    with jax.set_mesh(mesh):
        params = jax.device_put(tree(0), shardings)
        state, step = tx.init(params), make_step(tx)
        for i in range(TOTAL):
            params, state = step(params, state, jax.device_put(tree(1 + i), shardings))
            for made in (params, state.quant.frozen, optax.tree.get(state, "mu")):
                for name in ("a", "b"):
                    kernel, wanted = made[name]["kernel"], shardings[name]["kernel"]
                    assert kernel.sharding.is_equivalent_to(wanted, 2)
    expected, _ = run(tx)[-1]
    chex.assert_trees_all_close(jax.device_get(params), expected, rtol=1e-4, atol=1e-5)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [0, -1, (1, 2, 3), (1, 2, 3, 0), (1, 2, 3, 4.5), 2.5, True, (1, 2, 3, True), "1234", None],
)
def test_steps_that_no_plan_could_take_are_refused(steps):
    with pytest.raises(ValueError, match="expected steps_per_round to be a number from 1, or 4"):
        jq.incremental(optax.sgd(0.1), PLAN, steps)


@pytest.mark.parametrize(
    "steps", [np.int64(3), np.array(3), np.full(4, 3), [np.int32(3)] * 4, jnp.int32(3)]
)
def test_steps_may_be_integers_of_any_type(steps):
    jq.incremental(optax.sgd(0.1), PLAN, steps)


def test_a_state_that_lost_its_types_is_refused():
    tx, params = incremental(optax.sgd(0.1)), tree(0)
    state = tx.init(params)
    restored = [
        {"step": state.step, "quant": state.quant._asdict(), "inner": [], "skipped": {}},
        list(state),
        state._replace(quant=list(state.quant)),
    ]
    for lost in restored:
        with pytest.raises(ValueError, match=r"Restore into the structure of tx\.init\(params\)"):
            tx.update(params, lost, params)
        with pytest.raises(ValueError, match=r"Restore into the structure of tx\.init\(params\)"):
            jq.quant_state((lost,))


def test_updates_and_states_of_other_leaves_are_refused_by_name():
    tx, params = incremental(optax.sgd(0.1)), tree(0)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"updates to have .* got no leaf 'b/kernel'"):
        tx.update({"a": params["a"]}, state, params)
    with pytest.raises(ValueError, match=r"params to have .* got a leaf 'c'"):
        tx.update({**params, "c": jnp.ones(2)}, state, {**params, "c": jnp.ones(2)})


def test_missing_and_foreign_parameters_are_refused_by_name():
    tx = incremental(optax.sgd(0.1))
    state = tx.init(tree(0))
    with pytest.raises(ValueError, match=r"expected tx\.update\(updates, state, params\)"):
        tx.update(tree(1), state)
    with pytest.raises(ValueError, match="params: expected the leaf a/kernel, got a/weight"):
        tx.init({**tree(0), "a": {"bias": jnp.ones(8), "weight": jnp.ones((12, 8))}})
    bad = tree(0)
    bad["b"]["kernel"] = bad["b"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="b/kernel"):
        tx.init(bad)


def test_quant_state_is_found_once_or_refused():
    params = tree(0)
    tx = optax.chain(optax.identity(), incremental(optax.sgd(0.1)))
    assert int(jq.quant_state(tx.init(params)).round) == 0
    with pytest.raises(ValueError, match=r"one jq.incremental, got 0 of them \(restored without"):
        jq.quant_state(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="got 2 of them"):
        jq.quant_state((tx.init(params), tx.init(params)))
