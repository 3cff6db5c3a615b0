"""The ImageNet pipeline, on a small archive of the official layout that the tests make."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from PIL import Image

from tests.cases import timeless
from train import config as configs
from train import data, engine, experiment, imagenet, layout, models, networks, tasks
from train.config import Config, Data, Mesh, Quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*unofficial")

ROOT = Path(__file__).resolve().parent.parent
TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VERSION = "imagenet2012/5.1.0"
KEY = np.array([3, 4], np.uint32)
# Three of the 1000 classes; their labels are their places in the stock builder's list.
CLASSES = {"n01440764": 0, "n01531178": 11, "n15075141": 999}
# What the stock builder's list says of the first validation images.
VALIDATION_CLASSES = ("n01751748", "n09193705", "n02105855", "n04263257")


def encoded(seed, size, mode="RGB", form="jpeg"):
    """A picture of soft shapes, encoded."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=90)
    return buffer.getvalue()


def train_images():
    """By class and file; three of them are not what their names say."""
    odd = {
        "n01440764_10.JPEG": encoded(10, (61, 33), "CMYK"),
        "n01531178_11.JPEG": encoded(11, (40, 57), form="png"),
        "n15075141_12.JPEG": encoded(12, (47, 47), "L"),
    }
    images = {
        synset: {
            f"{synset}_{i}.JPEG": encoded(100 * label + i, (50 + 7 * i, 41 + label % 5))
            for i in range(2)
        }
        for synset, label in CLASSES.items()
    }
    for name, content in odd.items():
        images[name[:9]][name] = content
    return images


def validation_images():
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
    return {name: encoded(i, (30 + 5 * i, 60 - 5 * i)) for i, name in enumerate(names)}


