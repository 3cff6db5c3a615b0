"""All rounds of a plan, re-training included, as one XLA program: the host only waits.

A scan over all training steps: what starts a round and what ends it are branches of the step. All
three are those of `train.stages`, as in the loop of `train.loop`. Data lie on the devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from train import engine, stages
from train.config import Config
from train.engine import Engine, Images, Parts, TrainState


class Steps(NamedTuple):
    """What the training steps differ in; each field has a leading [steps].

    Under `vmap`, over seeds or learning rates say, the fields that branches depend on must not be
    mapped (`MAPPED` maps the others): all branches would be computed in every step.
    """

    rows: Any  # int32 [steps, batch], of the training images
    learning_rate: Any  # float32
    key: Any  # uint32 [steps, 2], of the epoch
    number: Any  # int32, of the step in its epoch
    epoch: Any  # int32, from 0 through all rounds
    round: Any  # int32
    first: Any  # bool, of its round
    last: Any  # bool, of its round


class Measured(NamedTuple):
    """Sums over the test images; each field has a leading [rounds]."""

    correct: jax.Array  # int32; float32 of a task that tells shares
    loss: jax.Array  # float32


class Records(NamedTuple):
    """What the loop would have logged."""

    epoch_loss: jax.Array  # float32 [epochs], sums over steps
    epoch_correct: jax.Array  # [epochs], as Measured.correct
    quantized: Measured
    retrained: Measured
    info: jq.RoundInfo  # with a leading [rounds]


class Epoch(NamedTuple):
    """An epoch of re-training, as the loop has it."""

    round: int
    first: bool  # of its round
    last: bool
    order: np.ndarray  # int [steps, batch]
    rates: np.ndarray  # float32 [steps]
    key: np.ndarray  # uint32 [2]
    temperatures: np.ndarray | None = None  # float32 [steps] of a straight-through stage


def make_steps(epochs: Sequence[Epoch]) -> Steps:
    """Return the steps of these epochs, one after the other."""
    parts = []
    for number, epoch in enumerate(epochs):
        count = len(epoch.order)
        at = np.arange(count, dtype=np.int32)
        parts.append(
            Steps(
                rows=epoch.order.astype(np.int32),
                learning_rate=epoch.rates,
                key=np.broadcast_to(epoch.key, (count, *epoch.key.shape)),
                number=at,
                epoch=np.full(count, number, np.int32),
                round=np.full(count, epoch.round, np.int32),
                first=(at == 0) & epoch.first,
                last=(at == count - 1) & epoch.last,
            )
        )
    return jax.tree.map(lambda *fields: np.concatenate(fields), *parts)


# For `in_axes` of `vmap`.
MAPPED = Steps(0, 0, 0, number=None, epoch=None, round=None, first=None, last=None)


def build(config: Config, plan: jq.Plan, parts: Parts) -> Callable[..., Any]:
    """Return a function of arrays, to be compiled: `run` for this experiment.

    `run(state, quant, teacher, train, test, keys, momentum, weight_decay, steps)` returns the
    TrainState and QuantState after the last round, and Records. `test` is filled up
    (`engine.fill_up`, which also says what is known) and cut into batches [batches, batch, ...];
    `keys` are uint32 [rounds, 3, 2]:
    for sensitivity and moments, the partition and the recalibration of each round. It may be mapped
    by `vmap`, over seeds and hyperparameters; see Steps.
    """
    return functools.partial(_run, config, plan, parts)


def traced(config: Config, parts: Parts) -> Engine:
    """Return the functions of rounds as parts of one program: data on the devices, loops scanned.

    Splits are those of `put_data`; `evaluate` gives Measured.
    """
    averaged = functools.partial(functools.partial, _mean_over_batches, config, parts)
    return Engine(
        start=parts.start,
        train=parts.train,
        evaluate=functools.partial(_measure, parts),
        recalibrate=functools.partial(engine.recalibrate, config, averaged(parts.batch_statistics)),
        guides=functools.partial(
            engine.guides, config, averaged(parts.squared_gradient), averaged(parts.input_moments)
        ),
        quantize=parts.quantize,
        settle=parts.settle,
        steps_per_call=1,
        parts=parts,
    )


def _run(
    config: Config,
    plan: jq.Plan,
    parts: Parts,
    state: TrainState,
    quant: jq.QuantState,
    teacher: Any,
    train: Images,
    test: tuple[Images, jax.Array],
    keys: jax.Array,
    momentum: jax.Array,
    weight_decay: jax.Array,
    steps: Steps,
) -> tuple[TrainState, jq.QuantState, Records]:
    stage, functions = config.retrain, traced(config, parts)

    def begin(
        state: TrainState, quant: jq.QuantState
    ) -> tuple[TrainState, jq.QuantState, jq.RoundInfo, Measured]:
        own_keys = jnp.asarray(keys)[quant.round]
        return stages.begin_round(
            stage, functions, plan, state, quant, train, test, own_keys, momentum, weight_decay
        )

    def one(carry: Any, x: Steps) -> tuple[Any, None]:
        state, quant, records = carry

        def start_round(state: TrainState, quant: jq.QuantState, records: Records) -> Any:
            state, quant, info, measured = begin(state, quant)
            records = records._replace(
                info=_put(records.info, x.round, info),
                quantized=_put(records.quantized, x.round, measured),
            )
            return state, quant, records

        def end_round(state: TrainState, records: Records) -> Records:
            # No round is straight through here, so the states stay.
            _, _, measured = stages.end(stage, functions, state, quant, test)
            return records._replace(retrained=_put(records.retrained, x.round, measured))

        carry = jax.lax.cond(x.first, start_round, lambda *same: same, state, quant, records)
        state, quant, records = carry
        batch = jax.tree.map(lambda array: array[None], parts.layout.take(train, x.rows))
        state, quant, metrics = stages.train(
            stage, functions, state, quant, teacher, batch, x.number, x.key, x.learning_rate[None]
        )
        records = records._replace(
            epoch_loss=records.epoch_loss.at[x.epoch].add(metrics["loss"]),
            epoch_correct=records.epoch_correct.at[x.epoch].add(metrics["correct"]),
        )
        records = jax.lax.cond(x.last, end_round, lambda _, same: same, state, records)
        return (*parts.layout.settle((state, quant)), parts.layout.whole(records)), None

    epochs = sum(config.retrain.epochs) * (
        plan.num_rounds if len(config.retrain.epochs) == 1 else 1
    )
    _, _, info, measured = jax.eval_shape(begin, state, quant)
    info, measured = jax.tree.map(lambda x: _zeros(plan.num_rounds, x), (info, measured))
    records = Records(
        jnp.zeros(epochs, jnp.float32),
        jnp.zeros(epochs, measured.correct.dtype),
        quantized=measured,
        retrained=measured,
        info=info,
    )
    return jax.lax.scan(one, (state, quant, records), steps)[0]


def _zeros(rounds: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros((rounds, *like.shape), like.dtype)


def _put(records: Any, round_: jax.Array, values: Any) -> Any:
    return jax.tree.map(lambda rows, row: rows.at[round_].set(row), records, values)


def _measure(parts: Parts, params: Any, batch_stats: Any, test: Any) -> Measured:
    variables = {"params": params, "batch_stats": batch_stats}
    correct, losses = jax.lax.map(lambda both: parts.count_correct(variables, *both), test)
    return Measured(jnp.sum(correct), jnp.sum(losses))


def _mean_over_batches(
    config: Config,
    parts: Parts,
    function: Callable[..., Any],
    batches: int,
    params: Any,
    batch_stats: Any,
    data: Images,
    key: jax.Array,
) -> Any:
    """Return what the function of this name in `train.engine` does."""
    size = len(data.labels)
    batch_size = min(config.batch_size, size)
    order = engine.epoch_rows(key, size, batch_size)
    variables = {"params": params, "batch_stats": batch_stats}

    def add(total: Any, i: jax.Array) -> tuple[Any, None]:
        own_key = jax.random.key_data(jax.random.fold_in(key, i))
        row = function(variables, parts.layout.take(data, order[i % len(order)]), own_key)
        return jax.tree.map(jnp.add, total, row), None

    batch = jax.tree.map(lambda x: x[:batch_size], data)
    shapes = jax.eval_shape(function, variables, batch, jax.random.key_data(key))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(batches))
    return jax.tree.map(lambda x: x / batches, total)


def result(measured: Measured, round_: int, size: int) -> dict[str, float]:
    """Return what `Engine.evaluate` does, of a round."""
    return {
        "accuracy": float(measured.correct[round_]) / size,
        "loss": float(measured.loss[round_]) / size,
    }


def put_data(parts: Parts, train: Images, test: Images) -> tuple[Images, tuple[Images, jax.Array]]:
    """Return the splits on the devices, all of them on each; `test` filled up and in batches."""
    filled = engine.fill_up(test, parts.eval_batch)
    batches = jax.tree.map(lambda x: x.reshape(-1, parts.eval_batch, *x.shape[1:]), filled)
    return parts.layout.place_whole(train), parts.layout.place_whole(batches)
