"""The rows of the tables: this library's settings, each quantized in one round without training."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jaxquant as jq
from benchmarks.bits import WHOLE, fitting
from benchmarks.language import models
from benchmarks.language.training import distilled

_STEPS, _RATE = 300, 0.016  # of training
Quantize = Callable[[models.Task], dict[str, jq.PackedArray]]  # of all kernels, by path


def clustered(
    task: models.Task,
    k: int,
    block: tuple[int, int],
    *,
    calibrated: bool = False,
    **rule: Any,
) -> dict[str, Any]:
    """Return kernels on codebooks of k centroids.

    Args:
      task: the model.
      k: centroids.
      block: as in `jq.LayerRule`; where it does not divide a kernel, the next size that does.
      calibrated: whether it goes by what the model makes of the task's batches.
      **rule: more of `jq.LayerRule`.
    """
    return quantized(task, rules_of(task, k, block, **rule), calibrated=calibrated)


def trained(task: models.Task, k: int, block: tuple[int, int], **rule: Any) -> dict[str, Any]:
    """Return kernels on codebooks of k centroids after training, see `training.distilled`."""
    own = rules_of(task, k, block, **rule)
    return distilled(task, own, calibration(task), steps=_STEPS, rate=_RATE)


def rules_of(task: models.Task, k: int, block: tuple[int, int], **rule: Any) -> list[jq.LayerRule]:
    """Return rules for the kernels, see `clustered`."""
    return [
        jq.LayerRule(re.escape(path), k=k, block=tuple(map(fitting, kernel.shape, block)), **rule)
        for path, kernel in models.kernels(task.params).items()
    ]


def allocated(
    task: models.Task, bits: float, choices: Mapping[int, Sequence[tuple[int, int]]]
) -> dict[str, Any]:
    """Return kernels by the rules that lose least at so many stored bits.

    Args:
      task: the model.
      bits: for each weight, with codebooks and scales.
      choices: numbers of centroids, and the blocks that are tried with each.
    """
    kernels = models.kernels(task.params)
    shapes = sorted({kernel.shape for kernel in kernels.values()})
    rules = []
    for shape in shapes:
        paths = [re.escape(path) for path, kernel in kernels.items() if kernel.shape == shape]
        rules += [
            jq.LayerRule("|".join(paths), k=k, block=tuple(map(fitting, shape, block)), scaled=True)
            for k, blocks in choices.items()
            for block in blocks
        ]
    found = jq.allocate(task.params, bits=bits, choices=rules, calibration=calibration(task))
    return quantized(task, found, calibrated=True)


def quantized(
    task: models.Task, rules: Sequence[jq.LayerRule], *, calibrated: bool
) -> dict[str, Any]:
    """Return kernels that are quantized in one round."""
    params = task.params
    plan = jq.slq(params, rounds=(1,), rules=rules)
    seen: dict[str, Any] = {"calibration": calibration(task)} if calibrated else {}
    params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params), **seen)
    return models.kernels(jq.pack(params, state))


@functools.cache
def calibration(task: models.Task) -> jq.Calibration:
    """Return what the model makes of the task's batches."""
    rules = [jq.LayerRule(".*/kernel")]
    found = jq.calibrate(
        task.function, task.params, task.batches, rules=rules, outputs=task.outputs, guided=True
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
        f"{name}, calibrated": functools.partial(row, calibrated=True) for name, row in rows.items()
    }
    tried = {k: [(WHOLE, 1), (64, 1)] for k in (4, 8, 12, 16, 24)}
    mixed = {
        f"{bits} bits, allocated": functools.partial(allocated, bits=bits, choices=tried)
        for bits in (4.1, 3.1)
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
