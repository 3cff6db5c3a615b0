"""What a round does, from its start to its end: written once, for the loop and the one program.

The loop (`train.loop`) calls these functions on compiled ones, so that a run can be saved and
stopped between any of them. The one program (`train.program`) scans them, and is compiled whole.
"""

from typing import Any

import jax

import jaxquant as jq
from train.config import Fit
from train.engine import Engine, TrainState


def begin_round(
    stage: Fit,
    functions: Engine,
    plan: jq.Plan,
    state: TrainState,
    quant: jq.QuantState,
    train: Any,
    test: Any,
    keys: Any,
    momentum: Any,
    weight_decay: Any,
) -> tuple[TrainState, jq.QuantState, jq.RoundInfo, Any]:
    """Quantize by the next row of the plan, renew batch statistics, measure, start an optimizer.

    If re-training is straight through, the round gives the codebooks alone: it is measured as
    quantized, and then nothing is frozen and the weights are those before.

    Args:
      stage: of re-training.
      functions: compiled, or to be compiled.
      plan: of the rounds.
      state: before the round.
      quant: before the round.
      train: training images, as `functions` takes them.
      test: images to measure with, likewise.
      keys: uint32 [3, 2]: for what guides the round, for the partition, for the statistics.
      momentum: of the optimizer, float32.
      weight_decay: likewise.

    Returns:
      The states in which re-training starts, what the round did, and what `functions.evaluate`
      says of the quantized network.
    """
    guiding, recalibrating = (jax.random.wrap_key_data(keys[i]) for i in (0, 2))
    guides = functions.guides(state.params, state.batch_stats, train, guiding)
    params, quant, info = functions.quantize(plan, state.params, quant, guides, keys[1])
    batch_stats = functions.recalibrate(params, state.batch_stats, train, recalibrating)
    measured = functions.evaluate(params, batch_stats, test)
    if stage.straight_through:
        params, quant = state.params, jq.release(quant)
    variables = {"params": params, "batch_stats": batch_stats}
    state = functions.start(variables, quant, momentum, weight_decay, optimizer=stage.optimizer)
    return state, quant, info, measured


def train(
    stage: Fit,
    functions: Engine,
    state: TrainState,
    quant: Any,
    teacher: Any,
    batches: Any,
    first: Any,
    key: Any,
    learning_rates: Any,
    temperatures: Any = None,
) -> tuple[TrainState, Any, dict[str, Any]]:
    """Take a training step for each learning rate [steps], as the stage says.

    Args:
      stage: of re-training, or of the float network.
      functions: compiled, or to be compiled.
      state: before the steps.
      quant: a QuantState, or () where nothing is frozen.
      teacher: float variables, of which a stage without a teacher takes no notice.
      batches: on the devices, [steps, batch, ...].
      first: number of the first step in its epoch, int32.
      key: of the epoch, uint32 [2].
      learning_rates: float32 [steps].
      temperatures: of a straight-through stage, float32 [steps].

    Returns:
      The new states, and the sums of loss and correct answers.
    """
    return functions.train(
        state,
        quant,
        teacher,
        batches,
        first,
        key,
        learning_rates,
        temperatures,
        distill=stage.has_teacher,
        move_centroids=stage.centroid_rate > 0,
        optimizer=stage.optimizer,
    )


def end(
    stage: Fit, functions: Engine, state: TrainState, quant: Any, test: Any
) -> tuple[TrainState, Any, Any]:
    """Freeze what a straight-through stage has trained, and measure.

    Returns:
      The states, which are other ones after a straight-through stage alone, and what
      `functions.evaluate` says.
    """
    if stage.straight_through:
        params, quant = functions.settle(state.params, quant)
        state = state._replace(params=params)
    return state, quant, functions.evaluate(state.params, state.batch_stats, test)
