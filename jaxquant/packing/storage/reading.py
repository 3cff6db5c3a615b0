"""The leaves of a file, checked, to a tree."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.packing.arrays import PackedArray, is_quantized
from jaxquant.packing.codes import pack_codes
from jaxquant.packing.storage.checks import check_paths
from jaxquant.packing.storage.entries import (
    InvalidError,
    LeafPath,
    Part,
    leaf_name,
    leaf_shape,
    path_text,
    weights_dtype,
)
from jaxquant.packing.storage.entropy import decompressed
from jaxquant.trees import pure, replaced


def decoded(part: Part) -> Any:
    """Return a leaf as it was saved.

    Raises:
      InvalidError: for other values than its checksum is of.
    """
    entry, values, scale = part.entry, part.values, part.scale
    own = zlib.crc32(values.tobytes())
    if part.words is None or part.tables is None:
        if own != part.checksum:
            raise InvalidError("expected another checksum, the values are damaged")
        return as_jax(values)
    codes = decompressed(part.words, part.tables, math.prod(leaf_shape(entry)))
    own = own if scale is None else zlib.crc32(scale.tobytes(), own)
    if zlib.crc32(codes.tobytes(), own) != part.checksum:
        raise InvalidError("expected another checksum, the codes or the codebook are damaged")
    stacked, rows, columns = (tuple(entry[name]) for name in ("stacked", "rows", "columns"))
    matrix = codes.reshape(*stacked, math.prod(rows), math.prod(columns))
    return PackedArray(
        # `jnp.asarray` compiles for each shape
        codes=jax.device_put(pack_codes(matrix, values.shape[-1])),
        codebook=as_jax(values),
        scale=None if scale is None else as_jax(scale),
        rows=rows,
        columns=columns,
        dtype=weights_dtype(entry),
    )


def as_jax(values: np.ndarray) -> Any:
    """Return a JAX array, or the NumPy array if JAX would cut its numbers to 32 bits."""
    same = jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype
    own = values.copy()  # not a part of all that the file holds
    return jax.device_put(own) if same else own


def arranged(own: Mapping[LeafPath, Any], like: Any) -> Any:
    """Return the leaves in the structure of `like`."""
    wanted, structure = jax.tree_util.tree_flatten_with_path(pure(like), is_leaf=is_quantized)
    keys = [tuple(path_text(key_path)) for key_path, _ in wanted]
    check_paths(keys)
    odd = sorted(leaf_name(path) for path in set(keys) ^ own.keys())
    if odd:
        raise InvalidError(f"expected the leaves of `like`, they differ in {', '.join(odd[:3])}")
    for key, (_, leaf) in zip(keys, wanted, strict=True):
        if hasattr(leaf, "shape") and tuple(leaf.shape) != tuple(own[key].shape):
            raise InvalidError(
                f"{leaf_name(key)}: expected shape {tuple(leaf.shape)}, got {own[key].shape}"
            )
    return replaced(like, jax.tree.unflatten(structure, [own[key] for key in keys]))
