r"""Products with packed weights against dense ones, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.matmul        # some minutes
    ... python -m benchmarks.matmul --shapes 4096x4096 --k 3 --batch 1       # one case
    ... python -m benchmarks.matmul --shapes --conv                          # convolutions only
    ... python -m benchmarks.matmul --shapes --words                         # kernels of words only
    ... python -m benchmarks.matmul --shapes --blocks                        # by blocks only
    ... python -m benchmarks.matmul --shapes --unpack                        # pack and unpack only

For each weight [rows, columns], k and number of input vectors: milliseconds of the dense product in
float32, of each implementation of `jaxquant.matmul` that is made for this platform, and of PyTorch
and onnxruntime where they are installed (benchmarks/others.py), as medians of turns; the median of
the ratios of float32 and the default implementation of each turn; the packed size over that in
float32; the memory that the default takes beside its arguments, over the size of the float32
weight; at how many GB/s it reads packed bytes, beside the first line's bandwidth of the memory; and
the milliseconds of the default without turns, when the weight may still lie in a cache.
With `--conv`, the 3x3 convolutions of
ResNet-20. With `--words`, a weight and these convolutions as words of four channels (Q-CNN): the
float32 product, that with the unpacked kernel, and the sums of table entries. With `--blocks`, a
weight of 4096 x 4096 by channels, groups and tiles: the float32 product, that with the weight
unpacked, and the default. With `--unpack`, packing and unpacking one, and writing so many floats.
The programs take
turns, so that a slow moment of the machine meets all of them; all but the first table have the
least of all turns.
Page faults in the memory of an unpacked weight cost more than unpacking it: the first line has
glibc use huge pages.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import common, others
from jaxquant import cpp
from jaxquant.packing.arrays import pack_product
from jaxquant.packing.codes import pack_codes
from jaxquant.packing.ops import choice

SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336))
BLOCKS = {  # block, k, dtype of the codebooks, scaled
    "one codebook": ((4096, 4096), 16, "float32", False),
    "channels": ((4096, 1), 16, "float32", False),
    "groups of 128": ((128, 1), 16, "float32", False),
    "tiles of 8 x 64": ((8, 64), 8, "float8_e4m3fn", False),
    "scaled channels": ((4096, 1), 16, "float32", True),
    "scaled groups of 128": ((128, 1), 16, "float32", True),
    "scaled groups of 32": ((32, 1), 16, "int8", True),
}
CONVS = ((32, 16), (16, 32), (8, 64))  # height and width, channels: the stages of ResNet-20
IMPLEMENTATIONS = {
    "cpu": ("unpack", "blocks", *(("native",) if cpp.missing() is None else ())),
    "gpu": ("unpack", "triton"),
    "tpu": ("unpack", "mosaic"),
}[jax.default_backend()]


class Program:
    """A compiled product and its arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        """Compile the function for these arguments."""
        self.args = args
        self.compiled = jax.jit(function).lower(*args).compile()

    def __call__(self) -> Any:
        """Run it."""
        return self.compiled(*self.args)

    def extra_bytes(self) -> int:
        """Return the bytes that it takes beside its arguments and its result."""
        analysis = self.compiled.memory_analysis()
        return analysis.temp_size_in_bytes if analysis else 0


def packed_weight(shape: tuple[int, ...], k: int) -> jq.PackedArray:
    """Return a normal weight on k levels."""
    weight = jax.random.normal(jax.random.key(0), shape)
    return jax.jit(jq.pack_array)(weight, jnp.linspace(-2.0, 2.0, k))


def matmuls(shape: tuple[int, int], k: int, batch: int) -> tuple[dict[str, Any], Any]:
    """Return the products to time by name, and the packed weight."""
    packed = packed_weight(shape, k)
    weight = jax.jit(jq.unpack)(packed)
    x = jax.random.normal(jax.random.key(1), (batch, shape[0]))
    made: dict[str, Any] = {"float32": Program(jnp.matmul, x, weight)}
    for name in IMPLEMENTATIONS:
        try:
            made[name] = Program(
                lambda x, p, name=name: jq.matmul(x, p, implementation=name), x, packed
            )
        except ValueError:
            continue  # not for this codebook
    return made | others.linear(np.asarray(weight), np.asarray(x)), packed


