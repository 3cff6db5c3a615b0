r"""Time and quality of `jaxquant.kmeans` against scikit-learn, kmeans1d and flash1dkmeans.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python -m benchmarks.kmeans                      # about two minutes on two cores
    python -m benchmarks.kmeans --parts speed --distribution normal

Five tables:

- speed: k = 17 clusters of 1M float32 weights, all methods in this one process, in turns.
  Ours is jitted, and its compilation timed apart. Every loss is computed the same way: in float64,
  every weight to its nearest centroid. kmeans1d is exact, and so the optimum that the losses are
  divided by; a part of its time is the conversion of its arguments and results to Python lists.
  The other methods also return the code of every weight; ours with that is a row of its own.
- quality: loss / exact optimum on other distributions, and the bound on it that `kmeans` reports.
- scale: ours alone on 10M and 100M weights, each in a process of its own: time, and memory. Peak is
  that of the whole process with Python and JAX; added is what one call takes on top of what was
  there before it.
- blocks: a codebook for each of many blocks, as a round clusters them, against one codebook for the
  leaf; flash1dkmeans and scikit-learn on 20 of the 4096 columns one by one, extrapolated to all.
  Temporaries are what XLA says of the compiled program.
- hard: loss / exact optimum on arrays that no equal bins resolve.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import common
from jaxquant.clustering.codebooks import assign
from jaxquant.clustering.kmeans import kmeans
from jaxquant.clustering.options import Clustering
from jaxquant.rounds.cluster import cluster_leaf

SEED = 0
PARTS = ("speed", "quality", "scale", "blocks", "hard")


def _outliers(rng: np.random.Generator, size: int) -> np.ndarray:
    weights = rng.standard_normal(size, np.float32)
    weights[: max(size // 100_000, 1)] *= 200 / np.abs(weights[: max(size // 100_000, 1)])
    return weights


def distributions(df: float) -> dict[str, Callable[[np.random.Generator, int], np.ndarray]]:
    """Return the weights to cluster, by name."""
    normal = np.random.Generator.standard_normal
    return {
        f"Student t, {df:g} degrees of freedom": lambda rng, n: rng.standard_t(df, n),
        "normal": normal,
        "normal, 1 in 100,000 at 200 sd": _outliers,
        "normal, mean 10": lambda rng, n: normal(rng, n) + 10,
        "normal, modes at -1000 and 1000": lambda rng, n: (
            normal(rng, n) + rng.choice([-1000, 1000], n)
        ),
        "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    }


def draw(name: str, df: float, size: int) -> np.ndarray:
    """Draw float32 weights, in pieces that keep the memory small."""
    sample, rng = distributions(df)[name], np.random.default_rng(SEED)
    weights = np.empty(size, np.float32)
    for start in range(0, size, 1_000_000):
        piece = weights[start : start + 1_000_000]
        piece[:] = sample(rng, piece.size)
    return weights


def loss(weights: np.ndarray, centroids: Any) -> float:
    """Sum the squared distances to the nearest centroid, in float64."""
    centroids = np.sort(np.asarray(centroids, np.float64))
    wide = weights.astype(np.float64)
    codes = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, wide)
    return float(np.sum(np.square(wide - centroids[codes])))


# Methods: weights -> a function without arguments that returns centroids -------------------------


def centroids_and_codes(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Cluster, and assign: what the other methods return."""
    centroids = kmeans(x, k).centroids
    return centroids, assign(x, centroids)


def ours(
    weights: np.ndarray, k: int, *, codes: bool = False
) -> tuple[Callable[[], jax.Array], float]:
    """Return the compiled clustering and its compile time in seconds."""
    x = jnp.asarray(weights)
    start = time.perf_counter()
    function = centroids_and_codes if codes else kmeans
    compiled = jax.jit(functools.partial(function, k=k)).lower(x).compile()
    compile_time = time.perf_counter() - start
    return lambda: jax.block_until_ready(compiled(x))[0], compile_time


