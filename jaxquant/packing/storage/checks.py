"""All of a file that can be checked before anything in it is decoded."""

import json
import math
import re
import reprlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.clustering.codebooks import MOST_CENTROIDS
from jaxquant.packing.storage.entries import (
    DTYPE_NAMES,
    DTYPES,
    FLOATING,
    FORMAT,
    PRODUCT_PARTS,
    InvalidError,
    LeafPath,
    Limits,
    Part,
    arrays_of,
    header_checksum,
    header_size,
    is_packed_entry,
    leaf_name,
    leaf_shape,
    longest_manifest,
    naming,
    nested,
    products_of,
    weights_dtype,
)

READ_VERSIONS = (1, 2)  # in the first, all weights are of their codebook's dtype, without scales
_WEIGHTS_PER_BYTE = 64
MOST_ENTRIES = 2**48  # of an array, beyond any memory
_MOST_AXES = 64  # of NumPy
_SCALES = {"float32", "bfloat16"}
_KINDS = {dict: "object", list: "array"}
_TENSORS = {"manifest": "U8", "checksums": "U32", "codes": "U32", "frequencies": "U16"}


def examined(data: bytes, limits: Limits) -> tuple[dict[str, Any], list[Part]]:
    """Check all of a file that can be checked without decoding.

    Returns:
      What the header says, and the leaves.
    """
    description, tensors = _open(data)
    entries = _read_manifest(tensors["manifest"], len(data))
    if len(tensors["checksums"]) - len(entries) not in (0, 1):
        raise InvalidError("manifest: expected an entry for each checksum")
    _check_description(description, limits)
    _check_entries(entries, tensors, limits, len(data))
    parts = list(_parts(entries, tensors))
    _check_products(products_of(description), {tuple(part.entry["path"]): part for part in parts})
    if len(tensors["checksums"]) > len(entries):  # the first files had none of the header
        _check_header(data[: 8 + header_size(data)], tensors)
    return description, parts


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description in the header, and the tensors, all of one dimension."""
    from safetensors import SafetensorError, deserialize

    try:
        raw = deserialize(data)  # checks every offset against the size of the file
    except (SafetensorError, ValueError, OverflowError) as error:
        raise InvalidError(f"expected a safetensors file, got {error}") from None
    described = _json(data[8 : 8 + header_size(data)], dict).get("__metadata__") or {}
    if described.get("format") != FORMAT or FORMAT not in described:
        raise InvalidError("expected a file of jaxquant.save, got other safetensors")
    description = _json(described[FORMAT], dict)
    version = description.get("version")
    if type(version) is not int or version not in READ_VERSIONS:
        raise InvalidError(f"expected format version 1 or 2, got {reprlib.repr(version)}")
    known = _TENSORS | {f"values.{name}": code for name, code in DTYPES.items()}
    tensors = {}
    for name, tensor in raw:
        dtype, shape = tensor["dtype"], tensor["shape"]
        if dtype != known.get(name) or len(shape) != 1:
            raise InvalidError(f"expected no tensor {leaf_name([name])} of {dtype} {shape}")
        tensors[name] = np.frombuffer(tensor["data"], jnp.dtype(DTYPE_NAMES[dtype]))
    missing = _TENSORS.keys() - tensors.keys()
    if missing:
        raise InvalidError(f"expected a tensor {sorted(missing)[0]}, got none")
    return description, tensors


def _json(text: str | bytes, kind: type) -> Any:
    """Return the value of JSON, of a kind, with no name twice in an object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name twice in an object, expected every name once")
        return result

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # also of UTF-8, and of too many digits
        raise InvalidError(f"expected JSON, got {error}") from None
    if type(value) is not kind:
        raise InvalidError(f"expected a JSON {_KINDS[kind]}, got {type(value).__name__}")
    return value


def _read_manifest(manifest: np.ndarray, size: int) -> list[Any]:
    """Return the entries in a file of so many bytes."""
    unzip, longest = zlib.decompressobj(), longest_manifest(size)
    with naming("manifest"):
        try:
            text = unzip.decompress(manifest.tobytes(), longest)
        except zlib.error as error:
            raise InvalidError(str(error)) from None
        if not unzip.eof or unzip.unused_data:
            raise InvalidError(f"expected at most {longest} bytes, whole and nothing else")
        return _json(text, list)


def _check_header(header: bytes, tensors: Mapping[str, np.ndarray]) -> None:
    if tensors["checksums"][-1] != header_checksum(header, tensors):
        raise InvalidError("expected another checksum, the header is damaged")


