"""Flax NNX in every form: modules, states, variables and arrays, in its own training loop."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.trees import leaves_with_paths, pure, replaced
from tests.cases import mostly_further

STEPS = 4  # a round: frozen weights have landed
RULES = [jq.LayerRule("(hidden|layers/1)/kernel")]
PATHS = ["hidden/kernel", "layers/1/kernel"]

X = jax.random.normal(jax.random.key(0), (16, 6))
Y = jnp.sin(X)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.dropout(self.norm(self.hidden(x))))
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.out(x)


def net():
    return Net(nnx.Rngs(0))


def params_of(model):
    return nnx.state(model, nnx.Param)


FORMS = {
    "module": lambda model: model,
    "whole state": nnx.state,
    "state": params_of,
    "pure state": lambda model: nnx.as_pure(params_of(model)),
    "pure dictionary": lambda model: nnx.to_pure_dict(params_of(model)),
}
with_any_form = pytest.mark.parametrize(
    "form", mostly_further(FORMS.values(), FORMS["module"], FORMS["pure dictionary"]), ids=FORMS
)


def plan_of(params):
    return jq.mlq(params, groups=1, rules=RULES, init="quantile")  # two rounds of ternary


@nnx.jit
def step(model, optimizer, **extra):
    def loss(model):
        return jnp.mean(jnp.square(model(X) - Y))

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads, **extra)
    return value


def trained(tx, steps=2 * STEPS):
    model = net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


quantize = jax.jit(jq.quantize_round, static_argnums=0)
TX = jq.incremental(optax.adamw(0.01), plan_of(net()), STEPS)


@pytest.fixture(scope="module")
def quantized():
    return trained(TX)


def assert_ternary(params):
    leaves = dict(leaves_with_paths(params))
    for path in PATHS:
        assert len(np.unique(np.asarray(leaves[path]))) <= 3, path


# --- Forms ----------------------------------------------------------------------------------------


@with_any_form
def test_every_form_has_the_same_plan_and_the_same_parameters(form):
    model = net()
    assert plan_of(form(model)) == plan_of(params_of(model))
    assert [layer.path for layer in plan_of(form(model)).selection.selected] == PATHS
    assert jax.tree.structure(pure(form(model), only_parameters=True)) == jax.tree.structure(
        nnx.to_pure_dict(params_of(model))
    )


def test_rules_written_for_the_array_in_a_variable_match():
    rules = [jq.LayerRule("hidden/kernel/value"), jq.LayerRule("out/.*/value", k=5)]
    for form in (FORMS["module"], FORMS["state"], FORMS["pure state"]):
        selected = jq.select(form(net()), rules).selected
        assert [(layer.path, layer.k) for layer in selected] == [
            ("hidden/kernel", 17),
            ("out/kernel", 5),
        ]


def test_a_name_that_is_value_stays():
    state = nnx.State({"attention": {"value": {"kernel": nnx.Param(jnp.ones((8, 8)))}}})
    assert [path for path, _ in leaves_with_paths(state)] == ["attention/value/kernel"]
    plain = {"attention": {"value": jnp.ones((8, 8)), "query": jnp.ones((8, 8))}}
    rules = [jq.LayerRule(".*/value")]
    assert [x.path for x in jq.select(plain, rules).selected] == ["attention/value"]


def test_batch_statistics_and_random_streams_are_no_parameters():
    paths = [layer.path for layer in jq.select(net()).layers]
    assert "norm/scale" in paths
    assert not [path for path in paths if path.startswith("dropout") or path.endswith("mean")]


def test_a_variable_that_two_modules_share_is_one_leaf():
    model = net()
    model.layers[1].kernel = model.layers[0].kernel
    paths = [layer.path for layer in jq.select(model).layers]
    assert "layers/0/kernel" in paths and "layers/1/kernel" not in paths


@with_any_form
def test_what_is_replaced_comes_back_in_its_own_form(form):
    given = form(net())
    plain = pure(given, only_parameters=True)
    new = replaced(given, jax.tree.map(lambda x: x + 1, plain), only_parameters=True)
    own = nnx.state(given, nnx.Not(nnx.RngState)) if isinstance(given, nnx.Module) else given
    assert jax.tree.structure(new) == jax.tree.structure(own)
    before, after = dict(leaves_with_paths(own)), dict(leaves_with_paths(new))
    for path, leaf in plain["hidden"].items():
        np.testing.assert_array_equal(after[f"hidden/{path}"], leaf + 1)
    for path in before.keys() - dict(leaves_with_paths(plain)).keys():
        assert after[path] is before[path]


@with_any_form
def test_a_round_takes_and_returns_every_form(form):
    model = net()
    plan, given = plan_of(model), form(model)
    state = jq.init(plan, given)
    for _ in range(plan.num_rounds):
        given, state, info = quantize(plan, given, state)
    assert list(info.loss) == PATHS
    assert type(given) is type(nnx.state(model) if form is FORMS["module"] else form(model))
    assert_ternary(given)
    assert all(jax.tree.leaves(jq.is_on_codebook(given, state)))
    nnx.update(model, given)
    assert_ternary(model)


# --- The standard loop ----------------------------------------------------------------------------


def test_the_model_is_quantized_and_its_other_weights_are_trained(quantized):
    model, optimizer = quantized
    assert_ternary(model)
    state = jq.quant_state(optimizer)
    assert int(state.round) == 2
    start = net()
    assert not jnp.array_equal(start.norm.scale[...], model.norm.scale[...])
    assert not jnp.array_equal(start.norm.mean[...], model.norm.mean[...])
    assert isinstance(model.hidden.kernel, nnx.Param)


def test_the_state_is_that_of_the_optimizer_and_of_its_state_and_has_plain_arrays(quantized):
    _, optimizer = quantized
    states = [jq.quant_state(x) for x in (optimizer, optimizer.opt_state)]
    for state in states:
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        assert isinstance(state.frozen, dict)
    jax.tree.map(np.testing.assert_array_equal, *states)
    with pytest.raises(ValueError, match="restored without its type"):
        jq.quant_state(nnx.state(optimizer))


@with_any_form
def test_what_was_quantized_is_seen_in_every_form(form, quantized):
    model, optimizer = quantized
    state = jq.quant_state(optimizer)
    given = form(model)
    assert all(jax.tree.leaves(jq.is_on_codebook(given, state)))
    assert all(jax.tree.leaves(jq.is_on_codebook(given, optimizer.opt_state.quant)))
    report = jq.report(given, state, reference=form(net()))
    assert [layer.path for layer in report.quantized] == PATHS
    assert report.frozen == 1
    grads = jq.centroid_gradients(given, given, state)
    assert grads["hidden"]["kernel"].shape == (3,)
    moved, new = jq.set_centroids(given, state, jax.tree.map(lambda c: c * 2, state.codebooks))
    np.testing.assert_array_equal(
        dict(leaves_with_paths(moved))["hidden/kernel"], model.hidden.kernel[...] * 2
    )
    assert all(jax.tree.leaves(jq.is_on_codebook(moved, new)))


@with_any_form
def test_it_is_packed_saved_loaded_and_put_back_into_the_model(form, quantized, tmp_path):
    model, optimizer = quantized
    packed = jq.pack(form(model), jq.quant_state(optimizer))
    if form is FORMS["whole state"]:
        with pytest.raises(ValueError, match=r"dropout/rngs/\w+: expected an array of numbers"):
            jq.save(tmp_path / "model.safetensors", packed)
        return
    jq.save(tmp_path / "model.safetensors", packed)
    assert "hidden" in jq.load(tmp_path / "model.safetensors")
    fresh = Net(nnx.Rngs(7))
    loaded = jq.load(tmp_path / "model.safetensors", like=form(fresh))
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    nnx.update(fresh, jq.unpack(loaded))
    jax.tree.map(np.testing.assert_array_equal, pure(params_of(fresh)), pure(params_of(model)))
    if form is FORMS["module"]:  # with its batch statistics
        fresh.eval(), model.eval()
        np.testing.assert_array_equal(fresh(X), model(X))


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(quantized):
    model, optimizer = trained(TX, steps=STEPS + 1)
    states = (nnx.state(node, nnx.Not(nnx.RngKey)) for node in (model, optimizer))
    saved = [jax.tree.map(np.asarray, nnx.to_pure_dict(state)) for state in states]
    keys = nnx.state(model, nnx.RngKey)
    model = Net(nnx.Rngs(7))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    for node, own in zip((model, optimizer), saved, strict=True):
        nnx.update(node, own)
    nnx.update(model, keys)
    for _ in range(STEPS - 1):
        step(model, optimizer)
    jax.tree.map(np.testing.assert_array_equal, pure(model), pure(quantized[0]))
    jax.tree.map(
        np.testing.assert_array_equal, jq.quant_state(optimizer), jq.quant_state(quantized[1])
    )


def test_split_and_merge_with_variables_is_the_loop_too():
    graph, params, rest = nnx.split(net(), nnx.Param, ...)
    tx = jq.incremental(optax.adamw(0.01), plan_of(params), STEPS)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graph, params, rest, copy=True)(X) - Y))

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(2 * STEPS):
        params, opt_state = step(params, opt_state)
    assert_ternary(params)
    assert int(jq.quant_state(opt_state).round) == 2


@pytest.mark.parametrize("around", [False, True])
def test_frozen_weights_stay_in_a_loop_of_rounds(around):
    model = net()
    plan = plan_of(model)
    tx = (
        jq.freeze_quantized(optax.adamw(0.01))
        if around
        else optax.chain(optax.adamw(0.01), jq.freeze_quantized())
    )
    params, state, _ = quantize(plan, model, jq.init(plan, model))
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = pure(params_of(model))
    for _ in range(2):
        step(model, optimizer, frozen=state.frozen)
    after = pure(params_of(model))
    frozen, old, new = (tree["hidden"]["kernel"] for tree in (state.frozen, before, after))
    np.testing.assert_array_equal(old == new, frozen)
    assert 0 < jnp.sum(frozen) < frozen.size


@pytest.mark.parametrize("module", ["flax", "jax.experimental.pallas"])
def test_the_library_does_not_import_what_few_need(module):
    code = f"import sys, jaxquant; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
