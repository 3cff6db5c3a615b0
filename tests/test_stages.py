"""What a round does: the same in functions that are compiled one by one and in one program."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from tests.test_engine import Tiny, begin, make_dataset, make_engine
from train import engine, program, stages
from train.config import Config, Fit, Quantize

KEYS = np.stack([engine.key_data(jax.random.key(i)) for i in range(3)])
NUMBERS = np.float32(0.9), np.float32(1e-4)


def setting(**retrain):
    """Return what rounds need of a tiny network, whose splits both forms take."""
    config = Config(
        quantize=Quantize(
            bits=2,
            rounds=(2, 3),
            sensitivity="fisher",
            sensitivity_batches=2,
            recalibrate_batches=2,
        ),
        retrain=Fit(learning_rate=0.1, **retrain),
        batch_size=10,
    )
    init = functools.partial(Tiny().init, train=False)
    dataset = make_dataset(pad=1, flip=True)
    shapes = jax.eval_shape(init, jax.random.key(0), IMAGE)
    rounds = (3,) if config.retrain.straight_through else (2, 3)
    plan = jq.slq(shapes["params"], bits=2, rounds=rounds)
    functions, variables, _ = make_engine(config, dataset, plan=plan)
    quant = jq.init(plan, variables["params"])
    return config, dataset, functions, plan, begin(functions, variables, quant), quant, variables


IMAGE = jnp.zeros((1, 4, 4, 2))


def steps(dataset):
    """Return the arguments of `stages.train` after the teacher, for an epoch of four steps."""
    order = engine.epoch_order(jax.random.key(5), 40, 10)
    batches = engine.Images(dataset.train.images[order], dataset.train.labels[order])
    return batches, np.int32(0), KEYS[0], np.full(4, 0.1, np.float32)


def whole(config, functions, plan, train, test, batches, state, quant, teacher):
    """Do a round: its start, an epoch, its end."""
    stage = config.retrain
    state, quant, info, quantized = stages.begin_round(
        stage, functions, plan, state, quant, train, test, KEYS, *NUMBERS
    )
    state, quant, sums = stages.train(stage, functions, state, quant, teacher, *batches)
    state, quant, retrained = stages.end(stage, functions, state, quant, test)
    return state, quant, info, sums, (quantized, retrained)


def test_a_round_is_the_same_in_compiled_functions_and_in_one_program():
    config, dataset, functions, plan, state, quant, teacher = setting(distill_weight=0.5)
    batches = steps(dataset)
    traced = program.traced(config, functions.parts)
    one = functools.partial(whole, config, traced, plan)
    splits = program.put_data(functions.parts, dataset.train, dataset.test)
    *expected, measured = jax.jit(one)(*splits, batches, state, quant, teacher)
    *got, results = whole(
        config, functions, plan, dataset.train, dataset.test, batches, state, quant, teacher
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    assert 0 < got[1].frozen["dense"]["kernel"].mean() < 1
    for sums, result in zip(measured, results, strict=True):
        assert int(sums.correct) / dataset.test.size == result["accuracy"]
        np.testing.assert_allclose(sums.loss / dataset.test.size, result["loss"], rtol=1e-4)
    assert results[0] != results[1]  # what an epoch has changed


def test_a_straight_through_round_gives_codebooks_and_freezes_at_its_end():
    config, dataset, functions, plan, state, quant, _ = setting(straight_through=True)
    before = jax.tree.map(np.asarray, state.params)
    begun, released, _, quantized = stages.begin_round(
        config.retrain,
        functions,
        plan,
        state,
        quant,
        dataset.train,
        dataset.test,
        KEYS,
        *NUMBERS,
    )
    chex.assert_trees_all_equal(begun.params, before)
    assert not any(np.any(mask) for mask in jax.tree.leaves(released.frozen))
    ended, frozen, result = stages.end(config.retrain, functions, begun, released, dataset.test)
    assert bool(jq.is_on_codebook(ended.params, frozen)["dense"]["kernel"])
    assert np.all(frozen.frozen["dense"]["kernel"])
    assert len(np.unique(ended.params["dense"]["kernel"])) <= 3
    assert result == quantized  # nothing was trained in between
