"""Tests of the datasets, on tiny archives that the tests write themselves; no network is used."""

import gzip
import hashlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from tests import own
from train import data, experiment, prepare
from train.config import Config, Data

CIFAR10 = "cifar-10-binary.tar.gz"
DATA = os.environ.get("JAXQUANT_DATA")
ROOT = Path(__file__).resolve().parent.parent


def cifar10_members(records=(10, 5)):
    """The six members of the archive, by name, as arrays [records, 3073]."""
    rng = np.random.default_rng(0)
    train, test = records
    names = {f"data_batch_{i}.bin": train // 5 for i in range(1, 6)} | {"test_batch.bin": test}
    members = {}
    for name, count in names.items():
        member = rng.integers(0, 256, (count, 3073), np.uint8)
        member[:, 0] %= 10
        members[f"cifar-10-batches-bin/{name}"] = member
    return members


def write_tar(path, members, extra=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            content = bytes(content)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)


def idx(array):
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
    return gzip.compress(header + array.tobytes())


def mnist_arrays():
    rng = np.random.default_rng(0)
    return {
        f"{stem}-{kind}-ubyte.gz": rng.integers(0, high, (count, *shape), np.uint8)
        for stem, count in (("train", 6), ("t10k", 4))
        for kind, high, shape in (("images-idx3", 256, (28, 28)), ("labels-idx1", 10, ()))
    }


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError(f"no network in tests, for {timeout} s")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", refuse)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Make the archives under `tmp_path` the official ones, of few records; returns that folder."""
    manual = tmp_path / "downloads" / "manual"
    write_tar(manual / CIFAR10, cifar10_members())
    for name, array in mnist_arrays().items():
        (manual / name).write_bytes(idx(array))
    for name, records in (("cifar10", (10, 5)), ("mnist", (6, 4))):
        source = data._SOURCES[name]
        source = source._replace(
            records=dict(zip(("train", "test"), records, strict=True)),
            checksums={file: sha256(manual / file) for file in source.checksums},
        )
        monkeypatch.setitem(data._SOURCES, name, source)
    return tmp_path


def cifar10_images(member):
    return member[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def sorted_rows(images, labels):
    """Rows of pixels and label in an order of their own, to compare whatever the order."""
    rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return rows[np.lexsort(rows.T)]


def official_splits(name):
    if name == "mnist":
        arrays = list(mnist_arrays().values())
        return {
            split: (arrays[i][..., None], arrays[i + 1]) for split, i in (("train", 0), ("test", 2))
        }
    members = list(cifar10_members().values())
    train = np.concatenate(members[:5])
    return {
        split: (cifar10_images(records), records[:, 0])
        for split, records in (("train", train), ("test", members[5]))
    }


def splits(dataset):
    return {"train": dataset.train, "test": dataset.test}


def test_digits_are_scaled_and_split_by_class():
    digits = data.load("digits", data_dir="unused")
    assert digits.train.images.shape == (1442, 8, 8, 1)
    assert digits.test.images.shape == (355, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert set(np.unique(digits.train.images)) <= {round(i * 255 / 16) for i in range(17)}
    assert digits.train.images.max() == 255
    counts = np.bincount(digits.test.labels, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 36
    pixels = digits.train.images / 255
    np.testing.assert_allclose(pixels.mean(), digits.mean[0], atol=1e-3)
    np.testing.assert_allclose(pixels.std(), digits.std[0], atol=1e-3)


def test_digits_need_neither_tfds_nor_a_folder():
    code = """
        import sys
        sys.modules["tensorflow_datasets"] = sys.modules["grain"] = None
        from train import data
        data.load("digits", data_dir="/nowhere")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_unknown_name_lists_the_names(tmp_path):
    expected = "data.name: expected one of digits, cifar10, mnist, imagenet2012, or FILE.npz or "
    with pytest.raises(ValueError, match=f"{expected}.* got 'svhn'"):
        data.load("svhn", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_loads_what_the_archive_holds(tiny, name):
    loaded = data.load(name, data_dir=tiny)
    for split, (images, labels) in splits(loaded).items():
        expected = official_splits(name)[split]
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        assert images.shape == expected[0].shape
        np.testing.assert_array_equal(sorted_rows(images, labels), sorted_rows(*expected))
    assert loaded.num_classes == 10
    assert len(loaded.mean) == len(loaded.std) == images.shape[-1]
    assert (loaded.pad, loaded.flip) == ((4, True) if name == "cifar10" else (0, False))
    assert not any(module == "tensorflow" for module in sys.modules)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_stock_data_source_reads_the_same(tiny, name):
    import tensorflow_datasets as tfds

    loaded = data.load(name, data_dir=tiny)
    for split, (images, labels) in splits(loaded).items():
        examples = list(tfds.data_source(name, split=split, data_dir=tiny))
        np.testing.assert_array_equal([example["image"] for example in examples], images)
        np.testing.assert_array_equal([example["label"] for example in examples], labels)
    if name == "cifar10":
        records = np.concatenate(list(cifar10_members().values()))
        images = dict(zip([f"train_{i:05d}" for i in range(10)], records, strict=False))
        for example in tfds.data_source(name, split="train", data_dir=tiny):
            expected = cifar10_images(images[example["id"].decode()][None])[0]
            np.testing.assert_array_equal(example["image"], expected)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_name_version_and_features_are_those_of_the_stock_builder(tiny, name):
    import tensorflow_datasets as tfds

    stock = tfds.builder_cls(name)
    ours = prepare.builder_class(data._SOURCES[name])(data_dir=tiny)
    assert ours.name == name
    assert ours.VERSION == stock.VERSION
    data.load(name, data_dir=tiny)
    written = tfds.builder_from_directory(tiny / name / str(ours.VERSION)).info
    assert repr(written.features) == repr(stock(data_dir=tiny / "elsewhere").info.features)


def test_preparation_happens_once(tiny):
    first = data.load("cifar10", data_dir=tiny)
    (tiny / "downloads" / "manual" / CIFAR10).unlink()
    second = data.load("cifar10", data_dir=str(tiny))
    np.testing.assert_array_equal(first.train.images, second.train.images)


@pytest.mark.slow
def test_a_kill_while_preparing_leaves_nothing_that_counts(tiny):
    """The process is killed as it writes its seventh image; the next call starts anew."""
    records, sums = data._SOURCES["cifar10"].records, data._SOURCES["cifar10"].checksums
    code = f"""
        import os, signal
        from train import data
        source = data._SOURCES["cifar10"]._replace(records={records}, checksums={sums})
        data._SOURCES["cifar10"] = source
        images, png = [], data._png
        def deadly(image):
            images.append(image)
            if len(images) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return png(image)
        data._png = deadly
        data.load("cifar10", data_dir={str(tiny)!r})
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name[:10] for path in (tiny / "cifar10").iterdir()] == ["incomplete"]
    assert len(data.load("cifar10", data_dir=tiny).train.images) == 10
    assert [path.name for path in (tiny / "cifar10").iterdir()] == ["3.0.2"]


def unofficial(tiny):
    """Another valid archive in the place of the official one; returns its checksum."""
    path = tiny / "downloads" / "manual" / CIFAR10
    members = cifar10_members()
    next(iter(members.values()))[0, 1] ^= 1
    write_tar(path, members)
    return sha256(path)


def test_unofficial_archive_is_refused(tiny):
    official, got = data._SOURCES["cifar10"].checksums[CIFAR10], unofficial(tiny)
    message = f"{CIFAR10}: expected SHA-256 {official}, got {got}; --config.data.allow_unofficial"
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", data_dir=tiny)
    assert not (tiny / "cifar10" / "3.0.2").exists()


def test_unofficial_archive_is_accepted_with_a_warning_and_remembered(tiny):
    got = unofficial(tiny)
    for _ in range(2):  # When preparing, and when reading what is prepared.
        with pytest.warns(UserWarning, match=f"got {got}; accepted by allow_unofficial") as caught:
            data.load("cifar10", data_dir=tiny, allow_unofficial=True)
        assert len(caught) == 1
    with pytest.raises(ValueError, match=f"made from an unofficial {CIFAR10}.*got {got}; --config"):
        data.load("cifar10", data_dir=tiny)


def test_official_archive_is_accepted_without_a_warning(tiny):
    data.load("mnist", data_dir=tiny, allow_unofficial=True)  # Warnings are errors here.


def test_absent_archive_names_file_folder_and_url(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar10", data_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in message
    assert f"place in {tmp_path / 'downloads' / 'manual'};" in message
    assert "no network in tests" in message


def test_only_the_absent_archives_are_named(tiny):
    absent = "t10k-labels-idx1-ubyte.gz"
    (tiny / "downloads" / "manual" / absent).unlink()
    with pytest.raises(FileNotFoundError, match=f"mnist: missing {absent} ") as caught:
        data.load("mnist", data_dir=tiny)
    assert "train-" not in str(caught.value)


def test_absent_archive_is_downloaded(tiny, monkeypatch):
    path = tiny / "downloads" / "manual" / CIFAR10
    content = path.read_bytes()
    path.unlink()
    urls = []

    def serve(url, timeout):
        urls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(prepare.urllib.request, "urlopen", serve)
    assert len(data.load("cifar10", data_dir=tiny).train.images) == 10
    assert urls == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert path.read_bytes() == content


@pytest.mark.parametrize("failure", ["short", "break"])
def test_bad_download_leaves_no_file(tiny, monkeypatch, failure):
    path = tiny / "downloads" / "manual" / CIFAR10
    content = path.read_bytes()
    path.unlink()

    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise http.client.IncompleteRead(b"")

    served = io.BytesIO(content[:-9]) if failure == "short" else Broken()
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda url, timeout: served)
    expected = ValueError if failure == "short" else FileNotFoundError
    with pytest.raises(expected, match=f"kriz/{CIFAR10}.*(got|IncompleteRead)"):
        data.load("cifar10", data_dir=tiny, allow_unofficial=True)
    assert not [file for file in path.parent.iterdir() if file.name.startswith("cifar")]


def refused(tiny, name, message):
    """Expect a damaged archive to be refused in one line, with nothing prepared."""
    with pytest.raises(ValueError, match=message) as caught:
        data.load(name, data_dir=tiny, allow_unofficial=True)
    assert "\n" not in str(caught.value)
    assert not list(tiny.glob(f"{name}/[0-9]*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "expected a gzip file, got EOFError"),
        (lambda whole: b"not gzip", "expected a gzip file, got BadGzipFile"),
        (lambda whole: b"", "(expected a tar archive|no such file)"),
        (
            lambda whole: whole[:999] + bytes(50) + whole[1049:],
            "expected a gzip file, got (BadGzip|error)",
        ),
        (lambda whole: gzip.compress(b"not tar" * 300), "expected a tar archive, got ReadError"),
        (lambda whole: gzip.compress(bytes(3 << 20), 1), "expected at most .* bytes inside"),
        (
            lambda whole: gzip.compress(gzip.decompress(whole)[:5000]),
            r"(expected a tar archive|data_batch_\d.bin: expected 6146 bytes)",
        ),
    ],
    ids=["cut", "other", "empty", "flipped", "no tar", "bomb", "cut tar"],
)
def test_damaged_cifar10_archive_is_refused(tiny, content, message):
    path = tiny / "downloads" / "manual" / CIFAR10
    path.write_bytes(content(path.read_bytes()))
    refused(tiny, "cifar10", f"{CIFAR10}: .*{message}")


def test_wrong_cifar10_members_are_refused(tiny):
    path, member = tiny / "downloads" / "manual" / CIFAR10, "cifar-10-batches-bin/data_batch_3.bin"
    members = cifar10_members()
    size = members[member].size
    for content in (members[member].tobytes()[:-1], members[member].tobytes() + b"\0"):
        write_tar(path, {**members, member: content})
        message = f"{CIFAR10}: {member}: expected {size} bytes, got {len(content)} bytes"
        refused(tiny, "cifar10", message)
    write_tar(path, {name: content for name, content in members.items() if name != member})
    refused(tiny, "cifar10", f"{member}: expected {size} bytes, got no such file")
    members[member][1, 0] = 10
    write_tar(path, members)
    refused(tiny, "cifar10", f"{member}: expected labels 0 to 9, got 10 in record 1")


def test_hostile_members_reach_neither_disk_nor_result(tiny):
    escape = tiny.parent / "escaped"
    link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {"../escaped": b"x", str(escape): b"x", **cifar10_members(), "../../escaped": b"x"}
    write_tar(tiny / "downloads" / "manual" / CIFAR10, members, extra=[link])
    with pytest.warns(UserWarning, match="unofficial"):
        loaded = data.load("cifar10", data_dir=tiny, allow_unofficial=True)
    expected = official_splits("cifar10")["test"]
    got = sorted_rows(loaded.test.images, loaded.test.labels)
    np.testing.assert_array_equal(got, sorted_rows(*expected))
    assert not escape.exists()
    assert {path.name for path in tiny.iterdir()} == {"downloads", "cifar10", ".cifar10.lock"}


def test_link_in_the_place_of_a_member_is_refused(tiny):
    members = cifar10_members()
    link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    del members[link.name]
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(tiny / "downloads" / "manual" / CIFAR10, members, extra=[link])
    refused(tiny, "cifar10", "test_batch.bin: expected 15365 bytes, got no such file")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3", lambda whole: whole[:-30], "expected a gzip file, got EOFError"),
        ("train-images-idx3", lambda whole: idx(np.zeros((6, 28, 27), np.uint8)), "IDX header"),
        ("train-images-idx3", lambda whole: idx(np.zeros((7, 28, 28), np.uint8)), "IDX header"),
        ("train-labels-idx1", lambda whole: idx(np.zeros((6, 1), np.uint8)), "IDX header"),
        ("t10k-labels-idx1", lambda whole: gzip.compress(b""), "IDX header .*, got $"),
        (
            "t10k-labels-idx1",
            lambda whole: gzip.compress(gzip.decompress(whole)[:-1]),
            "expected 12 bytes inside, got 11",
        ),
        (
            "t10k-labels-idx1",
            lambda whole: idx(np.array([0, 1, 11, 2], np.uint8)),
            "expected labels 0 to 9, got 11 in record 2",
        ),
    ],
)
def test_damaged_mnist_archive_is_refused(tiny, file, content, message):
    path = tiny / "downloads" / "manual" / f"{file}-ubyte.gz"
    path.write_bytes(content(path.read_bytes()))
    refused(tiny, "mnist", f"{file}-ubyte.gz: .*{message}")


def damage_nothing_but_info(folder):
    (folder / "dataset_info.json").unlink()


def damage_marker(folder):
    (folder / "archives.json").write_text("[]")


def nest_marker(folder):
    (folder / "archives.json").write_text("[" * 100_000)


def damage_records(folder):
    path = next(folder.glob("*train*array_record*"))
    path.write_bytes(path.read_bytes()[:100])


def damage_format(folder):
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))


