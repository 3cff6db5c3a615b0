"""Frozen weights stay where they are, under every optimizer that optax offers."""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from optax import contrib

from jaxquant.rounds.transforms import freeze_quantized
from tests.cases import mostly_further, mostly_slow

WARM_STEPS = 2  # with nothing frozen, so that every optimizer has momentum to spend
FROZEN_STEPS = 3

FROZEN = {
    "dense": {"kernel": np.arange(24).reshape(6, 4) % 5 < 2, "bias": np.False_},
    "scale": np.array([True, False, True, False]),
}
NOTHING_FROZEN = jax.tree.map(np.zeros_like, FROZEN)


def random_tree(seed, dtype=jnp.float32):
    """Numbers of magnitude 1 to 2 and of both signs."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(  # noqa: E731
        rng.choice([-1, 1], shape) * rng.uniform(1, 2, shape), dtype
    )
    return {"dense": {"kernel": draw(6, 4), "bias": draw(4)}, "scale": draw(4)}


# --- Which optimizers there are -------------------------------------------------------------------

_per_example = optax.stateless_with_tree_map(lambda g, _: jnp.stack([g, g]))

# Factories that wrap another optimizer, or take gradients of another form.
WRAPPERS = {
    "differentially_private_aggregate": lambda: optax.chain(
        _per_example, contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.sgd(0.1)
    ),
    "dpsgd": lambda: optax.chain(
        _per_example, contrib.dpsgd(0.1, 1.0, noise_multiplier=0.1, seed=0, momentum=0.9)
    ),
    "mechanize": lambda weight_decay=0.0: contrib.mechanize(
        optax.sgd(0.1), weight_decay=weight_decay, s_init=0.1
    ),
    "normalize": lambda: optax.chain(contrib.normalize(), optax.sgd(0.1, momentum=0.9)),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(0.1), contrib.reduce_on_plateau()),
    "sam": lambda: optax.GradientTransformation(  # its update refuses extra arguments
        *contrib.sam(optax.sgd(0.1, momentum=0.9), optax.chain(contrib.normalize(), optax.sgd(0.1)))
    ),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
}
NOT_OPTIMIZERS = {
    "hutchinson_estimator_diag_hessian": "an estimate that sophia uses, not an update",
    "schedule_free_eval_params": "a function of the parameters, not a transformation",
}
# What a factory cannot do without, and larger first steps for those that start with tiny ones.
ARGUMENTS = {
    "adadelta": {"learning_rate": 10.0},
    "dadapt_adamw": {"estim_lr0": 0.1},
    "dog": {"learning_rate": 1.0, "init_step": ("distance", 1.0)},
    "dowg": {"learning_rate": 1.0, "init_estim_sq_dist": 1.0},
    "galore": {"rank": 2},
    "lars": {"trust_coefficient": 0.1},
    "noisy_sgd": {"key": 0},
    "prodigy": {"estim_lr0": 0.1},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9},
}
NO_LEARNING_RATE = ("cocob", "polyak_sgd")


def public_optimizers():
    """Every public factory of optax's aliases and of optax.contrib, by name.

    One that a later optax adds is run with a learning rate alone; if that cannot work, its case
    fails until it has a place in one of the tables above.
    """

    def defined_in(factory):
        return inspect.unwrap(getattr(factory, "func", factory)).__module__

    found = {}
    for name in dir(optax):
        factory = getattr(optax, name)
        is_function = inspect.isfunction(factory) or isinstance(factory, functools.partial)
        if is_function and defined_in(factory) == optax.sgd.__module__:
            found[name] = factory
    for name, factory in inspect.getmembers(contrib, inspect.isfunction):
        is_building_block = name.startswith("scale_by_")  # of the optimizer of that name
        if not is_building_block and name not in NOT_OPTIMIZERS:
            found[name] = factory
    return found


OPTIMIZERS = public_optimizers()
SOME = (
    "adafactor",
    "adamw",
    "lion",
    "muon",
    "sgd",
)  # where one test runs all of them, others these


def weight_decay_argument(name):
    factory = WRAPPERS.get(name, OPTIMIZERS[name])
    names = inspect.signature(factory).parameters
    return next((n for n in ("weight_decay", "weight_decay_rate") if n in names), None)


def arguments(name):
    if name in WRAPPERS:
        return {}
    rate = {} if name in NO_LEARNING_RATE else {"learning_rate": 0.1}
    return rate | ARGUMENTS.get(name, {})


def make(name, **kwargs):
    return WRAPPERS.get(name, OPTIMIZERS[name])(**arguments(name), **kwargs)


# --- How a freeze is put around them --------------------------------------------------------------


def clipped_and_decayed(tx):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.clip(0.5),
        optax.add_decayed_weights(0.1),
        tx,
        optax.add_decayed_weights(-0.1),
        freeze_quantized(),
    )
    return optax.apply_if_finite(tx, max_consecutive_errors=3)


def multi_steps(tx):
    # Not `.gradient_transformation()`: it hands no extra arguments on, and so no `frozen`.
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


PLACES = {
    "clipped_and_decayed_if_finite": clipped_and_decayed,
    "inside_multi_steps": lambda tx: multi_steps(optax.chain(tx, freeze_quantized())),
    "outside_multi_steps": lambda tx: optax.chain(multi_steps(tx), freeze_quantized()),
    "around": freeze_quantized,
}


def train(tx, dtype=jnp.float32, frozen=FROZEN, gradient_of_frozen=None):
    """Warm up, freeze, train on; return the parameters at the freeze and at the end."""
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params, target, *, frozen=None, obj_fn=None):
        del frozen, obj_fn  # lbfgs insists that value_fn names every extra argument
        errors = jax.tree.map(
            lambda p, t: jnp.sum((p - t).astype(jnp.float32) ** 2), params, target
        )
        return jax.tree.reduce(jnp.add, errors) / 2

    @jax.jit
    def step(params, state, frozen, target):
        value_fn = functools.partial(loss_fn, target=target)
        value, grads = jax.value_and_grad(value_fn)(params)
        if gradient_of_frozen is not None:
            grads = jax.tree.map(
                lambda f, g: jnp.where(f, jnp.asarray(gradient_of_frozen, g.dtype), g),
                frozen,
                grads,
            )
        # Each optimizer takes those of these that it knows.
        extra = {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn}
        updates, state = tx.update(grads, state, params, frozen=frozen, **extra)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        return optax.apply_updates(params, updates), state

    params = random_tree(0, dtype)
    state = tx.init(params)
    for i in range(WARM_STEPS):
        params, state = step(params, state, NOTHING_FROZEN, random_tree(10 + i, dtype))
    before = params
    for i in range(FROZEN_STEPS):
        params, state = step(params, state, frozen, random_tree(20 + i, dtype))
    return before, params


def assert_only_free_entries_moved(before, after, frozen=FROZEN):
    def check(path, mask, old, new):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        old, new = np.asarray(old, np.float32), np.asarray(new, np.float32)
        mask = np.broadcast_to(mask, old.shape)
        np.testing.assert_array_equal(new[mask], old[mask], err_msg=f"frozen entries of {name}")
        assert np.isfinite(new).all(), name
        assert (new[~mask] != old[~mask]).any(), f"free entries of {name} did not move"

    jax.tree_util.tree_map_with_path(check, frozen, before, after)


def runs_optax(test):
    for mark in (
        pytest.mark.default_promotion,
        pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning"),
        pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning'),  # in dpsgd
    ):
        test = mark(test)
    return test


with_any_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@runs_optax
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", mostly_slow([jnp.float32, jnp.bfloat16], jnp.float32))
def test_frozen_entries_survive(name, dtype):
    tx = optax.chain(make(name), freeze_quantized())
    assert_only_free_entries_moved(*train(tx, dtype))


@runs_optax
@pytest.mark.parametrize(
    "name", mostly_further([n for n in OPTIMIZERS if weight_decay_argument(n)], *SOME)
)
@with_any_dtype
def test_frozen_entries_survive_weight_decay(name, dtype):
    tx = optax.chain(make(name, **{weight_decay_argument(name): 0.1}), freeze_quantized())
    assert_only_free_entries_moved(*train(tx, dtype))


@runs_optax
@pytest.mark.parametrize(
    ("name", "place", "dtype"),
    mostly_further(
        mostly_slow(
            itertools.product(OPTIMIZERS, PLACES, (jnp.float32, jnp.bfloat16)),
            *((name, "around", jnp.bfloat16) for name in OPTIMIZERS),
            *itertools.product(("adafactor", "adamw", "lion", "sgd"), PLACES, (jnp.float32,)),
        ),
        *((name, "around", jnp.bfloat16) for name in SOME),
        *(("adamw", place, jnp.float32) for place in PLACES),
    ),
)
def test_frozen_entries_survive_in_any_place(name, place, dtype):
    assert_only_free_entries_moved(*train(PLACES[place](make(name)), dtype))


@runs_optax
@pytest.mark.parametrize(
    "name", mostly_further([n for n in OPTIMIZERS if "learning_rate" in arguments(n)], *SOME)
)
def test_frozen_entries_survive_injected_hyperparameters(name):
    static = [n for n in inspect.signature(OPTIMIZERS[name]).parameters if n != "learning_rate"]
    tx = optax.inject_hyperparams(OPTIMIZERS[name], static_args=static)(**arguments(name))
    assert_only_free_entries_moved(*train(optax.chain(tx, freeze_quantized())))


@runs_optax
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_masking_gradients_instead_would_move_frozen_entries(name):
    """The check above can fail: momentum and weight decay move what is masked too early."""
    before, after = train(optax.chain(freeze_quantized(), make(name)))
    with pytest.raises(AssertionError, match="frozen entries of"):
        assert_only_free_entries_moved(before, after)


@runs_optax
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("gradient", [np.nan, np.inf, -np.inf])
def test_gradients_of_frozen_entries_do_not_matter(name, gradient):
    tx = optax.chain(make(name), freeze_quantized())
    assert_only_free_entries_moved(*train(tx, gradient_of_frozen=gradient))


@runs_optax
def test_lookahead_freezes_fast_and_slow_parameters_by_a_pair_of_masks():
    tx = optax.chain(
        optax.lookahead(optax.sgd(0.1, momentum=0.9), sync_period=2, slow_step_size=0.5),
        freeze_quantized(),
    )
    params = optax.LookaheadParams.init_synced(random_tree(0))
    state, start = tx.init(params), params.fast
    for i in range(4):
        updates, state = tx.update(
            random_tree(i), state, params, frozen=optax.LookaheadParams(FROZEN, FROZEN)
        )
        params = optax.apply_updates(params, updates)
    assert_only_free_entries_moved(start, params.fast)
    assert_only_free_entries_moved(start, params.slow)


@runs_optax
def test_schedule_free_freezes_trained_parameters_and_evaluation_needs_the_mask_again():
    tx = optax.chain(contrib.schedule_free(optax.sgd(0.1), 0.1), freeze_quantized())
    params = random_tree(0)
    state = tx.init(params)
    for i in range(WARM_STEPS + FROZEN_STEPS):
        if i == WARM_STEPS:
            frozen_at = params
        frozen = FROZEN if i >= WARM_STEPS else NOTHING_FROZEN
        updates, state = tx.update(random_tree(i), state, params, frozen=frozen)
        params = optax.apply_updates(params, updates)
    assert_only_free_entries_moved(frozen_at, params)

    averaged = contrib.schedule_free_eval_params(state[0], params)
    with pytest.raises(AssertionError, match="frozen entries of"):
        assert_only_free_entries_moved(frozen_at, averaged)
    assert_only_free_entries_moved(frozen_at, jax.tree.map(jnp.where, FROZEN, params, averaged))


# --- Around an optimizer: what is frozen takes no part in its arithmetic --------------------------

LEAF = {"w": jnp.array([3.0, -0.4, 0.3, 5.0])}
MASK = {"w": jnp.array([True, False, False, True])}
GRADIENT = {"w": jnp.array([100.0, 0.03, -0.04, jnp.nan])}


def free_update(tx, gradient=GRADIENT, **extra):
    """The first update of the two free weights of LEAF."""
    tx = freeze_quantized(tx)
    update, _ = tx.update(gradient, tx.init(LEAF), LEAF, frozen=MASK, **extra)
    np.testing.assert_array_equal(update["w"][jnp.array([0, 3])], 0.0)
    return np.asarray(update["w"][1:3])


ALONE = {"w": LEAF["w"][1:3]}  # as if there were only the free weights


@runs_optax
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)),
        optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1.0)),
        optax.chain(
            optax.add_decayed_weights(0.5), optax.clip_by_global_norm(0.01), optax.sgd(1.0)
        ),
        optax.lamb(0.1, weight_decay=0.3),
        optax.lars(0.1, weight_decay=0.3),
        optax.fromage(0.1),
        optax.noisy_sgd(0.1, eta=0.0, key=0),
    ],
    ids=["clip", "adaptive", "decay_then_clip", "lamb", "lars", "fromage", "noisy_sgd"],
)
def test_free_weights_are_updated_as_if_there_were_no_others(tx):
    gradient = {"w": GRADIENT["w"][1:3]}
    expected, _ = tx.update(gradient, tx.init(ALONE), ALONE)
    np.testing.assert_allclose(free_update(tx), expected["w"], rtol=1e-5)


@runs_optax
def test_norms_are_those_of_free_weights_by_hand():
    # The gradient's norm is 0.05, that of the free weights 0.5.
    clipped = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    np.testing.assert_allclose(free_update(clipped), [-0.006, 0.008], rtol=1e-5)
    trusted = optax.chain(optax.scale_by_trust_ratio(), optax.scale(-1.0))
    np.testing.assert_allclose(free_update(trusted), [-0.3, 0.4], rtol=1e-5)
    # A mean over a leaf divides by all its entries: rms 0.5 / 2, not 0.5 / sqrt(2).
    scaled = optax.chain(optax.scale_by_param_block_rms(), optax.scale(-1.0))
    np.testing.assert_allclose(free_update(scaled), [-0.0075, 0.01], rtol=1e-5)


@runs_optax
def test_adafactor_moves_a_quarter_of_a_matrix_as_it_does_the_whole():
    """By its root mean square times the learning rate: rows, columns and scale shrink alike."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (16, 8))
    params, gradient = jnp.full((16, 8), 0.5), jnp.asarray(signs, jnp.float32)
    frozen = jnp.add.outer(jnp.arange(16), jnp.arange(8)) % 4 > 0
    tx = freeze_quantized(optax.adafactor(0.1, min_dim_size_to_factor=4))
    update, _ = tx.update(gradient, tx.init(params), params, frozen=frozen)
    np.testing.assert_allclose(update, jnp.where(frozen, 0, -0.05 * gradient), rtol=1e-4)


