"""The rows of the tables: this library's settings, each quantized in one round without training."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jaxquant as jq
from benchmarks.bits import WHOLE, fitting
from benchmarks.language import models

Quantize = Callable[[models.Task], dict[str, jq.PackedArray]]  # of all kernels, by path


def clustered(
    task: models.Task,
    k: int,
    block: tuple[int, int],
    *,
    calibrate: Callable[[models.Task], dict[str, Any]] | None = None,
    **rule: Any,
) -> dict[str, Any]:
    """Return kernels on codebooks of k centroids.

    Args:
      task: the model.
      k: centroids.
      block: as in `jq.LayerRule`; where it does not divide a kernel, the next size that does.
      calibrate: returns more for `jq.quantize_round`, from what the model makes of the batches.
      **rule: more of `jq.LayerRule`.
    """
    params = task.params
    rules = [
        jq.LayerRule(re.escape(path), k=k, block=tuple(map(fitting, kernel.shape, block)), **rule)
        for path, kernel in models.kernels(params).items()
    ]
    plan = jq.slq(params, rounds=(k,), rules=rules)
    seen = {} if calibrate is None else calibrate(task)
    params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params), **seen)
    return models.kernels(jq.pack(params, state))


def ours() -> dict[str, Quantize]:
    """Return the settings of this library by name."""
    blocks = {
        "a codebook a matrix": {"block": (WHOLE, WHOLE)},
        "a scale a channel": {"block": (WHOLE, 1), "scaled": True},
        **{
            f"groups of {size}, scaled": {"block": (size, 1), "scaled": True}
            for size in (128, 64, 32)
        },
    }
    return {
        f"k = {k}, {name}": functools.partial(clustered, k=k, **own)
        for k in (16, 8)
        for name, own in blocks.items()
    }
