"""A packed tree as one safetensors file, its codes entropy-coded. The format: docs/format.md.

A file is read as if it came from a stranger: nothing in it is executed, every size is checked
before memory is taken for it, and every leaf has a checksum.
"""

import contextlib
import dataclasses
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.packing import (
    PackedArray,
    ProductArray,
    is_packed,
    is_product,
    is_quantized,
    pack_codes,
    unpack_codes,
)
from jaxquant.schedules import Plan
from jaxquant.trees import pure, replaced

_FORMAT = "jaxquant"
_VERSION = 1
_PRECISION = 16  # bits of the frequencies in the file; the coder itself counts in 24
_CHUNK = 2**22  # codes decoded at once, as int32
_MANIFEST_LIMIT = 2**26  # bytes
_WEIGHTS_PER_BYTE = 1024  # no packed model has more: 0.008 bits a weight
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
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_NAMES = {code: name for name, code in _DTYPES.items()}

_pack_codes = jax.jit(pack_codes, static_argnums=1)
_unpack_codes = jax.jit(unpack_codes, static_argnums=(1, 2))


class _InvalidError(ValueError):
    """What is wrong, so far without the name of the file or the leaf."""


# Writing -----------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    packed: Any,
    *,
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a packed tree to one safetensors file, whole or not at all.

    Codes take their entropy (range coding, the `constriction` library; Bamler, 2022), usually less
    than the whole bits of `pack`; codebooks and leaves that are not quantized are stored as they
    are. `docs/format.md` describes the format and reads it in a few lines of NumPy. Needs
    safetensors and constriction: `pip install jaxquant[storage]`. Runs on the host.

    Args:
      path: of the file; replaced if it exists.
      packed: from `pack`; any tree of PackedArray nodes, ProductArrays and arrays of numbers.
      plan: recorded in the file, for the reader's information.
      metadata: anything that JSON can hold; recorded too.

    Raises:
      ValueError: for a leaf or metadata that cannot be stored; names the leaf. Nothing is written.
      OSError: if the file cannot be written; an older one of that name is as it was.

    >>> import jaxquant as jq, tempfile
    >>> codebook = jnp.array([-1.0, 0.0, 1.0])
    >>> packed = {"w": jq.pack_array(jnp.eye(64), codebook), "b": jnp.ones(3)}
    >>> path = tempfile.mktemp()
    >>> jq.save(path, packed)
    >>> jq.load(path)["b"].tolist()
    [1.0, 1.0, 1.0]
    """
    packed = pure(packed)
    entries, tensors = _encode(packed)
    description = {
        "version": _VERSION,
        "jaxquant": _library_version(),
        "method": None if plan is None else plan.method,
        "plan": None if plan is None else _describe_plan(plan),
        "metadata": dict(metadata or {}),
    }
    products = _product_paths(packed)
    if products:
        description["products"] = products
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: expected what JSON can hold: {error}") from None
    tensors["manifest"] = np.frombuffer(
        zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 9), np.uint8
    )
    from safetensors.numpy import save as serialize

    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in sorted(tensors.items())}
    _write(Path(path), _in_order(serialize(arrays, {"format": _FORMAT, _FORMAT: text})))


def _in_order(data: bytes) -> bytes:
    """Sort the header's fields, which safetensors writes as they hash: same tree, same file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # what follows stays aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _library_version() -> str:
    from jaxquant import __version__

    return __version__


