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

import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from train.logs import write_bytes

_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_SHOWN = 4
# What NumPy and zipfile raise on damaged, encrypted, exotic or dishonest files.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Read every tensor of a `.npz` or `.safetensors` file; pickled objects are refused.

    Args:
      path: The file; its suffix tells the format.

    Returns:
      The arrays by name, with the file's own names, shapes and dtypes.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the suffix is another one, or the file is damaged, naming the file.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a .npz or .safetensors file, got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return readers[path.suffix](path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, Mapping):
                raise ValueError("a single array")
            tensors = {name: archive[name] for name in archive}
    except _DAMAGE as error:
        raise ValueError(f"{path}: expected a .npz of arrays, got {_one_line(error)}") from None
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):  # A member that is no .npy comes as bytes.
            raise ValueError(f"{path}: expected a .npz of arrays, got member {name!r}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{path}: expected a .safetensors file, got {_one_line(error)}") from None


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
    return jq.load(path, like={name: x for name, x in variables.items() if jax.tree.leaves(x)})


def load(path: str | Path, variables: Any, *, unused: str | None = None) -> Any:
    """Fill a network's variables from a file, by name and shape.

    A packed network (`jaxquant.save`) stays packed; `jaxquant.unpack` gives its weights, and leaves
    other trees as they are. Of a PyTorch state_dict, a prefix `module.` on all names (DataParallel)
    is dropped, `num_batches_tracked` and what `unused` matches is ignored, and apart from these
    every tensor of the network is filled and every one of the file is used.

    Args:
      path: A file for `read_state_dict`, or of `jaxquant.save`.
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
    tensors = _strip(read_state_dict(path), unused)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(variables)
    names = [_torch_name(key_path) for key_path, _ in leaves]
    _check_names(path, expected=names, got=tensors)
    filled = [
        _to_linen(path, name, tensors[name], leaf)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
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

    write_bytes(path, serialize(to_state_dict(variables)))
    return path.stat().st_size


def _strip(tensors: dict[str, np.ndarray], unused: str | None) -> dict[str, np.ndarray]:
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
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _to_linen(path: str | Path, name: str, tensor: np.ndarray, leaf: Any) -> np.ndarray:
    expected = _to_torch_layout(np.broadcast_to(np.float32(0), leaf.shape)).shape
    if tensor.shape != expected:
        raise ValueError(f"{path}: {name}: expected shape {expected}, got {tensor.shape}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{path}: {name}: expected floating point values, got {tensor.dtype}")
    with np.errstate(over="ignore"):
        tensor = tensor.astype(leaf.dtype)
    bad = tensor.size - int(np.isfinite(tensor.astype(np.float32)).sum())
    if bad:
        raise ValueError(f"{path}: {name}: expected finite values, got {bad} NaN or infinite")
    return _to_linen_layout(tensor)