def tar(members, extra=()):
    """An archive of these files, then of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return buffer.getvalue()


def train_tar(images):
    return tar({f"{synset}.tar": tar(files) for synset, files in images.items()})


def write_archives(data_dir):
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / TRAIN).write_bytes(train_tar(train_images()))
    (manual / VALIDATION).write_bytes(tar(validation_images()))


def load(data_dir, *, workers=0, image_size=32):
    loaded = data.load(
        "imagenet2012",
        data_dir=data_dir,
        allow_unofficial=True,
        image_size=image_size,
        workers=workers,
    )
    assert isinstance(loaded.train, imagenet.Encoded)
    return loaded


@pytest.fixture
def tiny(tmp_path):
    write_archives(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder whose dataset is prepared; not to be changed."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_archives(folder)
    load(folder)
    return folder


@pytest.fixture
def official(tiny, monkeypatch):
    """Make the archives under `tiny` the official ones."""
    sums = {
        file: hashlib.md5((tiny / "downloads" / "manual" / file).read_bytes()).hexdigest()
        for file in (TRAIN, VALIDATION)
    }
    small = imagenet.source()._replace(checksums=sums, records={"train": 9, "validation": 4})
    monkeypatch.setattr(imagenet, "source", lambda: small)
    return tiny


def stock(data_dir, split):
    """What tensorflow-datasets itself reads, by file name."""
    import tensorflow_datasets as tfds

    examples = tfds.data_source("imagenet2012", split=split, data_dir=data_dir)
    return {example["file_name"].decode(): example for example in examples}


def rgb(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# What is prepared --------------------------------------------------------------------------------


def test_stock_data_source_reads_what_the_archives_hold(prepared):
    train, validation = stock(prepared, "train"), stock(prepared, "validation")
    files = {name: x for of_class in train_images().values() for name, x in of_class.items()}
    assert train.keys() == files.keys()
    for name, content in files.items():
        assert train[name]["label"] == CLASSES[name[:9]]
        image = train[name]["image"]
        assert image.shape == rgb(content).shape
        # The CMYK and the PNG image are encoded anew.
        atol = 4 if name[10:] in ("10.JPEG", "11.JPEG") else 0
        np.testing.assert_allclose(image.astype(int), rgb(content), atol=atol)
    names = imagenet.source().label_names
    assert validation.keys() == validation_images().keys()
    for (name, content), synset in zip(
        validation_images().items(), VALIDATION_CLASSES, strict=True
    ):
        assert names[validation[name]["label"]] == synset
        np.testing.assert_array_equal(validation[name]["image"], rgb(content))
    assert "tensorflow" not in sys.modules


def test_name_version_and_features_are_those_of_the_stock_builder(prepared, tmp_path):
    import tensorflow_datasets as tfds

    builder = tfds.builder_cls("imagenet2012")
    source = imagenet.source()
    assert (source.name, source.version) == (builder.name, str(builder.VERSION))
    written = tfds.builder_from_directory(prepared / VERSION).info
    theirs = builder(data_dir=tmp_path).info
    assert repr(written.features) == repr(theirs.features)
    assert written.features["label"].names == theirs.features["label"].names
    assert written.features["image"].encoding_format == theirs.features["image"].encoding_format


def test_labels_are_1000_and_those_of_50000_validation_images():
    assert len(set(imagenet.source().label_names)) == 1000
    labels = imagenet._lines("validation_labels.txt")
    assert len(labels) == 50_000
    assert set(labels) == set(imagenet.source().label_names)


def test_images_are_in_the_order_of_the_stock_builder(tiny, prepared, monkeypatch):
    """Its shuffler needs TensorFlow for more than some memory, of which here it has none."""
    from tensorflow_datasets.core import shuffle

    for split in ("train", "validation"):
        shuffler, got = shuffle.Shuffler(tiny, split), list(stock(prepared, split))
        for name in got:
            shuffler.add(name, name.encode())
        assert got == [name.decode() for _, name in shuffler]
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
    assert load(tiny).train.size == 9


def test_a_kill_while_preparing_leaves_nothing_that_counts(tiny):
    code = f"""
        import os, signal
        from train import data, imagenet
        seen, as_jpeg = [], imagenet._as_jpeg
        def deadly(encoded):
            seen.append(encoded)
            if len(seen) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return as_jpeg(encoded)
        imagenet._as_jpeg = deadly
        data.load("imagenet2012", data_dir={str(tiny)!r}, allow_unofficial=True)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name[:10] for path in (tiny / "imagenet2012").iterdir()] == ["incomplete"]
    assert load(tiny).train.size == 9
    assert [path.name for path in (tiny / "imagenet2012").iterdir()] == ["5.1.0"]


def test_official_archives_are_accepted_without_a_warning(official):
    loaded = data.load("imagenet2012", data_dir=official)  # Warnings are errors here.
    assert (loaded.train.size, loaded.test.size, loaded.num_classes) == (9, 4, 1000)
    assert loaded.train.image_shape == (224, 224, 3)


def test_official_archives_of_another_size_are_refused(official, monkeypatch):
    few = imagenet.source()._replace(records={"train": 9, "validation": 5})
    monkeypatch.setattr(imagenet, "source", lambda: few)
    with pytest.raises(ValueError, match=r"5\.1\.0: validation: expected 5 images, got 4"):
        data.load("imagenet2012", data_dir=official)


def test_unofficial_archives_are_refused_and_remembered(tiny):
    sums = {
        file: hashlib.md5((tiny / "downloads" / "manual" / file).read_bytes()).hexdigest()
        for file in (TRAIN, VALIDATION)
    }
    message = f"{TRAIN}: expected MD5 1d675b47d978889d74fa0da5fadfb00e, got {sums[TRAIN]}"
    with pytest.raises(ValueError, match=f"{message}; --config.data.allow_unofficial"):
        data.load("imagenet2012", data_dir=tiny)
    assert not (tiny / VERSION).exists()
    with pytest.warns(UserWarning, match=f"{message}; accepted by allow_unofficial"):
        load(tiny)
    with pytest.raises(ValueError, match=f"made from an unofficial {message}"):
        data.load("imagenet2012", data_dir=tiny)


