"""Gradients of a network's convolutions: by the whole batch, and by parts of it.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.training

A forward and a backward pass of ResNet-20 on 128 images of 32x32, with and without
`train.gradients.in_parts`, in turns; times are the least of all turns.
"""

import argparse
import contextlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import common
from train import models
from train.gradients import in_parts


def rows(model: str, batch: int, turns: int) -> list[list[object]]:
    """Return a row for each way."""
    module = models.build(model, num_classes=10)
    images = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    variables = jax.jit(partial(module.init, train=False))(jax.random.key(1), images)

    def loss(params: Any, *, parts: bool) -> jax.Array:
        way = nn.intercept_methods(in_parts) if parts else contextlib.nullcontext()
        with way:
            logits, _ = module.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
        return jnp.mean(jnp.square(logits))

    names = {"the whole batch": False, "parts": True}
    grad = {name: jax.jit(jax.grad(partial(loss, parts=parts))) for name, parts in names.items()}
    times = common.least(
        {name: partial(run, variables["params"]) for name, run in grad.items()}, turns
    )
    first = times["the whole batch"]
    return [[name, f"{1e3 * t:.0f}", f"{first / t:.2f}x"] for name, t in times.items()]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    print(common.machine())
    table = rows(options.model, options.batch, options.turns)
    print(common.markdown(["gradients by", "ms", "faster"], table))


if __name__ == "__main__":
    main()
