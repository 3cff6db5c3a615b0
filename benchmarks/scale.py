r"""Time and memory of a round of `jaxquant.quantize_round` on large networks.

    python -m benchmarks.scale    # two minutes on one core, 9 GB of memory

Layers of 4096 x 4096 float32 weights, a row for each number of them, each in a process of its own:
the seconds of the fastest of the first three rounds of 5-bit SLQ, compiled before, with parameters
and state donated; the peak of resident memory of the whole process, with interpreter and compiler,
over the bytes of the parameters, of which masks are a quarter more. The targets: a peak of at most
2.2 times the parameters at 1e9, and a time per parameter no longer than at 1e8.

    python -m benchmarks.scale --collectives    # what a round of such layers sends on eight devices
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from benchmarks import common

SIDE = 4096


class Rounds(NamedTuple):
    """What the first rounds on a tree of parameters took."""

    compiling: float  # seconds
    first: float  # seconds of the first, which clusters anew
    seconds: float  # of the fastest
    frozen: float  # share of the weights after the last, mean over layers
    temporary: int  # bytes that a round takes beside what it is given
    peak: int  # bytes of resident memory of the whole process, with interpreter and compiler
    held: int  # bytes, at most: of parameters and state, and of what rounds take beside them


def time_rounds(params: Any, plan: jq.Plan, rounds: int = 3) -> Rounds:
    """Run the first rounds of a plan, parameters and state donated."""
    state = jq.init(plan, params)
    one_round = jax.jit(jq.quantize_round, static_argnums=0, donate_argnums=(1, 2))
    start = time.perf_counter()
    compiled = one_round.lower(plan, params, state).compile()
    compiling = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    given = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    before = _resident(reset_peak=True)
    times, shares = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        params, state, info = jax.block_until_ready(compiled(params, state))
        times.append(time.perf_counter() - start)
        shares = [float(share.mean()) for share in info.weights_frozen.values()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux
    held = given + _resident(peak=True) - before
    frozen = sum(shares) / len(shares)
    temporary = memory.temp_size_in_bytes
    return Rounds(compiling, times[0], min(times), frozen, temporary, peak, held)


def _resident(*, peak: bool = False, reset_peak: bool = False) -> int:
    """Return the bytes of resident memory of this process, now or at most. Linux only."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def measure(layers: int) -> list[str]:
    """Run rounds on so many layers; return a row of the table."""
    keys = jax.random.split(jax.random.key(0), layers)
    draw = jax.jit(lambda key: jax.random.normal(key, (SIDE, SIDE)) * 0.05)
    params = {f"layer_{i}": jax.block_until_ready(draw(key)) for i, key in enumerate(keys)}
    size = layers * SIDE * SIDE
    rounds = time_rounds(params, jq.slq(params))
    return [
        f"{size:.2e}",
        f"{layers}",
        f"{rounds.compiling:.1f}",
        f"{rounds.seconds:.1f}",
        f"{rounds.seconds / size * 1e9:.1f}",
        f"{rounds.peak / 1e9:.2f}",
        f"{rounds.peak / (4 * size):.2f}",
        f"{rounds.frozen:.1%}",
    ]


def print_collectives() -> None:
    """Print what a round of 16 such layers, split over two axes of eight devices, sends."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    layer = jax.ShapeDtypeStruct((SIDE, SIDE), "float32", sharding=sharding)
    params = {f"layer_{i}": layer for i in range(16)}
    plan = jq.slq(params)
    state = jax.eval_shape(lambda params: jq.init(plan, params), params)
    masks = {name: layer.update(dtype="bool") for name in params}
    compiled = jax.jit(jq.quantize_round, static_argnums=0).lower(
        plan, params, state._replace(frozen=masks)
    )
    text = compiled.compile().as_text() or ""
    rows = []
    for operation in common.COLLECTIVES:
        sizes = sorted(common.collective_sizes(text, operation), reverse=True)
        total = f"{4 * sum(sizes) / 1e6:.1f}"
        rows.append([operation, f"{len(sizes)}", f"{sizes[0] if sizes else 0:,}", total])
    print(f"\nWeights: {16 * SIDE * SIDE:,}, {64 * SIDE * SIDE / 1e6:,.0f} MB.\n")
    print(common.markdown(["operation", "results", "most entries", "MB in all"], rows))


def main() -> None:
    """Parse the command line and print the table, or with `--row` one row of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 60])
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--collectives", action="store_true", help="what eight devices send")
    args = parser.parse_args()
    if args.collectives:
        jax.config.update("jax_num_cpu_devices", 8)
        print_collectives()
        return
    if args.row:
        print(f"| {' | '.join(measure(args.layers[0]))} |")
        return
    print(common.machine())
    header = ["parameters", "layers", "s to compile", "s a round", "ns a parameter"]
    header += ["peak GB", "peak / parameters", "frozen"]
    print(f"\n{common.markdown(header, [])}", flush=True)
    for layers in args.layers:
        command = [sys.executable, "-m", "benchmarks.scale", "--row", "--layers", f"{layers}"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
