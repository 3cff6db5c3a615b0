"""The datasets of the experiments: in memory, or on disk as encoded images.

`digits` comes with scikit-learn, and what is yours as arrays, see `train.arrays`. The others are
prepared from the official archives, see `train.prepare`: `cifar10` and `mnist` here, and read into
memory; `imagenet2012` in `train.imagenet`, and decoded as it is needed.
"""

import functools
import gzip
import io
import itertools
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import arrays, imagenet, prepare
from train.named import name_of
from train.prepare import Source, Splits, one_line

_READ_BATCH = 1000
_MAX_MEMBERS = 100
_SLACK_BYTES = 1 << 20  # What an archive may hold beside its records: headers, names, a readme.


class Images(NamedTuple):
    """Images and labels: a split in memory, or batches on the devices, with axes in front.

    Or inputs and targets of your own, of any shape [N, ...], for a task of your own.
    """

    images: Any  # uint8 [N, H, W, C], or float32 of your own
    labels: Any  # int32 [N], in [0, num_classes)

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image of a split, (H, W, C)."""
        return self.images.shape[1:]

    def part(self, start: int, stop: int) -> "Images":
        """Return the split of the images from one place to before another."""
        return Images(self.images[start:stop], self.labels[start:stop])


class Dataset(NamedTuple):
    """Images and labels, and how they are normalized and augmented.

    Attributes:
      name: As given to `load`, of a function its name.
      train: The images to train on.
      test: The images to measure with.
      num_classes: Number of classes; 0 for targets of your own.
      mean: Per channel, of pixels on [0, 1], or of float32 as they are.
      std: Per channel, likewise.
      pad: Pixels of padding for random crops; 0 for none.
      flip: Whether images may be mirrored left to right.
    """

    name: str
    train: Images | imagenet.Encoded
    test: Images | imagenet.Encoded
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool


_CIFAR10 = Source(
    name="cifar10",
    version="3.0.2",
    url="https://www.cs.toronto.edu/~kriz/",
    checksums={
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    },
    shape=(32, 32, 3),
    records={"train": 50_000, "test": 10_000},
    # Those of the public checkpoints (they are ImageNet's).
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    pad=4,
    flip=True,
    text="id",
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

_MNIST = Source(
    name="mnist",
    version="3.0.1",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    checksums={f"{stem}-ubyte.gz": sha256 for stem, sha256 in _MNIST_SHA256.items()},
    shape=(28, 28, 1),
    records={"train": 60_000, "test": 10_000},
    mean=(0.1307,),
    std=(0.3081,),
    label_names=tuple("0123456789"),
)

_SOURCES = {source.name: source for source in (_CIFAR10, _MNIST)}
NAMES = ("digits", *_SOURCES, imagenet.NAME)


def load(
    name: str | Callable[..., Any],
    *,
    data_dir: str | Path,
    allow_unofficial: bool = False,
    image_size: int = 224,
    workers: int = 0,
) -> Dataset:
    """Load a dataset, preparing it under `data_dir` the first time.

    - `digits`: the 1,797 8x8 digits of scikit-learn, values 0..16 scaled to 0..255; of each class
      every fifth image is for testing (5, 10, ... in scikit-learn's order). It needs no `data_dir`.
    - `cifar10`, `mnist`: from the official archives in `data_dir/downloads/manual`, downloaded
      there if absent. Their SHA-256 is verified. The prepared dataset is at
      `data_dir/<name>/<version>`. A directory that tensorflow-datasets itself prepared as
      array_record is read too. Images come in tensorflow-datasets' fixed shuffled order.
    - `imagenet2012`: the same, but archives have to be placed by hand, and images stay on disk.

    - `FILE.npz`, a function or "package.module:function": arrays of your own, see
      `train.arrays.load`.

    Args:
      name: One of `NAMES`, or what is yours.
      data_dir: Folder of tensorflow-datasets.
      allow_unofficial: Accept archives of another checksum, with a warning. What was prepared from
        such an archive is refused by later calls without this.
      image_size: Side of the crops of images that are on disk.
      workers: Processes that decode images that are on disk; 0 for threads of this process.

    Returns:
      The dataset, in a fixed order.

    Raises:
      ValueError: If the name is unknown, an archive is not the official one or is damaged, or what
        is prepared cannot be read.
      FileNotFoundError: If a file is absent, or an archive is and cannot be downloaded, naming the
        files, the folder and the URLs.
    """
    if arrays.is_own(name):
        return _own(name)
    assert isinstance(name, str)
    try:
        data_dir = Path(data_dir).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{data_dir}: expected a folder, got {one_line(error)}") from None
    if name == "digits":
        return _load_digits()
    if name == imagenet.NAME:
        source = imagenet.source()
        train, test = imagenet.load(
            data_dir, allow_unofficial=allow_unofficial, image_size=image_size, workers=workers
        )
    elif name in _SOURCES:
        source, read = _SOURCES[name], _READERS[name]
        prepare.make(source, data_dir, allow_unofficial=allow_unofficial, read=read)
        train, test = (_read_split(source, data_dir, split) for split in ("train", "test"))
    else:
        raise ValueError(
            f"data.name: expected one of {', '.join(NAMES)}, or FILE.npz or "
            f"package.module:function of your own, got {name!r}"
        )
    return Dataset(
        name,
        train,
        test,
        num_classes=len(source.label_names),
        mean=source.mean,
        std=source.std,
        pad=source.pad,
        flip=source.flip,
    )


def _own(name: str | Callable[..., Any]) -> Dataset:
    own = arrays.load(name)
    return Dataset(
        name_of(name),
        Images(own.images, own.labels),
        Images(own.test_images, own.test_labels),
        own.num_classes,
        mean=own.mean,
        std=own.std,
        pad=own.pad,
        flip=own.flip,
    )


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    test = arrays.every_fifth(labels)
    return Dataset(
        "digits",
        Images(images[~test], labels[~test]),
        Images(images[test], labels[test]),
        10,
        mean=(0.3052,),
        std=(0.3760,),
        pad=0,
        flip=False,
    )


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _read_split(source: Source, data_dir: Path, split: str) -> Images:
    """Decode one prepared split into images uint8 [N, H, W, C] and labels int32 [N]."""
    import grain
    import tensorflow_datasets as tfds

    target = prepare.folder(source, data_dir)
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
        raise ValueError(prepare.unreadable(target, error)) from error
    if len(images) != source.records[split]:
        raise ValueError(
            f"{target}: {split}: expected {source.records[split]} images, got {len(images)}"
        )
    _check_labels(f"{target}: {split}", labels)
    return Images(images, labels)


def _read_batch(examples: Any, shape: tuple[Any, ...], start: int) -> tuple[np.ndarray, np.ndarray]:
    batch = examples.__getitems__(list(range(start, min(start + _READ_BATCH, len(examples)))))
    images = np.stack([_decode(example["image"]).reshape(shape) for example in batch])
    return images, np.array([example["label"] for example in batch], np.int32)


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)))


# The archives


def _gunzip(path: Path, limit: int) -> bytes:
    """Decompress a file into memory, at most `limit` bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file, got {one_line(error)}") from None
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes inside, got more")
    return content


def _read_cifar10(source: Source, folder: Path) -> Splits:
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
    records = {
        split: np.concatenate([_cifar10_records(members[name]) for name in files])
        for split, files in names.items()
    }
    return {
        split: (range(len(of_split)), functools.partial(_cifar10_example, split, of_split))
        for split, of_split in records.items()
    }


def _cifar10_records(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(-1, 3073)


def _cifar10_example(split: str, records: np.ndarray, index: int) -> dict[str, Any]:
    image = records[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    label = int(records[index, 0])
    return {"image": _png(image), "label": label, "id": f"{split}_{index:05d}"}


def _tar_members(path: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """Read the named members, each of exactly its size, and nothing else."""
    # All in memory: only so is the work bounded, whatever the headers claim.
    content = _gunzip(path, sum(sizes.values()) + _SLACK_BYTES)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            infos = list(itertools.islice(archive, _MAX_MEMBERS))
    except (tarfile.TarError, EOFError, OSError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: expected a tar archive, got {one_line(error)}") from None
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


def _read_mnist(source: Source, folder: Path) -> Splits:
    """Read the four IDX files."""
    splits = {}
    for split, stem in {"train": "train", "test": "t10k"}.items():
        shape = (source.records[split], 28, 28)
        images = _idx(folder / f"{stem}-images-idx3-ubyte.gz", shape)
        labels = _idx_labels(folder / f"{stem}-labels-idx1-ubyte.gz", source.records[split])
        splits[split] = (range(len(labels)), functools.partial(_mnist_example, images, labels))
    return splits


def _mnist_example(images: np.ndarray, labels: np.ndarray, index: int) -> dict[str, Any]:
    return {"image": _png(images[index, ..., None]), "label": int(labels[index])}


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


_READERS: dict[str, Callable[[Source, Path], Splits]] = {
    "cifar10": _read_cifar10,
    "mnist": _read_mnist,
}
