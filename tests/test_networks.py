"""Networks of your own, of both makes of Flax, as functions of their variables."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from tests import own
from train import networks

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")


def build(model, num_classes=3):
    return networks.build(model, num_classes=num_classes, image=IMAGE)


def variables_of(network):
    return network.init(jax.random.key(0), jnp.zeros(IMAGE.shape))


@pytest.mark.parametrize("name", ["Linen", "Nnx"])
@pytest.mark.parametrize("how", ["by its name", "itself", "by a function"])
def test_a_network_of_your_own_answers_as_its_module_does(name, how):
    cls = getattr(own, name)
    given = {
        "by its name": f"tests.own:{name}",
        "itself": cls,
        "by a function": (lambda num_classes: cls(num_classes))
        if name == "Linen"
        else (lambda num_classes, rngs: cls(num_classes, (8, 8, 1), rngs=rngs)),
    }[how]
    network = build(given)
    variables = variables_of(network)
    x = jax.random.normal(jax.random.key(1), (5, 8, 8, 1))
    answers, _ = network.apply(variables, x, None)
    if name == "Linen":
        expected = own.Linen(3).apply({"params": variables["params"]}, x)
    else:
        module = own.Nnx(3, (8, 8, 1), rngs=nnx.Rngs(jax.random.key(0)))
        module.eval()
        expected, _ = nnx.capture(module, nnx.Intermediate)(x)
        assert [feature.shape for feature in answers.features] == [(5, 4, 4, 8), (5, 2, 2, 8)]
    np.testing.assert_allclose(answers.logits, expected, rtol=1e-5, atol=1e-6)


def test_training_of_nnx_renews_statistics_and_drops_by_the_key_of_the_step():
    network = build(own.Nnx)
    variables = variables_of(network)
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    run = jax.jit(network.apply)
    first, again, other = (run(variables, x, jax.random.key(i)) for i in (2, 2, 3))
    chex.assert_trees_all_equal(first, again)
    assert np.abs(first[0].logits - other[0].logits).max() > 1e-3
    chex.assert_trees_all_equal(first[1], other[1])  # what comes before the dropout
    before = variables["batch_stats"]
    assert jax.tree.structure(first[1]) == jax.tree.structure(before)
    assert np.abs(first[1]["norm"]["mean"] - before["norm"]["mean"]).max() > 1e-3
    measured, kept = run(variables, x, None)
    chex.assert_trees_all_equal(kept, before)
    assert np.abs(measured.logits - first[0].logits).max() > 1e-3


@pytest.mark.parametrize("name", ["Linen", "Nnx"])
def test_layers_are_as_deep_as_a_pass_comes_to_them_late(name):
    network = build(getattr(own, name))
    params = variables_of(network)["params"]
    selection = jq.select(params, network.rules)
    expected = {
        "Linen": ["stem/kernel", "body/kernel", "answer/kernel"],
        "Nnx": ["layers/0/kernel", "layers/1/kernel", "answer/kernel"],
    }[name]
    assert [layer.path for layer in selection.by_depth()] == expected
    assert {layer.path for layer in selection.selected} == {
        layer.path for layer in jq.select(params).selected
    }


@pytest.mark.parametrize("name", ["Linen", "Nnx"])
def test_a_network_of_your_own_runs_from_packed_weights(name):
    network = build(getattr(own, name))
    variables = variables_of(network)
    plan = jq.slq(variables["params"], rounds=(17,), rules=network.rules)
    params, state, _ = jq.quantize_round(
        plan, variables["params"], jq.init(plan, variables["params"])
    )
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))

    def logits(variables, x):
        return network.apply(variables, x, None)[0].logits

    packed = {**variables, "params": jq.pack(params, state)}
    got = jq.packed(logits)(packed, x)
    np.testing.assert_allclose(got, logits({**variables, "params": params}, x), atol=1e-5)


NO_IMPORT = "model: expected a module {0} that can be imported, got ModuleNotFoundError"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet21", "model: expected one of resnet20, "),
        (":Linen", "model: expected package.module:name, got ':Linen'"),
        ("tests.own:", "model: expected package.module:name, got 'tests.own:'"),
        ("nowhere.at_all:Linen", NO_IMPORT.format("nowhere.at_all")),
        ("tests.own:Nowhere", "model: expected Nowhere in tests.own, got no such name"),
        ("tests.own:NUMBER", "model: expected tests.own:NUMBER to be a class or a function, got 3"),
        ("tests.own:no_module", "expected tests.own:no_module to give a module of Flax Linen or"),
        ("tests.own:Wide", "tests.own:Wide to need no arguments but num_classes, image_shape, "),
        ("tests.own:Wide", "got 'width' without a default"),
        ("tests.own:Failing", "model: tests.own:Failing: RuntimeError: no such luck"),
        (
            "tests.own:NoLogits",
            "expected logits of shape (2, 3) for images (2, 8, 8, 1), got (2, 4",
        ),
        ("tests.own:Counting", "expected variables in params and batch_stats, got counts, params"),
        (own.Linen(3), "model: expected a class or a function that returns a module, got a module"),
        (functools.partial(own.Wide, 3), "model: tests.own:Wide(3): "),
    ],
)
def test_what_is_no_network_is_named(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(model)


class Doubling(nn.Module):
    """Batch normalization of which the decay is not the usual one."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.25, name="norm")(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def test_a_module_that_takes_train_is_told_of_it():
    network = build(Doubling)
    variables = variables_of(network)
    x = 3 + jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    _, stats = network.apply(variables, x, jax.random.key(0))
    np.testing.assert_allclose(stats["norm"]["mean"], 0.75 * x.mean((0, 1, 2)), rtol=1e-5)
