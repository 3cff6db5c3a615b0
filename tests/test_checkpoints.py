"""Checkpoints: damage is noticed and passed over, what does not fit is said, readers only read."""

import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train import checkpoints
from train.checkpoints import Checkpoints, read

PROGRESS = {"events": [{"loss": 0.5}]}
shows_warnings = pytest.mark.filterwarnings("always:.*cannot be read")


def tree(number):
    rng = np.random.default_rng(number)
    kernel = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    train = {"kernel": kernel, "mask": kernel > 0}
    return {"train": train, "empty": {}, "round": jnp.int32(number)}


def save(folder, *numbers):
    opened = Checkpoints(folder)
    for number in numbers:
        opened.save(tree(number), {"number": number, **PROGRESS})
    opened.close()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints 0 and 1; not to be changed."""
    return save(tmp_path_factory.mktemp("two") / "checkpoints", 0, 1)


@pytest.fixture
def copied(two, tmp_path):
    return shutil.copytree(two, tmp_path / "checkpoints")


def snapshot(folder):
    """Return what changes if anything is written, made, moved or deleted in a folder."""
    kept = [folder, *folder.rglob("*")]
    return {path: (x.st_ino, x.st_mtime_ns, x.st_size) for path in kept for x in [path.stat()]}


def restore(folder, like):
    opened = Checkpoints(folder)
    try:
        return opened.restore(like)
    finally:
        opened.close()


def assert_holds(restored, number):
    assert restored is not None
    arrays, progress = restored
    assert progress == {"number": number, **PROGRESS}
    assert jax.tree.structure(arrays) == jax.tree.structure(tree(number))
    jax.tree.map(np.testing.assert_array_equal, arrays, tree(number))


def test_what_is_saved_is_restored_and_keeps_the_type(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints")
    assert opened.restore(tree(0)) is None and read(tmp_path / "checkpoints", tree(0)) is None
    opened.save(tree(3), {"number": 3, **PROGRESS})
    assert_holds(opened.restore(tree(0)), 3)
    opened.close()
    assert_holds(read(tmp_path / "checkpoints", tree(0)), 3)


@shows_warnings
def test_a_flipped_bit_in_any_file_is_noticed_and_the_one_before_taken(copied):
    items = [copied / "1" / item for item in ("arrays", "progress")]
    files = [path for item in items for path in item.rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "commit_success.txt"]  # holds nothing
    assert len(files) > 8
    rng = np.random.default_rng(0)
    for path in files:
        data = path.read_bytes()
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged.tobytes())
        with pytest.warns(match="checkpoints/1: this checkpoint cannot be read, its files are not"):
            assert_holds(read(copied, tree(0)), 0)
        path.write_bytes(data)
    assert_holds(read(copied, tree(0)), 1)


@shows_warnings
def test_only_the_writer_moves_a_damaged_checkpoint_away(copied):
    manifest = copied / "1" / "arrays" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    before = snapshot(copied.parent)
    with pytest.warns(match="taking the one before it"):
        assert_holds(read(copied, tree(0)), 0)
    assert snapshot(copied.parent) == before
    with pytest.warns(match="it is now .*checkpoints.damaged/1"):
        assert_holds(restore(copied, tree(0)), 0)
    assert [path.name for path in copied.iterdir()] == ["0"]
    assert len(list(copied.with_name("checkpoints.damaged").iterdir())) == 1


@shows_warnings
def test_damage_is_noticed_without_checksums_where_it_cannot_be_read(copied):
    """As of checkpoints of earlier versions, which are read all the same."""
    for path in copied.rglob("sha256.json"):
        path.unlink()
    assert_holds(read(copied, tree(0)), 1)
    assert_holds(restore(copied, tree(0)), 1)
    (copied / "1" / "progress" / "metadata").write_text("{")
    with pytest.warns(match="cannot be read"):
        assert_holds(restore(copied, tree(0)), 0)


def test_a_checkpoint_gets_its_number_after_its_checksums(copied, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(folder):
        assert not (copied / "2").exists()
        raise Killed

    monkeypatch.setattr(checkpoints, "_write_sums", kill)
    opened = Checkpoints(copied)
    with pytest.raises(Killed):
        opened.save(tree(2), {})
        opened.wait()
    assert_holds(read(copied, tree(0)), 1)
    monkeypatch.undo()
    assert_holds(restore(save(copied, 2), tree(0)), 2)


def changed(part, **fields):
    """Return a tree with other entries in one of its nodes."""
    other = tree(0)
    return {**other, part: {**other[part], **fields}}


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (changed("empty", bias=jnp.zeros(3)), r"1 missing \(empty/bias\)"),
        ({"round": jnp.int32(0)}, r"2 unexpected \(train/kernel, train/mask\)"),
        (
            changed("train", kernel=jnp.zeros((16, 8))),
            r"1 different \(train/kernel as float32\[16, 16\] instead of float32\[16, 8\]\)",
        ),
        (changed("train", mask=jnp.zeros((16, 16))), r"mask as bool\[16, 16\] instead of float32"),
    ],
)
def test_what_does_not_fit_is_no_damage(copied, like, message):
    before = snapshot(copied)
    for function in (read, restore):
        with pytest.raises(ValueError, match=f"checkpoints/1: expected the arrays.*{message}"):
            function(copied, like)
    assert {path.name for path in copied.parent.iterdir()} == {"checkpoints"}
    assert snapshot(copied) == before


def test_what_is_whole_and_cannot_be_restored_is_no_damage(copied, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", no_memory)
    with pytest.raises(ValueError, match=r"checkpoints/1: this .* cannot be read .*out of memory"):
        restore(copied, tree(0))
    assert sorted(path.name for path in copied.iterdir()) == ["0", "1"]


def test_nodes_without_arrays_do_not_count(two):
    like = {**tree(0), "more": (), "train": {**tree(0)["train"], "none": {"empty": {}}}}
    del like["empty"]
    arrays, _ = read(two, like) or (None, None)
    assert jax.tree.structure(arrays) == jax.tree.structure(like)
    np.testing.assert_array_equal(arrays["train"]["kernel"], tree(1)["train"]["kernel"])


def test_a_reader_leaves_what_is_being_written(copied):
    shutil.copytree(copied / "1", copied / "2.orbax-checkpoint-tmp")
    before = snapshot(copied)
    assert_holds(read(copied, tree(0)), 1)
    assert snapshot(copied) == before
    assert_holds(restore(copied, tree(0)), 1)
    # A writer removes it, in the background.
    for _ in range(100):
        left = sorted(path.name for path in copied.iterdir())
        if left == ["0", "1"]:
            break
        time.sleep(0.1)
    assert left == ["0", "1"]


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_a_later_one(
    copied, monkeypatch
):
    whole = checkpoints._check_sums

    def delete(folder):
        if folder.name == "1":
            save(copied, 2, 3)
            assert not folder.exists()
        return whole(folder)

    monkeypatch.setattr(checkpoints, "_check_sums", delete)
    assert_holds(read(copied, tree(0)), 3)


def test_beside_a_writer_a_reader_always_finds_a_whole_one(copied):
    thread = threading.Thread(target=save, args=(copied, *range(2, 12)))
    thread.start()
    seen = []
    while thread.is_alive():
        restored = read(copied, tree(0))
        assert restored is not None
        seen.append(restored[1]["number"])
        assert_holds(restored, seen[-1])
    thread.join()
    assert seen == sorted(seen) and len(set(seen)) > 3
    assert sorted(int(path.name) for path in copied.iterdir()) == [10, 11]


def test_checksums_are_those_of_the_files(two):
    for item in ("arrays", "progress"):
        sums = json.loads((two / "1" / item / "sha256.json").read_text())
        assert sums and all(len(value) == 64 for value in sums.values())
        assert checkpoints._wrong_files(two / "1" / item) == []


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 8 bytes: No space left on device [28]"
        )

    opened = Checkpoints(tmp_path)
    monkeypatch.setattr(opened._manager, "save", no_space)
    message = "could not be written \\(no space left on device\\); those before it are whole"
    with pytest.raises(OSError, match=message):
        opened.save({"a": jnp.zeros(3)}, {})
    opened.close()
