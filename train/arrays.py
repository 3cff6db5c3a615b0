"""Data of your own: arrays in a file or from a function, checked, split and measured."""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.named import call, name_of, resolve

_NEEDED = ("images", "labels")
_TEST = ("test_images", "test_labels")
_OTHER = ("pad", "flip")
_PAIRS = ("inputs", "targets")  # for a task of your own
_TEST_PAIRS = ("test_inputs", "test_targets")
_MOST_CLASSES = 100_000
_PART = 256  # images that are measured at once


class Arrays(NamedTuple):
    """A dataset of your own."""

    images: np.ndarray  # uint8 or float32 [N, H, W, C], or inputs
    labels: np.ndarray  # int32 [N], in [0, num_classes), or targets
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int  # 0 of inputs and targets
    mean: tuple[float, ...]  # of the training images per channel, of bytes on [0, 1]
    std: tuple[float, ...]
    pad: int
    flip: bool


def is_own(name: str | Callable[..., Any]) -> bool:
    """Return whether a config's `data.name` is a file or a function of yours."""
    return not isinstance(name, str) or name.endswith(".npz") or ":" in name


def load(name: str | Callable[..., Any]) -> Arrays:
    """Return the arrays of a file or a function.

    - `images`: [N, H, W, C] or, with one channel, [N, H, W]; bytes or floating point, in any unit.
    - `labels`: integers [N]; the classes are 0, 1, ... up to the highest one, each there.
    - `test_images`, `test_labels`: likewise. Without them, of each class every fifth image (5, 10,
      ... in their order) is for testing, and the others to train on.
    - `pad`: pixels of black frame out of which training images are cropped at random; 0 without it.
    - `flip`: whether training images may be mirrored left to right; they are not without it.

    Or, for a task of your own,

    - `inputs` and `targets`: numbers of any shape [N, ...].
    - `test_inputs`, `test_targets`: likewise. Without them every fifth of all is for testing.

    Args:
      name: a file as of `numpy.savez`, or a function without arguments, or "package.module:name" of
        one, that returns such arrays by name.

    Raises:
      ValueError: for what is not as above, naming the array.
      FileNotFoundError: if there is no such file.
    """
    given = _read(Path(name)) if isinstance(name, str) and name.endswith(".npz") else _called(name)
    where = f"data.name: {name_of(name)}"
    if any(array in given for array in _PAIRS):
        return _pairs(where, given)
    _check_names(where, given, _NEEDED, _TEST, _OTHER)
    images, labels = _pair(where, given, *_NEEDED)
    if _TEST[0] in given:
        test_images, test_labels = _pair(where, given, *_TEST)
        if (test_images.shape[1:], test_images.dtype) != (images.shape[1:], images.dtype):
            raise ValueError(
                f"{where}: test_images: expected {_kind(images)} as of images, got "
                f"{_kind(test_images)}"
            )
    else:
        test = every_fifth(labels)
        test_images, test_labels = images[test], labels[test]
        images, labels = images[~test], labels[~test]
        if not len(test_labels):
            raise ValueError(
                f"{where}: expected test_images and test_labels, or a class of five images or more "
                "to take some for testing, got neither"
            )
    mean, std = _moments(images)
    return Arrays(
        images,
        labels,
        test_images,
        test_labels,
        num_classes=_count_classes(where, np.concatenate([labels, test_labels])),
        mean=mean,
        std=std,
        pad=_pad(where, given, images.shape[1:3]),
        flip=_flip(where, given),
    )


def _check_names(
    where: str,
    given: Mapping[str, Any],
    needed: Sequence[str],
    test: Sequence[str],
    other: Sequence[str],
) -> None:
    missing = [array for array in needed if array not in given]
    if any(array in given for array in test):
        missing += [array for array in test if array not in given]
    unknown = [str(array) for array in given if array not in (*needed, *test, *other)]
    if missing or unknown:
        raise ValueError(
            f"{where}: expected {', '.join(needed)} and maybe {', '.join((*test, *other))}, got "
            + (f"no {missing[0]}" if missing else f"{unknown[0]!r}")
        )


def _pairs(where: str, given: Mapping[str, Any]) -> Arrays:
    """Return inputs and targets of any shape."""
    _check_names(where, given, _PAIRS, _TEST_PAIRS, ())
    inputs, targets = (_numbers(where, name, given) for name in _PAIRS)
    if _TEST_PAIRS[0] in given:
        test_inputs, test_targets = (_numbers(where, name, given) for name in _TEST_PAIRS)
        for name, ours, theirs in (
            (_PAIRS[0], test_inputs, inputs),
            (_PAIRS[1], test_targets, targets),
        ):
            if (ours.shape[1:], ours.dtype) != (theirs.shape[1:], theirs.dtype):
                raise ValueError(
                    f"{where}: test_{name}: expected {_kind(theirs)} as of {name}, got "
                    f"{_kind(ours)}"
                )
    else:
        test = np.arange(len(inputs)) % 5 == 4
        _check_lengths(where, _PAIRS, inputs, targets)
        test_inputs, test_targets = inputs[test], targets[test]
        inputs, targets = inputs[~test], targets[~test]
    _check_lengths(where, _PAIRS, inputs, targets)
    _check_lengths(where, _TEST_PAIRS, test_inputs, test_targets)
    if not len(test_inputs):
        raise ValueError(
            f"{where}: expected test_inputs and test_targets, or five examples or more to take "
            "some for testing, got neither"
        )
    return Arrays(inputs, targets, test_inputs, test_targets, 0, (), (), pad=0, flip=False)


