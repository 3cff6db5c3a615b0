"""Public functions outside of jit: what a call costs once its shapes are known.

    python -m benchmarks.eager

`kmeans` of one matrix and `quantize_round` of a network of three, eagerly and under jit, in turns;
the first call, which compiles, and the least of all later ones. Memory maps, of which Linux gives
a process 65,530, are those that the later calls add.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax

import jaxquant as jq
from benchmarks import common


def rows(turns: int) -> list[list[object]]:
    """Return a row for each function."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {f"layer_{i}": jax.random.normal(key, (256, 1024)) for i, key in enumerate(keys)}
    plan = jq.slq(params)
    state = jq.init(plan, params)
    matrix = params["layer_0"]
    functions = {
        "kmeans, 256 x 1024, k = 3": (partial(jq.kmeans, k=3), (matrix,)),
        "quantize_round, three such, k = 17": (partial(jq.quantize_round, plan), (params, state)),
    }
    table = []
    for name, (function, arguments) in functions.items():
        ways = {
            "eager": partial(function, *arguments),
            "jit": partial(jax.jit(function), *arguments),
        }
        first = {}
        for way, call in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            first[way] = time.perf_counter() - start
        before = _memory_maps()
        later = common.least(ways, turns)
        added = _memory_maps() - before
        for way in ways:
            table.append([name, way, f"{first[way]:.2f}", f"{1e3 * later[way]:.1f}", added])
    return table


def _memory_maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_text().count("\n") if maps.exists() else 0


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    print(common.machine())
    header = ["function", "call", "first, s", "later, ms", "memory maps added"]
    print(common.markdown(header, rows(options.turns)))


if __name__ == "__main__":
    main()