def test_absent_archives_are_named_with_folder_and_page(tiny):
    (tiny / "downloads" / "manual" / VALIDATION).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load("imagenet2012", data_dir=tiny)
    message = str(caught.value)
    assert f"missing {VALIDATION}: register at https://image-net.org/download-images" in message
    assert message.endswith(f"place in {tiny / 'downloads' / 'manual'}")
    assert TRAIN not in message


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def vast(name, size):
    """A header that claims a size; `tar` would read as much."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(size):
    """A header of an extended header that claims a size."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


FISH = "n01440764"
FILES = train_images()[FISH]
ONE = {f"{FISH}_1.JPEG": FILES[f"{FISH}_1.JPEG"]}


def of_fish(inner):
    return tar({f"{FISH}.tar": inner})


DAMAGED = {
    "empty": (b"", f"{TRAIN}: expected a tar archive, got ReadError"),
    "other": (b"not a tar" * 99, f"{TRAIN}: expected a tar archive, got ReadError"),
    "cut": (train_tar(train_images())[:9000], f"{TRAIN}: expected a tar archive, got ReadError"),
    "without images": (of_fish(tar({})), f"{TRAIN}: expected images, got none"),
    "flat": (tar(FILES), rf"{TRAIN}: expected only files n.d\{{8\}}.*, got 'n01440764_0"),
    "other class": (tar({"n00000001.tar": tar({})}), f"{TRAIN}: n00000001.tar: expected one of"),
    "class no tar": (of_fish(b"x" * 999), f"{TRAIN}: {FISH}.tar: expected a tar archive"),
    "class cut": (of_fish(tar(FILES)[:1700]), f"{FISH}.tar: expected a tar archive, got Read"),
    "class of another": (
        of_fish(tar({"n01531178_1.JPEG": ONE[f"{FISH}_1.JPEG"]})),
        f"{FISH}.tar: expected only files {FISH}.*, got 'n01531178_1.JPEG'",
    ),
    "traversal": (tar({f"../{FISH}.tar": tar(ONE)}), "expected only files .*, got '../n01440764"),
    "absolute": (of_fish(tar({"/tmp/x.JPEG": b"x"})), "expected only files .*, got '/tmp/x.JPEG'"),
    "symlink": (tar({}, [link(f"{FISH}.tar")]), f"expected only files .*, got '{FISH}.tar'"),
    "hard link": (of_fish(tar(ONE, [link(f"{FISH}_2.JPEG", tarfile.LNKTYPE)])), "got '.*_2.JPEG'"),
    "vast image": (of_fish(vast(f"{FISH}_1.JPEG", 1 << 40)), f"{FISH}.tar: .*got ReadError"),
    "vast class": (vast(f"{FISH}.tar", 1 << 40) + tar(ONE), f"{TRAIN}: expected a tar.* got Read"),
    "vast header": (extended(1 << 36), "expected at most 67108864 bytes in one piece"),
    "negative": (vast(f"{FISH}.tar", -1024) + tar(ONE), "expected"),
    "other format": (
        of_fish(tar({f"{FISH}_1.JPEG": encoded(0, (50, 40), form="tiff")})),
        f"{TRAIN}: {FISH}_1.JPEG: expected a JPEG or PNG image, got UnidentifiedImageError",
    ),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_hostile_training_archive_is_refused(tiny, content, message):
    (tiny / "downloads" / "manual" / TRAIN).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tiny)
    assert "\n" not in str(caught.value)
    assert TRAIN in str(caught.value)
    assert not (tiny / VERSION).exists()
    # Nothing is unpacked, here or elsewhere.
    assert {path.name for path in tiny.rglob("*") if path.is_file()} == {
        TRAIN,
        VALIDATION,
        ".imagenet2012.lock",
    }
    assert not list(tiny.parent.glob("n0*")) and not Path("/tmp/x.JPEG").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"ILSVRC2012_val_00050001.JPEG": b""},
            "ILSVRC2012_val_00050001.JPEG: expected numbers 1 to 50000",
        ),
        (
            {"ILSVRC2012_val_00000000.JPEG": b""},
            "ILSVRC2012_val_00000000.JPEG: expected numbers 1 to 50000",
        ),
        ({"val/ILSVRC2012_val_00000001.JPEG": b""}, "expected only files .*, got 'val/ILSV"),
        (
            {"ILSVRC2012_val_00000001.JPEG": b""},
            "ILSVRC2012_val_00000001.JPEG: expected a JPEG or PNG image, got",
        ),
    ],
)
def test_a_damaged_validation_archive_is_refused(tiny, members, message):
    (tiny / "downloads" / "manual" / VALIDATION).write_bytes(tar(members))
    with pytest.raises(ValueError, match=f"{VALIDATION}: {message}") as caught:
        load(tiny)
    assert "\n" not in str(caught.value)
    assert not (tiny / VERSION).exists()