@runs_optax
def test_what_muon_makes_orthogonal_is_free():
    gradient, tx = random_tree(0)["dense"]["kernel"], contrib.muon(0.1)
    frozen = jnp.zeros((6, 4), bool).at[:2].set(True)
    around = freeze_quantized(tx)
    update, _ = around.update(gradient, around.init(gradient), gradient, frozen=frozen)
    expected, _ = tx.update(gradient[2:], tx.init(gradient[2:]), gradient[2:])
    assert not update[:2].any()
    np.testing.assert_allclose(update[2:], expected, rtol=1e-3)


@runs_optax
def test_functions_of_the_parameters_see_them_whole_and_their_gradients_are_hidden():
    seen = []

    def look(updates, state, params, *, value, grad, value_fn, grad_fn):
        hidden = jnp.where(MASK["w"], 0.0, LEAF["w"])
        np.testing.assert_array_equal(params["w"], hidden)
        np.testing.assert_array_equal(grad["w"], jnp.where(MASK["w"], 0.0, GRADIENT["w"]))
        np.testing.assert_array_equal(jax.grad(value_fn)(params)["w"], 2 * hidden)
        np.testing.assert_array_equal(grad_fn(params, 1)["w"], 2 * hidden)
        seen.append((value, value_fn(params)))
        return updates, state

    def value_fn(params):
        return jnp.sum(jnp.square(params["w"]))

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), look)
    free_update(
        tx,
        value=jnp.float32(7.0),
        grad=GRADIENT,
        value_fn=value_fn,
        grad_fn=lambda params, step: jax.grad(value_fn)(params),
    )
    np.testing.assert_allclose(seen, [(7.0, 34.25)])


