"""A packed tree as one safetensors file, its codes entropy-coded. The format: docs/format.md.

A file is read as if it came from a stranger: nothing in it is executed, every size is checked
before memory is taken for it, and all of it has checksums. What `save` is about to write passes the
same checks first, so that what is saved loads.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import reprlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.clustering.codebooks import MOST_CENTROIDS
from jaxquant.files import read_file, replace_file
from jaxquant.packing.arrays import (
    PackedArray,
    ProductArray,
    View,
    is_packed,
    is_product,
    is_quantized,
    table_bytes,
    with_block_axes,
)
from jaxquant.packing.codes import pack_codes, packed_rows, unpack_codes
from jaxquant.rounds.schedules import Plan
from jaxquant.trees import pure, replaced

_FORMAT = "jaxquant"
_VERSION = 2
_READ_VERSIONS = (1, 2)  # in the first, all weights are of their codebook's dtype, without scales
_PRECISION = 16  # bits of the frequencies in the file; the coder itself counts in 24
_CHUNK = 2**22  # codes decoded at once, as int32
_SMALL_MANIFEST = 2**20  # bytes of JSON that a file of any size may have
_MANIFEST_PER_BYTE = 16  # and what a longer one may have for each of its bytes
_WEIGHTS_PER_BYTE = 64
_MOST_ENTRIES = 2**48  # of an array, beyond any memory
_MOST_AXES = 64  # of NumPy
_LONGEST_MESSAGE = 500  # characters
_LONGEST_NAME = 100  # of a leaf in a message
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_FLOATING = {name for name in _DTYPES if jnp.issubdtype(jnp.dtype(name), jnp.floating)}
_SCALES = {"float32", "bfloat16"}
_NAMES = {code: name for name, code in _DTYPES.items()}
_Path = tuple[str, ...]
_PRODUCT_PARTS = ("codes", "words")
_KINDS = {dict: "object", list: "array"}
_TENSORS = {"manifest": "U8", "checksums": "U32", "codes": "U32", "frequencies": "U16"}


class Limits(NamedTuple):
    """What `load` takes from a file, and `save` puts in one; raise it for larger trees.

    Attributes:
      leaves: how many there may be.
      depth: keys from the root to a leaf; levels of the metadata.
      name: characters of a key.
      weights: entries of all leaves together, an empty axis counted as one entry, whatever the
        size of the file; a file that is larger than a 64th of it may have 64 for each of its bytes.
    """

    leaves: int = 2**16
    depth: int = 100
    name: int = 1000
    weights: int = 2**26


_LIMITS = Limits()


class _Part(NamedTuple):
    """A leaf of a file: its entry of the manifest, and its own part of the tensors."""

    entry: Mapping[str, Any]
    checksum: int
    values: np.ndarray  # of a packed leaf its codebook
    scale: np.ndarray | None
    words: np.ndarray | None  # of the range coder, of a packed leaf
    tables: np.ndarray | None  # its frequencies


class _InvalidError(ValueError):
    """What is wrong, so far without the name of the file; short and printable."""

    def __init__(self, message: str):
        super().__init__(_printable(message[:_LONGEST_MESSAGE])[:_LONGEST_MESSAGE])


def _printable(text: str) -> str:
    """Return text with what controls terminals, and what is no Unicode, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of a leaf before the message of an error."""
    try:
        yield
    except _InvalidError as error:
        raise _InvalidError(f"{name}: {error}") from None


def _name(path: Sequence[str]) -> str:
    name = "/".join(path[:_LONGEST_NAME]) or "the root"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


# Writing -----------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    packed: Any,
    *,
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    limits: Limits = _LIMITS,
) -> None:
    """Write a packed tree to one safetensors file, whole or not at all.

    Codes take their entropy (range coding, the `constriction` library; Bamler, 2022), usually less
    than the whole bits of `pack`; codebooks and leaves that are not quantized are stored as they
    are. `docs/format.md` describes the format and reads it in a few lines of NumPy. Needs
    safetensors and constriction: `pip install jaxquant[storage]`. Runs on the host.

    What is saved loads: equal, bit for bit, in the structure of `like`. Numbers of Python and NumPy
    come back as arrays.

    Args:
      path: of the file; replaced if it exists, with its mode kept. A symbolic link stays, and what
        it leads to is replaced.
      packed: from `pack`; any tree of PackedArray nodes, ProductArrays and arrays of numbers.
      plan: recorded in the file, for the reader's information.
      metadata: anything that JSON can hold, with text as keys; recorded too, tuples as lists.
      limits: of the tree; `load` needs the same if they are not the default.

    Raises:
      ValueError: for a leaf or metadata that cannot be stored, or could not be loaded; names the
        leaf. Nothing is written.
      OSError: if the file cannot be written; an older one of that name is as it was.

    >>> import jaxquant as jq, tempfile
    >>> codebook = jnp.array([-1.0, 0.0, 1.0])
    >>> packed = {"w": jq.pack_array(jnp.eye(64), codebook), "b": jnp.ones(3)}
    >>> path = tempfile.mktemp()
    >>> jq.save(path, packed)
    >>> jq.load(path)["b"].tolist()
    [1.0, 1.0, 1.0]
    """
    description = {
        "version": _VERSION,
        "jaxquant": _library_version(),
        "method": None if plan is None else plan.method,
        "plan": None if plan is None else _describe_plan(plan),
        "metadata": dict(metadata or {}),
    }
    leaves, products = _flatten(pure(packed))
    if products:
        description["products"] = products
    text = _description_text(description, limits)
    entries, tensors = _encode(leaves, limits)
    tensors["manifest"] = _manifest(entries, sum(tensor.nbytes for tensor in tensors.values()))
    data = _serialize(tensors, text)
    _examine(data, limits)
    replace_file(path, data)


def _library_version() -> str:
    from jaxquant import __version__

    return __version__


def _describe_plan(plan: Plan) -> dict[str, Any]:
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    fields["clustering"] = dataclasses.asdict(plan.clustering)
    return {name: value for name, value in fields.items() if name not in ("selection", "method")}


def _description_text(description: Mapping[str, Any], limits: Limits) -> str:
    try:
        text = json.dumps(description, allow_nan=False, ensure_ascii=False)
        text.encode()  # no halves of surrogate pairs, which would come back as one character
    except (TypeError, ValueError, RecursionError) as error:
        raise _InvalidError(f"metadata: expected what JSON can hold: {error}") from None
    _check_metadata(description["metadata"], limits.depth)
    return text


def _flatten(packed: Any) -> tuple[list[tuple[list[str], Any]], list[list[str]]]:
    """Return the leaves with their paths, and those of ProductArrays, whose parts are leaves."""
    pairs = jax.tree_util.tree_flatten_with_path(
        packed, is_leaf=lambda node: is_packed(node) or isinstance(node, View)
    )[0]
    nodes = jax.tree_util.tree_flatten_with_path(packed, is_leaf=is_product)[0]
    products = [_path_text(path) for path, node in nodes if is_product(node)]
    return [(_path_text(path), leaf) for path, leaf in pairs], products


def _path_text(key_path: Sequence[Any]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in key_path]


def _encode(
    leaves: Sequence[tuple[list[str], Any]], limits: Limits
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the manifest's entries, and the tensors of the file by name, but for the manifest."""
    entries: list[dict[str, Any]] = []
    codes, frequencies = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint16)]
    values: dict[str, list[np.ndarray]] = {}
    checksums: list[int] = []
    for path, leaf in leaves:
        with _named(_name(path)):
            if is_packed(leaf):
                _as_numpy(leaf.codes)  # so that what is none is named
                leaf = with_block_axes(leaf)
            array = _as_numpy(leaf.codebook if is_packed(leaf) else leaf)
            entry: dict[str, Any] = {
                "path": path,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
            }
            checksum, arrays = zlib.crc32(array.tobytes()), [array]
            if is_packed(leaf):
                entry |= _sizes(leaf)
                if leaf.scale is not None:
                    scale = _as_numpy(leaf.scale)
                    entry["scale"] = {"shape": list(scale.shape), "dtype": scale.dtype.name}
                    checksum = zlib.crc32(scale.tobytes(), checksum)
                    arrays.append(scale)
                _check_entry(entry, limits)
                plain = _codes_by_model(leaf)
                words, tables = _compress(plain, leaf.k)
                entry |= {"models": len(tables), "words": len(words)}
                codes.append(words)
                frequencies.append(tables.ravel())
                checksum = zlib.crc32(plain.tobytes(), checksum)
            _check_entry(entry, limits)
        for array in arrays:
            values.setdefault(array.dtype.name, []).append(array.ravel())
        entries.append(entry)
        checksums.append(checksum)
    tensors = {f"values.{name}": np.concatenate(arrays) for name, arrays in values.items()}
    tensors["checksums"] = np.array([*checksums, 0], np.uint32)  # the last is the header's
    tensors["codes"] = np.concatenate(codes)
    tensors["frequencies"] = np.concatenate(frequencies)
    return entries, tensors


