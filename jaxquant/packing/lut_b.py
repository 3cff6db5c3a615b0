"""LUT-B: tiles of eight centroids, which the tensor cores of NVIDIA's Rubin multiply by.

A weight [outputs, inputs] is cut into tiles of 8 x 64, each with eight centroids of float8_e4m3fn
and 512 indices of three bits: 3.125 bits a weight. These are the bytes of `lut-b` checkpoints, as
vllm-project/compressed-tensors#801 (July 2026, not merged) describes them; what runs them orders
them anew for its device. `docs/format.md` has the layout. All of it runs on the host, with NumPy.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.packing.arrays import PackedArray
from jaxquant.packing.codes import pack_codes, unpack_codes

_TILE = (8, 64)
_K = 8
_BYTES = 3 * math.prod(_TILE) // 8  # of the indices of a tile
_FLOAT8 = jnp.dtype("float8_e4m3fn")


def to_lut_b(packed: PackedArray) -> dict[str, np.ndarray]:
    """Return the tensors of a `lut-b` checkpoint that hold a packed weight.

    Args:
      packed: of blocks (8, 64), for a weight [..., outputs, inputs], or (64, 8), for a kernel
        [..., inputs, outputs], which is transposed; eight centroids that float8_e4m3fn holds.

    Returns:
      "weight_packed", uint8 [..., outputs / 8, inputs / 64, 192], and "weight_codebook",
      float8_e4m3fn [..., outputs / 8, inputs / 64, 8]. Of a weight with one scale also
      "weight_scale", float32 [1], which the layout lacks: products are to be multiplied by it.

    Raises:
      ValueError: for other blocks, other centroids, and more scales than one.

    >>> import jaxquant as jq
    >>> codebook = jnp.arange(8.0).astype(jnp.float8_e4m3fn).reshape(1, 1, 8)
    >>> weight = jnp.arange(512.0).reshape(8, 64) % 8
    >>> tensors = to_lut_b(jq.pack_array(weight, codebook))
    >>> tensors["weight_packed"].shape, tensors["weight_packed"][0, 0, :3].tolist()
    ((1, 1, 192), [136, 198, 250])
    """
    shape, numbers = packed.shape, packed.numbers
    block = tuple(size // number for size, number in zip(shape, numbers, strict=True))
    if block[-2:] not in (_TILE, _TILE[::-1]) or set(block[:-2]) - {1}:
        raise ValueError(f"expected blocks of 8 x 64, or 64 x 8 in kernels, got {block}")
    if packed.scale is not None and packed.scale.size != 1:
        raise ValueError(f"expected no scale, or one of the weight, got {packed.scale.size}")
    given = np.asarray(packed.codebook)
    codebook = given.astype(_FLOAT8).reshape(*numbers, packed.k)
    if (
        packed.k != _K
        or (codebook.astype(np.float64).ravel() != given.astype(np.float64).ravel()).any()
    ):
        raise ValueError(f"expected {_K} centroids of {_FLOAT8}, got {packed.k} of {given.dtype}")
    codes = unpack_codes(np.asarray(packed.codes), math.prod(packed.rows), _K).reshape(shape)
    if block[-2:] != _TILE:
        codes, codebook = codes.swapaxes(-1, -2), codebook.swapaxes(-2, -3)
    *stacked, outputs, inputs = codes.shape
    height, width = _TILE
    tiles = codes.reshape(*stacked, outputs // height, height, inputs // width, width)
    eights = tiles.swapaxes(-2, -3).reshape(*codebook.shape[:-1], -1, 8).astype(np.uint32)
    words = np.bitwise_or.reduce(eights << np.arange(0, 24, 3, dtype=np.uint32), axis=-1)
    three = words[..., None] >> np.arange(0, 24, 8, dtype=np.uint32)
    indices = (three & 255).astype(np.uint8).reshape(*codebook.shape[:-1], _BYTES)
    tensors = {"weight_packed": indices, "weight_codebook": codebook}
    if packed.scale is not None:
        tensors["weight_scale"] = np.asarray(packed.scale).astype(np.float32).reshape(1)
    return tensors


def from_lut_b(
    tensors: Mapping[str, Any], *, dtype: Any = "float32", transposed: bool = False
) -> PackedArray:
    """Return the packed weight that the tensors of a `lut-b` checkpoint hold.

    Args:
      tensors: "weight_packed" and "weight_codebook", and "weight_scale" if there is one, as
        `to_lut_b` returns them; others are left.
      dtype: of the weight.
      transposed: return a kernel [..., inputs, outputs], not a weight [..., outputs, inputs].

    Returns:
      PackedArray of blocks (8, 64), or (64, 8) if transposed.

    Raises:
      ValueError: for tensors of other shapes or dtypes, and a dtype that is not floating point.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected a dtype of floating point, got {jnp.dtype(dtype)}")
    indices, codebook = (np.asarray(tensors[f"weight_{name}"]) for name in ("packed", "codebook"))
    tiles = indices.shape[:-1]
    fits = len(tiles) >= 2 and indices.shape[-1] == _BYTES and codebook.shape == (*tiles, _K)
    if not fits or indices.dtype != np.uint8 or codebook.dtype != _FLOAT8:
        raise ValueError(
            f"expected uint8 [..., {_BYTES}] and {_FLOAT8} [..., {_K}] for the same tiles, got "
            f"{indices.dtype} {indices.shape} and {codebook.dtype} {codebook.shape}"
        )
    scale = tensors.get("weight_scale")
    if scale is not None:
        scale = np.asarray(scale, np.float32)
        if scale.size != 1:
            raise ValueError(f"expected one scale, got {scale.shape}")
        scale = jax.device_put(scale.reshape((1,) * (len(tiles) + 1)))
    three = indices.reshape(*tiles, -1, 3).astype(np.uint32)
    words = np.bitwise_or.reduce(three << np.arange(0, 24, 8, dtype=np.uint32), axis=-1)
    eights = words[..., None] >> np.arange(0, 24, 3, dtype=np.uint32) & 7
    codes = eights.astype(np.uint8).reshape(*tiles, *_TILE).swapaxes(-2, -3)
    *stacked, down, across, _ = indices.shape
    codes = codes.reshape(*stacked, down * _TILE[0], across * _TILE[1])
    if transposed:
        codes, codebook = codes.swapaxes(-1, -2), codebook.swapaxes(-2, -3)
    return PackedArray(
        codes=jax.device_put(pack_codes(codes, _K)),
        codebook=jax.device_put(codebook),
        scale=scale,
        rows=codes.shape[-2:-1],
        columns=codes.shape[-1:],
        dtype=dtype,
    )
