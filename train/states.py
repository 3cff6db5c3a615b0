"""The states of a run: the first one, what any of them looks like, what they may not hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.trees import leaves_with_paths
from train import engine
from train.config import Fit
from train.course import Progress, RunState, units
from train.experiment import Job


def functions(job: Job) -> engine.Engine:
    """Return what is compiled for an experiment."""
    return engine.build(job.config, job.dataset, job.task, job.layout, job.inputs, job.plan)


def fresh(job: Job, compiled: engine.Engine) -> RunState:
    """Return the state at the start of a run."""
    variables = job.initial
    if variables is None:
        # The key is an argument: XLA would fold the random numbers of a constant one, slowly.
        variables = jax.jit(job.task.init)(jax.random.key(job.config.seed))
    variables = jq.unpack(jax.tree.map(jnp.asarray, dict(variables)))
    quant: Any = () if job.plan is None else jq.init(job.plan, variables["params"])
    variables, quant = job.layout.place((complete(variables), quant))
    return RunState(start_stage(compiled, variables, quant, job.config.fit), quant, variables)


def shapes(job: Job, compiled: engine.Engine, stage: Fit | None = None) -> RunState:
    """Return the shapes and places of a run's states, by default as long as it fits floats."""
    stage = stage or job.config.fit

    def state(variables: Any) -> RunState:
        quant: Any = () if job.plan is None else jq.init(job.plan, variables["params"])
        return RunState(start_stage(compiled, variables, quant, stage), quant, variables)

    return job.layout.describe(jax.eval_shape(state, complete(job.shapes)))


def saved_shapes(job: Job, compiled: engine.Engine, record: Mapping[str, Any]) -> RunState:
    """Return the shapes and places of the state beside a record: stages' optimizers may differ."""
    progress = Progress(**record["progress"])
    begun = units(job.config, job.plan)[: progress.units + (progress.steps > 0)]
    rounds = begun and begun[-1].round >= 0
    return shapes(job, compiled, job.config.retrain if rounds else job.config.fit)


def complete(variables: Any) -> dict[str, Any]:
    """Return variables with the same collections, whether a network has batch norm or not."""
    return {"batch_stats": {}, **variables}


def start_stage(
    compiled: engine.Engine, variables: Any, quant: Any, stage: Fit
) -> engine.TrainState:
    """Return the state in which a stage starts: with a fresh optimizer."""
    # As arrays of the host: Python's numbers would have a type of their own, and a compilation.
    numbers = (np.float32(stage.momentum), np.float32(stage.weight_decay))
    return compiled.start(variables, quant, *numbers, optimizer=stage.optimizer)


def check_finite(what: str, *trees: Any) -> None:
    """Raise a FloatingPointError that names what is NaN or infinite, of weights or statistics."""
    leaves = [item for tree in trees for item in leaves_with_paths(tree)]
    bad = [path for path, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]
    if bad:
        raise FloatingPointError(f"{what}: NaN or infinite values in {', '.join(bad)}")


def settled(compiled: engine.Engine, state: RunState) -> RunState:
    """Return the state with all weights on their centroids, at the end of straight-through."""
    params, quant = compiled.settle(state.train.params, state.quant)
    return state._replace(quant=quant, train=state.train._replace(params=params))