def _describe_plan(plan: Plan) -> dict[str, Any]:
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return {name: value for name, value in fields.items() if name not in ("selection", "method")}


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(packed: Any) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the manifest's entries, and the tensors of the file by name."""
    entries: list[dict[str, Any]] = []
    codes: list[np.ndarray] = []
    frequencies: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {}
    checksums: list[int] = []
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(packed, is_leaf=is_packed)[0]:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        array = np.asarray(leaf.codebook) if is_packed(leaf) else _as_numpy(name, leaf)
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name}: expected a dtype of safetensors, got {array.dtype}")
        entry: dict[str, Any] = {
            "path": _path_text(key_path),
            "shape": list(array.shape),
            "dtype": array.dtype.name,
        }
        checksum = zlib.crc32(array.tobytes())
        if is_packed(leaf):
            plain = _codes_by_model(leaf)
            words, tables = _compress(plain, leaf.k)
            entry |= {
                "rows": list(leaf.rows),
                "columns": list(leaf.columns),
                "stacked": list(leaf.codes.shape[:-2]),
                "models": len(tables),
                "words": len(words),
            }
            codes.append(words)
            frequencies.append(tables.ravel())
            checksum = zlib.crc32(plain.tobytes(), checksum)
        values.setdefault(array.dtype.name, []).append(array.ravel())
        entries.append(entry)
        checksums.append(checksum)
    _refuse_equal_paths(entries)
    tensors = {f"values.{name}": np.concatenate(arrays) for name, arrays in values.items()}
    tensors["checksums"] = np.array(checksums, np.uint32)
    tensors["codes"] = np.concatenate([np.zeros(0, np.uint32), *codes])
    tensors["frequencies"] = np.concatenate([np.zeros(0, np.uint16), *frequencies])
    return entries, tensors


def _product_paths(packed: Any) -> list[list[str]]:
    """Return the paths of ProductArrays, whose codes and words are leaves of the file."""
    pairs = jax.tree_util.tree_flatten_with_path(packed, is_leaf=is_product)[0]
    return [_path_text(path) for path, leaf in pairs if is_product(leaf)]


def _path_text(key_path: Sequence[Any]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in key_path]


def _as_numpy(name: str, leaf: Any) -> np.ndarray:
    try:
        return np.asarray(leaf)
    except TypeError as error:  # a random key
        raise ValueError(f"{name}: expected an array of numbers, got {error}") from None