@pytest.mark.parametrize(
    "damage",
    [damage_nothing_but_info, damage_marker, nest_marker, damage_records, damage_format],
)
def test_damaged_prepared_folder_is_refused(tiny, damage):
    data.load("mnist", data_dir=tiny)
    damage(tiny / "mnist" / "3.0.1")
    message = "mnist/3.0.1: expected a dataset prepared as array_record, got .*deleting the folder"
    with pytest.raises(ValueError, match=message) as caught:
        data.load("mnist", data_dir=tiny)
    assert "\n" not in str(caught.value)


def test_prepared_folder_of_another_size_is_refused(tiny, monkeypatch):
    data.load("mnist", data_dir=tiny)
    source = data._SOURCES["mnist"]._replace(records={"train": 60_000, "test": 10_000})
    monkeypatch.setitem(data._SOURCES, "mnist", source)
    with pytest.raises(ValueError, match=r"3\.0\.1: train: expected 60000 images, got 6"):
        data.load("mnist", data_dir=tiny)


def test_folder_prepared_by_tfds_itself_is_accepted(tiny):
    data.load("mnist", data_dir=tiny)
    (tiny / "mnist" / "3.0.1" / "archives.json").unlink()
    assert len(data.load("mnist", data_dir=tiny).train.images) == 6