def scikit_learn(weights: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    """Return scikit-learn's k-means with one start (k-means++)."""
    from sklearn.cluster import KMeans

    column = weights.reshape(-1, 1)

    def run() -> np.ndarray:
        model: Any = KMeans(k, n_init=cast(Any, 1), random_state=SEED).fit(column)
        return model.cluster_centers_.ravel()

    return run


def exact(weights: np.ndarray, k: int) -> Callable[[], list[float]]:
    """Return kmeans1d, the exact optimum."""
    import kmeans1d  # pyright: ignore[reportMissingImports]

    return lambda: kmeans1d.cluster(cast(Any, weights), k).centroids


def flash(weights: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    """Return flash1dkmeans, warmed up: its first call compiles."""
    from flash1dkmeans import kmeans_1d  # pyright: ignore[reportMissingImports]

    run = lambda x: kmeans_1d(x, k, random_state=SEED)[0]  # noqa: E731
    run(weights[: 100 * k])
    return lambda: run(weights)


# Tables ------------------------------------------------------------------------------------------


def speed(name: str, df: float, size: int, k: int, repeats: int) -> None:
    """Print the table of all methods on one distribution."""
    weights = draw(name, df, size)
    run_ours, compile_time = ours(weights, k)
    methods = {
        "jaxquant.kmeans": (run_ours, repeats),
        "jaxquant.kmeans and assign": (ours(weights, k, codes=True)[0], repeats),
        "flash1dkmeans": (flash(weights, k), max(repeats // 2, 1)),
        "scikit-learn KMeans(n_init=1)": (scikit_learn(weights, k), max(repeats // 4, 1)),
        "kmeans1d (exact)": (exact(weights, k), 1),
    }
    losses = {method: loss(weights, run()) for method, (run, _) in methods.items()}  # warms up
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(repeats):
        for method, (run, count) in methods.items():
            if turn < count:
                times[method] += common.seconds(run, 1)
    optimum = losses["kmeans1d (exact)"]
    reference = statistics.median(times["jaxquant.kmeans"])
    print(f"\n### {size:,} weights, {name}, k = {k}\n")
    print(
        common.markdown(
            ["method", "seconds (median)", "best", "runs", "times slower", "loss / exact optimum"],
            [
                [
                    method,
                    f"{statistics.median(taken):.4f}",
                    f"{min(taken):.4f}",
                    len(taken),
                    f"{statistics.median(taken) / reference:.1f}",
                    f"{losses[method] / optimum:.6f}",
                ]
                for method, taken in times.items()
            ],
        )
    )
    print(f"\njaxquant.kmeans compiled once before that, in {compile_time:.2f} s.")


def quality(df: float, size: int, k: int) -> None:
    """Print loss / exact optimum on every distribution."""
    rows = []
    cluster = jax.jit(functools.partial(kmeans, k=k))
    for name in distributions(df):
        weights = draw(name, df, size)
        result = cluster(jnp.asarray(weights))
        optimum = loss(weights, exact(weights, k)())
        ratios = [
            loss(weights, centroids) / optimum
            for centroids in (result.centroids, flash(weights, k)(), scikit_learn(weights, k)())
        ]
        bound = f"{1 + float(result.gap):.4f}"
        rows.append([name, *(f"{ratio:.6f}" for ratio in ratios), bound])
    print(f"\n### loss / exact optimum, {size:,} weights, k = {k}\n")
    print(
        common.markdown(
            ["weights", "jaxquant", "flash1dkmeans", "scikit-learn", "our certificate: at most"],
            rows,
        )
    )


def scale(name: str, df: float, sizes: list[int], k: int, repeats: int) -> None:
    """Print time and memory of ours on large arrays."""
    rows = []
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.kmeans", "--child", name]
        command += ["--weights", str(size), "--df", str(df), "--k", str(k)]
        command += ["--repeats", str(repeats)]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        got = json.loads(child.stdout.splitlines()[-1])
        median = statistics.median(got["times"])
        rows.append(
            [
                f"{size:,}",
                f"{median:.3f}",
                f"{min(got['times']):.3f}",
                f"{median / size * 1e9:.2f}",
                f"{got['peak'] / (4 * size):.2f}",
                f"{got['added'] / (4 * size):.2f}",
            ]
        )
    print(f"\n### jaxquant.kmeans alone, {name}, k = {k}\n")
    header = ["weights", "seconds (median)", "best", "ns per weight"]
    print(common.markdown([*header, "peak / input bytes", "added / input bytes"], rows))


def blocks_table(repeats: int) -> None:
    """Print time, memory and loss of codebooks for many blocks."""
    rows, rng = [], np.random.default_rng(SEED)
    cases = [
        ("one codebook", (4096, 4096), (1, 1), 16),
        ("a codebook a column", (4096, 4096), (1, 4096), 16),
        ("tiles (8, 64)", (2048, 4096), (256, 64), 8),
        ("groups (128, 1)", (2048, 4096), (16, 4096), 16),
    ]
    for name, shape, numbers, k in cases:
        x = jnp.asarray(rng.standard_normal(shape, np.float32))
        block = tuple(side // number for side, number in zip(shape, numbers, strict=True))
        plan = jq.slq({"w": x}, rules=[jq.LayerRule("w", k=k, block=block)])
        options = {"layer": plan.selection.selected[0], "clustering": Clustering()}
        run = functools.partial(cluster_leaf, **options)
        tables = jnp.zeros((*numbers, k), jnp.float32), jnp.zeros((*numbers, k), bool)
        args = x, None, *tables, None
        compiled = jax.jit(run).lower(*args).compile()
        losses = np.asarray(compiled(*args).clusters.losses).reshape(-1, k)[:50].sum()
        least = min(common.seconds(functools.partial(compiled, *args), repeats))
        size = np.prod(shape) // np.prod(numbers)
        cut = np.asarray(x).reshape(numbers[0], -1, numbers[1], shape[1] // numbers[1])
        cut = cut.transpose(0, 2, 1, 3).reshape(-1, size)[:50]
        optimum = sum(loss(own, exact(own, k)()) for own in cut[: 50 if size < 2**16 else 0])
        memory: Any = compiled.memory_analysis()
        temporary = memory.temp_size_in_bytes / x.nbytes
        ratio = f"{losses / optimum:.5f}" if optimum else ""
        rows.append([name, shape, k, f"{least:.3f}", f"{least / x.size * 1e9:.1f}"])
        rows[-1] += [f"{temporary:.2f}", ratio]
        if name == "a codebook a column":
            for method, make in (("flash1dkmeans", flash), ("scikit-learn", scikit_learn)):
                runs = [make(own, k) for own in cut[:20]]
                pairs = zip(cut[:20], runs, strict=True)
                ratio = sum(loss(own, one()) for own, one in pairs) / sum(
                    loss(own, exact(own, k)()) for own in cut[:20]
                )
                spent = sum(min(common.seconds(one, 2)) for one in runs) / 20 * 4096
                label = f"{method}, 20 columns of 4096, extrapolated"
                rows.append([label, shape, k, f"{spent:.3f}", f"{spent / x.size * 1e9:.1f}", ""])
                rows[-1].append(f"{ratio:.5f}, of 20")
    print("\n### Blocks, normal weights\n")
    header = ["codebooks", "shape", "k", "seconds (best)", "ns per weight"]
    header += ["temporaries / weight bytes", "loss / exact optimum, 50 blocks"]
    print(common.markdown(header, rows))


def hard(size: int, k: int) -> None:
    """Print loss / exact optimum on hard arrays, small and large."""
    rows, rng = [], np.random.default_rng(SEED)
    cluster = jax.jit(functools.partial(kmeans, k=k))
    for n in (1500, size):
        normal = rng.standard_normal(n)
        arrays = {
            "normal, one at 1e5 deviations": np.r_[normal[1:], 1e5],
            "normal, one at 1e10 deviations": np.r_[normal[1:], 1e10],
            "modes 0, 1, 1e5, deviation 1e-3": rng.choice([0, 1, 1e5], n) + 1e-3 * normal,
            "modes 1e6 apart": rng.choice([0, 1e6], n) + normal,
            "Cauchy": rng.standard_cauchy(n),
            "log-normal, 5": np.exp(5 * normal),
        }
        for name, values in arrays.items():
            x = values.astype(np.float32)
            result = cluster(jnp.asarray(x))
            ratio = loss(x, result.centroids) / loss(x, exact(x.astype(np.float64), k)())
            rows.append([name, f"{n:,}", f"{ratio:.6f}", f"{1 + float(result.gap):.4f}"])
    print(f"\n### Hard arrays, k = {k} (kmeans1d sums in float64: below 1 it was not exact)\n")
    header = ["weights", "number", "loss / kmeans1d", "our certificate: at most"]
    print(common.markdown(header, rows))


def _memory(field: str) -> int:
    """Return a line of /proc/self/status in bytes, such as VmRSS or its peak VmHWM."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def child(name: str, df: float, size: int, k: int, repeats: int) -> None:
    """Cluster one large array and print times and memory as JSON."""
    x = jax.block_until_ready(jnp.array(draw(name, df, size)))
    compiled = jax.jit(functools.partial(kmeans, k=k)).lower(x).compile()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    times = common.seconds(lambda: compiled(x), repeats)
    peak = _memory("VmHWM")
    print(json.dumps({"times": times, "peak": peak, "added": peak - before}))


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--distribution", default="Student", help="how its name starts")
    parser.add_argument("--df", type=float, default=3.0, help="degrees of freedom of Student's t")
    parser.add_argument("--weights", type=int, default=1_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--k", type=int, default=17)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.df, args.weights, args.k, args.repeats)
        return
    names = [name for name in distributions(args.df) if name.startswith(args.distribution)]
    if not names:
        parser.error(f"expected --distribution to start one of {list(distributions(args.df))}")
    warnings.filterwarnings("ignore", module="sklearn")
    print(common.machine())
    if "speed" in args.parts:
        speed(names[0], args.df, args.weights, args.k, args.repeats)
    if "quality" in args.parts:
        quality(args.df, args.weights, args.k)
    if "scale" in args.parts:
        scale(names[0], args.df, args.sizes, args.k, max(args.repeats // 2, 1))
    if "blocks" in args.parts:
        blocks_table(args.repeats)
    if "hard" in args.parts:
        hard(100_000, args.k)


if __name__ == "__main__":
    main()
