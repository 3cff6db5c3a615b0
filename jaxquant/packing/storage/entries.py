"""The words of the format: what a file says of each leaf, its limits, and errors that name it."""

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = "jaxquant"
VERSION = 2
LeafPath = tuple[str, ...]
_LONGEST_MESSAGE = 500  # characters
_LONGEST_NAME = 100  # of a leaf in a message
DTYPES = {
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
FLOATING = {name for name in DTYPES if jnp.issubdtype(jnp.dtype(name), jnp.floating)}
DTYPE_NAMES = {code: name for name, code in DTYPES.items()}
PRODUCT_PARTS = ("codes", "words")  # leaves of a ProductArray
_SMALL_MANIFEST = 2**20  # bytes of JSON that a file of any size may have
_MANIFEST_PER_BYTE = 16  # and what a longer one may have for each of its bytes


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


DEFAULT_LIMITS = Limits()


class Part(NamedTuple):
    """A leaf of a file: its entry of the manifest, and its own part of the tensors."""

    entry: Mapping[str, Any]
    checksum: int
    values: np.ndarray  # of a packed leaf its codebook
    scale: np.ndarray | None
    words: np.ndarray | None  # of the range coder, of a packed leaf
    tables: np.ndarray | None  # its frequencies


class InvalidError(ValueError):
    """What is wrong, so far without the name of the file; short and printable."""

    def __init__(self, message: str):
        """Keep a message, cut and printable."""
        super().__init__(printable(message[:_LONGEST_MESSAGE])[:_LONGEST_MESSAGE])


def printable(text: str) -> str:
    """Return text with what controls terminals, and what is no Unicode, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a leaf before the message of an error."""
    try:
        yield
    except InvalidError as error:
        raise InvalidError(f"{name}: {error}") from None


def leaf_name(path: Sequence[str]) -> str:
    """Return the path of a leaf as text, cut for a message."""
    name = "/".join(path[:_LONGEST_NAME]) or "the root"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def path_text(key_path: Sequence[Any]) -> list[str]:
    """Return the keys to a leaf of a tree, each as text."""
    return [jax.tree_util.keystr((key,), simple=True) for key in key_path]


def is_packed_entry(entry: Mapping[str, Any]) -> bool:
    """Return whether a leaf is packed, by its entry."""
    return "rows" in entry


def weights_dtype(entry: Mapping[str, Any]) -> Any:
    """Return the name of the dtype of the weights of a packed leaf."""
    return entry.get("weights", entry["dtype"])


def leaf_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a leaf, of the weights of a packed one."""
    names = ("stacked", "rows", "columns") if is_packed_entry(entry) else ("shape",)
    return tuple(size for name in names for size in entry[name])


def arrays_of(entry: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Return the name of the tensor that holds each part of a leaf, and the part's shape."""
    arrays = {"values": (f"values.{entry['dtype']}", entry["shape"])}
    if "scale" in entry:
        arrays["scale"] = f"values.{entry['scale']['dtype']}", entry["scale"]["shape"]
    if is_packed_entry(entry):
        arrays["words"] = "codes", [entry["words"]]
        arrays["tables"] = "frequencies", [entry["models"], entry["shape"][-1]]
    return arrays


def products_of(description: Mapping[str, Any]) -> list[LeafPath]:
    """Return the paths of the ProductArrays of a file."""
    return [tuple(path) for path in description.get("products", [])]


def nested(leaves: Iterable[tuple[LeafPath, Any]]) -> Any:
    """Return nested dictionaries; a path must not be another's or lead through another leaf."""
    root: dict[str, Any] = {}
    for path, leaf in leaves:
        *way, last = ("", *path)  # below one key, so that the root may be a leaf
        node = root
        for i, key in enumerate(way):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise InvalidError(f"{leaf_name(path)}: expected no leaf at {leaf_name(path[:i])}")
        if last in node:
            raise InvalidError(
                f"{leaf_name(path)}: expected paths that differ as text, got this one twice"
            )
        node[last] = leaf
    return root.get("", {})


def longest_manifest(size: int) -> int:
    """Return how many bytes of JSON a file of so many bytes may have."""
    return max(_SMALL_MANIFEST, _MANIFEST_PER_BYTE * size)


def header_size(data: bytes) -> int:
    """Return the bytes of the JSON in the header."""
    return int.from_bytes(data[:8], "little")


def header_checksum(header: bytes, tensors: Mapping[str, np.ndarray]) -> int:
    """Return the checksum of the header with its length, and of the manifest."""
    return zlib.crc32(tensors["manifest"].tobytes(), zlib.crc32(header))
