"""The datasets of the experiments, as arrays in memory.

`digits` comes with scikit-learn. `cifar10` and `mnist` are read by tensorflow-datasets, without
TensorFlow: builders of our own write the official archives as array_record, with the names,
versions and features of the stock builders, so that `tfds.data_source` reads the result as if the
stock builder had written it. Nothing of an archive is unpacked to disk.
"""

import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import shutil
import sys
import tarfile
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_TIMEOUT_S = 20
_READ_BATCH = 1000
_MAX_MEMBERS = 100
_SLACK_BYTES = 1 << 20  # What an archive may hold beside its records: headers, names, a readme.
# In a prepared directory: the SHA-256 of each archive that it was made from.
_MARKER = "archives.json"
_ACCEPT = "--config.data.allow_unofficial=true accepts it"

_Splits = dict[str, tuple[np.ndarray, np.ndarray]]


class Dataset(NamedTuple):
    """Images and labels in memory, and how they are normalized and augmented.

    Attributes:
      name: As given to `load`.
      train_images: uint8 [N, H, W, C].
      train_labels: int32 [N], in [0, num_classes).
      test_images: uint8 [M, H, W, C].
      test_labels: int32 [M].
      num_classes: Number of classes.
      mean: Per channel, of pixels on [0, 1].
      std: Per channel, of pixels on [0, 1].
      pad: Pixels of padding for random crops; 0 for none.
      flip: Whether images may be mirrored left to right.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool


class _Source(NamedTuple):
    """A dataset that is made from archives. `version` is that of the stock builder."""

    name: str
    version: str
    url: str
    sha256: dict[str, str]
    shape: tuple[int, int, int]
    records: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    label_names: tuple[str, ...]


_CIFAR10 = _Source(
    name="cifar10",
    version="3.0.2",
    url="https://www.cs.toronto.edu/~kriz/",
    sha256={
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    },
    shape=(32, 32, 3),
    records={"train": 50_000, "test": 10_000},
    # Those of the public checkpoints (they are ImageNet's).
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    pad=4,
    flip=True,
    label_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
)

_MNIST_SHA256 = {
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}

_MNIST = _Source(
    name="mnist",
    version="3.0.1",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    sha256={f"{stem}-ubyte.gz": sha256 for stem, sha256 in _MNIST_SHA256.items()},
    shape=(28, 28, 1),
    records={"train": 60_000, "test": 10_000},
    mean=(0.1307,),
    std=(0.3081,),
    pad=0,
    flip=False,
    label_names=tuple("0123456789"),
)

_SOURCES = {source.name: source for source in (_CIFAR10, _MNIST)}
NAMES = ("digits", *_SOURCES)


def load(name: str, *, data_dir: str | Path, allow_unofficial: bool = False) -> Dataset:
    """Load a dataset into memory, preparing it under `data_dir` the first time.

    - `digits`: the 1,797 8x8 digits of scikit-learn, values 0..16 scaled to 0..255; of each class
      every fifth image is for testing (5, 10, ... in scikit-learn's order). It needs no `data_dir`.
    - `cifar10`, `mnist`: from the official archives in `data_dir/downloads/manual`, downloaded
      there if absent. Their SHA-256 is verified. The prepared dataset is at
      `data_dir/<name>/<version>`, written under another name and renamed when complete, so that a
      process killed in between leaves nothing that a later call could take for it. A directory that
      tensorflow-datasets itself prepared as array_record is read too. Images come in
      tensorflow-datasets' fixed shuffled order.

    Args:
      name: One of `NAMES`.
      data_dir: Folder of tensorflow-datasets.
      allow_unofficial: Accept archives of another SHA-256, with a warning. What was prepared from
        such an archive is refused by later calls without this.

    Returns:
      The dataset, in a fixed order.

    Raises:
      ValueError: If the name is unknown, an archive is not the official one or is damaged, or what
        is prepared cannot be read.
      FileNotFoundError: If an archive is absent and cannot be downloaded, naming the files, the
        folder and the URLs.
    """
    if name == "digits":
        return _load_digits()
    if name not in _SOURCES:
        raise ValueError(f"dataset: expected one of {', '.join(NAMES)}, got {name!r}")
    source, data_dir = _SOURCES[name], Path(data_dir).expanduser()
    if not _prepared(source, data_dir).exists():
        _prepare(source, data_dir, allow_unofficial)
    _check_prepared(source, data_dir, allow_unofficial)
    train, test = (_read_split(source, data_dir, split) for split in ("train", "test"))
    return Dataset(
        name, *train, *test, 10, source.mean, source.std, pad=source.pad, flip=source.flip
    )


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return Dataset(
        "digits",
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        10,
        mean=(0.3052,),
        std=(0.3760,),
        pad=0,
        flip=False,
    )


# What is prepared


def _prepared(source: _Source, data_dir: Path) -> Path:
    return data_dir / source.name / source.version


def _prepare(source: _Source, data_dir: Path, allow_unofficial: bool) -> None:
    """Make the prepared directory from the archives; it appears complete or not at all."""
    with _locked(data_dir / f".{source.name}.lock"):
        target = _prepared(source, data_dir)
        if target.exists():  # Another process made it while we waited.
            return
        for left_by_a_kill in target.parent.glob(f"incomplete.*_{target.name}"):
            shutil.rmtree(left_by_a_kill)
        folder = _fetch(source, data_dir / "downloads" / "manual")
        sums = {file: _sha256(folder / file) for file in source.sha256}
        for file, problem in _unofficial(source, sums):
            if not allow_unofficial:
                raise ValueError(f"{folder / file}: {problem}; {_ACCEPT}")
        builder = _builder_class(source.name)(data_dir=data_dir)
        builder.splits_to_write, builder.sums = _READERS[source.name](source, folder), sums
        builder.write()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Not on Windows, where array_record is not either.

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_prepared(source: _Source, data_dir: Path, allow_unofficial: bool) -> None:
    """Refuse, or warn of, a directory that was made from an unofficial archive."""
    target = _prepared(source, data_dir)
    # Without a marker tensorflow-datasets itself prepared it, which verifies checksums.
    if not (target / _MARKER).exists():
        return
    try:
        problems = list(_unofficial(source, json.loads((target / _MARKER).read_text())))
    except (ValueError, AttributeError) as error:
        raise ValueError(_unreadable(target, error)) from None
    if problems:
        file, problem = problems[0]
        message = f"{target}: made from an unofficial {file}: {problem}"
        if not allow_unofficial:
            raise ValueError(
                f"{message}; {_ACCEPT}, deleting the folder prepares it anew from the official one"
            )
        warnings.warn(f"{message}; accepted by allow_unofficial", stacklevel=3)


def _unofficial(source: _Source, sums: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each archive whose checksum is not the official one, and what is wrong."""
    for file, expected in source.sha256.items():
        if sums.get(file) != expected:
            yield file, f"expected SHA-256 {expected}, got {sums.get(file)}"


@functools.cache
def _builder_class(name: str) -> Any:
    """Return a builder like the stock one of that name; it writes arrays that it is given."""
    import tensorflow_datasets as tfds

    source = _SOURCES[name]

    # Not registered: the stock builder of the same name must stay importable.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(source.version)
        splits_to_write: _Splits
        sums: dict[str, str]

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=source.shape),
                "label": tfds.features.ClassLabel(names=source.label_names),
            }
            if name == "cifar10":
                features["id"] = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage=source.url,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager  # The archives are already here.
            # data_path is still the temporary directory: the marker appears with the data.
            (Path(self.data_path) / _MARKER).write_text(json.dumps(self.sums))
            return {split: self._generate_examples(split) for split in self.splits_to_write}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, (image, label) in enumerate(zip(*self.splits_to_write[split], strict=True)):
                example = {"image": _png(image), "label": int(label)}
                if name == "cifar10":
                    example["id"] = f"{split}_{index:05d}"
                yield index, example

        def write(self) -> None:
            tfds.disable_progress_bar()
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            with redirect_stdout(sys.stderr):  # It prints what it is about to do.
                self.download_and_prepare(download_config=config, file_format="array_record")

    Builder.name = name
    return Builder


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _read_split(source: _Source, data_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode one prepared split into images uint8 [N, H, W, C] and labels int32 [N]."""
    import grain
    import tensorflow_datasets as tfds

    target = _prepared(source, data_dir)
    try:
        skip = {"image": tfds.decode.SkipDecoding()}
        examples = tfds.data_source(source.name, split=split, data_dir=data_dir, decoders=skip)
        starts = grain.MapDataset.range(0, len(examples), _READ_BATCH)
        # A thread of its own would only wait for the interpreter's lock.
        batches = starts.map(functools.partial(_read_batch, examples, source.shape))
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=0))
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # The readers' own exceptions are many, and not all public.
        raise ValueError(_unreadable(target, error)) from error
    if len(images) != source.records[split]:
        raise ValueError(
            f"{target}: {split}: expected {source.records[split]} images, got {len(images)}"
        )
    _check_labels(f"{target}: {split}", labels)
    return images, labels


def _read_batch(examples: Any, shape: tuple[int, ...], start: int) -> tuple[np.ndarray, np.ndarray]:
    batch = examples.__getitems__(list(range(start, min(start + _READ_BATCH, len(examples)))))
    images = np.stack([_decode(example["image"]).reshape(shape) for example in batch])
    return images, np.array([example["label"] for example in batch], np.int32)


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)))


def _unreadable(target: Path, error: Exception) -> str:
    return (
        f"{target}: expected a dataset prepared as array_record, got {_one_line(error)}; "
        "deleting the folder prepares it anew"
    )


# The archives


def _fetch(source: _Source, folder: Path) -> Path:
    """Return the folder of the archives, after downloading those that are absent."""
    missing = [file for file in source.sha256 if not (folder / file).is_file()]
    for done, file in enumerate(missing):
        try:
            _download(source.url + file, folder / file, source.sha256[file])
        except (OSError, http.client.HTTPException) as error:
            files = ", ".join(f"{file} ({source.url}{file})" for file in missing[done:])
            raise FileNotFoundError(
                f"{source.name}: missing {files}: download by hand and place in {folder}; "
                f"downloading failed with {_one_line(error)}"
            ) from None
    return folder


def _download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path`; whatever goes wrong, no partial or other file gets that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
        got = _sha256(part)
        if got != sha256:
            raise ValueError(f"{url}: expected SHA-256 {sha256}, got {got}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gunzip(path: Path, limit: int) -> bytes:
    """Decompress a file into memory, at most `limit` bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file, got {_one_line(error)}") from None
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes inside, got more")
    return content


def _read_cifar10(source: _Source, folder: Path) -> _Splits:
    """Read the archive's records: a label byte, then 3072 bytes CHW."""
    path = folder / "cifar-10-binary.tar.gz"
    names = {
        "train": [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
        "test": ["cifar-10-batches-bin/test_batch.bin"],
    }
    sizes = {
        name: source.records[split] // len(files) * 3073
        for split, files in names.items()
        for name in files
    }
    members = _tar_members(path, sizes)
    for name, content in members.items():
        _check_labels(f"{path}: {name}", _cifar10_records(content)[:, 0])
    return {
        split: _cifar10_arrays(np.concatenate([_cifar10_records(members[name]) for name in files]))
        for split, files in names.items()
    }


def _cifar10_records(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(-1, 3073)


def _cifar10_arrays(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _tar_members(path: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """Read the named members, each of exactly its size, and nothing else."""
    # All in memory: only so is the work bounded, whatever the headers claim.
    content = _gunzip(path, sum(sizes.values()) + _SLACK_BYTES)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            infos = list(itertools.islice(archive, _MAX_MEMBERS))
    except (tarfile.TarError, EOFError, OSError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: expected a tar archive, got {_one_line(error)}") from None
    members = {
        info.name: content[info.offset_data : info.offset_data + info.size]
        for info in infos
        if info.isreg() and info.name in sizes
    }
    for name, size in sizes.items():
        got = f"{len(members[name])} bytes" if name in members else "no such file"
        if got != f"{size} bytes":
            raise ValueError(f"{path}: {name}: expected {size} bytes, got {got}")
    return members


def _read_mnist(source: _Source, folder: Path) -> _Splits:
    """Read the four IDX files."""
    splits = {}
    for split, stem in {"train": "train", "test": "t10k"}.items():
        shape = (source.records[split], 28, 28)
        images = _idx(folder / f"{stem}-images-idx3-ubyte.gz", shape)
        labels = _idx_labels(folder / f"{stem}-labels-idx1-ubyte.gz", source.records[split])
        splits[split] = (images[..., None], labels)
    return splits


def _idx_labels(path: Path, records: int) -> np.ndarray:
    labels = _idx(path, (records,))
    _check_labels(str(path), labels)
    return labels


def _idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of bytes, that must have this shape."""
    header = np.array([0x0800 + len(shape), *shape], ">u4").tobytes()
    size = len(header) + int(np.prod(shape))
    content = _gunzip(path, size + _SLACK_BYTES)
    if content[: len(header)] != header:
        got = content[: len(header)].hex()
        raise ValueError(f"{path}: expected IDX header {header.hex()} (shape {shape}), got {got}")
    if len(content) != size:
        raise ValueError(f"{path}: expected {size} bytes inside, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _check_labels(where: str, labels: np.ndarray) -> None:
    if labels.max(initial=0) > 9:
        index = int(labels.argmax())
        raise ValueError(f"{where}: expected labels 0 to 9, got {labels.max()} in record {index}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_READERS: dict[str, Callable[[_Source, Path], _Splits]] = {
    "cifar10": _read_cifar10,
    "mnist": _read_mnist,
}