@runs_optax
def test_a_chain_with_the_mask_on_both_sides_hides_gradients_alone():
    tx = optax.chain(
        freeze_quantized(), optax.clip_by_global_norm(0.01), optax.sgd(1.0), freeze_quantized()
    )
    update, _ = tx.update(GRADIENT, tx.init(LEAF), LEAF, frozen=MASK)
    np.testing.assert_allclose(update["w"], [0.0, -0.006, 0.008, 0.0], rtol=1e-5)


# --- The transformation by itself -----------------------------------------------------------------


def freeze(updates, frozen):
    tx = freeze_quantized()
    return tx.update(updates, tx.init(updates), frozen=frozen)[0]


def test_state_is_empty_and_kept():
    tx = freeze_quantized()
    state = tx.init({"w": jnp.ones(2)})
    assert state == optax.EmptyState()
    assert tx.update(jnp.ones(2), state, frozen=False)[1] is state


def test_scalar_mask_covers_its_leaf():
    updates = {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones(())}
    got = freeze(updates, {"a": True, "b": np.False_, "c": jnp.array(True)})
    chex.assert_trees_all_equal(got, {"a": jnp.zeros((2, 3)), "b": jnp.ones(2), "c": jnp.zeros(())})


@given(
    st.sampled_from([np.float32, np.float16, jnp.bfloat16, np.complex64]),
    st.sampled_from([(), (3,), (2, 3)]).flatmap(
        lambda shape: st.tuples(
            hnp.arrays(np.float32, shape, elements=st.floats(width=32)),
            hnp.arrays(np.bool_, shape),
        )
    ),
)
def test_zero_where_frozen_and_untouched_elsewhere(dtype, drawn):
    update, frozen = jnp.asarray(drawn[0]).astype(dtype), drawn[1]
    got = freeze({"w": update}, {"w": frozen})["w"]
    assert got.dtype == update.dtype
    expected = np.where(frozen, np.zeros_like(update), update)
    assert np.asarray(got).tobytes() == expected.tobytes()  # NaN payloads and signs of zero too
    assert np.asarray(freeze(got, frozen)).tobytes() == expected.tobytes()


