"""A packed tree as one safetensors file: `save`, `load`, `read_metadata`."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jaxquant.files import read_file, replace_file
from jaxquant.packing.arrays import ProductArray
from jaxquant.packing.storage.checks import examined
from jaxquant.packing.storage.entries import (
    DEFAULT_LIMITS,
    PRODUCT_PARTS,
    VERSION,
    InvalidError,
    Limits,
    leaf_name,
    naming,
    nested,
    printable,
    products_of,
)
from jaxquant.packing.storage.reading import arranged, decoded
from jaxquant.packing.storage.writing import (
    description_text,
    encoded,
    flattened,
    manifest_of,
    serialized,
)
from jaxquant.rounds.schedules import Plan
from jaxquant.trees import pure


def save(
    path: str | os.PathLike[str],
    packed: Any,
    *,
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
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

    >>> import jax.numpy as jnp, jaxquant as jq, tempfile
    >>> codebook = jnp.array([-1.0, 0.0, 1.0])
    >>> packed = {"w": jq.pack_array(jnp.eye(64), codebook), "b": jnp.ones(3)}
    >>> path = tempfile.mktemp()
    >>> jq.save(path, packed)
    >>> jq.load(path)["b"].tolist()
    [1.0, 1.0, 1.0]
    """
    description = {
        "version": VERSION,
        "jaxquant": _library_version(),
        "method": None if plan is None else plan.method,
        "plan": None if plan is None else _describe_plan(plan),
        "metadata": dict(metadata or {}),
    }
    leaves, products = flattened(pure(packed))
    if products:
        description["products"] = products
    text = description_text(description, limits)
    entries, tensors = encoded(leaves, limits)
    tensors["manifest"] = manifest_of(entries, sum(tensor.nbytes for tensor in tensors.values()))
    data = serialized(tensors, text)
    examined(data, limits)
    replace_file(path, data)


def _library_version() -> str:
    from jaxquant import __version__

    return __version__


def _describe_plan(plan: Plan) -> dict[str, Any]:
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    fields["clustering"] = dataclasses.asdict(plan.clustering)
    return {name: value for name, value in fields.items() if name not in ("selection", "method")}


def load(path: str | os.PathLike[str], *, like: Any = None, limits: Limits = DEFAULT_LIMITS) -> Any:
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
        description, parts = examined(read_file(path), limits)
        own = {}
        for part in parts:
            with naming(leaf_name(part.entry["path"])):
                own[tuple(part.entry["path"])] = decoded(part)
        for product in products_of(description):
            codes, words = (own.pop((*product, name)) for name in PRODUCT_PARTS)
            own[product] = ProductArray(codes=codes, words=words)
        return nested(own.items()) if like is None else arranged(own, like)


def read_metadata(
    path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> dict[str, Any]:
    """Return what `save` recorded: versions, method, plan, metadata.

    Args:
      path: of the file.
      limits: as in `load`.

    Raises:
      ValueError, OSError: as `load`.
    """
    with _of_file(path):
        return examined(read_file(path), limits)[0]


@contextlib.contextmanager
def _of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the name of the file before the message of an error."""
    try:
        yield
    except InvalidError as error:
        raise ValueError(f"{printable(str(path))}: {error}") from None