def _check_lengths(
    where: str, names: Sequence[str], inputs: np.ndarray, targets: np.ndarray
) -> None:
    if len(inputs) != len(targets):
        raise ValueError(
            f"{where}: {names[1]}: expected one for each of {len(inputs)} {names[0]}, got "
            f"{len(targets)}"
        )


def _numbers(where: str, name: str, given: Mapping[str, Any]) -> np.ndarray:
    """Return numbers [N, ...]: bytes as they are, else int32 or float32."""
    array = np.asarray(given[name])
    whole = np.issubdtype(array.dtype, np.integer)
    if not array.ndim or not array.size or not (whole or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"{where}: {name}: expected integers or floating point [N, ...], none of them 0, got "
            f"{_kind(array)}"
        )
    if array.dtype == np.uint8:
        return array
    narrow = array.astype(np.int32 if whole else np.float32)
    bad = int(np.count_nonzero(narrow != array if whole else ~np.isfinite(narrow)))
    if bad:
        kind = "integers in int32" if whole else "finite numbers in float32"
        raise ValueError(f"{where}: {name}: expected {kind}, got {bad} others")
    return narrow


def every_fifth(labels: np.ndarray) -> np.ndarray:
    """Return True for every fifth of the entries of each label: 5, 10, ... in their order."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[4::5]] = True
    return chosen


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"data.name: {path}: expected a file of arrays, got no such file")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data.name: {path}: expected arrays as of numpy.savez, got {reason}"
        ) from None


def _called(name: str | Callable[..., Any]) -> Mapping[str, Any]:
    given = call("data.name", resolve("data.name", name))
    if not isinstance(given, Mapping):
        raise ValueError(
            f"data.name: {name_of(name)}: expected a mapping of arrays by name, got "
            f"{type(given).__name__}"
        )
    return given


def _pair(
    where: str, given: Mapping[str, Any], of_images: str, of_labels: str
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(given[of_images]), np.asarray(given[of_labels])
    known = images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)
    if images.ndim not in (3, 4) or not images.size or not known:
        raise ValueError(
            f"{where}: {of_images}: expected uint8 or floating point [N, H, W, C] or [N, H, W], "
            f"none of them 0, got {_kind(images)}"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: {of_labels}: expected integers [N], got {_kind(labels)}")
    if len(labels) != len(images):
        raise ValueError(
            f"{where}: {of_labels}: expected one for each of {len(images)} images, got "
            f"{len(labels)}"
        )
    if labels.min() < 0 or labels.max() >= _MOST_CLASSES:
        raise ValueError(
            f"{where}: {of_labels}: expected classes from 0 up to the number of classes, got "
            f"{labels.min()} to {labels.max()}"
        )
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
        bad = int(np.count_nonzero(~np.isfinite(images)))
        if bad:
            raise ValueError(
                f"{where}: {of_images}: expected finite numbers in float32, got {bad} others"
            )
    return images if images.ndim == 4 else images[..., None], labels.astype(np.int32)


def _count_classes(where: str, labels: np.ndarray) -> int:
    there = np.bincount(labels)
    if len(there) < 2 or not there.all():
        absent = int(np.argmin(there)) if not there.all() else 1
        raise ValueError(
            f"{where}: labels: expected classes 0, 1, ... at least two of them and each there, got "
            f"no image of class {absent}"
        )
    return len(there)


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, 1 for one that is constant."""
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    count = images[..., 0].size
    parts = [images[i : i + _PART] for i in range(0, len(images), _PART)]
    sums = np.array([part.sum((0, 1, 2), dtype=np.float64) for part in parts])
    mean = sums.sum(axis=0) / (scale * count)
    squares = np.array([np.square(part / scale - mean).sum((0, 1, 2)) for part in parts])
    variance = squares.sum(axis=0) / count
    std = np.sqrt(variance)
    return tuple(map(float, mean)), tuple(float(s) if s > 0 else 1.0 for s in std)


def _pad(where: str, given: Mapping[str, Any], sides: tuple[int, ...]) -> int:
    pad = np.asarray(given.get("pad", 0))
    if pad.ndim or not np.issubdtype(pad.dtype, np.integer) or not 0 <= pad <= min(sides):
        raise ValueError(
            f"{where}: pad: expected a number of pixels from 0 to {min(sides)}, got {pad}"
        )
    return int(pad)


def _flip(where: str, given: Mapping[str, Any]) -> bool:
    flip = np.asarray(given.get("flip", False))
    if flip.ndim or flip.dtype != bool:
        raise ValueError(f"{where}: flip: expected true or false, got {flip}")
    return bool(flip)


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