def test_mask_may_change_without_a_new_trace():
    traces = []

    @jax.jit
    def step(updates, frozen):
        traces.append(None)
        return freeze(updates, frozen)

    updates = random_tree(0)
    for seed in range(5):
        frozen = jax.tree.map(lambda u: u > jnp.float32(seed - 2), updates)  # noqa: B023
        chex.assert_trees_all_equal(
            step(updates, frozen),
            jax.tree.map(lambda f, u: np.where(f, np.zeros_like(u), u), frozen, updates),
        )
    assert len(traces) == 1


def test_vmap_over_masks():
    updates = random_tree(0)
    masks = jax.tree.map(lambda a, b: jnp.stack([a, b]), FROZEN, NOTHING_FROZEN)
    got = jax.vmap(freeze, in_axes=(None, 0))(updates, masks)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], got), freeze(updates, FROZEN))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], got), updates)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharding_is_kept(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    update = jax.device_put(jnp.arange(16.0).reshape(8, 2), sharding)
    for frozen in (jax.device_put(update > 3.0, sharding), False):
        got = jax.jit(freeze)(update, frozen)
        assert got.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(got, np.where(frozen, 0, update))


def test_missing_mask_says_how_to_pass_it():
    tx = optax.chain(optax.sgd(0.1), freeze_quantized())
    params = random_tree(0)
    with pytest.raises(ValueError, match=r"expected the keyword argument frozen=state\.frozen"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_wrapper_that_drops_extra_arguments_is_noticed():
    steps = optax.MultiSteps(optax.chain(optax.sgd(0.1), freeze_quantized()), every_k_schedule=2)
    tx = optax.chain(steps.gradient_transformation())
    with pytest.raises(ValueError, match=r"frozen=state\.frozen"):
        tx.update(random_tree(0), tx.init(random_tree(0)), random_tree(0))


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"dense": {"kernel": False}, "scale": False}, "got no leaf 'dense/bias'"),
        (FROZEN | {"shift": False}, "got a leaf 'shift'"),
        ({"dense": FROZEN["dense"], "scale": None}, "got no leaf 'scale'"),
        ({"dense": FROZEN["dense"], "scale": [False]}, "got no leaf 'scale'"),
        (FROZEN | {"scale": np.zeros(3, bool)}, r"shape \(4,\) or \(\) at 'scale', got \(3,\)"),
        (FROZEN | {"scale": np.zeros((1, 4), bool)}, r"'scale', got \(1, 4\)"),
        (FROZEN | {"scale": np.zeros(4, np.float32)}, "dtype bool at 'scale', got float32"),
        (FROZEN | {"scale": 1}, "dtype bool at 'scale', got int32"),
    ],
)
def test_bad_mask_is_refused_by_name(frozen, message):
    with pytest.raises(ValueError, match=message):
        freeze(random_tree(0), frozen)


def test_mask_with_the_same_paths_in_other_containers_is_refused():
    with pytest.raises(ValueError, match="structure"):
        freeze((jnp.ones(2),), [False])