def _refuse_equal_paths(entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a path that is another's, or leads through another leaf: no dictionary holds both."""
    leaves = {tuple(entry["path"]) for entry in entries}
    if len(leaves) < len(entries):
        paths = ["/".join(entry["path"]) for entry in entries]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise _InvalidError(f"{twice}: expected paths that differ as text, got this one twice")
    for path in leaves:
        inner = next((path[:i] for i in range(len(path)) if path[:i] in leaves), None)
        if inner is not None:
            raise _InvalidError(
                f"{'/'.join(path)}: expected no leaf at {'/'.join(inner) or 'the root'}"
            )


def _codes_by_model(packed: PackedArray) -> np.ndarray:
    """Return the codes, uint8 [stacked layers, weights of one]."""
    codes = np.asarray(_unpack_codes(packed.codes, math.prod(packed.rows), packed.k))
    return codes.reshape(math.prod(packed.codes.shape[:-2]) if codes.size else 1, -1)


def _compress(codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of the range coder, and the frequencies [models, k] it needs to decode.

    One model for all stacked layers, or one for each, whichever takes less.
    """
    counts = np.stack([np.bincount(row, minlength=k) for row in codes]).reshape(-1, k)
    tables = np.stack([_frequencies(row) for row in counts]).reshape(-1, k)
    shared = _frequencies(counts.sum(axis=0))[None]
    if _bits(counts.sum(axis=0, keepdims=True), shared) <= _bits(counts, tables):
        codes, tables = codes.reshape(1, -1), shared
    coder, models = _range_coder().stack.AnsCoder(), _models(tables)
    if k > 1:
        for row, model in zip(codes[::-1], models[::-1], strict=True):
            starts = range(0, row.size, _CHUNK)
            for start in reversed(starts):  # a stack: what goes in last comes out first
                coder.encode_reverse(row[start : start + _CHUNK].astype(np.int32), model)
    return np.asarray(coder.get_compressed(), np.uint32), tables.astype(np.uint16)


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


# Reading -----------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Read a tree that `save` wrote. Safe for files from strangers.

    Args:
      path: of the file.
      like: a tree of the structure to return, its leaves arrays, shapes or anything else; without
        it, nested dictionaries with text as keys, whatever the containers were.

    Returns:
      The tree with PackedArray and ProductArray nodes where they were, ready for `unpack` and for
      products. Numbers
      of 64 bits stay NumPy arrays unless jax_enable_x64 is set.

    Raises:
      ValueError: if the file is damaged, not such a file, claims absurd sizes, or has other leaves
        than `like`; names the file, and the leaf where there is one.
      OSError: if it cannot be read.
    """
    path = Path(path)
    with _named(path):
        description, tensors = _read(path)
        entries, paths = _check_manifest(tensors), []
        leaves = []
        for entry, checksum, parts in _parts(entries, tensors):
            with _named("/".join(entry["path"])):
                leaves.append(_decode(entry, checksum, **parts))
            paths.append(tuple(entry["path"]))
        paths, leaves = _join_products(description.get("products", []), paths, leaves)
        return _nest(paths, leaves) if like is None else _arrange(paths, leaves, like)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `save` recorded: versions, method, plan, metadata.

    Args:
      path: of the file.

    Raises:
      ValueError, OSError: as `load`.
    """
    path = Path(path)
    with _named(path):
        header, _ = _read(path)
        return header


@contextlib.contextmanager
def _named(name: object) -> Iterator[None]:
    try:
        yield
    except _InvalidError as error:
        raise _InvalidError(f"{name}: {error}") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description in the header, and the tensors, all of one dimension."""
    from safetensors import SafetensorError, deserialize

    data = path.read_bytes()
    try:
        raw = deserialize(data)  # checks every offset against the size of the file
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _InvalidError(
            f"expected a safetensors file, got {' '.join(str(error).split())}"
        ) from None
    header = _json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    described = header.get("__metadata__") or {}
    if described.get("format") != _FORMAT or _FORMAT not in described:
        raise _InvalidError("expected a file of jaxquant.save, got other safetensors")
    description = _json(described[_FORMAT].encode())
    if description.get("version") != _VERSION:
        raise _InvalidError(
            f"expected format version {_VERSION}, got {description.get('version')!r}"
        )
    known = {"manifest": "U8", "checksums": "U32", "codes": "U32", "frequencies": "U16"}
    known |= {f"values.{name}": code for name, code in _DTYPES.items()}
    tensors = {}
    for name, tensor in raw:
        if tensor["dtype"] != known.get(name) or len(tensor["shape"]) != 1:
            raise _InvalidError(f"expected no tensor {name} of {tensor['dtype']} {tensor['shape']}")
        tensors[name] = np.frombuffer(tensor["data"], jnp.dtype(_NAMES[tensor["dtype"]]))
    missing = {"manifest", "checksums", "codes", "frequencies"} - tensors.keys()
    if missing:
        raise _InvalidError(f"expected a tensor {sorted(missing)[0]}, got none")
    return description, tensors


def _json(data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise _InvalidError("expected every name once, got one twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _InvalidError(f"expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise _InvalidError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _check_manifest(tensors: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the entries; their lengths fit the tensors, and none claims absurd sizes."""
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(tensors["manifest"].tobytes(), _MANIFEST_LIMIT)
    except zlib.error as error:
        raise _InvalidError(f"manifest: {error}") from None
    if not unzip.eof:
        raise _InvalidError(f"manifest: expected at most {_MANIFEST_LIMIT} bytes, whole")
    entries = _json(b'{"entries":' + text + b"}")["entries"]
    if not isinstance(entries, list) or len(entries) != len(tensors["checksums"]):
        raise _InvalidError("manifest: expected an entry for each checksum")
    limit = _WEIGHTS_PER_BYTE * sum(tensor.nbytes for tensor in tensors.values())
    lengths = dict.fromkeys(tensors.keys() - {"manifest"}, 0)
    lengths["checksums"] = len(entries)
    claimed = 0
    for number, entry in enumerate(entries):
        with _named(f"manifest: entry {number}"):
            _check_entry(entry)
            name = f"values.{entry['dtype']}"
            if name not in lengths:
                raise _InvalidError(f"expected a tensor {name}, got none")
            lengths[name] += math.prod(entry["shape"])
            shape = _weight_shape(entry) if "rows" in entry else entry["shape"]
            claimed += math.prod(max(size, 1) for size in shape)  # an empty array may be absurd too
            if "rows" in entry:
                lengths["codes"] += entry["words"]
                lengths["frequencies"] += entry["models"] * entry["shape"][-1]
    for name, length in lengths.items():
        if length != tensors[name].size:
            raise _InvalidError(f"{name}: expected {length} entries, got {tensors[name].size}")
    if claimed > limit:
        raise _InvalidError(
            f"expected at most {limit} weights in a file of this size, got {claimed}"
        )
    _refuse_equal_paths(entries)
    return entries


def _weight_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return (*entry["stacked"], *entry["rows"], *entry["columns"])


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise _InvalidError(f"expected an object, got {entry!r:.50}")
    packed = "rows" in entry
    sizes = ["shape"] + (["rows", "columns", "stacked"] if packed else [])
    counts = ["models", "words"] if packed else []
    if entry.keys() != {"path", "dtype", *sizes, *counts}:
        raise _InvalidError(f"expected other fields than {', '.join(map(str, entry))}")
    path, dtype = entry["path"], entry["dtype"]
    if not isinstance(path, list) or not all(isinstance(key, str) for key in path):
        raise _InvalidError(f"expected a path of text, got {path!r:.50}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _InvalidError(f"expected a dtype of safetensors, got {dtype!r:.50}")
    for name in sizes:
        size = entry[name]
        if not isinstance(size, list) or len(size) > 64 or not all(map(_is_count, size)):
            raise _InvalidError(f"expected {name} to be sizes, got {size!r:.50}")
    for name in counts:
        if not _is_count(entry[name]):
            raise _InvalidError(f"expected {name} to be a count, got {entry[name]!r:.50}")
    if packed:
        _check_packed(entry)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _check_packed(entry: Mapping[str, Any]) -> None:
    shape, codebook = _weight_shape(entry), tuple(entry["shape"])
    if not jnp.issubdtype(jnp.dtype(entry["dtype"]), jnp.floating):
        raise _InvalidError(f"expected a codebook of floating point, got {entry['dtype']}")
    if not codebook or not 1 <= codebook[-1] <= 256:
        raise _InvalidError(f"expected a codebook of 1 to 256 centroids, got shape {codebook}")
    slices = [i for i, size in enumerate(codebook[:-1]) if size != 1]
    fits = len(codebook) == 1 or (
        len(codebook) == len(shape) + 1
        and len(slices) <= 1
        and all(codebook[i] == shape[i] for i in slices)
    )
    if not fits or len(entry["columns"]) > 1 or len(entry["stacked"]) > 1:
        raise _InvalidError(
            f"expected a codebook for weights of shape {shape}, got shape {codebook}"
        )
    if entry["models"] not in (1, math.prod(entry["stacked"])):
        raise _InvalidError(f"expected a model for all layers or for each, got {entry['models']}")


def _parts(
    entries: Sequence[dict[str, Any]], tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[dict[str, Any], int, dict[str, np.ndarray]]]:
    """Yield each entry with its checksum and its parts of the tensors, which follow each other."""
    starts = dict.fromkeys(tensors, 0)

    def take(name: str, count: int) -> np.ndarray:
        start = starts[name]
        starts[name] += count
        return tensors[name][start : start + count]

    for entry, checksum in zip(entries, tensors["checksums"], strict=True):
        shape = tuple(entry["shape"])
        parts: dict[str, Any] = {
            "values": take(f"values.{entry['dtype']}", math.prod(shape)).reshape(shape)
        }
        if "rows" in entry:
            parts["words"] = take("codes", entry["words"])
            tables = take("frequencies", entry["models"] * shape[-1])
            parts["tables"] = tables.reshape(entry["models"], shape[-1])
        yield entry, int(checksum), parts


def _decode(
    entry: Mapping[str, Any],
    checksum: int,
    *,
    values: np.ndarray,
    words: np.ndarray | None = None,
    tables: np.ndarray | None = None,
) -> Any:
    own = zlib.crc32(values.tobytes())
    if words is None or tables is None:
        if own != checksum:
            raise _InvalidError("expected another checksum, the values are damaged")
        return _as_jax(values)
    shape = _weight_shape(entry)
    codes = _decompress(words, tables, math.prod(shape))
    if zlib.crc32(codes.tobytes(), own) != checksum:
        raise _InvalidError("expected another checksum, the codes or the codebook are damaged")
    stacked, rows, columns = (tuple(entry[name]) for name in ("stacked", "rows", "columns"))
    matrix = codes.reshape(*stacked, math.prod(rows), math.prod(columns))
    return PackedArray(
        codes=_pack_codes(matrix, values.shape[-1]),
        codebook=_as_jax(values),
        rows=rows,
        columns=columns,
    )


def _as_jax(values: np.ndarray) -> Any:
    """Return a JAX array, or the NumPy array if JAX would cut its numbers to 32 bits."""
    same = jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype
    return jnp.asarray(values) if same else values.copy()


def _decompress(words: np.ndarray, tables: np.ndarray, size: int) -> np.ndarray:
    """Return the codes, uint8 [size]."""
    codes = np.zeros(size, np.uint8)
    if tables.shape[1] == 1:
        if words.size:
            raise _InvalidError("expected no code words for a single centroid")
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


def _join_products(
    products: Any, paths: list[tuple[str, ...]], leaves: list[Any]
) -> tuple[list[tuple[str, ...]], list[Any]]:
    """Put the codes and words of each ProductArray together, in the place of both."""
    if not isinstance(products, list) or not all(
        isinstance(path, list) and all(isinstance(key, str) for key in path) for path in products
    ):
        raise _InvalidError("expected products to be paths")
    own = dict(zip(paths, leaves, strict=True))
    for path in map(tuple, products):
        with _named("/".join(path)):
            parts = [own.pop((*path, name), None) for name in ("codes", "words")]
            own[path] = _join(*parts)
    return list(own), list(own.values())


def _join(codes: Any, words: Any) -> ProductArray:
    if not is_packed(codes) or words is None or is_packed(words) or words.ndim != 3:
        raise _InvalidError("expected packed codes and words [M, K, D]")
    subspaces, k, _ = words.shape
    numbers = np.asarray(codes.codebook)
    fits = len(codes.shape) >= 2 and codes.shape[-2] == subspaces
    if not fits or not np.array_equal(numbers, np.arange(k, dtype=numbers.dtype)):
        raise _InvalidError(
            f"expected codes of {subspaces} subspaces, numbers of {k} words, got {codes.shape}"
        )
    if not jnp.issubdtype(words.dtype, jnp.floating):
        raise _InvalidError(f"expected words of floating point, got {words.dtype}")
    return ProductArray(codes=codes, words=words)


def _nest(paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> Any:
    if paths == [()]:
        return leaves[0]
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _arrange(paths: Sequence[tuple[str, ...]], leaves: Sequence[Any], like: Any) -> Any:
    """Return the leaves in the structure of `like`."""
    own = dict(zip(paths, leaves, strict=True))
    plain = pure(like)
    wanted, structure = jax.tree_util.tree_flatten_with_path(plain, is_leaf=is_quantized)
    keys = [tuple(_path_text(key_path)) for key_path, _ in wanted]
    if set(keys) != own.keys():
        odd = sorted("/".join(path) for path in set(keys) ^ own.keys())
        raise _InvalidError(f"expected the leaves of `like`, they differ in {', '.join(odd[:3])}")
    for key, (_, leaf) in zip(keys, wanted, strict=True):
        if hasattr(leaf, "shape") and tuple(leaf.shape) != tuple(own[key].shape):
            raise _InvalidError(
                f"{'/'.join(key)}: expected shape {tuple(leaf.shape)}, got {own[key].shape}"
            )
    return replaced(like, jax.tree.unflatten(structure, [own[key] for key in keys]))
