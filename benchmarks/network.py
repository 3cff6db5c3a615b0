r"""A network run from its packed file, beside the same network in floats.

    XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.network runs/mlq/model.safetensors

For each number of images: the bytes of the weights, the peak of memory while the network runs
(weights, input, logits and everything in between, as XLA lays it out) and milliseconds, each for
floats and for the packed network. Both run in turns; times are the least of all turns. On CPU, XLA
by default starts everything that it can at once, so that all weights are unpacked at the same time;
the flag has it do one thing after the other.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from benchmarks import common
from train import models, pretrained


def rows(path: str, model: str, batches: list[int], turns: int) -> Iterator[list[object]]:
    """Yield a row for each number of images."""
    module = models.build(model, num_classes=10)
    shape = (32, 32, 3)
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    )
    packed = pretrained.load(path, variables)
    trees = {"float": jax.jit(jq.unpack)(packed), "packed": packed}

    apply = jq.packed(partial(module.apply, train=False))

    for batch in batches:
        images = jax.random.normal(jax.random.key(0), (batch, *shape))
        run = {name: jax.jit(apply).lower(tree, images).compile() for name, tree in trees.items()}
        calls = {name: partial(run[name], tree, images) for name, tree in trees.items()}
        times = common.least(calls, turns)
        yield [
            batch,
            *(f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)):,}" for tree in trees.values()),
            *(f"{_peak(run[name]):,}" for name in trees),
            *(f"{1e3 * times[name]:.2f}" for name in trees),
        ]


def _peak(compiled: jax.stages.Compiled) -> int:
    memory: Any = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", help="a packed network of train.models, of 32x32 RGB images")
    parser.add_argument("--model", default="resnet20", help=f"one of {', '.join(models.NAMES)}")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    print(common.machine())
    header = ["images", "weights, float", "weights, packed", "peak, float", "peak, packed"]
    header += ["float, ms", "packed, ms"]
    table = rows(options.file, options.model, options.batch, options.turns)
    print(common.markdown(header, table), flush=True)


if __name__ == "__main__":
    main()