def test_an_image_that_is_there_twice_is_refused(tiny):
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode="w") as archive:
        for _ in range(2):
            for name, content in ONE.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (tiny / "downloads" / "manual" / TRAIN).write_bytes(of_fish(twice.getvalue()))
    with pytest.raises(ValueError, match=f"expected every name once, got {FISH}_1.JPEG again"):
        load(tiny)
    assert not (tiny / VERSION).exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off_is_named_when_it_is_read(tiny, workers):
    images = train_images()
    whole = images[FISH][f"{FISH}_0.JPEG"]
    images[FISH][f"{FISH}_0.JPEG"] = whole[: len(whole) // 2]
    (tiny / "downloads" / "manual" / TRAIN).write_bytes(train_tar(images))
    rows = np.arange(9)
    with pytest.raises(
        ValueError, match=f"^{FISH}_0.JPEG: expected a JPEG or PNG image, got OSError: .*trunc"
    ):
        list(load(tiny, workers=workers).train.read([(rows, rows)], KEY))


@pytest.mark.parametrize("file", ["dataset_info.json", "imagenet2012-train.array_record*"])
def test_a_damaged_prepared_folder_is_refused(prepared, tmp_path, file):
    shutil.copytree(prepared / "imagenet2012", tmp_path / "imagenet2012")
    (path,) = (tmp_path / VERSION).glob(file)
    path.write_bytes(path.read_bytes()[:99])
    imagenet._open.cache_clear()
    rows = np.arange(9)
    with pytest.raises(ValueError, match=r"5\.1\.0: expected a dataset prepared as array_record"):
        list(load(tmp_path).train.read([(rows, rows)], KEY))


# Crops -------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1 << 32),
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
)
def test_a_random_box_is_inside_and_of_an_allowed_shape(seed, width, height):
    draw = lambda: imagenet.random_box(np.random.default_rng(seed), width, height)  # noqa: E731
    left, upper, right, lower = draw()
    assert draw() == (left, upper, right, lower)
    w, h = right - left, lower - upper
    assert 0 <= left < right <= width and 0 <= upper < lower <= height
    # Sides are rounded: by half a pixel each.
    assert (w + 0.5) / max(h - 0.5, 0.1) >= 3 / 4 and (w - 0.5) / (h + 0.5) <= 4 / 3
    if 3 / 4 <= width / height <= 4 / 3:
        assert (w + 0.5) * (h + 0.5) >= 0.08 * width * height


def test_where_no_box_fits_it_is_the_middle():
    rng = np.random.default_rng(0)
    assert imagenet.random_box(rng, 1000, 10) == (493, 0, 506, 10)  # 13 of 1000 columns
    assert imagenet.random_box(rng, 9, 1000) == (0, 494, 9, 506)  # 12 of 1000 rows


