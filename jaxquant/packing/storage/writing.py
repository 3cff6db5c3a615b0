"""A packed tree to the bytes of a file."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.packing.arrays import (
    PackedArray,
    View,
    is_packed,
    is_product,
    table_bytes,
    with_block_axes,
)
from jaxquant.packing.codes import packed_rows, unpack_codes
from jaxquant.packing.storage.checks import check_entry, check_metadata
from jaxquant.packing.storage.entries import (
    DTYPES,
    FORMAT,
    InvalidError,
    Limits,
    header_checksum,
    leaf_name,
    longest_manifest,
    naming,
    path_text,
)
from jaxquant.packing.storage.entropy import best_tables, compressed


def description_text(description: Mapping[str, Any], limits: Limits) -> str:
    """Return the JSON of what `save` records.

    Raises:
      InvalidError: for metadata that JSON cannot hold.
    """
    try:
        text = json.dumps(description, allow_nan=False, ensure_ascii=False)
        text.encode()  # no halves of surrogate pairs, which would come back as one character
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError(f"metadata: expected what JSON can hold: {error}") from None
    check_metadata(description["metadata"], limits.depth)
    return text


def flattened(packed: Any) -> tuple[list[tuple[list[str], Any]], list[list[str]]]:
    """Return the leaves with their paths, and those of ProductArrays, whose parts are leaves."""
    pairs = jax.tree_util.tree_flatten_with_path(
        packed, is_leaf=lambda node: is_packed(node) or isinstance(node, View)
    )[0]
    nodes = jax.tree_util.tree_flatten_with_path(packed, is_leaf=is_product)[0]
    products = [path_text(path) for path, node in nodes if is_product(node)]
    return [(path_text(path), leaf) for path, leaf in pairs], products


def encoded(
    leaves: Sequence[tuple[list[str], Any]], limits: Limits
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the manifest's entries, and the tensors of the file by name, but for the manifest."""
    entries: list[dict[str, Any]] = []
    codes, frequencies = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint16)]
    values: dict[str, list[np.ndarray]] = {}
    checksums: list[int] = []
    for path, leaf in leaves:
        with naming(leaf_name(path)):
            if is_packed(leaf):
                as_numpy(leaf.codes)  # so that what is none is named
                leaf = with_block_axes(leaf)
            array = as_numpy(leaf.codebook if is_packed(leaf) else leaf)
            entry: dict[str, Any] = {
                "path": path,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
            }
            checksum, arrays = zlib.crc32(array.tobytes()), [array]
            if is_packed(leaf):
                entry |= _sizes(leaf)
                if leaf.scale is not None:
                    scale = as_numpy(leaf.scale)
                    entry["scale"] = {"shape": list(scale.shape), "dtype": scale.dtype.name}
                    checksum = zlib.crc32(scale.tobytes(), checksum)
                    arrays.append(scale)
                check_entry(entry, limits)
                plain = codes_by_model(leaf)
                words, tables = compressed(plain, leaf.k)
                entry |= {"models": len(tables), "words": len(words)}
                codes.append(words)
                frequencies.append(tables.ravel())
                checksum = zlib.crc32(plain.tobytes(), checksum)
            check_entry(entry, limits)
        for array in arrays:
            values.setdefault(array.dtype.name, []).append(array.ravel())
        entries.append(entry)
        checksums.append(checksum)
    tensors = {f"values.{name}": np.concatenate(arrays) for name, arrays in values.items()}
    tensors["checksums"] = np.array([*checksums, 0], np.uint32)  # the last is the header's
    tensors["codes"] = np.concatenate(codes)
    tensors["frequencies"] = np.concatenate(frequencies)
    return entries, tensors


def as_numpy(leaf: Any) -> np.ndarray:
    """Return the numbers of a leaf, in the byte order of the machine."""
    if isinstance(leaf, View):
        raise InvalidError(f"expected a packed weight as it was packed, got {leaf!r}")
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:  # a random key, a deleted array
        raise InvalidError(f"expected an array of numbers, got {error}") from None
    if array.dtype.name not in DTYPES:
        raise InvalidError(f"expected a dtype of safetensors, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _sizes(packed: PackedArray) -> dict[str, Any]:
    """Return what an entry says of a packed leaf; its codes are not encoded yet."""
    stacked = np.shape(packed.codes)[:-2]
    sizes = {"rows": packed.rows, "columns": packed.columns, "stacked": stacked}
    own = {} if packed.dtype == packed.codebook.dtype else {"weights": packed.dtype.name}
    return {name: list(size) for name, size in sizes.items()} | {"models": 1, "words": 0} | own


def codes_by_model(packed: PackedArray) -> np.ndarray:
    """Return the codes, uint8 [stacked layers, weights of one]."""
    codes, k = as_numpy(packed.codes), packed.k
    rows, columns = math.prod(packed.rows), math.prod(packed.columns)
    if codes.dtype != np.uint8 or codes.shape[-2:] != (packed_rows(rows, k), columns):
        raise InvalidError(
            f"expected codes uint8 [..., {packed_rows(rows, k)}, {columns}], "
            f"got {codes.dtype} {codes.shape}"
        )
    plain = unpack_codes(codes, rows, k)
    if plain.size and plain.max() >= k:
        raise InvalidError(f"expected codes below {k}, got {plain.max()}")
    return plain.reshape(math.prod(codes.shape[:-2]) if plain.size else 1, -1)


def stored_bytes(packed: PackedArray) -> int:
    """Return the bytes that a weight takes in a file, but for its entry in the manifest."""
    packed = with_block_axes(packed)
    _, bits = best_tables(codes_by_model(packed), packed.k)
    return math.ceil(bits / 8) + table_bytes(packed.codebook, packed.scale)


def manifest_of(entries: Sequence[Mapping[str, Any]], size: int) -> np.ndarray:
    """Return the manifest of a file of `size` other bytes, compressed no more than `load` takes."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    small = zlib.compress(text, 9)
    if len(text) > longest_manifest(size + len(small)):
        small = zlib.compress(text, 0)
    return np.frombuffer(small, np.uint8)


def serialized(tensors: Mapping[str, np.ndarray], text: str) -> bytes:
    """Return the file. Not by `safetensors.serialize`: its order, and so the file, is random."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, FORMAT: text}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # is aligned
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = DTYPES[tensor.dtype.name]
        header[name] = {"dtype": dtype, "shape": [tensor.size], "data_offsets": [start, end]}
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    data = len(data).to_bytes(8, "little") + data
    tensors["checksums"][-1] = header_checksum(data, tensors)
    return b"".join([data, *(tensor.tobytes() for _, tensor in ordered)])
