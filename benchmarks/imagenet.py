r"""Speed of the ImageNet pipeline: preparing, decoding with random crops, decoding for evaluation.

    taskset -c 1 python -m benchmarks.imagenet       # about two minutes on one core

The images are synthetic, 500 x 375, JPEGs of quality 90 and about 100 KB, as ImageNet's are on
average: smooth waves and noise. They are packed into archives of the official layout in a temporary
folder and prepared as the official ones would be.

First table: seconds of processor time (all threads) an image, alone. `draft` lets the JPEG decoder
halve the image where the crop stays at least as large as the result; the difference is that of the
result's pixels, of 255. Second table: batches as training gets them. Wall time is that of the
machine as it was; processor time counts this process and its workers, in which starting them (about
a second and a half each) is left out by starting the clock at the first batch.
"""

import argparse
import io
import os
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common
from train import imagenet

QUALITY, NOISE = 90, 19.0
TICKS = os.sysconf("SC_CLK_TCK")


def jpeg(seed: int, width: int, height: int) -> bytes:
    """Encode a synthetic photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.zeros((height, width, 3))
    for frequency in 2.0 ** np.arange(1, 7):
        angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi, 3)
        along = x * np.cos(angle) + y * np.sin(angle)
        waves += np.sin(2 * np.pi * frequency * along[..., None] + phase) * 60 / frequency**0.5
    pixels = 128 + waves + rng.normal(0, NOISE, waves.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> bytes:
    """Write an archive and return it."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def write_archives(folder: Path, photographs: Sequence[bytes], copies: int) -> int:
    """Write archives of the official layout, a class for each copy; return the training images."""
    folder.mkdir(parents=True)
    classes = {}
    for synset in imagenet.source().label_names[:copies]:
        members = {f"{synset}_{i}.JPEG": content for i, content in enumerate(photographs)}
        classes[f"{synset}.tar"] = tar(folder / "class.tar", members)
    train, validation = imagenet.source().checksums
    tar(folder / train, classes)
    numbered = {f"ILSVRC2012_val_{i:08d}.JPEG": x for i, x in enumerate(photographs, 1)}
    tar(folder / validation, numbered)
    return len(photographs) * copies


def processor_seconds() -> float:
    """Return the processor time of this process and of its live children."""
    total = time.process_time()
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def milliseconds(function: Callable[[bytes], Any], photographs: Sequence[bytes]) -> str:
    """Return processor time an image."""
    function(photographs[0])
    start = time.process_time()
    for content in photographs:
        function(content)
    return f"{(time.process_time() - start) / len(photographs) * 1e3:.2f}"


def crop(content: bytes, draft: bool = False) -> np.ndarray:
    """Decode an image and crop it at random, always the same way for the same image."""
    picture, rng = imagenet._picture(content), np.random.default_rng(len(content))
    if not draft:
        return np.asarray(imagenet.random_resized_crop(rng, picture, 224))
    (width, height), box = picture.size, imagenet.random_box(rng, *picture.size)
    least = min(box[2] - box[0], box[3] - box[1]) / 224
    picture.draft("RGB", (round(width / least), round(height / least)))
    scale = width / picture.size[0]
    scaled = (box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale)
    return np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR, box=scaled))


def center(content: bytes) -> np.ndarray:
    """Decode an image as it is evaluated."""
    picture = imagenet._picture(content)
    return np.asarray(imagenet.resized_center(picture, 224))


def alone(width: int, height: int, count: int) -> list[str]:
    """Return a row of the first table."""
    photographs = [jpeg(seed, width, height) for seed in range(count)]
    difference = [np.mean(np.abs(crop(x).astype(float) - crop(x, draft=True))) for x in photographs]
    functions = (
        lambda content: imagenet._picture(content).load(),
        crop,
        lambda content: crop(content, draft=True),
        center,
    )
    size = np.mean([len(content) for content in photographs]) / 1e3
    times = [milliseconds(function, photographs) for function in functions]
    return [f"{width} x {height}", f"{size:.0f}", *times, f"{np.mean(difference):.2f}"]


def batches(split: imagenet.Encoded, batch_size: int, *, train: bool) -> list[str]:
    """Return images a second by the wall clock and by processor time, from the second batch on."""
    rows = np.arange(split.size // batch_size * batch_size).reshape(-1, batch_size)
    reading = split.read([(r, r) for r in rows], np.array([1, 2], np.uint32) if train else None)
    next(reading)
    wall, processor = time.perf_counter(), processor_seconds()
    for _ in range(len(rows) - 2):
        next(reading)
    # Before the last one: at the end the workers stop, and their time is no longer known.
    spent = time.perf_counter() - wall, processor_seconds() - processor
    reading.close()
    done = (len(rows) - 2) * batch_size
    return [f"{done / seconds:.0f}" for seconds in spent]


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="different ones")
    parser.add_argument("--copies", type=int, default=20, help="of each, in the prepared dataset")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*unofficial")
    print(common.machine())
    header = ["image", "KB", "ms decode", "ms and crop", "ms, draft", "ms for evaluation", "diff."]
    rows = [alone(500, 375, args.images), alone(1600, 1200, max(1, args.images // 10))]
    print(f"\n### One image at a time\n\n{common.markdown(header, rows)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        photographs = [jpeg(seed, 500, 375) for seed in range(args.images)]
        archives = Path(folder) / "downloads" / "manual"
        count = write_archives(archives, photographs, args.copies)
        start, options = time.process_time(), {"allow_unofficial": True, "image_size": 224}
        imagenet.load(Path(folder), workers=0, **options)
        seconds = time.process_time() - start
        rows = []
        for workers in (0, 1):
            train, _ = imagenet.load(Path(folder), workers=workers, **options)
            rows.append(["train", workers, *batches(train, args.batch_size, train=True)])
            rows.append(["evaluate", workers, *batches(train, args.batch_size, train=False)])
    print(f"\nPreparing: {(count + len(photographs)) / seconds:.0f} img a second of processor time")
    header = ["batches", "workers", "img/s, wall clock", "img a second of processor time"]
    print(f"\n### Batches of {args.batch_size}\n\n{common.markdown(header, rows)}")


if __name__ == "__main__":
    main()