def torchvision_box(rng, width, height):
    """`RandomResizedCrop.get_params` of torchvision 0.20, in its own order of draws."""
    area, log_ratio = height * width, np.log((3.0 / 4.0, 4.0 / 3.0))
    for _ in range(10):
        target_area = area * rng.uniform(0.08, 1.0)
        aspect_ratio = np.exp(rng.uniform(log_ratio[0], log_ratio[1]))
        w = int(round(np.sqrt(target_area * aspect_ratio)))  # noqa: RUF046
        h = int(round(np.sqrt(target_area / aspect_ratio)))  # noqa: RUF046
        if 0 < w <= width and 0 < h <= height:
            i = rng.integers(0, height - h + 1)
            j = rng.integers(0, width - w + 1)
            return j, i, j + w, i + h
    in_ratio = float(width) / float(height)
    if in_ratio < 3.0 / 4.0:
        w = width
        h = int(round(w / (3.0 / 4.0)))  # noqa: RUF046
    elif in_ratio > 4.0 / 3.0:
        h = height
        w = int(round(h * (4.0 / 3.0)))  # noqa: RUF046
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


@pytest.mark.parametrize("size", [(500, 375), (300, 500), (64, 64), (900, 100), (10, 200), (3, 2)])
def test_random_boxes_are_those_of_torchvision(size):
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(300):
        assert imagenet.random_box(ours, *size) == torchvision_box(theirs, *size)


def test_areas_of_random_boxes_are_uniform():
    rng = np.random.default_rng(0)
    boxes = np.array([imagenet.random_box(rng, 4000, 4000) for _ in range(4000)])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    areas, aspects = w * h / 4000**2, np.log(w / h) / np.log(4 / 3)
    # Of small boxes all fit, so there nothing is drawn again.
    small = areas < 0.5
    assert 0.08 <= areas.min() < 0.09
    np.testing.assert_allclose(np.mean(areas[small]), 0.29, atol=0.01)
    np.testing.assert_allclose(np.std(areas[small]), 0.42 / 12**0.5, atol=0.01)
    np.testing.assert_allclose(np.mean(aspects[small]), 0, atol=0.05)
    np.testing.assert_allclose(np.std(aspects[small]), 2 / 12**0.5, atol=0.03)
    corners = boxes[small, 0] / (4000 - w[small])
    np.testing.assert_allclose([corners.mean(), corners.std()], [0.5, 12**-0.5], atol=0.02)


def test_a_random_crop_is_the_box_resized():
    picture = Image.fromarray(rgb(encoded(0, (90, 70))))
    box = imagenet.random_box(np.random.default_rng(1), 90, 70)
    expected = picture.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
    got = imagenet.random_resized_crop(np.random.default_rng(1), picture, 32)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "corner"),
    [((512, 256), (144, 16)), ((256, 300), (16, 38)), ((513, 256), (144, 16))],
)
def test_the_centre_of_an_image_that_needs_no_resizing_is_a_part_of_it(size, corner):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    got = np.asarray(imagenet.resized_center(Image.fromarray(pixels), 224))
    left, upper = corner
    np.testing.assert_array_equal(got, pixels[upper : upper + 224, left : left + 224])


