r"""One token of a whole decoder from packed weights, beside the same decoder in floats.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.decode
    ... python -m benchmarks.decode --k 3 --implementations native --batch 8

Width 1024, 8 layers of seven products, a head of 32,000 words, 123 million weights: what a step
costs where XLA sees all products at once, as no benchmark of single products tells. For each number
of centroids, with the layers in a list and stacked under `lax.scan`: milliseconds in float32 and
from packed weights, by `jq.packed` of the same step and by each implementation that knows such
codes, as medians of turns; in brackets the MiB that a step takes beside its arguments; and how long
the two are traced, in milliseconds, the least of a few.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from benchmarks import common
from benchmarks.matmul import IMPLEMENTATIONS, Program

WIDTH, HIDDEN, LAYERS, VOCABULARY = 1024, 2816, 8, 32_000
HEADS, KEY_HEADS, HEAD_SIZE, POSITIONS = 16, 4, 64, 128
SHAPES = {
    "query": (WIDTH, HEADS * HEAD_SIZE),
    "key": (WIDTH, KEY_HEADS * HEAD_SIZE),
    "value": (WIDTH, KEY_HEADS * HEAD_SIZE),
    "out": (HEADS * HEAD_SIZE, WIDTH),
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
Product = Callable[[jax.Array, Any], jax.Array]


def make_layers(k: int) -> list[dict[str, jq.PackedArray]]:
    """Return the layers, their weights on k levels."""
    keys = iter(jax.random.split(jax.random.key(0), LAYERS * len(SHAPES)))
    return [
        {name: weight(next(keys), shape, k) for name, shape in SHAPES.items()}
        for _ in range(LAYERS)
    ]


@functools.partial(jax.jit, static_argnums=(1, 2))
def weight(key: jax.Array, shape: tuple[int, ...], k: int) -> jq.PackedArray:
    """Return a packed weight of k levels."""
    values = jax.random.normal(key, shape) / shape[0] ** 0.5
    return jq.pack_array(values, jnp.linspace(-2.0, 2.0, k) / shape[0] ** 0.5)


def stack(layers: list[Any]) -> Any:
    """Return the layers as `lax.scan` takes them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def step(product: Product, params: Any, cache: jax.Array, x: jax.Array) -> jax.Array:
    """Return the logits [batch, words] after one token more, embedded as x [batch, width].

    `cache` holds keys and values, [layers, 2, batch, positions, key heads, head size].
    """
    if isinstance(params["layers"], list):
        for layer, pair in zip(params["layers"], cache, strict=True):
            x = block(product, layer, pair, x)
    else:
        x = jax.lax.scan(
            lambda x, one: (block(product, *one, x), None), x, (params["layers"], cache)
        )[0]
    return product(normalize(x), params["head"])


def block(product: Product, layer: Any, cache: jax.Array, x: jax.Array) -> jax.Array:
    """Return what one layer makes of x: grouped attention, a gated network."""
    y = normalize(x)
    query, key, value = (product(y, layer[name]) for name in ("query", "key", "value"))
    own = jnp.stack([key, value]).reshape(2, -1, 1, KEY_HEADS, HEAD_SIZE)
    keys, values = jnp.concatenate([cache[:, :, 1:], own], axis=2)
    query = query.reshape(-1, KEY_HEADS, HEADS // KEY_HEADS, HEAD_SIZE)
    scores = jax.nn.softmax(jnp.einsum("bkgd,bpkd->bkgp", query, keys) / HEAD_SIZE**0.5)
    attended = jnp.einsum("bkgp,bpkd->bkgd", scores, values).reshape(x.shape[0], -1)
    x = x + product(attended, layer["out"])
    y = normalize(x)
    hidden = jax.nn.silu(product(y, layer["gate"])) * product(y, layer["up"])
    return x + product(hidden, layer["down"])


def normalize(x: jax.Array) -> jax.Array:
    """Return x of mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def programs(k: int, batch: int, stacked: bool, names: list[str]) -> dict[str, Program]:
    """Return the steps to time, by name."""
    key = jax.random.key(1)
    cache = jax.random.normal(key, (LAYERS, 2, batch, POSITIONS, KEY_HEADS, HEAD_SIZE))
    x = jax.random.normal(key, (batch, WIDTH))
    packed = {"layers": make_layers(k), "head": weight(key, (WIDTH, VOCABULARY), k)}
    floats = jax.jit(jq.unpack)(packed)
    if stacked:
        packed, floats = ({**tree, "layers": stack(tree["layers"])} for tree in (packed, floats))
    made = {"float32": Program(functools.partial(step, jnp.matmul), floats, cache, x)}
    for name in names:
        function = jq.packed(functools.partial(step, jnp.matmul))
        if name != "packed":
            function = functools.partial(step, functools.partial(jq.matmul, implementation=name))
        try:
            made[name] = Program(function, packed, cache, x)
        except ValueError:
            continue  # not for these codes
    return made


def rows(ks: list[int], batches: list[int], turns: int, names: list[str]) -> Iterator[list[object]]:
    """Yield a row for each case."""
    for stacked in (False, True):
        for k in ks:
            for batch in batches:
                made = programs(k, batch, stacked, names)
                times = medians(made, turns)
                yield [
                    "scanned" if stacked else "in a list",
                    k,
                    batch,
                    *(
                        f"{1e3 * times[n]:.1f} ({made[n].extra_bytes() / 2**20:.0f})"
                        if n in made
                        else ""
                        for n in ("float32", *names)
                    ),
                    *trace_times(made),
                ]


def trace_times(made: dict[str, Program]) -> list[str]:
    """Return the milliseconds that the step is traced for, in floats and by `jq.packed`."""
    function = functools.partial(step, jnp.matmul)
    if "packed" not in made:
        return ["", ""]
    times = {"float32": [], "packed": []}
    for _ in range(5):
        for name, transform in (("float32", functools.partial), ("packed", jq.packed)):
            jax.clear_caches()
            started = time.perf_counter()
            jax.jit(transform(function)).trace(*made[name].args)
            times[name].append(time.perf_counter() - started)
    return [f"{1e3 * min(spent):.0f}" for spent in times.values()]


def medians(functions: dict[str, Program], turns: int) -> dict[str, float]:
    """Time functions in turns; return the median seconds of each by name."""
    times = common.in_turns(functions, turns)
    return {name: statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--k", nargs="+", type=int, default=[3, 5, 16, 17])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--implementations", nargs="*", default=["packed", *IMPLEMENTATIONS])
    options = parser.parse_args()
    print(common.machine())
    header = ["layers", "k", "vectors", "float32, ms (MiB)"]
    header += [f"{name}, ms (MiB)" for name in options.implementations]
    header += ["traced, float32", "traced, packed"]
    table = rows(options.k, options.batch, options.turns, options.implementations)
    print(common.markdown(header, table), flush=True)


if __name__ == "__main__":
    main()