def _check_description(description: Mapping[str, Any], limits: Limits) -> None:
    fields = {"version", "jaxquant", "method", "plan", "metadata"}
    if description.keys() - {"products"} != fields or type(description["metadata"]) is not dict:
        raise InvalidError(f"expected a header with {', '.join(sorted(fields))}")
    products = description.get("products", [])
    if type(products) is not list or not all(map(_is_path, products)):
        raise InvalidError("expected products to be paths")
    check_metadata(description["metadata"], limits.depth)


def check_metadata(metadata: Mapping[str, Any], depth: int) -> None:
    """Refuse keys that are no text, and metadata of more levels than `depth`."""
    levels, level = 0, [metadata]
    while level:
        levels += 1
        if levels > depth:
            raise InvalidError(f"metadata: expected at most {depth} levels (see `limits`)")
        odd = [
            key
            for node in level
            if isinstance(node, dict)
            for key in node
            if not isinstance(key, str)
        ]
        if odd:
            raise InvalidError(f"metadata: expected text as keys, got {reprlib.repr(odd[0])}")
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [x for items in inner for x in items if isinstance(x, dict | list | tuple)]


def _check_entries(
    entries: Sequence[Any], tensors: Mapping[str, np.ndarray], limits: Limits, size: int
) -> None:
    """Check the entries, which share the tensors of a file of so many bytes."""
    if len(entries) > limits.leaves:
        raise InvalidError(
            f"expected at most {limits.leaves} leaves (see `limits`), got {len(entries)}"
        )
    most = min(max(limits.weights, _WEIGHTS_PER_BYTE * size), MOST_ENTRIES)
    lengths, claimed = dict.fromkeys(tensors.keys() - {"manifest", "checksums"}, 0), 0
    for number, entry in enumerate(entries):
        with naming(f"manifest: entry {number}"):
            check_entry(entry, limits)
        with naming(leaf_name(entry["path"])):
            claimed += math.prod(max(size, 1) for size in leaf_shape(entry))
            if claimed > most:
                raise InvalidError(
                    f"expected at most {most} weights in a file of this size (see `limits`), "
                    f"got {claimed}"
                )
            for name, shape in arrays_of(entry).values():
                if name not in lengths:
                    raise InvalidError(f"expected a tensor {name}, got none")
                lengths[name] += math.prod(shape)
    for name, length in lengths.items():
        if length != tensors[name].size:
            raise InvalidError(f"{name}: expected {length} entries, got {tensors[name].size}")
    check_paths(tuple(entry["path"]) for entry in entries)


def check_paths(paths: Iterable[LeafPath]) -> None:
    """Refuse a path that is another's, or leads through another leaf: no dictionary holds both."""
    nested((path, path) for path in sorted(paths, key=len))


def check_entry(entry: Any, limits: Limits) -> None:
    """Refuse an entry whose fields are not all there, or do not fit each other."""
    if not isinstance(entry, dict):
        raise InvalidError(f"expected an object, got {reprlib.repr(entry)}")
    packed = is_packed_entry(entry)
    sizes = ["shape"] + (["rows", "columns", "stacked"] if packed else [])
    counts = ["models", "words"] if packed else []
    optional = {"weights", "scale"} if packed else set()
    if entry.keys() - optional != {"path", "dtype", *sizes, *counts}:
        raise InvalidError(f"expected other fields than {reprlib.repr(list(entry))}")
    _check_path(entry["path"], limits)
    _check_dtype(entry["dtype"], DTYPES, "a dtype of safetensors")
    for name in sizes:
        _check_sizes(entry[name], name)
    for name in counts:
        if not _is_count(entry[name]):
            raise InvalidError(f"expected {name} to be a count, got {reprlib.repr(entry[name])}")
    if packed:
        _check_packed(entry)


def _check_dtype(dtype: Any, known: Collection[str], wanted: str) -> None:
    if not isinstance(dtype, str) or dtype not in known:
        raise InvalidError(f"expected {wanted}, got {reprlib.repr(dtype)}")


def _check_sizes(size: Any, name: str) -> None:
    if not isinstance(size, list) or len(size) > _MOST_AXES or not all(map(_is_count, size)):
        raise InvalidError(f"expected {name} to be sizes, got {reprlib.repr(size)}")


def _check_path(path: Any, limits: Limits) -> None:
    if not _is_path(path):
        raise InvalidError(f"expected a path of text, got {reprlib.repr(path)}")
    if len(path) > limits.depth:
        raise InvalidError(
            f"expected at most {limits.depth} keys to a leaf (see `limits`), got {len(path)}"
        )
    longest = max(map(len, path), default=0)
    if longest > limits.name:
        raise InvalidError(
            f"expected keys of at most {limits.name} characters (see `limits`), got {longest}"
        )