def convs(size: int, channels: int, k: int, batch: int) -> tuple[dict[str, Program], Any]:
    """Return the 3x3 convolutions to time by name, and the packed kernel."""
    packed = packed_weight((3, 3, channels, channels), k)
    kernel = jax.jit(jq.unpack)(packed)
    x = jax.random.normal(jax.random.key(1), (batch, size, size, channels))

    return {"float32": Program(convolve, x, kernel), "unpack": Program(jq.conv, x, packed)}, packed


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the convolution with a float kernel."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def words_kernel(shape: tuple[int, ...], k: int, length: int = 4) -> jq.ProductArray:
    """Return a kernel of k random words of so many channels."""
    *window, channels, features = shape
    subspaces = channels // length
    codes = jax.random.randint(jax.random.key(0), (*window, subspaces, features), 0, k)
    words = jax.random.normal(jax.random.key(1), (subspaces, k, length))
    return jax.jit(pack_product)(codes, words)


def words_rows(ks: list[int], batches: list[int], turns: int) -> Iterator[list[object]]:
    """Yield a row for each case, dense and convolution."""
    shapes = [((4096, 4096), ()), *(((3, 3, c, c), (size, size)) for size, c in CONVS)]
    for shape, space in shapes:
        for k in ks:
            array = words_kernel(shape, k)
            kernel = jax.jit(jq.unpack)(array)
            for batch in batches:
                x = jax.random.normal(jax.random.key(1), (batch, *space, shape[-2]))
                product = jq.conv if space else jq.matmul
                made = {"float32": Program(convolve if space else jnp.matmul, x, kernel)}
                for name in ("unpack", "words"):
                    call = functools.partial(product, implementation=name)
                    made[name] = Program(call, x, array)
                times = common.least(made, turns)
                yield [
                    " x ".join(map(str, (*space, *shape[-2:]))),
                    k,
                    batch,
                    *(f"{1e3 * times[name]:.3f}" for name in made),
                    f"{array.nbytes / (4 * array.size):.3f}",
                ]


