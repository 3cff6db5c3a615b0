"""What the benchmarks share: the machine in one line, timed runs, Markdown tables."""

import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np


def machine() -> str:
    """Describe the machine and the versions that a result holds for."""
    device = jax.devices()[0]
    return (
        f"{_cpu_model()}, {cores()} cores, {platform.system()} {platform.machine()}; "
        f"JAX device: {device.platform} ({device.device_kind}); "
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"numpy {metadata.version('numpy')}"
    )


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Time `repeats` calls, each until its result is there."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return times


def in_turns(functions: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Time functions in turns, so that a slow moment of the machine meets all; seconds by name."""
    times = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            spent = seconds(function, 1)
            times[name] += spent if turn else []  # the first warms up
    return times


def least(functions: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return the least time of each function that runs in turns with the others."""
    return {name: min(spent) for name, spent in in_turns(functions, turns).items()}


def scikit_learn(problems: Iterable[np.ndarray], k: int, passes: int = 300) -> float:
    """Return the seconds of KMeans(k, n_init=1) on points [n, D], one problem after the other."""
    from sklearn.cluster import KMeans

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        for points in problems:
            KMeans(k, n_init=cast(Any, 1), max_iter=passes, random_state=0).fit(points)
    return time.perf_counter() - start


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collective_sizes(text: str, operation: str) -> list[int]:
    """Return the entries of each result of a collective operation in compiled HLO."""
    found = re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
    shapes = [shape for results in found for shape in re.findall(r"\[([\d,]*)\]", results)]
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