def _is_path(path: Any) -> bool:
    """Return whether this is a list of Unicode text, without halves of surrogate pairs."""
    return isinstance(path, list) and all(
        isinstance(key, str) and not re.search("[\ud800-\udfff]", key) for key in path
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_ENTRIES


def _check_packed(entry: Mapping[str, Any]) -> None:
    shape, codebook = leaf_shape(entry), tuple(entry["shape"])
    codebooks = FLOATING | ({"int8"} if "scale" in entry else set())
    _check_dtype(entry["dtype"], codebooks, "a codebook of floating point, or int8 with a scale")
    _check_dtype(weights_dtype(entry), FLOATING, "weights of floating point")
    if not codebook or not 1 <= codebook[-1] <= MOST_CENTROIDS:
        raise InvalidError(f"expected a codebook of 1 to 256 centroids, got shape {codebook}")
    if "scale" in entry:
        _check_scale(entry["scale"], shape, codebook)
    if len(entry["stacked"]) > 1:
        raise InvalidError(
            f"expected at most one axis of stacked layers, got {len(entry['stacked'])} in {shape}"
        )
    if len(codebook) > 1 and not _is_in_blocks(codebook[:-1], shape):
        raise InvalidError(
            f"expected a codebook for weights of shape {shape}, got shape {codebook}"
        )
    if entry["models"] not in (1, math.prod(entry["stacked"])):
        raise InvalidError(f"expected a model for all layers or for each, got {entry['models']}")


def _check_scale(scale: Any, shape: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    if not isinstance(scale, dict) or scale.keys() != {"shape", "dtype"}:
        raise InvalidError(f"expected a scale of a shape and a dtype, got {reprlib.repr(scale)}")
    _check_sizes(scale["shape"], "the scale's shape")
    _check_dtype(scale["dtype"], _SCALES, "a scale of float32 or bfloat16")
    *numbers, last = scale["shape"] or [0]
    whole = not numbers or _is_in_blocks(numbers, shape)
    fits = last == 1 and whole and len(codebook) == len(numbers) + 1
    pairs = zip(codebook, numbers, strict=False)
    if not fits or any(own != other and 1 not in (own, other) for own, other in pairs):
        raise InvalidError(
            f"expected a scale for weights of shape {shape} and codebooks of shape {codebook}, "
            f"got shape {tuple(scale['shape'])}"
        )


def _is_in_blocks(numbers: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether so many blocks cut a weight's axes into equal parts."""
    return len(numbers) == len(shape) and all(
        number == size or (0 < number < size and size % number == 0) or number == 1
        for number, size in zip(numbers, shape, strict=True)
    )


def _parts(entries: Sequence[Any], tensors: Mapping[str, np.ndarray]) -> Iterator[Part]:
    """Yield each leaf with its parts of the tensors, which follow each other."""
    ends = dict.fromkeys(tensors, 0)
    for entry, checksum in zip(entries, tensors["checksums"], strict=False):
        parts: dict[str, Any] = dict.fromkeys(("scale", "words", "tables"))
        for part, (name, shape) in arrays_of(entry).items():
            start, ends[name] = ends[name], ends[name] + math.prod(shape)
            parts[part] = tensors[name][start : ends[name]].reshape(shape)
        yield Part(entry, int(checksum), **parts)


def _check_products(products: Sequence[LeafPath], parts: Mapping[LeafPath, Part]) -> None:
    """Refuse products that are not of two leaves of their own, or share a path with others."""
    others = dict(parts)
    for path in products:
        with naming(leaf_name(path)):
            _check_product(*(others.pop((*path, name), None) for name in PRODUCT_PARTS))
    check_paths([*products, *others])


def _check_product(codes: Part | None, words: Part | None) -> None:
    if codes is None or words is None or codes.words is None or words.words is not None:
        raise InvalidError("expected packed codes and words")
    shape, size, numbers = leaf_shape(codes.entry), words.values.shape, codes.values
    if len(size) != 3 or len(shape) < 2 or shape[-2] != size[0]:
        raise InvalidError(
            f"expected codes [..., M, features] and words [M, K, D], got {shape}, {size}"
        )
    plain = codes.scale is None and numbers.shape == (size[1],)
    if not plain or (numbers.astype(np.float64) != np.arange(size[1])).any():
        raise InvalidError(f"expected the numbers of {size[1]} words as the codebook of the codes")
    if words.entry["dtype"] not in FLOATING:
        raise InvalidError(f"expected words of floating point, got {words.entry['dtype']}")
