"""Weights on codebooks of blocks of all kinds, made with NumPy."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.packing.codes import pack_codes


class Case(NamedTuple):
    """A weight, its blocks, and what their codebooks are stored as."""

    shape: tuple[int, ...]
    numbers: tuple[int, ...]  # of blocks along each axis
    k: int = 3
    dtype: str = "float32"
    codebook_dtype: str = "float32"
    scale_dtype: str | None = None
    layers: int = 0  # that are stacked
    own: tuple[int, ...] | None = None  # codebooks along each axis, if fewer than blocks
    scales: tuple[int, ...] | None = None  # scales along each axis, if fewer than blocks


CASES = {
    "tiles": Case((16, 12), (2, 3)),
    "groups": Case((12, 7), (3, 7), 5),
    "rows": Case((12, 7), (12, 1)),
    "channels of a convolution": Case((3, 3, 4, 6), (1, 1, 2, 1), 17),
    "a window of one": Case((1, 1, 4, 6), (1, 1, 1, 6)),
    "groups of a vector": Case((12,), (4,)),
    "channels of layers": Case((4, 20, 6), (4, 1, 6), layers=4),
    "groups of layers": Case((2, 12, 6), (2, 3, 6), 4, layers=2),
    "narrow tiles": Case((16, 12), (2, 3), 8, "float32", "float8_e4m3fn"),
    "narrow channels": Case((16, 12), (1, 12), 8, "bfloat16", "float16"),
    "scaled groups": Case((12, 8), (3, 8), 5, "float32", "float32", "bfloat16", own=(1, 1)),
    "scaled integers": Case((16, 12), (2, 3), 16, "bfloat16", "int8", "float32", own=(1, 1)),
    "scaled rows": Case((12, 7), (12, 7), 3, "float16", "float8_e4m3fn", "float32", own=(12, 1)),
    "scaled columns": Case((12, 8), (1, 4), 5, "float32", "int8", "float32", own=(1, 1)),
    "scaled codebooks": Case((16, 12), (2, 3), 4, "float32", "bfloat16", "float32"),
    "a scale of tiles": Case(
        (16, 12), (2, 3), 8, "float32", "float8_e4m3fn", "float32", scales=(1, 1)
    ),
    "a scale of layers": Case(
        (2, 6, 4), (2, 1, 4), 3, "float32", "float8_e4m3fn", "float32", 2, None, (1, 1, 1)
    ),
    "scaled layers": Case((3, 12, 6), (3, 2, 6), 3, "bfloat16", "int8", "bfloat16", 3, (1, 1, 1)),
}


def made(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return random weights of blocks, their codes, their codebooks and their scale."""
    rng = np.random.default_rng(case.k)
    codebook = np.sort(rng.normal(size=(*(case.own or case.numbers), case.k)), axis=-1)
    codebook = codebook * 40 if case.codebook_dtype == "int8" else codebook
    codebook, scale = codebook.astype(jnp.dtype(case.codebook_dtype)), None
    centroids = codebook.astype(np.float32)
    if case.scale_dtype is not None:
        scale = rng.uniform(0.5, 2, (*(case.scales or case.numbers), 1)).astype(
            jnp.dtype(case.scale_dtype)
        )
        centroids = centroids * scale.astype(np.float32)
    centroids = centroids.astype(jnp.dtype(case.dtype))
    for axis, (size, number) in enumerate(zip(case.shape, case.numbers, strict=True)):
        centroids = np.repeat(centroids, size // number, axis)
    codes = rng.integers(0, case.k, case.shape).astype(np.uint8)
    weights = np.take_along_axis(centroids, codes[..., None].astype(int), -1)[..., 0]
    return weights, codes, codebook, scale


def on_blocks(case: Case) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return random weights of blocks, their codebooks and their scale."""
    weights, _, codebook, scale = made(case)
    return (
        jnp.asarray(weights),
        jnp.asarray(codebook),
        None if scale is None else jnp.asarray(scale),
    )


def packed_blocks(case: Case) -> tuple[jq.PackedArray, np.ndarray]:
    """Return a PackedArray and the weights in it, without a program for each shape."""
    weights, codes, codebook, scale = made(case)
    stacked, rows = case.shape[: case.layers and 1], case.shape[case.layers and 1 : -1]
    if len(case.shape) == 1:
        rows = case.shape
    if case.layers and scale is not None:
        codebook = np.broadcast_to(codebook, (case.layers, *codebook.shape[1:]))
        scale = np.broadcast_to(scale, (case.layers, *scale.shape[1:]))
    matrix = codes.reshape(*stacked, math.prod(rows), -1)
    packed = jq.PackedArray(
        codes=jax.device_put(pack_codes(matrix, case.k)),
        codebook=jax.device_put(codebook),
        scale=None if scale is None else jax.device_put(scale),
        rows=rows,
        columns=case.shape[1:][-1:],
        dtype=case.dtype,
    )
    return packed, weights


def by_block(x: Any, numbers: tuple[int, ...]) -> list[np.ndarray]:
    """Return the entries of each block, one block after the other."""
    sizes = [size // number for size, number in zip(np.shape(x), numbers, strict=True)]
    return [
        np.asarray(x)[
            tuple(slice(i * n, i * n + n) for i, n in zip(block, sizes, strict=True))
        ].ravel()
        for block in np.ndindex(*numbers)
    ]
