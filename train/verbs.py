"""What is done with the networks of runs: they are measured, and written to files."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxquant as jq
from train import compare, engine, pretrained, states, summary
from train.checkpoints import read
from train.config import Config
from train.course import Progress, RunState, units
from train.experiment import Job, check, refuse_other
from train.named import name_of


def evaluate(config: Config, workdir: Path | None, *, mirrored: bool = False) -> dict[str, float]:
    """Return accuracy and loss of the workdir's latest checkpoint, or else of config.init.

    With `mirrored` by the mean of the answers to an image and its mirror image.
    """
    if workdir is not None:
        job, functions, state = _restore(config, workdir)
        variables = {"params": state.train.params, "batch_stats": state.train.batch_stats}
    elif config.init:
        config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, epochs=(0,)))
        job = check(config)
        functions = states.functions(job)
        variables = jax.tree.map(jnp.asarray, dict(job.initial))  # a packed one runs as it is
    else:
        raise ValueError("expected --config.init=FILE or --workdir DIR, got neither")
    if mirrored and job.task.answer_mirrored is None:
        raise ValueError(
            f"--mirrored: expected a task with answer_mirrored, got {name_of(config.task)}"
        )
    if mirrored and not job.dataset.flip:
        raise ValueError(
            f"--mirrored: expected images that may be mirrored, got those of {job.dataset.name}"
        )
    batch_stats = variables.get("batch_stats", {})
    test = job.dataset.test
    result = functions.evaluate(variables["params"], batch_stats, test, mirrored=mirrored)
    if not math.isfinite(result["loss"]):
        raise FloatingPointError(f"expected a finite loss, got {result['loss']}")
    return result


def export(config: Config, workdir: Path, output: Path, *, pytorch: bool) -> int:
    """Write the network of the latest checkpoint to a file; return its bytes.

    Args:
      config: of the experiment.
      workdir: of the experiment.
      output: a safetensors file.
      pytorch: plain float tensors under PyTorch's names; else packed, after the last round only,
        or as they are where nothing is quantized.
    """
    job, _, state = _restore(config, workdir)
    params, batch_stats = state.train.params, state.train.batch_stats
    if pytorch:
        return pretrained.save({"params": jq.unpack(params), "batch_stats": batch_stats}, output)
    if config.quantize.method == "qcnn" and jax.tree.structure(params) == jax.tree.structure(
        job.shapes["params"]
    ):
        raise ValueError(f"{workdir}: expected a finished run to pack, got one under way")
    return summary.write_packed(output, job, state)


def _restore(config: Config, workdir: Path) -> tuple[Job, engine.Engine, RunState]:
    """Return an experiment at its latest checkpoint; nothing is written."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{workdir}: expected a workdir with checkpoints, got none")
    config = compare.as_run(config, workdir)
    refuse_other(config, workdir)
    job = check(config, start=False)._replace(workdir=workdir)
    functions = states.functions(job)
    restored = read(folder, functools.partial(states.saved_shapes, job, functions))
    if restored is None:
        raise ValueError(f"{workdir}: expected at least one checkpoint, got none")
    state, record = restored
    if config.retrain.straight_through and int(state.quant.round):
        state = states.settled(functions, state)  # what it is worth so far
    states.check_finite(
        f"{workdir}: its latest checkpoint", state.train.params, state.train.batch_stats
    )
    return job, functions, _with_products(job, state, Progress(**record["progress"]))


def _with_products(job: Job, state: RunState, progress: Progress) -> RunState:
    """Return the state with the products of a finished run, of which no checkpoint is saved."""
    path, config = job.workdir / summary.MODEL, job.config
    done = progress.units == len(units(config, job.plan))
    if config.quantize.method != "qcnn" or not done or not path.is_file():
        return state
    variables = states.complete(pretrained.load(path, job.shapes))
    return state._replace(train=state.train._replace(**variables))
