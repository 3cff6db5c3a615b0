r"""Rounds of `jaxquant.quantize_round` with codebooks of blocks: time, memory, compilation.

    python -m benchmarks.blocks                     # about eight minutes on two cores
    python -m benchmarks.blocks --parts leaves

- leaves: one leaf of float32 weights, each row in a process of its own. Nanoseconds a weight are
  those of the first round, which clusters anew, and of the fastest of two more, compiled before.
  Temporaries are what the compiled round takes beside what it is given; the peak is the resident
  memory that parameters, state and rounds hold at most; both over the bytes of the weights.
- network: a transformer of 133M parameters, 12 layers that are not stacked, a codebook for each
  output of each kernel.
- compile: a decoder with 32 layers, 224 leaves of 7 shapes, against its first two layers: seconds
  to compile a round, and a step of training with `incremental`.
"""

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxquant as jq
from benchmarks import common
from benchmarks.scale import time_rounds

PARTS = ("leaves", "network", "compile")


class Leaf(NamedTuple):
    """A leaf to quantize."""

    shape: tuple[int, int]
    rule: dict[str, Any]


LEAVES = {
    "one codebook": Leaf((4096, 4096), {"k": 16}),
    "a codebook an output": Leaf((4096, 4096), {"k": 16, "block": (-1, 1)}),
    "tiles of 8 x 64": Leaf((2048, 4096), {"k": 8, "block": (8, 64)}),
    "tiles of 8 x 64, float8": Leaf(
        (2048, 4096), {"k": 8, "block": (8, 64), "centroid_dtype": "float8_e4m3fn"}
    ),
    "groups of 128 inputs": Leaf((2048, 4096), {"k": 16, "block": (128, 1)}),
    "groups of 128 inputs, scaled": Leaf(
        (2048, 4096), {"k": 16, "block": (128, 1), "scaled": True}
    ),
    "an embedding by rows": Leaf((50257, 768), {"k": 16, "block": (1, -1)}),
}


def draw(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Draw normal weights, those of each output of a deviation of its own."""
    keys = jax.random.split(jax.random.key(seed))
    deviations = 0.02 * jnp.exp(0.3 * jax.random.normal(keys[0], shape[-1:]))
    return jax.random.normal(keys[1], shape) * jnp.broadcast_to(deviations, shape)


def measure_leaf(name: str) -> list[str]:
    """Run rounds on a leaf; return a row of the table."""
    shape, rule = LEAVES[name]
    params = {"w": jax.block_until_ready(jax.jit(draw, static_argnums=(0, 1))(shape, 0))}
    rounds = time_rounds(params, jq.slq(params, rules=[jq.LayerRule("w", **rule)]))
    size = shape[0] * shape[1]
    return [
        name,
        f"{shape[0]} x {shape[1]}",
        f"{rounds.compiling:.1f}",
        f"{rounds.first:.2f}",
        f"{rounds.first / size * 1e9:.0f}",
        f"{rounds.seconds / size * 1e9:.0f}",
        f"{rounds.temporary / (4 * size):.2f}",
        f"{rounds.held / (4 * size):.2f}",
    ]


def transformer(layers: int = 12, width: int = 768, words: int = 50257) -> dict[str, Any]:
    """Return the shapes of the kernels of a transformer, its embedding and its output layer."""
    one = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    named = {f"layer_{i}/{name}": shape for i in range(layers) for name, shape in one.items()}
    return named | {"embedding": (words, width), "head": (width, 12500)}


def measure_network() -> list[str]:
    """Run rounds on a transformer; return a row of the table."""
    shapes = transformer()
    make = jax.jit(draw, static_argnums=(0, 1))
    params = {name: make(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    params = jax.block_until_ready(params)
    size = sum(leaf.size for leaf in params.values())
    rounds = time_rounds(params, jq.slq(params, rules=[jq.LayerRule(".*", k=16, block=(-1, 1))]))
    return [
        f"{size:,}",
        f"{len(params)}",
        f"{rounds.compiling:.1f}",
        f"{rounds.first:.1f}",
        f"{rounds.seconds:.1f}",
        f"{rounds.temporary / (4 * size):.2f}",
        f"{rounds.held / (4 * size):.2f}",
    ]


def decoder(layers: int, width: int = 512) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the kernels of a decoder: seven of each layer, of as many shapes."""
    one = {
        "query": (width, width),
        "key": (width, width // 4),
        "value": (width, width // 8),
        "out": (width // 2, width),
        "gate": (width, 3 * width),
        "up": (width, 2 * width),
        "down": (3 * width, width),
    }
    return {
        f"layer_{i:02}/{name}": jax.ShapeDtypeStruct(shape, "float32")
        for i in range(layers)
        for name, shape in one.items()
    }


def compile_round(params: Any, plan: jq.Plan) -> Callable[[], Any]:
    """Return what compiles a round."""
    state = jax.eval_shape(functools.partial(jq.init, plan), params)
    return jax.jit(jq.quantize_round, static_argnums=0).lower(plan, params, state).compile


def compile_step(params: Any, plan: jq.Plan) -> Callable[[], Any]:
    """Return what compiles a step of training in which rounds run when they are due."""
    tx = jq.incremental(optax.adam(1e-3), plan, steps_per_round=100)

    def step(params: Any, state: Any) -> Any:
        gradients = jax.grad(lambda p: sum(jnp.sum(jnp.tanh(w)) for w in p.values()))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(params, jax.eval_shape(tx.init, params)).compile


def measure_compiling(what: str) -> list[str]:
    """Compile for two layers and for all; return a row of the table."""
    compile_one = {"a round": compile_round, "a step with incremental": compile_step}[what]
    spent, programs = [], []
    for layers in (2, 32):
        params = decoder(layers)
        plan = jq.slq(params)
        start = time.perf_counter()
        compile_one(params, plan)()
        spent.append(time.perf_counter() - start)
        programs.append(len(params))
    few, many = spent
    return [what, f"{few:.1f}", f"{many:.1f}", f"{many / few:.2f}"]


HEADERS = {
    "leaves": [
        "blocks",
        "weights",
        "s to compile",
        "s, first round",
        "ns a weight",
        "later",
        "temporaries",
        "peak",
    ],
    "network": [
        "weights",
        "leaves",
        "s to compile",
        "s, first round",
        "later",
        "temporaries",
        "peak",
    ],
    "compile": ["", "s for 2 layers", "s for 32", "times"],
}
ROWS: dict[str, Callable[[], list[str]]] = {
    **{f"leaves: {name}": functools.partial(measure_leaf, name) for name in LEAVES},
    "network: transformer": measure_network,
    **{
        f"compile: {what}": functools.partial(measure_compiling, what)
        for what in ("a round", "a step with incremental")
    },
}


def main() -> None:
    """Parse the command line and print the tables, or with `--row` one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(f"| {' | '.join(ROWS[args.row]())} |")
        return
    print(common.machine())
    for part in args.parts:
        print(f"\n### {part}\n\n{common.markdown(HEADERS[part], [])}", flush=True)
        for name in ROWS:
            if name.startswith(f"{part}: "):
                command = [sys.executable, "-m", "benchmarks.blocks", "--row", name]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