def test_the_centre_of_a_halved_image_is_worked_by_hand():
    """Columns 0 0 80 80 0 0 ...; halving weighs four by 1 3 3 1, which gives 20 60 20 60 ..."""
    columns = 80 * (np.arange(146) // 2 % 2)
    pixels = np.broadcast_to(columns[None, :, None], (146, 146, 3)).astype(np.uint8)
    got = np.asarray(imagenet.resized_center(Image.fromarray(pixels), 64))  # 73 of 146, then 64
    assert got.shape == (64, 64, 3)
    np.testing.assert_array_equal(got[:, :, 0], np.tile([20, 60], (64, 32)))


@pytest.mark.parametrize("size", [(61, 33), (50, 33), (33, 50), (500, 375), (37, 37)])
def test_the_centre_is_that_of_torchvision(size):
    """`Resize(256)` and `CenterCrop(224)` on PIL images, in their own words."""
    picture = Image.fromarray(rgb(encoded(3, size)))
    w, h = size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = 256, int(256 * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    resized = picture.resize((new_w, new_h), Image.Resampling.BILINEAR)
    top, left = int(round((new_h - 224) / 2.0)), int(round((new_w - 224) / 2.0))  # noqa: RUF046
    expected = resized.crop((left, top, left + 224, top + 224))
    got = imagenet.resized_center(picture, 224)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


# Batches -----------------------------------------------------------------------------------------


def order(steps=4, batch_size=8):
    """Rows of an epoch; some come twice."""
    return np.random.default_rng(0).integers(0, 9, (steps, batch_size))


def read(split, rows, positions, key=KEY):
    images, labels = zip(*split.read(list(zip(rows, positions, strict=True)), key), strict=True)
    return np.stack(images), np.stack(labels)


def at(rows):
    return np.arange(rows.size).reshape(rows.shape)


def test_images_are_decoded_cropped_and_labelled(prepared):
    """Each is the crop, by the key and its position, of what the archive holds: CMYK, PNG too."""
    import tensorflow_datasets as tfds

    rows = np.arange(9)
    (images,), (labels,) = read(load(prepared).train, [rows], [rows + 70])
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (9, 32, 32, 3), np.int32)
    examples = list(tfds.data_source("imagenet2012", split="train", data_dir=prepared))
    assert labels.tolist() == [example["label"] for example in examples]
    for row, example in enumerate(examples):
        rng = np.random.default_rng((3, 4, row + 70))
        picture = Image.fromarray(example["image"])
        expected = imagenet.random_resized_crop(rng, picture, 32)
        np.testing.assert_array_equal(images[row], np.asarray(expected))


def test_a_folder_with_the_images_as_they_are_gives_rgb_too(prepared):
    """As the stock builder of versions before 3.0.0 left them."""
    for files in train_images().values():
        for name, content in files.items():
            picture = imagenet._decode({"image": content, "file_name": name.encode()})
            np.testing.assert_array_equal(np.asarray(picture), rgb(content))


def test_without_a_key_batches_are_centres_and_rows_past_the_end_do_not_count(prepared):
    split = load(prepared).test
    (images,), (labels,) = read(split, [np.array([2, 0, 3, 4, 7])], [np.zeros(5, int)], key=None)
    assert labels.tolist()[3:] == [-1, -1] and not images[3:].any()
    by_label = {example["label"]: example for example in stock(prepared, "validation").values()}
    for image, label in zip(images[:3], labels[:3], strict=True):
        picture = Image.fromarray(by_label[label]["image"])
        np.testing.assert_array_equal(image, np.asarray(imagenet.resized_center(picture, 32)))


def test_a_part_begins_where_it_says(prepared):
    split = load(prepared).train
    part = split.part(2, 8).part(1, 9)
    assert part.size == 5
    (images,), (labels,) = read(part, [np.arange(6)], [np.zeros(6, int)], key=None)
    (whole,), (all_labels,) = read(split, [np.arange(9)], [np.zeros(9, int)], key=None)
    np.testing.assert_array_equal(images[:5], whole[3:8])
    assert labels.tolist() == [*all_labels[3:8].tolist(), -1]


def test_crops_follow_from_key_and_position_alone(prepared):
    split, rows = load(prepared).train, np.array([5, 5, 1, 5])
    (images,), _ = read(split, [rows], [np.array([0, 1, 2, 0])])
    assert (images[0] != images[1]).any()
    np.testing.assert_array_equal(images[0], images[3])
    (others,), _ = read(split, [rows], [np.array([0, 1, 2, 0])], key=KEY + 1)
    assert all((a != b).any() for a, b in zip(images, others, strict=True))


def test_an_epoch_resumed_at_any_step_gives_the_same_bits(prepared):
    rows = order()
    whole = read(load(prepared).train, rows, at(rows))
    split = layout.make(Config(batch_size=8))
    for first in range(1, 4):
        parts = [rows[i : i + 1] for i in range(first, 4)]
        fed = engine.feed(split, load(prepared).train, parts, key=KEY, first=8 * first)
        for i, batch in enumerate(fed, first):
            np.testing.assert_array_equal(batch.images[0], whole[0][i])
            np.testing.assert_array_equal(batch.labels[0], whole[1][i])


@pytest.mark.slow
def test_workers_give_the_same_bits(prepared):
    rows = order()
    whole = read(load(prepared).train, rows, at(rows))
    for first in (0, 3):
        ours = read(load(prepared, workers=2).train, rows[first:], at(rows)[first:])
        for a, b in zip(ours, whole, strict=True):
            np.testing.assert_array_equal(a, b[first:])


def test_the_parts_of_two_processes_are_the_batch(prepared):
    """Each reads the columns of its own devices alone."""
    rows, split = order(), load(prepared).train
    whole = layout.make(Config(batch_size=8, mesh=Mesh(devices=8)))
    devices = whole.mesh.devices.tolist()
    halves = [whole.columns(8, devices=own) for own in (devices[1::2], devices[::2])]
    assert [half.tolist() for half in halves] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    images, labels = read(split, rows, at(rows))
    for columns in halves:
        ours = read(split, rows[:, columns], at(rows)[:, columns])
        np.testing.assert_array_equal(ours[0], images[:, columns])
        np.testing.assert_array_equal(ours[1], labels[:, columns])


@pytest.mark.parametrize("devices", [1, 4])
def test_batches_lie_split_over_the_devices(prepared, devices):
    rows, split = order(), load(prepared).train
    images, labels = read(split, rows, at(rows))
    lay = layout.make(Config(batch_size=8, mesh=Mesh(devices=devices)))
    (fed,) = engine.feed(lay, split, [rows], key=KEY)
    np.testing.assert_array_equal(fed.images, images)
    np.testing.assert_array_equal(fed.labels, labels)
    assert fed.images.sharding.is_equivalent_to(
        jax.NamedSharding(lay.mesh, P(None, "data")), fed.images.ndim
    )
    first = next(engine.feed(lay, split, list(rows), key=KEY))
    np.testing.assert_array_equal(first.images, images[0])
    np.testing.assert_array_equal(first.labels, labels[0])


# Experiments -------------------------------------------------------------------------------------


def small_config(folder, **changes):
    settings = Data("imagenet2012", str(folder), allow_unofficial=True, image_size=32)
    return dataclasses.replace(Config(data=settings, batch_size=4, eval_batch_size=3), **changes)


def test_a_job_knows_its_data_without_decoding_them(prepared, monkeypatch):
    monkeypatch.setattr(imagenet, "_picture", None)
    job = experiment.check(small_config(prepared))
    assert job.shapes["params"]["linear"]["kernel"].shape == (64, 1000)
    assert job.dataset.train.size == 9
    limited = configs.vary(small_config(prepared), data={"train_limit": 5})
    assert experiment.check(limited).dataset.train.size == 5
    assert experiment.check(limited).dataset.test.size == 4
    held_out = configs.vary(small_config(prepared), data={"holdout": 3, "train_limit": 5})
    train, test, _ = experiment.check(held_out).dataset[1:4]
    assert (train.start, train.size, test.start, test.size, test.split) == (0, 5, 6, 3, "train")
    with pytest.raises(ValueError, match="batch_size: expected at most 9, got 10"):
        experiment.check(small_config(prepared, batch_size=10))


def test_one_program_is_refused(prepared):
    with pytest.raises(ValueError, match="one_program: expected images that are in memory, got"):
        experiment.check(small_config(prepared, one_program=True, quantize=Quantize(rounds=(17,))))


@pytest.mark.parametrize(("field", "least"), [("image_size", 1), ("workers", 0)])
def test_sizes_that_no_run_could_use_are_named(field, least):
    config = configs.vary(Config(), data={field: least - 1})
    with pytest.raises(ValueError, match=f"data.{field}: expected at least {least}, got"):
        configs.validate(config)


def test_a_run_may_go_on_with_other_workers(prepared):
    texts = [configs.to_json(small_config(prepared))]
    texts.append(configs.to_json(configs.vary(small_config(prepared), data={"workers": 3})))
    assert configs.difference(*texts) == ""


@pytest.mark.slow
def test_it_is_evaluated_as_images_in_memory_are(prepared):
    config, dataset = small_config(prepared), load(prepared)
    model = models.build("small_cnn", num_classes=1000)
    task = tasks.classify(networks.linen(model), dataset)
    functions = engine.build(config, dataset, task, layout.make(config))
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    ours = functions.evaluate(variables["params"], variables["batch_stats"], dataset.test)
    rows = np.arange(4)
    (images,), (labels,) = read(dataset.test, [rows], [rows], key=None)
    theirs = functions.evaluate(
        variables["params"], variables["batch_stats"], data.Images(images, labels)
    )
    assert ours == theirs
    x = (images / 255 - np.array(dataset.mean)) / np.array(dataset.std)
    logits = model.apply(variables, x.astype(np.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert ours["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)


def write_larger_archives(data_dir):
    """Of 96 images that tell their class by their shade; returns the arguments of a run."""
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    names = imagenet.source().label_names[:8]
    shade = lambda i: np.full((40, 52, 3), 32 * i, np.uint8)  # noqa: E731

    def image(i, seed):
        noise = np.random.default_rng(seed).integers(0, 32, (40, 52, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(shade(i) + noise).save(buffer, "jpeg")
        return buffer.getvalue()

    images = {
        synset: {f"{synset}_{j}.JPEG": image(i, 12 * i + j) for j in range(12)}
        for i, synset in enumerate(names)
    }
    (manual / TRAIN).write_bytes(train_tar(images))
    (manual / VALIDATION).write_bytes(tar(validation_images()))
    return [
        *("--config", "configs/digits_slq.py"),
        f"--config.data.dir={data_dir}",
        "--config.data.name=imagenet2012",
        "--config.data.image_size=32",
        "--config.data.allow_unofficial=true",
        "--config.fit.epochs=2",
        "--config.retrain.epochs=1",
        "--config.quantize.rounds=3",
        "--config.quantize.bits=2",
        "--config.quantize.sensitivity=fisher",
        "--config.quantize.sensitivity_batches=2",
        "--config.quantize.recalibrate_batches=2",
        "--config.batch_size=8",
        "--config.save_seconds=0",
        "--config.plots.draw=false",
    ]


def start(arguments, workdir, cache_folder):
    """Start a run in a process group of its own, on one device."""
    environment = {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments, "--workdir", str(workdir)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output[0]


def saved(workdir):
    """Return the number of the latest checkpoint."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=-1)


def gone(group):
    """Whether all processes of a group end within some seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_report(tmp_path, cache_folder):
    """A minute. Killed within epochs, with workers, it sees what a run without any does."""
    arguments = write_larger_archives(tmp_path / "data")
    whole, workdir = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    finish(start(arguments, whole, cache_folder))
    arguments.append("--config.data.workers=2")
    for step in (5, 17):
        process = start(arguments, workdir, cache_folder)
        while saved(workdir) < step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert gone(process.pid), "workers outlive the run"
    assert "continuing after" in finish(start(arguments, workdir, cache_folder))
    for name in ("metrics.jsonl", "report.json", "model.safetensors"):
        assert timeless(workdir / name) == timeless(whole / name)
    report = json.loads((workdir / "report.json").read_text())
    assert report["quantized"]["on_codebook"] is True


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, cache_folder):
    """A minute. Each decodes its half of every batch; sums differ in their order alone."""
    arguments = write_larger_archives(tmp_path / "data")
    finish(start(arguments, tmp_path / "one", cache_folder))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    arguments += ["--config.mesh.devices=0", "--config.data.workers=1"]
    processes = [
        start([*arguments, f"--distributed=localhost:{port},2,{i}"], tmp_path / "two", cache_folder)
        for i in range(2)
    ]
    for process in processes:
        finish(process)
    for one, two in zip(*(losses(tmp_path / name) for name in ("one", "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-2)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
