"""Read and write the networks of `train.models`: PyTorch state_dicts, and packed by jaxquant.

State_dicts are .npz or .safetensors; a packed network is known by its metadata. The tensors' names
in a state_dict follow from the paths of the Linen tree, never the other way round, so a name in
the file can reach only a tensor that the network has:

    params/layer1_0/conv1/kernel     HWIO       layer1.0.conv1.weight       OIHW
    params/linear/kernel             [in, out]  linear.weight               [out, in]
    params/bn1/scale, .../bias                  bn1.weight, bn1.bias
    batch_stats/bn1/mean, .../var               bn1.running_mean, bn1.running_var

So torchvision's published state_dicts of the ImageNet networks fit as they are:

    params/features_0/kernel                    features.0.weight
    params/layer2_0/downsample_0/kernel         layer2.0.downsample.0.weight
    params/inception3a/branch2_1/conv/kernel    inception3a.branch2.1.conv.weight
"""

import contextlib
import functools
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.files import replace_file
from jaxquant.rounds.selection import leaves_with_paths

_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_SHOWN = 4
_LONGEST_NAME = 100
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # NumPy's; others may ask for gigabytes
_HEADER_BYTES = 10_240  # NumPy's longest header, and what is before it
_LONGEST_AXIS = 1 << 48


