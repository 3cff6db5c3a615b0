"""The rows of the tables: this library's settings, each quantized in one round without training."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

import jaxquant as jq
from benchmarks.bits import WHOLE, fitting
from benchmarks.language import models
from benchmarks.language.training import distilled

_Choice = tuple[int, tuple[int, int]]  # k and the block
_TRAINING: dict[str, Any] = {"steps": 400, "warm": 0.0, "begun": 0.5}
_RATE = 0.024  # over k: as centroids lie closer, weights need not go as far
Quantize = Callable[[models.Task], dict[str, jq.PackedArray]]  # of all kernels, by path


def clustered(
    task: models.Task,
    k: int,
    block: tuple[int, int],
    *,
    calibrated: int = 0,
    **rule: Any,
) -> dict[str, Any]:
    """Return kernels on codebooks of k centroids.

    Args:
      task: the model.
      k: centroids.
      block: as in `jq.LayerRule`; where it does not divide a kernel, the next size that does.
      calibrated: by how many groups of outputs it goes by what the model makes of the task's
        batches; 0 if it does not.
      **rule: more of `jq.LayerRule`.
    """
    return quantized(task, rules_of(task, k, block, **rule), calibrated=calibrated)


def trained(task: models.Task, k: int, block: tuple[int, int], **rule: Any) -> dict[str, Any]:
    """Return kernels on codebooks of k centroids after training, see `training.distilled`."""
    own = rules_of(task, k, block, **rule)
    return distilled(task, own, calibration(task, 1), rate=_RATE / k, **_TRAINING)


def rules_of(task: models.Task, k: int, block: tuple[int, int], **rule: Any) -> list[jq.LayerRule]:
    """Return rules for the kernels, see `clustered`."""
    return [
        jq.LayerRule(re.escape(path), k=k, block=tuple(map(fitting, kernel.shape, block)), **rule)
        for path, kernel in models.kernels(task.params).items()
    ]


def allocated(task: models.Task, like: _Choice, choices: Sequence[_Choice]) -> dict[str, Any]:
    """Return kernels by the rules that lose least in the stored bytes of equal ones.

    Args:
      task: the model.
      like: k and the block whose bytes they have; one of the choices.
      choices: numbers of centroids and blocks that are tried.
    """
    found, equal = _measured(task, tuple(choices)), set(rules_of(task, *like, scaled=True))
    saved = sum(choice.bytes for choice in found.table if choice.rule in equal)
    return quantized(task, found.within(bits=8 * saved / found.size), calibrated=1)


@functools.cache
def _measured(task: models.Task, choices: tuple[_Choice, ...]) -> jq.Allocation:
    """Return what each of some rules makes of each kernel."""
    return jq.allocate(
        task.params,
        bits=32,
        choices=[rule for choice in choices for rule in rules_of(task, *choice, scaled=True)],
        calibration=calibration(task, 1),
        function=task.function,
        batches=task.batches[: task.alone],
        outputs=task.outputs,
    )


def quantized(
    task: models.Task, rules: Sequence[jq.LayerRule], *, calibrated: int
) -> dict[str, Any]:
    """Return kernels that are quantized in one round, see `clustered`."""
    params = task.params
    plan = jq.slq(params, rounds=(1,), rules=rules)
    seen: dict[str, Any] = {"calibration": calibration(task, calibrated)} if calibrated else {}
    params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params), **seen)
    return models.kernels(jq.pack(params, state))


@functools.cache
def calibration(task: models.Task, groups: int) -> jq.Calibration:
    """Return what the model makes of the task's batches, by groups of outputs."""
    rules = [jq.LayerRule(".*/kernel")]
    found = jq.calibrate(
        task.function, task.params, task.batches, rules=rules, outputs=task.outputs, guided=groups
    )
    return jax.block_until_ready(found)


def ours() -> dict[str, Quantize]:
    """Return the settings of this library by name."""
    blocks = {
        "a codebook a matrix": {"block": (WHOLE, WHOLE)},
        "a scale a channel": {"block": (WHOLE, 1), "scaled": True},
        "a codebook a channel": {"block": (WHOLE, 1), "centroid_dtype": "bfloat16"},
        **{
            f"groups of {size}, scaled": {"block": (size, 1), "scaled": True}
            for size in (128, 64, 32)
        },
    }
    rows = {
        f"k = {k}, {name}": functools.partial(clustered, k=k, **own)
        for k in (16, 8)
        for name, own in blocks.items()
    }
    told = {
        f"{name}, calibrated{by}": functools.partial(row, calibrated=groups)
        for groups, by in ((1, ""), (4, " by 4 groups of outputs"))
        for name, row in rows.items()
    }
    few_tried = [(k, (64, 1)) for k in (4, 8, 16, 32)]
    tried = [(k, (size, 1)) for k in (4, 6, 8, 12, 16, 24, 32) for size in (WHOLE, 64)]
    mixed = {
        f"{name}, bytes of k = {k}": functools.partial(
            allocated, like=(k, (64, 1)), choices=choices
        )
        for name, choices in (("allocated", tried), ("allocated in groups of 64", few_tried))
        for k in (16, 8)
    }
    few = {
        f"k = {k}, {name}, trained": functools.partial(trained, k=k, **blocks[name])
        for k, name in (
            (8, "a scale a channel"),
            (3, "a scale a channel"),
            (3, "groups of 64, scaled"),
        )
    }
    return rows | told | mixed | few