def _as_numpy(leaf: Any) -> np.ndarray:
    """Return the numbers of a leaf, in the byte order of the machine."""
    if isinstance(leaf, View):
        raise _InvalidError(f"expected a packed weight as it was packed, got {leaf!r}")
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:  # a random key, a deleted array
        raise _InvalidError(f"expected an array of numbers, got {error}") from None
    if array.dtype.name not in _DTYPES:
        raise _InvalidError(f"expected a dtype of safetensors, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _sizes(packed: PackedArray) -> dict[str, Any]:
    """Return what an entry says of a packed leaf; its codes are not encoded yet."""
    stacked = np.shape(packed.codes)[:-2]
    sizes = {"rows": packed.rows, "columns": packed.columns, "stacked": stacked}
    own = {} if packed.dtype == packed.codebook.dtype else {"weights": packed.dtype.name}
    return {name: list(size) for name, size in sizes.items()} | {"models": 1, "words": 0} | own


def _codes_by_model(packed: PackedArray) -> np.ndarray:
    """Return the codes, uint8 [stacked layers, weights of one]."""
    codes, k = _as_numpy(packed.codes), packed.k
    rows, columns = math.prod(packed.rows), math.prod(packed.columns)
    if codes.dtype != np.uint8 or codes.shape[-2:] != (packed_rows(rows, k), columns):
        raise _InvalidError(
            f"expected codes uint8 [..., {packed_rows(rows, k)}, {columns}], "
            f"got {codes.dtype} {codes.shape}"
        )
    plain = unpack_codes(codes, rows, k)
    if plain.size and plain.max() >= k:
        raise _InvalidError(f"expected codes below {k}, got {plain.max()}")
    return plain.reshape(math.prod(codes.shape[:-2]) if plain.size else 1, -1)


def _compress(codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of the range coder, and the frequencies [models, k] it needs to decode."""
    tables, _ = _best_tables(codes, k)
    codes = codes.reshape(len(tables), -1)
    coder, models = _range_coder().stack.AnsCoder(), _models(tables)
    if k > 1:
        for row, model in zip(codes[::-1], models[::-1], strict=True):
            starts = range(0, row.size, _CHUNK)
            for start in reversed(starts):  # a stack: what goes in last comes out first
                coder.encode_reverse(row[start : start + _CHUNK].astype(np.int32), model)
    return np.asarray(coder.get_compressed(), np.uint32), tables.astype(np.uint16)


def _best_tables(codes: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Return the frequencies [models, k] by which codes are coded, and the bits that both take.

    One model for all stacked layers, or one for each, whichever takes less.
    """
    counts = np.stack([np.bincount(row, minlength=k) for row in codes]).reshape(-1, k)
    tables = np.stack([_frequencies(row) for row in counts]).reshape(-1, k)
    shared = _frequencies(counts.sum(axis=0))[None]
    bits, shared_bits = _bits(counts, tables), _bits(counts.sum(axis=0, keepdims=True), shared)
    return (shared, shared_bits) if shared_bits <= bits else (tables, bits)


def stored_bytes(packed: PackedArray) -> int:
    """Return the bytes that a weight takes in a file, but for its entry in the manifest."""
    packed = with_block_axes(packed)
    _, bits = _best_tables(_codes_by_model(packed), packed.k)
    return math.ceil(bits / 8) + table_bytes(packed.codebook, packed.scale)


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Return counts scaled to a sum of 2**16, each at least 1 (0 means 2**16: k is 1)."""
    k, total = len(counts), max(int(counts.sum()), 1)
    free = 2**_PRECISION - k
    scaled = 1 + counts.astype(np.int64) * free // total
    scaled[np.argmax(scaled)] += 2**_PRECISION - scaled.sum()
    return scaled % 2**_PRECISION


def _bits(counts: np.ndarray, tables: np.ndarray) -> float:
    """Return the bits that codes and tables take."""
    shares = np.where(tables == 0, 2**_PRECISION, tables) / 2**_PRECISION
    return float(-np.sum(counts * np.log2(shares))) + tables.size * _PRECISION


def _range_coder() -> Any:
    try:
        from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise ImportError("saving and loading need: pip install jaxquant[storage]") from None
    return stream


def _models(tables: np.ndarray) -> list[Any]:
    """Return the coder's model of each row, None for a single centroid."""
    # `perfect` keeps multiples of 2**-24 as they are, so a reader needs no floating point.
    make = _range_coder().model.Categorical
    shares = tables.astype(np.float64) / 2**_PRECISION
    return [make(row, perfect=True) if len(row) > 1 else None for row in shares]


def _manifest(entries: Sequence[Mapping[str, Any]], size: int) -> np.ndarray:
    """Return the manifest of a file of `size` other bytes, compressed no more than `load` takes."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    compressed = zlib.compress(text, 9)
    if len(text) > _longest_manifest(size + len(compressed)):
        compressed = zlib.compress(text, 0)
    return np.frombuffer(compressed, np.uint8)


def _serialize(tensors: Mapping[str, np.ndarray], text: str) -> bytes:
    """Return the file. Not by `safetensors.serialize`: its order, and so the file, is random."""
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, _FORMAT: text}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # is aligned
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = _DTYPES[tensor.dtype.name]
        header[name] = {"dtype": dtype, "shape": [tensor.size], "data_offsets": [start, end]}
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    data = len(data).to_bytes(8, "little") + data
    tensors["checksums"][-1] = _header_checksum(data, tensors)
    return b"".join([data, *(tensor.tobytes() for _, tensor in ordered)])


# Reading -----------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, like: Any = None, limits: Limits = _LIMITS) -> Any:
    """Read a tree that `save` wrote. Safe for files from strangers.

    Time and memory grow no faster than the file: beyond the limits, which hold for files of any
    size, it may claim at most 64 weights for each of its bytes, and 16 bytes of manifest. Sizes are
    checked before anything is decoded, and nothing is compiled.

    Args:
      path: of the file.
      like: a tree of the structure to return, its leaves arrays, shapes or anything else; without
        it, nested dictionaries with text as keys, whatever the containers were.
      limits: of the tree; to be raised only for files that one trusts.

    Returns:
      The tree with PackedArray and ProductArray nodes where they were, ready for `unpack` and for
      products. Numbers of 64 bits stay NumPy arrays unless jax_enable_x64 is set.

    Raises:
      ValueError: if the file is damaged, not such a file, claims absurd sizes, or has other leaves
        than `like`; names the file, and the leaf where there is one.
      OSError: if it cannot be read.
    """
    with _of_file(path):
        description, parts = _examine(read_file(path), limits)
        own = {}
        for part in parts:
            with _named(_name(part.entry["path"])):
                own[tuple(part.entry["path"])] = _decode(part)
        for product in _products(description):
            codes, words = (own.pop((*product, name)) for name in _PRODUCT_PARTS)
            own[product] = ProductArray(codes=codes, words=words)
        return _nest(own.items()) if like is None else _arrange(own, like)


def read_metadata(path: str | os.PathLike[str], *, limits: Limits = _LIMITS) -> dict[str, Any]:
    """Return what `save` recorded: versions, method, plan, metadata.

    Args:
      path: of the file.
      limits: as in `load`.

    Raises:
      ValueError, OSError: as `load`.
    """
    with _of_file(path):
        return _examine(read_file(path), limits)[0]


@contextlib.contextmanager
def _of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the name of the file before the message of an error."""
    try:
        yield
    except _InvalidError as error:
        raise ValueError(f"{_printable(str(path))}: {error}") from None


def _decode(part: _Part) -> Any:
    entry, values, scale = part.entry, part.values, part.scale
    own = zlib.crc32(values.tobytes())
    if part.words is None or part.tables is None:
        if own != part.checksum:
            raise _InvalidError("expected another checksum, the values are damaged")
        return _as_jax(values)
    codes = _decompress(part.words, part.tables, math.prod(_leaf_shape(entry)))
    own = own if scale is None else zlib.crc32(scale.tobytes(), own)
    if zlib.crc32(codes.tobytes(), own) != part.checksum:
        raise _InvalidError("expected another checksum, the codes or the codebook are damaged")
    stacked, rows, columns = (tuple(entry[name]) for name in ("stacked", "rows", "columns"))
    matrix = codes.reshape(*stacked, math.prod(rows), math.prod(columns))
    return PackedArray(
        # `jnp.asarray` compiles for each shape
        codes=jax.device_put(pack_codes(matrix, values.shape[-1])),
        codebook=_as_jax(values),
        scale=None if scale is None else _as_jax(scale),
        rows=rows,
        columns=columns,
        dtype=_weights_dtype(entry),
    )


def _as_jax(values: np.ndarray) -> Any:
    """Return a JAX array, or the NumPy array if JAX would cut its numbers to 32 bits."""
    same = jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype
    own = values.copy()  # not a part of all that the file holds
    return jax.device_put(own) if same else own


def _decompress(words: np.ndarray, tables: np.ndarray, size: int) -> np.ndarray:
    """Return the codes, uint8 [size]."""
    codes = np.zeros(size, np.uint8)
    if tables.shape[1] == 1:
        if words.size or tables.any():
            raise _InvalidError("expected no code words and a frequency of 0 for one centroid")
        return codes
    wide = tables.astype(np.int64)
    if (wide == 0).any() or (wide.sum(axis=1) != 2**_PRECISION).any():
        raise _InvalidError(f"expected frequencies from 1 that add up to {2**_PRECISION}")
    try:
        coder = _range_coder().stack.AnsCoder(words)
    except ValueError:
        raise _InvalidError("expected another end of the code words") from None
    for row, model in zip(codes.reshape(len(tables), -1), _models(tables), strict=True):
        for start in range(0, row.size, _CHUNK):
            row[start : start + _CHUNK] = coder.decode(model, min(_CHUNK, row.size - start))
    if not coder.is_empty():
        raise _InvalidError("expected the code words to end with the codes")
    return codes


def _nest(leaves: Iterable[tuple[_Path, Any]]) -> Any:
    """Return nested dictionaries; a path must not be another's or lead through another leaf."""
    root: dict[str, Any] = {}
    for path, leaf in leaves:
        *way, last = ("", *path)  # below one key, so that the root may be a leaf
        node = root
        for i, key in enumerate(way):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise _InvalidError(f"{_name(path)}: expected no leaf at {_name(path[:i])}")
        if last in node:
            raise _InvalidError(
                f"{_name(path)}: expected paths that differ as text, got this one twice"
            )
        node[last] = leaf
    return root.get("", {})


def _arrange(own: Mapping[_Path, Any], like: Any) -> Any:
    """Return the leaves in the structure of `like`."""
    wanted, structure = jax.tree_util.tree_flatten_with_path(pure(like), is_leaf=is_quantized)
    keys = [tuple(_path_text(key_path)) for key_path, _ in wanted]
    _check_paths(keys)
    odd = sorted(_name(path) for path in set(keys) ^ own.keys())
    if odd:
        raise _InvalidError(f"expected the leaves of `like`, they differ in {', '.join(odd[:3])}")
    for key, (_, leaf) in zip(keys, wanted, strict=True):
        if hasattr(leaf, "shape") and tuple(leaf.shape) != tuple(own[key].shape):
            raise _InvalidError(
                f"{_name(key)}: expected shape {tuple(leaf.shape)}, got {own[key].shape}"
            )
    return replaced(like, jax.tree.unflatten(structure, [own[key] for key in keys]))


# Checks, of files to read and of files to write --------------------------------------------------


def _examine(data: bytes, limits: Limits) -> tuple[dict[str, Any], list[_Part]]:
    """Check all of a file that can be checked without decoding.

    Returns:
      What the header says, and the leaves.
    """
    description, tensors = _open(data)
    entries = _read_manifest(tensors["manifest"], len(data))
    if len(tensors["checksums"]) - len(entries) not in (0, 1):
        raise _InvalidError("manifest: expected an entry for each checksum")
    _check_description(description, limits)
    _check_entries(entries, tensors, limits, len(data))
    parts = list(_parts(entries, tensors))
    _check_products(_products(description), {tuple(part.entry["path"]): part for part in parts})
    if len(tensors["checksums"]) > len(entries):  # the first files had none of the header
        _check_header(data[: 8 + _header_size(data)], tensors)
    return description, parts


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description in the header, and the tensors, all of one dimension."""
    from safetensors import SafetensorError, deserialize

    try:
        raw = deserialize(data)  # checks every offset against the size of the file
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _InvalidError(f"expected a safetensors file, got {error}") from None
    described = _json(data[8 : 8 + _header_size(data)], dict).get("__metadata__") or {}
    if described.get("format") != _FORMAT or _FORMAT not in described:
        raise _InvalidError("expected a file of jaxquant.save, got other safetensors")
    description = _json(described[_FORMAT], dict)
    version = description.get("version")
    if type(version) is not int or version not in _READ_VERSIONS:
        raise _InvalidError(f"expected format version 1 or 2, got {reprlib.repr(version)}")
    known = _TENSORS | {f"values.{name}": code for name, code in _DTYPES.items()}
    tensors = {}
    for name, tensor in raw:
        dtype, shape = tensor["dtype"], tensor["shape"]
        if dtype != known.get(name) or len(shape) != 1:
            raise _InvalidError(f"expected no tensor {_name([name])} of {dtype} {shape}")
        tensors[name] = np.frombuffer(tensor["data"], jnp.dtype(_NAMES[dtype]))
    missing = _TENSORS.keys() - tensors.keys()
    if missing:
        raise _InvalidError(f"expected a tensor {sorted(missing)[0]}, got none")
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
        raise _InvalidError(f"expected JSON, got {error}") from None
    if type(value) is not kind:
        raise _InvalidError(f"expected a JSON {_KINDS[kind]}, got {type(value).__name__}")
    return value


def _read_manifest(manifest: np.ndarray, size: int) -> list[Any]:
    """Return the entries in a file of so many bytes."""
    unzip, longest = zlib.decompressobj(), _longest_manifest(size)
    with _named("manifest"):
        try:
            text = unzip.decompress(manifest.tobytes(), longest)
        except zlib.error as error:
            raise _InvalidError(str(error)) from None
        if not unzip.eof or unzip.unused_data:
            raise _InvalidError(f"expected at most {longest} bytes, whole and nothing else")
        return _json(text, list)


def _longest_manifest(size: int) -> int:
    """Return how many bytes of JSON a file of so many bytes may have."""
    return max(_SMALL_MANIFEST, _MANIFEST_PER_BYTE * size)


def _check_header(header: bytes, tensors: Mapping[str, np.ndarray]) -> None:
    if tensors["checksums"][-1] != _header_checksum(header, tensors):
        raise _InvalidError("expected another checksum, the header is damaged")


def _header_checksum(header: bytes, tensors: Mapping[str, np.ndarray]) -> int:
    return zlib.crc32(tensors["manifest"].tobytes(), zlib.crc32(header))


def _check_description(description: Mapping[str, Any], limits: Limits) -> None:
    fields = {"version", "jaxquant", "method", "plan", "metadata"}
    if description.keys() - {"products"} != fields or type(description["metadata"]) is not dict:
        raise _InvalidError(f"expected a header with {', '.join(sorted(fields))}")
    products = description.get("products", [])
    if type(products) is not list or not all(map(_is_path, products)):
        raise _InvalidError("expected products to be paths")
    _check_metadata(description["metadata"], limits.depth)


def _products(description: Mapping[str, Any]) -> list[_Path]:
    return [tuple(path) for path in description.get("products", [])]


def _check_metadata(metadata: Mapping[str, Any], depth: int) -> None:
    """Refuse keys that are no text, and metadata of more levels than `depth`."""
    levels, level = 0, [metadata]
    while level:
        levels += 1
        if levels > depth:
            raise _InvalidError(f"metadata: expected at most {depth} levels (see `limits`)")
        odd = [
            key
            for node in level
            if isinstance(node, dict)
            for key in node
            if not isinstance(key, str)
        ]
        if odd:
            raise _InvalidError(f"metadata: expected text as keys, got {reprlib.repr(odd[0])}")
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [x for items in inner for x in items if isinstance(x, dict | list | tuple)]


def _check_entries(
    entries: Sequence[Any], tensors: Mapping[str, np.ndarray], limits: Limits, size: int
) -> None:
    """Check the entries, which share the tensors of a file of so many bytes."""
    if len(entries) > limits.leaves:
        raise _InvalidError(
            f"expected at most {limits.leaves} leaves (see `limits`), got {len(entries)}"
        )
    most = min(max(limits.weights, _WEIGHTS_PER_BYTE * size), _MOST_ENTRIES)
    lengths, claimed = dict.fromkeys(tensors.keys() - {"manifest", "checksums"}, 0), 0
    for number, entry in enumerate(entries):
        with _named(f"manifest: entry {number}"):
            _check_entry(entry, limits)
        with _named(_name(entry["path"])):
            claimed += math.prod(max(size, 1) for size in _leaf_shape(entry))
            if claimed > most:
                raise _InvalidError(
                    f"expected at most {most} weights in a file of this size (see `limits`), "
                    f"got {claimed}"
                )
            for name, shape in _arrays(entry).values():
                if name not in lengths:
                    raise _InvalidError(f"expected a tensor {name}, got none")
                lengths[name] += math.prod(shape)
    for name, length in lengths.items():
        if length != tensors[name].size:
            raise _InvalidError(f"{name}: expected {length} entries, got {tensors[name].size}")
    _check_paths(tuple(entry["path"]) for entry in entries)


def _check_paths(paths: Iterable[_Path]) -> None:
    """Refuse a path that is another's, or leads through another leaf: no dictionary holds both."""
    _nest((path, path) for path in sorted(paths, key=len))


def _check_entry(entry: Any, limits: Limits) -> None:
    if not isinstance(entry, dict):
        raise _InvalidError(f"expected an object, got {reprlib.repr(entry)}")
    packed = _is_packed(entry)
    sizes = ["shape"] + (["rows", "columns", "stacked"] if packed else [])
    counts = ["models", "words"] if packed else []
    optional = {"weights", "scale"} if packed else set()
    if entry.keys() - optional != {"path", "dtype", *sizes, *counts}:
        raise _InvalidError(f"expected other fields than {reprlib.repr(list(entry))}")
    _check_path(entry["path"], limits)
    _check_dtype(entry["dtype"], _DTYPES, "a dtype of safetensors")
    for name in sizes:
        _check_sizes(entry[name], name)
    for name in counts:
        if not _is_count(entry[name]):
            raise _InvalidError(f"expected {name} to be a count, got {reprlib.repr(entry[name])}")
    if packed:
        _check_packed(entry)


def _check_dtype(dtype: Any, known: Collection[str], wanted: str) -> None:
    if not isinstance(dtype, str) or dtype not in known:
        raise _InvalidError(f"expected {wanted}, got {reprlib.repr(dtype)}")


def _check_sizes(size: Any, name: str) -> None:
    if not isinstance(size, list) or len(size) > _MOST_AXES or not all(map(_is_count, size)):
        raise _InvalidError(f"expected {name} to be sizes, got {reprlib.repr(size)}")


def _is_packed(entry: Mapping[str, Any]) -> bool:
    return "rows" in entry


def _check_path(path: Any, limits: Limits) -> None:
    if not _is_path(path):
        raise _InvalidError(f"expected a path of text, got {reprlib.repr(path)}")
    if len(path) > limits.depth:
        raise _InvalidError(
            f"expected at most {limits.depth} keys to a leaf (see `limits`), got {len(path)}"
        )
    longest = max(map(len, path), default=0)
    if longest > limits.name:
        raise _InvalidError(
            f"expected keys of at most {limits.name} characters (see `limits`), got {longest}"
        )


def _is_path(path: Any) -> bool:
    """Return whether this is a list of Unicode text, without halves of surrogate pairs."""
    return isinstance(path, list) and all(
        isinstance(key, str) and not re.search("[\ud800-\udfff]", key) for key in path
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_ENTRIES


def _check_packed(entry: Mapping[str, Any]) -> None:
    shape, codebook = _leaf_shape(entry), tuple(entry["shape"])
    codebooks = _FLOATING | ({"int8"} if "scale" in entry else set())
    _check_dtype(entry["dtype"], codebooks, "a codebook of floating point, or int8 with a scale")
    _check_dtype(_weights_dtype(entry), _FLOATING, "weights of floating point")
    if not codebook or not 1 <= codebook[-1] <= MOST_CENTROIDS:
        raise _InvalidError(f"expected a codebook of 1 to 256 centroids, got shape {codebook}")
    if "scale" in entry:
        _check_scale(entry["scale"], shape, codebook)
    fits = len(codebook) == 1 or _is_in_blocks(codebook[:-1], shape)
    if not fits or len(entry["stacked"]) > 1:
        raise _InvalidError(
            f"expected a codebook for weights of shape {shape}, got shape {codebook}"
        )
    if entry["models"] not in (1, math.prod(entry["stacked"])):
        raise _InvalidError(f"expected a model for all layers or for each, got {entry['models']}")


def _check_scale(scale: Any, shape: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    if not isinstance(scale, dict) or scale.keys() != {"shape", "dtype"}:
        raise _InvalidError(f"expected a scale of a shape and a dtype, got {reprlib.repr(scale)}")
    _check_sizes(scale["shape"], "the scale's shape")
    _check_dtype(scale["dtype"], _SCALES, "a scale of float32 or bfloat16")
    *numbers, last = scale["shape"] or [0]
    whole = not numbers or _is_in_blocks(numbers, shape)
    fits = last == 1 and whole and len(codebook) == len(numbers) + 1
    pairs = zip(codebook, numbers, strict=False)
    if not fits or any(own != other and 1 not in (own, other) for own, other in pairs):
        raise _InvalidError(
            f"expected a scale for weights of shape {shape} and codebooks of shape {codebook}, "
            f"got shape {tuple(scale['shape'])}"
        )


def _is_in_blocks(numbers: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether so many blocks cut a weight's axes into equal parts."""
    return len(numbers) == len(shape) and all(
        number == size or (0 < number < size and size % number == 0) or number == 1
        for number, size in zip(numbers, shape, strict=True)
    )


def _weights_dtype(entry: Mapping[str, Any]) -> Any:
    return entry.get("weights", entry["dtype"])


def _leaf_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    names = ("stacked", "rows", "columns") if _is_packed(entry) else ("shape",)
    return tuple(size for name in names for size in entry[name])


def _arrays(entry: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Return the name of the tensor that holds each part of a leaf, and the part's shape."""
    arrays = {"values": (f"values.{entry['dtype']}", entry["shape"])}
    if "scale" in entry:
        arrays["scale"] = f"values.{entry['scale']['dtype']}", entry["scale"]["shape"]
    if _is_packed(entry):
        arrays["words"] = "codes", [entry["words"]]
        arrays["tables"] = "frequencies", [entry["models"], entry["shape"][-1]]
    return arrays


def _parts(entries: Sequence[Any], tensors: Mapping[str, np.ndarray]) -> Iterator[_Part]:
    """Yield each leaf with its parts of the tensors, which follow each other."""
    ends = dict.fromkeys(tensors, 0)
    for entry, checksum in zip(entries, tensors["checksums"], strict=False):
        parts: dict[str, Any] = dict.fromkeys(("scale", "words", "tables"))
        for part, (name, shape) in _arrays(entry).items():
            start, ends[name] = ends[name], ends[name] + math.prod(shape)
            parts[part] = tensors[name][start : ends[name]].reshape(shape)
        yield _Part(entry, int(checksum), **parts)


def _check_products(products: Sequence[_Path], parts: Mapping[_Path, _Part]) -> None:
    """Refuse products that are not of two leaves of their own, or share a path with others."""
    others = dict(parts)
    for path in products:
        with _named(_name(path)):
            _check_product(*(others.pop((*path, name), None) for name in _PRODUCT_PARTS))
    _check_paths([*products, *others])


def _check_product(codes: _Part | None, words: _Part | None) -> None:
    if codes is None or words is None or codes.words is None or words.words is not None:
        raise _InvalidError("expected packed codes and words")
    shape, size, numbers = _leaf_shape(codes.entry), words.values.shape, codes.values
    if len(size) != 3 or len(shape) < 2 or shape[-2] != size[0]:
        raise _InvalidError(
            f"expected codes [..., M, features] and words [M, K, D], got {shape}, {size}"
        )
    plain = codes.scale is None and numbers.shape == (size[1],)
    if not plain or (numbers.astype(np.float64) != np.arange(size[1])).any():
        raise _InvalidError(f"expected the numbers of {size[1]} words as the codebook of the codes")
    if words.entry["dtype"] not in _FLOATING:
        raise _InvalidError(f"expected words of floating point, got {words.entry['dtype']}")
