r"""Bits a weight against error, of codebooks by all kinds of blocks, on kernels from a file.

    python -m benchmarks.bits --weights resnet56.npz        # a minute or two on two cores
    python -m benchmarks.bits --weights model.safetensors --names "encoder.*" --largest 12

Every array of two axes or more and 4096 entries or more is taken as a matrix [inputs, outputs]: an
array [outputs, ..., inputs] as PyTorch stores it is turned (`--inputs-first`: it is one already).
Each is quantized in one round, without re-training. Error is the squared error over all kernels
over their squared norm; bits are those of packed codes, codebooks (bfloat16, where a row does not
say otherwise) and scales. Groups and tiles have the size that the row gives, or the largest below
it that divides the kernel.

NF4 (Dettmers et al., "QLoRA", 2023, appendix E) and rounding to int4 have a table that knows
nothing of the weights, times the largest magnitude of each group in bfloat16.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import common

NF4 = np.array(
    [
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ],
    np.float32,
).ravel()
INT4 = np.arange(-7, 8, dtype=np.float32) / 7
WHOLE = -1
METHODS: dict[str, dict[str, Any]] = {
    "one codebook": {"block": (WHOLE, WHOLE)},
    "a codebook an output": {"block": (WHOLE, 1)},
    "groups of 128 inputs": {"block": (128, 1)},
    "groups of 128, scaled": {"block": (128, 1), "scaled": True},
    "groups of 32, scaled": {"block": (32, 1), "scaled": True},
    "outputs, scaled": {"block": (WHOLE, 1), "scaled": True},
    "tiles of 8 x 64": {"block": (8, 64)},
    "tiles of 8 x 64, float8": {"block": (8, 64), "centroid_dtype": "float8_e4m3fn"},
}
TABLES = {"NF4, groups of 64": (NF4, 64), "int4, groups of 64": (INT4, 64)}
TABLES |= {"NF4, groups of 128": (NF4, 128), "int4, groups of 128": (INT4, 128)}


def read(
    path: Path, *, inputs_first: bool, names: str, largest: int | None
) -> dict[str, jax.Array]:
    """Return the kernels of a file as matrices [inputs, outputs]."""
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
    else:
        from safetensors.numpy import load_file

        arrays = load_file(path)
    kernels = {}
    for name, array in arrays.items():
        if (
            re.fullmatch(names, name)
            and array.ndim >= 2
            and array.size >= 4096
            and array.dtype == np.float32
        ):
            flat = (
                array.reshape(-1, array.shape[-1])
                if inputs_first
                else array.reshape(array.shape[0], -1).T
            )
            kernels[name] = jnp.asarray(flat)
    order = sorted(kernels, key=lambda name: -kernels[name].size)[:largest]
    return {name: kernels[name] for name in order}


def fitting(size: int, wanted: int) -> int:
    """Return the largest divisor of a size that is at most `wanted`, or -1 for the whole of it."""
    if wanted == WHOLE:
        return WHOLE
    return next(d for d in range(min(size, wanted), 0, -1) if size % d == 0)


def clustered(kernels: dict[str, jax.Array], k: int, rule: dict[str, Any]) -> tuple[float, float]:
    """Return bits a weight and error of kernels that are quantized by a rule."""
    options: dict[str, Any] = {"centroid_dtype": "bfloat16"} | rule
    rules = []
    for name, kernel in kernels.items():
        block = tuple(map(fitting, kernel.shape, rule["block"]))
        size = np.prod([n if b == WHOLE else b for n, b in zip(kernel.shape, block, strict=True)])
        if options.get("scaled") or size > k:
            options["block"] = block
            rules.append(jq.LayerRule(re.escape(name), k=k, **options))
    plan = jq.slq(kernels, rounds=(k,), rules=rules)
    new, state, _ = jq.quantize_round(plan, kernels, jq.init(plan, kernels))
    return jq.report(new, state).bits_per_weight, error(new, kernels)


def by_table(
    kernels: dict[str, jax.Array], centroids: np.ndarray, group: int
) -> tuple[float, float]:
    """Return bits a weight and error of kernels on a fixed table by groups of inputs."""
    new, scales = {}, 0
    middles = (centroids[1:] + centroids[:-1]) / 2
    for name, kernel in kernels.items():
        rows = np.asarray(kernel).T.reshape(-1, fitting(kernel.shape[0], group))
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scale = np.asarray(jnp.asarray(largest, jnp.bfloat16).astype(jnp.float32))
        codes = np.searchsorted(middles, rows / np.where(scale > 0, scale, 1))
        new[name] = (centroids[codes] * scale).reshape(kernel.shape[::-1]).T
        scales += scale.size
    size = sum(kernel.size for kernel in kernels.values())
    return 4 + 16 * scales / size, error(new, kernels)


def error(new: dict[str, Any], old: dict[str, Any]) -> float:
    """Return the squared error over all kernels over their squared norm."""
    pairs = [(np.asarray(new[name], np.float64), np.asarray(old[name], np.float64)) for name in old]
    return sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help=".npz or .safetensors")
    parser.add_argument("--inputs-first", action="store_true")
    parser.add_argument("--names", default=".*", help="only kernels whose whole name it matches")
    parser.add_argument("--largest", type=int, help="only so many kernels, the largest")
    args = parser.parse_args()
    options = {"inputs_first": args.inputs_first, "names": args.names, "largest": args.largest}
    kernels = read(args.weights, **options)
    size = sum(kernel.size for kernel in kernels.values())
    print(f"{common.machine()}\n\n{len(kernels)} kernels, {size:,} weights\n")
    rows: list[tuple[str, Callable[[], tuple[float, float]]]] = [
        (f"{name}, k = {k}", lambda k=k, rule=rule: clustered(kernels, k, rule))
        for name, rule in METHODS.items()
        for k in ((8,) if "tiles" in name else (8, 16))
    ]
    rows += [(name, lambda own=own: by_table(kernels, *own)) for name, own in TABLES.items()]
    found = []
    for name, measure in rows:
        start = time.perf_counter()
        found.append((name, *measure()))
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    lines = [(n, f"{bits:.3f}", f"{e:.5f}") for n, bits, e in sorted(found, key=lambda x: x[1])]
    print(common.markdown(["codebooks", "bits a weight", "error"], lines))


if __name__ == "__main__":
    main()
