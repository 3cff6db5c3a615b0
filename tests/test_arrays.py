"""Images of your own: what is taken, how it is split and measured, what is refused by name."""

import re

import numpy as np
import pytest

from tests import own
from train import arrays, data


def given(**changes):
    """Return arrays of three classes with changes; None leaves one out."""
    made = {**own.arrays(31), **changes}
    return {name: array for name, array in made.items() if array is not None}


@pytest.mark.parametrize("how", ["a file", "a function", "its name"])
def test_a_dataset_of_your_own_is_taken_as_it_is(how, tmp_path):
    made = own.arrays()
    path = tmp_path / "own.npz"
    np.savez(path, **made)
    name = {"a file": str(path), "a function": own.arrays, "its name": "tests.own:arrays"}[how]
    dataset = data.load(name, data_dir="unused")
    assert dataset.name == (str(path) if how == "a file" else "tests.own:arrays")
    assert dataset.num_classes == 3 and dataset.pad == 0 and dataset.flip is False
    test = np.zeros(60, bool)
    for label in range(3):
        test[np.flatnonzero(made["labels"] == label)[4::5]] = True
    for split, chosen in ((dataset.train, ~test), (dataset.test, test)):
        np.testing.assert_array_equal(split.images, made["images"][chosen][..., None])
        np.testing.assert_array_equal(split.labels, made["labels"][chosen])
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
    assert dataset.test.size == 12
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, [pixels.mean()])
    np.testing.assert_allclose(dataset.std, [pixels.std()])


def test_a_split_of_your_own_and_floating_point_are_kept():
    rng = np.random.default_rng(0)
    images = rng.normal(7, 3, (600, 4, 5, 2))
    images[..., 1] = 2.0
    labels = np.arange(600) % 2
    test = {"test_images": images[:5], "test_labels": np.array([1, 0, 0, 0, 0], np.uint8)}
    made = arrays.load(lambda: {"images": images, "labels": labels, "pad": 2, "flip": True, **test})
    assert made.images.dtype == np.float32 and made.pad == 2 and made.flip is True
    np.testing.assert_allclose(made.images, images, rtol=1e-6)
    np.testing.assert_array_equal(made.test_labels, test["test_labels"])
    np.testing.assert_allclose(made.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(made.std, [images[..., 0].std(), 1.0], rtol=1e-5)


LABELS = np.arange(31) % 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "expected images, labels and maybe test_images, test_labels, pad, flip"),
        ({"labels": None}, "got no labels"),
        ({"test_labels": LABELS}, "got no test_images"),
        ({"imges": LABELS}, "got 'imges'"),
        ({"images": np.zeros((31, 4))}, "images: expected uint8 or floating point [N, H, W, C] or"),
        ({"images": np.zeros((31, 4))}, "got float64[31, 4]"),
        ({"images": np.zeros((31, 4, 4), int)}, "none of them 0, got int64[31, 4, 4]"),
        ({"images": np.zeros((31, 0, 4))}, "none of them 0, got float64[31, 0, 4]"),
        (
            {"images": np.full((31, 4, 4), np.nan)},
            "images: expected finite numbers in float32, got",
        ),
        ({"images": np.full((31, 4, 4), 1e300)}, "in float32, got 496 others"),
        ({"labels": LABELS / 1}, "labels: expected integers [N], got float64[31]"),
        ({"labels": LABELS[:, None]}, "labels: expected integers [N], got int64[31, 1]"),
        ({"labels": LABELS[1:]}, "labels: expected one for each of 31 images, got 30"),
        (
            {"labels": LABELS - 1},
            "labels: expected classes from 0 up to the number of classes, got",
        ),
        ({"labels": LABELS - 1}, "got -1 to 1"),
        ({"labels": LABELS + 10**9}, "got 1000000000 to 1000000002"),
        ({"labels": LABELS + 1}, "each there, got no image of class 0"),
        ({"labels": 2 * LABELS}, "each there, got no image of class 1"),
        ({"labels": 0 * LABELS}, "at least two of them and each there, got no image of class 1"),
        (
            {"test_images": np.zeros((2, 4, 4)), "test_labels": np.array([0, 1])},
            "test_images: expected uint8[31, 8, 8, 1] as of images, got float32[2, 4, 4, 1]",
        ),
        ({"pad": 9}, "pad: expected a number of pixels from 0 to 8, got 9"),
        ({"pad": 0.5}, "pad: expected a number of pixels from 0 to 8, got 0.5"),
        ({"flip": 1}, "flip: expected true or false, got 1"),
    ],
)
def test_what_is_no_dataset_is_named(changes, message, tmp_path):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=re.escape(message)) as caught:
        arrays.load(lambda: given(**changes))
    assert re.match(r"data\.name: \S*test_arrays:\S*: ", str(caught.value))
    path = tmp_path / "own.npz"
    np.savez(path, **given(**changes))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=re.escape(message)) as caught:
        arrays.load(str(path))
    assert str(caught.value).startswith(f"data.name: {path}: ")


def test_too_few_images_are_not_split():
    with pytest.raises(ValueError, match="or a class of five images or more to take some for test"):
        arrays.load(lambda: own.arrays(12))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.own:nowhere", "data.name: expected nowhere in tests.own, got no such name"),
        ("tests.own:no_module", "data.name: tests.own:no_module: expected a mapping of arrays by"),
        (
            "tests.own:clipped",
            "expected tests.own:clipped to need no arguments but none, got 'lear",
        ),
    ],
)
def test_a_function_that_gives_no_dataset_is_named(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        arrays.load(name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"[1, 2]"])
def test_a_file_that_is_no_archive_is_named(content, tmp_path):
    path = tmp_path / "own.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"data.name: {path}: expected a file")):
        arrays.load(str(path))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"data.name: {path}: expected arrays as of")):
        arrays.load(str(path))


def test_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **{**own.arrays(), "labels": np.array([{}] * 60)}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"expected arrays as of numpy\.savez, got Object arrays"):
        arrays.load(str(path))