class Tensor(NamedTuple):
    """A tensor of a file, known from its header: its values have not been read."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a `.npz` or `.safetensors` file by the file's own names, and close it.

    Nothing is decompressed but headers, so a file may claim what it will. No pickled objects.

    Args:
      path: The file; its suffix tells the format.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the suffix is another one, or the file is damaged, naming the file; also from
        `read`, naming the tensor too.
    """
    path = Path(path)
    formats = {
        ".npz": (zipfile.ZipFile, _npz_tensors),
        ".safetensors": (_open_safetensors, _safetensors_tensors),
    }
    if path.suffix not in formats:
        raise ValueError(f"{path}: expected a .npz or .safetensors file, got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    open_file, list_tensors = formats[path.suffix]
    with contextlib.ExitStack() as stack:
        with _readable(f"{path}: expected a {path.suffix} of arrays"):
            file = stack.enter_context(open_file(path))
        yield list_tensors(path, file)


def _npz_tensors(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        member = f"{path}: member {_shown(info.filename)}"
        with _readable(f"{member}: expected an array"):
            if name == info.filename or name in tensors or info.compress_type not in _COMPRESSION:
                raise ValueError("another kind of file, name or compression")
            shape, dtype = _npy_header(archive, info)
        tensors[name] = Tensor(
            shape,
            str(dtype),
            dtype.kind == "f",
            functools.partial(_read_npy, member, archive, info),
        )
    return tensors


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], Any]:
    """Return the shape and the dtype of an array from its member's first bytes."""
    with archive.open(info) as member:
        start = io.BytesIO(member.read(_HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(start)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(start)
    else:  # a later one is for arrays of structures
        raise ValueError(f"version {version}")
    if not all(0 <= length < _LONGEST_AXIS for length in shape):
        raise ValueError("an impossible shape")
    return shape, dtype


def _read_npy(where: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with _readable(f"{where}: expected an array"), archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # at the end the checksum has been compared
            raise ValueError("more values than its header says")
        return array


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="numpy")


def _safetensors_tensors(path: Path, file: Any) -> dict[str, Tensor]:
    tensors = {}
    for name in file.keys():  # noqa: SIM118
        header = file.get_slice(name)
        dtype = header.get_dtype()
        read = functools.partial(_read_safetensors, f"{path}: {_shown(name)}", file, name)
        tensors[name] = Tensor(tuple(header.get_shape()), dtype, "F" in dtype, read)
    return tensors


def _read_safetensors(where: str, file: Any, name: str) -> np.ndarray:
    with _readable(f"{where}: expected an array"):
        return file.get_tensor(name)


@contextlib.contextmanager
def _readable(expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever comes of damaged, exotic or dishonest files
        raise ValueError(f"{expected}, got {_one_line(error)}") from None


def _shown(name: str) -> str:
    """Return a file's own name for something: it may be of any length and hold anything."""
    return (
        name if name.isprintable() and len(name) <= _LONGEST_NAME else ascii(name[:_LONGEST_NAME])
    )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load_packed(path: str | Path, variables: Any) -> Any:
    """Return the variables of a file of `jaxquant.save`, packed, or None if it is another file.

    Args:
      path: The file.
      variables: As of `load`.

    Raises:
      ValueError: If the file is damaged, or another network's, naming the file and the leaf.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("format") != "jaxquant":
                return None
    except (SafetensorError, OSError):
        return None  # `load` says what is wrong with it
    packed = jq.load(path, like={name: x for name, x in variables.items() if jax.tree.leaves(x)})
    for name, leaf in leaves_with_paths(packed):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            _check_finite(path, name, leaf)
    return packed


def load(path: str | Path, variables: Any, *, unused: str | None = None) -> Any:
    """Fill a network's variables from a file, by name and shape.

    A packed network (`jaxquant.save`) stays packed; `jaxquant.unpack` gives its weights, and leaves
    other trees as they are. Of a PyTorch state_dict, a prefix `module.` on all names (DataParallel)
    is dropped, `num_batches_tracked` and what `unused` matches is ignored, and apart from these
    every tensor of the network is filled and every one of the file is used.

    Args:
      path: A file for `opened`, or of `jaxquant.save`.
      variables: {"params": ..., "batch_stats": ...} of arrays or `jax.ShapeDtypeStruct`, as of
        `module.init` or `jax.eval_shape` of it.
      unused: Regular expression for whole names of tensors that the network does without, see
        `train.models.unused_tensors`.

    Returns:
      A tree like `variables`, of new arrays in its dtypes, or packed.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If names are missing or unexpected, or a tensor has another shape, is not floating
        point, or has a NaN or infinite value, naming the file and the tensors. Nothing has been put
        on a device by then.
    """
    packed = _load_packed(path, variables)
    if packed is not None:
        return packed
    leaves, treedef = jax.tree_util.tree_flatten_with_path(variables)
    wanted = {_torch_name(key_path): leaf for key_path, leaf in leaves}
    with opened(path) as file:
        tensors = _strip(file, unused)
        _check_names(path, expected=list(wanted), got=tensors)
        for name, leaf in wanted.items():
            _check_header(path, name, tensors[name], leaf)
        filled = [_to_linen(path, name, tensors[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(treedef, [jnp.asarray(array) for array in filled])


def to_state_dict(variables: Any) -> dict[str, np.ndarray]:
    """Return a network's variables under PyTorch's names, in its layout: the inverse of `load`.

    Args:
      variables: {"params": ..., "batch_stats": ...} of arrays.

    Returns:
      Contiguous NumPy arrays by name, without a prefix and without `num_batches_tracked` (which
      PyTorch fills in itself).

    Raises:
      ValueError: If the tree holds a leaf that has no counterpart in PyTorch, naming its path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    return {
        _torch_name(path): np.ascontiguousarray(_to_torch_layout(np.asarray(leaf)))
        for path, leaf in leaves
    }


def save(variables: Any, path: Path) -> int:
    """Write a network as a .safetensors state_dict, and return the file's bytes.

    Raises:
      ValueError: As `to_state_dict`.
      OSError: If the file cannot be written; an older one is as it was.
    """
    from safetensors.numpy import save as serialize

    replace_file(path, serialize(to_state_dict(variables)))
    return path.stat().st_size


def _strip(tensors: dict[str, Tensor], unused: str | None) -> dict[str, Tensor]:
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in named.items()
        if not name.endswith("num_batches_tracked") and not (unused and re.fullmatch(unused, name))
    }


def _torch_name(key_path: tuple[Any, ...]) -> str:
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    _, *modules, leaf = path.split("/")
    if leaf not in _LEAF_NAMES or not modules:
        raise ValueError(f"{path}: expected a leaf named {', '.join(_LEAF_NAMES)}, got {leaf!r}")
    # A number after an underscore is a place in a Sequential: layer1_0 is layer1.0.
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, _LEAF_NAMES[leaf]])


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _to_linen_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _check_names(path: str | Path, *, expected: list[str], got: Iterable[str]) -> None:
    got = set(got)
    missing = [name for name in expected if name not in got]
    unexpected = sorted(got.difference(expected))
    parts = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if parts:
        raise ValueError(
            f"{path}: expected the model's {len(expected)} tensors, got {', '.join(parts)}"
        )


def _first(names: list[str]) -> str:
    return ", ".join(_shown(name) for name in names[:_SHOWN]) + (
        ", ..." if len(names) > _SHOWN else ""
    )


def _check_header(path: str | Path, name: str, tensor: Tensor, leaf: Any) -> None:
    expected = _to_torch_layout(np.broadcast_to(np.float32(0), leaf.shape)).shape
    if tensor.shape != expected:
        raise ValueError(f"{path}: {name}: expected shape {expected}, got {tensor.shape}")
    if not tensor.floating:
        raise ValueError(f"{path}: {name}: expected floating point values, got {tensor.dtype}")


def _to_linen(path: str | Path, name: str, tensor: Tensor, leaf: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = tensor.read().astype(leaf.dtype)
    _check_finite(path, name, array)
    return _to_linen_layout(array)


def _check_finite(path: str | Path, name: str, array: Any) -> None:
    bad = array.size - int(np.isfinite(np.asarray(array, np.float32)).sum())
    if bad:
        raise ValueError(f"{path}: {name}: expected finite values, got {bad} NaN or infinite")