def blocks_weight(
    block: tuple[int, int], k: int, dtype: str, scaled: bool, side: int = 4096
) -> jq.PackedArray:
    """Return a square weight of random codes on random codebooks of its blocks."""
    keys = jax.random.split(jax.random.key(0), 3)
    numbers = tuple(side // size for size in block)
    own = (1, 1) if scaled else numbers
    codes = jax.random.randint(keys[0], (side, side), 0, k)
    return jq.PackedArray(
        codes=jax.jit(pack_codes, static_argnums=1)(codes, k),
        codebook=jax.random.randint(keys[1], (*own, k), -127, 128).astype(dtype),
        scale=jax.random.uniform(keys[2], (*numbers, 1), jnp.bfloat16) if scaled else None,
        rows=(side,),
        columns=(side,),
        dtype="float32",
    )


def blocks_rows(batches: list[int], turns: int) -> Iterator[list[object]]:
    """Yield a row for each kind of blocks."""
    for name, (block, k, dtype, scaled) in BLOCKS.items():
        packed = blocks_weight(block, k, dtype, scaled)
        weight = jax.jit(jq.unpack)(packed)
        for batch in batches:
            x = jax.random.normal(jax.random.key(1), (batch, len(weight)))
            unpacked = functools.partial(jq.matmul, implementation="unpack")
            made = {
                "float32": Program(jnp.matmul, x, weight),
                "unpack": Program(unpacked, x, packed),
                "default": Program(jq.matmul, x, packed),
            }
            times = common.least(made, turns)
            yield [
                name,
                k,
                dtype,
                batch,
                *(f"{1e3 * times[each]:.2f}" for each in made),
                f"{packed.nbytes / weight.nbytes:.3f}",
                f"{made['default'].extra_bytes() / weight.nbytes:.3f}",
            ]


def unpack_rows(turns: int, side: int = 4096, k: int = 16) -> Iterator[list[object]]:
    """Yield a row for what goes over a whole weight: the last only writes its floats."""
    packed = packed_weight((side, side), k)
    made = {
        "pack": Program(jq.pack_array, jax.jit(jq.unpack)(packed), packed.codebook),
        "unpack": Program(jq.unpack, packed),
        "write": Program(lambda value: jnp.broadcast_to(value, (side, side)), jnp.float32(1)),
    }
    for name, spent in common.in_turns(made, turns).items():
        yield [name, f"{1e3 * statistics.median(spent):.1f}"]


def bandwidth() -> float:
    """Return the bytes a second that are read from 512 MB by a product with one vector."""
    x = jnp.ones((2**13, 2**14))
    product = Program(jnp.matmul, jnp.ones((1, len(x))), x)
    return x.nbytes / min(common.seconds(product, 10))


def matmul_rows(
    shapes: list[tuple[int, int]], ks: list[int], batches: list[int], turns: int
) -> Iterator[list[object]]:
    """Yield a row for each case, the names of the timed products before them."""
    for number, (shape, batch, k) in enumerate(itertools.product(shapes, batches, ks)):
        made, packed = matmuls(shape, k, batch)
        times = common.in_turns(made, turns)
        best = choice.fastest(batch, jnp.ones((batch, shape[0])), packed)
        pairs = zip(times["float32"], times[best], strict=True)
        if not number:
            yield [*made]
        yield [
            f"{shape[0]} x {shape[1]}",
            batch,
            k,
            *(f"{1e3 * statistics.median(spent):.2f}" for spent in times.values()),
            f"{statistics.median(dense / own for dense, own in pairs):.1f}",
            f"{packed.nbytes / (4 * packed.size):.3f}",
            f"{made[best].extra_bytes() / (4 * packed.size):.3f}",
            f"{packed.nbytes / statistics.median(times[best]) / 1e9:.1f}",
            f"{1e3 * statistics.median(common.seconds(made[best], turns)):.2f}",
        ]


def conv_rows(ks: list[int], batches: list[int], turns: int) -> Iterator[list[object]]:
    """Yield a row for each case."""
    for size, channels in CONVS:
        for k in ks:
            for batch in batches:
                made, packed = convs(size, channels, k, batch)
                times = common.least(made, turns)
                yield [
                    f"{size} x {size} x {channels}",
                    k,
                    batch,
                    f"{1e3 * times['float32']:.3f}",
                    f"{1e3 * times['unpack']:.3f}",
                    f"{times['float32'] / times['unpack']:.2f}",
                    f"{packed.nbytes / (4 * packed.size):.3f}",
                ]


def main() -> None:
    """Print a table, or two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="*", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--k", nargs="+", type=int, default=[3, 5, 16, 17])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--conv", action="store_true", help="convolutions too")
    parser.add_argument("--words", action="store_true", help="kernels of 16, 64, 256 words too")
    parser.add_argument("--blocks", action="store_true", help="blocks of all kinds too")
    parser.add_argument("--unpack", action="store_true", help="packing and unpacking too")
    options = parser.parse_args()
    shapes = [(int(a), int(b)) for a, b in (text.split("x") for text in options.shapes)]
    print(common.machine())
    if shapes:
        print(f"Memory: {bandwidth() / 1e9:.1f} GB/s")
        rows = matmul_rows(shapes, options.k, options.batch, options.turns)
        header = ["rows x columns", "vectors", "k", *(f"{name}, ms" for name in next(rows))]
        header += ["times as fast as float32", "bytes / float32", "extra / float32", "GB/s"]
        header += ["repeated, ms"]
        print(common.markdown(header, rows), flush=True)
    if options.conv:
        header = ["image", "k", "images", "float32, ms", "unpack, ms"]
        header += ["float32 / unpack", "bytes / float32"]
        rows = conv_rows(options.k, options.batch, options.turns)
        print(common.markdown(header, rows), flush=True)
    if options.words:
        header = ["weight", "words", "inputs", "float32, ms", "unpack, ms", "words, ms"]
        rows = words_rows([16, 64, 256], options.batch, options.turns)
        print(common.markdown([*header, "bytes / float32"], rows), flush=True)
    if options.unpack:
        print(common.markdown(["4096 x 4096", "ms"], unpack_rows(options.turns)), flush=True)
    if options.blocks:
        header = ["blocks", "k", "centroids", "vectors", "float32, ms", "unpack, ms", "default, ms"]
        rows = blocks_rows(options.batch, options.turns)
        header += ["bytes / float32", "extra / float32"]
        print(common.markdown(header, rows), flush=True)


if __name__ == "__main__":
    main()
