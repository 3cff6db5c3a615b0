r"""Products with packed weights against dense ones, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.matmul        # some minutes
    ... python -m benchmarks.matmul --shapes 4096x4096 --k 3 --batch 1       # one case

For each weight [rows, columns], k and number of input vectors: milliseconds of the dense product in
float32 and bfloat16, of each implementation of `jaxquant.matmul`, the packed size over that in
float32, and the share of the time that reading the packed weight must take at the bandwidth that
the copy of a large array reaches. The programs take turns, so that a slow moment of the machine
meets all of them; figures are the least of all turns. Page faults in the memory of an unpacked
weight cost more than unpacking it: the first line has glibc use huge pages.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from benchmarks import common
from jaxquant.ops import IMPLEMENTATIONS

SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336))


def programs(
    shape: tuple[int, int], k: int, batch: int
) -> tuple[dict[str, Callable[[], Any]], jq.PackedArray]:
    """Return the products to time by name, and the packed weight."""
    weight = jax.random.normal(jax.random.key(0), shape)
    codebook = jnp.linspace(-2.0, 2.0, k)
    packed = jax.jit(jq.pack_array)(weight, codebook)
    weight = jax.jit(jq.unpack)(packed)
    x = jax.random.normal(jax.random.key(1), (batch, shape[0]))
    half_x, half = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    dense = jax.jit(jnp.matmul)
    made: dict[str, Callable[[], Any]] = {
        "float32": lambda: dense(x, weight),
        "bfloat16": lambda: dense(half_x, half),
    }
    product = jax.jit(jq.matmul, static_argnames="implementation")
    for name in IMPLEMENTATIONS:
        try:
            jax.eval_shape(lambda x, p, name=name: jq.matmul(x, p, implementation=name), x, packed)
        except ValueError:
            continue  # not for this codebook
        made[name] = lambda name=name: product(x, packed, implementation=name)
    return made, packed


def bandwidth() -> float:
    """Return the bytes a second that the memory moves, from a copy of 256 MB."""
    x = jnp.ones(2**26)
    copy = jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(copy(x))
    return 2 * x.nbytes / min(common.seconds(lambda: copy(x), 10))


def measure(
    shapes: list[tuple[int, int]], ks: list[int], batches: list[int], turns: int
) -> Iterator[list[object]]:
    """Yield a row for each case."""
    limit = bandwidth()
    for shape in shapes:
        for k in ks:
            for batch in batches:
                made, packed = programs(shape, k, batch)
                times = {name: [] for name in made}
                for turn in range(turns + 1):
                    for name, program in made.items():
                        spent = common.seconds(program, 1)
                        times[name] += spent if turn else []  # the first compiles
                best = {name: min(spent) for name, spent in times.items()}
                packed_best = min(best[name] for name in IMPLEMENTATIONS if name in best)
                yield [
                    f"{shape[0]} x {shape[1]}",
                    k,
                    batch,
                    *(f"{1e3 * best[n]:.2f}" if n in best else "" for n in header_names()),
                    f"{best['float32'] / packed_best:.2f}",
                    f"{packed.nbytes / (4 * packed.size):.3f}",
                    f"{packed.nbytes / limit / packed_best:.0%}",
                ]


def header_names() -> list[str]:
    """Return the names of the timed products."""
    return ["float32", "bfloat16", *IMPLEMENTATIONS]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--k", nargs="+", type=int, default=[3, 16, 17])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    shapes = [(int(a), int(b)) for a, b in (text.split("x") for text in options.shapes)]
    print(common.machine())
    header = ["rows x columns", "k", "vectors", *(f"{name}, ms" for name in header_names())]
    header += ["float32 / best packed", "bytes / float32", "of bandwidth"]
    rows = measure(shapes, options.k, options.batch, options.turns)
    print(common.markdown(header, rows), flush=True)


if __name__ == "__main__":
    main()