def test_checksums_are_those_of_tensorflow_datasets():
    from tensorflow_datasets.core import utils

    for name, source in data._SOURCES.items():
        text = (utils.tfds_path() / "url_checksums" / f"{name}.txt").read_text()
        rows = {row.split("\t")[0]: row.split("\t")[2] for row in text.splitlines()}
        for file, expected in source.checksums.items():
            assert rows[source.url + file] == expected


@pytest.mark.skipif(DATA is None, reason="JAXQUANT_DATA names no folder with downloads/manual")
@pytest.mark.filterwarnings("ignore:.*unofficial")
@pytest.mark.parametrize(("name", "shape"), [("cifar10", (32, 32, 3)), ("mnist", (28, 28, 1))])
def test_real_data(name, shape):
    folder = Path(DATA or "") / "downloads" / "manual"
    absent = [file for file in data._SOURCES[name].checksums if not (folder / file).exists()]
    if absent:
        pytest.skip(f"{folder / absent[0]} is absent")
    loaded = data.load(name, data_dir=DATA or "", allow_unofficial=True)
    train = 50_000 if name == "cifar10" else 60_000
    assert loaded.train.images.shape == (train, *shape)
    assert loaded.test.images.shape == (10_000, *shape)
    if name == "cifar10":
        assert np.bincount(loaded.train.labels).tolist() == [5000] * 10
        assert np.bincount(loaded.test.labels).tolist() == [1000] * 10


@pytest.mark.parametrize("limit", [0, 20, 45])
def test_what_is_held_out_is_measured_on_and_does_not_train(limit):
    whole = data.load(own.arrays, data_dir="unused").train
    settings = Data(own.arrays, holdout=whole.size - 40, train_limit=limit)
    job = experiment.check(Config(data=settings, batch_size=20))
    trained = job.dataset.train.images
    np.testing.assert_array_equal(trained, whole.images[: min(limit, 40) or 40])
    np.testing.assert_array_equal(job.dataset.test.images, whole.images[40:])
    np.testing.assert_array_equal(job.dataset.test.labels, whole.labels[40:])
    held_out = "8 held out to measure with"
    assert experiment.title(job).endswith(f"{len(trained)} images to train on and {held_out}")


def test_nothing_left_to_train_on_is_named():
    message = "data.holdout: expected fewer than 48 images, got 48"
    with pytest.raises(ValueError, match=re.escape(message)):
        experiment.check(Config(data=Data(own.arrays, holdout=48)))
