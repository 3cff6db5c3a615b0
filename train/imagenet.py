"""ImageNet (ILSVRC 2012): on disk as encoded images, decoded and cropped as they are needed.

The official archives are read as they are, member by member, and never unpacked. What a batch
holds follows from the rows, the epoch's key and the rows' positions in the epoch alone: not from
the number of workers, nor from where a run was stopped and resumed.
"""

import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import os
import re
import tarfile
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from train import prepare, signals
from train.prepare import Source, Splits, one_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

NAME = "imagenet2012"
_TRAIN, _VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_MAX_READ = 1 << 26  # bytes at once, of an image say; the largest image has a quarter of that
_MAX_MEMBERS = 100_000  # of one archive
_AREA, _ASPECT, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of random crops
_RESIZE = 256 / 224  # shorter side of an image that is evaluated, in sides of its centre


@functools.cache
def source() -> Source:
    """Return what the dataset is made from."""
    return Source(
        name=NAME,
        version="5.1.0",
        url="https://image-net.org/download-images",
        checksums={
            _TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
            _VALIDATION: "29b22e2961454d5413ddabcf34fc5622",
        },
        algorithm="MD5",
        records={"train": 1_281_167, "validation": 50_000},
        shape=(None, None, 3),
        encoding="jpeg",
        text="file_name",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip=True,
        label_names=_lines("labels.txt"),
        registration=True,
    )


def _lines(file: str) -> tuple[str, ...]:
    """Return the lines of a file that the stock builder has."""
    import tensorflow_datasets as tfds

    path = Path(tfds.core.tfds_path(f"datasets/{NAME}/{file}"))
    return tuple(path.read_text().split())


def load(
    data_dir: Path, *, allow_unofficial: bool, image_size: int, workers: int
) -> tuple["Encoded", "Encoded"]:
    """Return the splits to train on and to measure with, preparing them the first time.

    Args:
      data_dir: Folder of tensorflow-datasets.
      allow_unofficial: Accept archives of other checksums, of any number of images, with a warning.
      image_size: Side of the crops.
      workers: Processes that decode; 0 for threads of this process.

    Raises:
      ValueError, FileNotFoundError: As `train.prepare.make`.
    """
    official = prepare.make(source(), data_dir, allow_unofficial=allow_unofficial, read=_read)
    splits = []
    for split, expected in source().records.items():
        size = len(_open(str(data_dir), split))
        if official and size != expected:
            target = prepare.folder(source(), data_dir)
            raise ValueError(f"{target}: {split}: expected {expected} images, got {size}")
        splits.append(Encoded(str(data_dir), split, size, image_size, workers))
    return splits[0], splits[1]


# The images -------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A split of encoded images on disk; `train.data.Images` is one in memory.

    Attributes:
      data_dir: Folder of tensorflow-datasets.
      split: Its name there.
      size: Number of images, one after the other in tensorflow-datasets' order.
      image_size: Side of the crops.
      workers: Processes that decode; 0 for threads of this process.
      start: Place of the first image in the split.
    """

    data_dir: str
    split: str
    size: int
    image_size: int
    workers: int
    start: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of a crop, (H, W, C)."""
        return self.image_size, self.image_size, 3

    def part(self, start: int, stop: int) -> "Encoded":
        """Return the split of the images from one place to before another."""
        return self._replace(start=self.start + start, size=min(self.size, stop) - start)

    def read(
        self, batches: Sequence[tuple[np.ndarray, np.ndarray]], key: np.ndarray | None
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Give batches in their order; workers decode ahead.

        Args:
          batches: For each the rows, int [...], and their positions in the epoch, of the same
            shape. A row past the end gives an image of zeros that is labelled -1.
          key: uint32, of the epoch: crops are random, each by the key and the position. None: the
            centres of images, to measure with.

        Yields:
          Images uint8 [..., H, W, C] and labels int32 [...].

        Raises:
          ValueError: If what is prepared, or an image in it, cannot be read.
        """
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's processes ask for them, the program has none.
        threads = 1 if self.workers else len(os.sched_getaffinity(0))
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        batched = grain.MapDataset.source(batches).map(functools.partial(_read_batch, self, key))
        iterator = iter(
            batched.to_iter_dataset(ahead).mp_prefetch(
                grain.MultiprocessingOptions(self.workers), worker_init_fn=_follow_parent
            )
        )
        with contextlib.closing(iterator):
            with signals.withheld() if self.workers else contextlib.nullcontext():
                first = list(itertools.islice(iterator, 1))
            yield from first
            yield from iterator


def _follow_parent(*_: int) -> None:
    """End a worker with the process that reads; no signal does, as that one may have to save."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # A process that is killed cannot stop its workers.
    os._exit(1)


def _read_batch(
    split: Encoded, key: np.ndarray | None, batch: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    rows, positions = batch
    images = np.zeros((rows.size, *split.image_shape), np.uint8)
    labels = np.full(rows.size, -1, np.int32)
    (known,) = np.nonzero(rows.ravel() < split.size)
    examples = _read_examples(split, rows.ravel()[known].tolist())
    for at, example in zip(known, examples, strict=True):
        picture = _decode(example)
        if key is None:
            picture = resized_center(picture, split.image_size)
        else:
            rng = np.random.default_rng((*key.tolist(), int(positions.flat[at])))
            picture = random_resized_crop(rng, picture, split.image_size)
        images[at], labels[at] = np.asarray(picture), example["label"]
    return images.reshape(*rows.shape, *split.image_shape), labels.reshape(rows.shape)


@functools.lru_cache(maxsize=2)  # a split to train on, one to measure with
def _open(data_dir: str, split: str) -> Any:
    """Return a split's examples, with images as they are encoded."""
    import tensorflow_datasets as tfds

    skip = {"image": tfds.decode.SkipDecoding()}
    with _readable(data_dir):
        return tfds.data_source(NAME, split=split, data_dir=data_dir, decoders=skip)


def _read_examples(split: Encoded, rows: list[int]) -> Sequence[dict[str, Any]]:
    with _readable(split.data_dir):
        own = [split.start + row for row in rows]
        examples = _open(split.data_dir, split.split).__getitems__(own)
    for example in examples:
        if not 0 <= example["label"] < len(source().label_names):
            raise ValueError(f"{_name(example)}: expected labels 0 to 999, got {example['label']}")
    return examples


@contextlib.contextmanager
def _readable(data_dir: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # The readers' own exceptions are many, and not all public.
        target = prepare.folder(source(), Path(data_dir))
        raise ValueError(prepare.unreadable(target, error)) from error


def _name(example: dict[str, Any]) -> str:
    return bytes(example["file_name"]).decode(errors="replace")


def _decode(example: dict[str, Any]) -> "Picture":
    """Decode an image to RGB, whatever it is inside."""
    try:
        picture = _picture(example["image"])
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except Exception as error:  # Decoders' own exceptions are many.
        raise ValueError(
            f"{_name(example)}: expected a JPEG or PNG image, got {one_line(error)}"
        ) from None


def _picture(encoded: bytes) -> "Picture":
    from PIL import Image

    # No other formats: some of their decoders run other programs.
    return Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG"))


def random_resized_crop(rng: np.random.Generator, picture: "Picture", size: int) -> "Picture":
    """Return a random crop of an image, resized to [size, size] with anti-aliasing.

    As `RandomResizedCrop(size)` of torchvision, on PIL images.
    """
    from PIL.Image import Resampling

    crop = picture.crop(random_box(rng, *picture.size))
    return crop.resize((size, size), Resampling.BILINEAR)


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Return a random crop of an image: left, upper, right, lower.

    Its area is uniform on 0.08 to 1 of the image's, the logarithm of its aspect ratio uniform on
    3/4 to 4/3, its place uniform; drawn again while it does not fit, at most ten times, then it is
    the largest in the middle whose aspect ratio is allowed (Szegedy et al., CVPR 2015, section 6;
    `RandomResizedCrop.get_params` of torchvision).

    Args:
      rng: Drawn from.
      width: Pixels, at least 1.
      height: Pixels, at least 1.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREA)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            upper, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, upper, left + w, upper + h
    # One of the two is the image's own, up to rounding.
    w = min(width, round(height * _ASPECT[1]))
    h = min(height, round(width / _ASPECT[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def resized_center(picture: "Picture", size: int) -> "Picture":
    """Return the centre [size, size] of an image whose shorter side is resized to 256/224 of it.

    As `Resize` and `CenterCrop` of torchvision, on PIL images.
    """
    from PIL.Image import Resampling

    short, (width, height) = round(size * _RESIZE), picture.size
    resized = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    left, upper = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    box = (left, upper, left + size, upper + size)
    return picture.resize(resized, Resampling.BILINEAR).crop(box)


# The archives -----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where an image is in an archive."""

    label: str
    offset: int
    size: int


def _read(source: Source, folder: Path) -> Splits:
    """Find all images; each is read when it is its turn to be written."""
    found = {
        "train": (folder / _TRAIN, _train_places(source, folder / _TRAIN)),
        "validation": (folder / _VALIDATION, _validation_places(folder / _VALIDATION)),
    }
    for path, places in found.values():
        if not places:
            raise ValueError(f"{path}: expected images, got none")
    return {
        split: (places.keys(), functools.partial(_example, path, places))
        for split, (path, places) in found.items()
    }


def _train_places(source: Source, path: Path) -> dict[str, _Place]:
    """Find the images in an archive that holds an archive for each class."""
    places = {}
    with _Frugal(path) as file:
        for outer, content in _members(str(path), file, r"n\d{8}\.tar"):
            label, where = outer.name.removesuffix(".tar"), f"{path}: {outer.name}"
            if label not in source.label_names:
                raise ValueError(f"{where}: expected one of the classes of {NAME}, got another")
            for inner, _ in _members(where, content, rf"{label}_\d+\.JPEG"):
                offset = outer.offset_data + inner.offset_data
                places[inner.name] = _Place(label, offset, inner.size)
    return places


def _validation_places(path: Path) -> dict[str, _Place]:
    """Find images whose labels the stock builder has, by their numbers."""
    labels, places = _lines("validation_labels.txt"), {}
    with _Frugal(path) as file:
        for info, _ in _members(str(path), file, r"ILSVRC2012_val_\d{8}\.JPEG"):
            number = int(info.name[-13:-5])
            if not 1 <= number <= len(labels):
                raise ValueError(f"{path}: {info.name}: expected numbers 1 to {len(labels)}")
            places[info.name] = _Place(labels[number - 1], info.offset_data, info.size)
    return places


def _example(path: Path, places: dict[str, _Place], name: str) -> dict[str, Any]:
    label, offset, size = places[name]
    try:
        with _Frugal(path) as file:
            file.seek(offset)
            image = _as_jpeg(file.read(size))
    except Exception as error:  # Decoders' own exceptions are many.
        message = f"{path}: {name}: expected a JPEG or PNG image, got {one_line(error)}"
        raise ValueError(message) from None
    return {"image": image, "label": label, "file_name": name}


def _as_jpeg(encoded: bytes) -> bytes:
    """Return what an RGB or grayscale JPEG is; other images (there are 23) as such a JPEG.

    The stock builder does the same, so that other readers get three channels.
    """
    picture = _picture(encoded)
    if picture.format == "JPEG" and picture.mode in ("RGB", "L"):
        return encoded
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="jpeg", quality=100, subsampling=0)
    return buffer.getvalue()


def _members(where: str, file: Any, names: str) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """Give each file of a tar archive; anything but files of such names is refused."""
    with _tar(where):
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    seen = set()
    while len(seen) < _MAX_MEMBERS:
        with _tar(where):
            info = archive.next()
        if info is None:
            return
        if not info.isreg() or info.issparse() or not re.fullmatch(names, info.name):
            raise ValueError(f"{where}: expected only files {names}, got {info.name[:100]!r}")
        if info.name in seen:
            raise ValueError(f"{where}: expected every name once, got {info.name} again")
        seen.add(info.name)
        yield info, archive.extractfile(info)
    raise ValueError(f"{where}: expected at most {_MAX_MEMBERS} files, got more")


@contextlib.contextmanager
def _tar(where: str) -> Iterator[None]:
    try:
        yield
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        OverflowError,
        MemoryError,
        RecursionError,
        ValueError,
    ) as error:
        raise ValueError(f"{where}: expected a tar archive, got {one_line(error)}") from None


class _Frugal(io.FileIO):
    """A file that gives no more than 64 MiB at once: headers in a tar may claim any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ:
            raise ValueError(f"expected at most {_MAX_READ} bytes in one piece, got {size}")
        return super().read(size)
