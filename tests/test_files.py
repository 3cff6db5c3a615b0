"""Files: replaced whole or not at all, with their rights, through links; nothing left behind."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxquant import files
from jaxquant.files import read_file, replace_file

# The module alone, without the time that it takes to import JAX.
PROGRAM = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = sys.argv[1]
"""


def run(program, path):
    return subprocess.Popen([sys.executable, "-c", PROGRAM + program, str(path)])


def mode(path):
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.mark.parametrize("before", [0o600, 0o640, 0o666, 0o444])
def test_a_replaced_file_keeps_its_mode(before, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(before)
    replace_file(path, b"new")
    assert mode(path) == before
    path.chmod(0o600)
    assert read_file(path) == b"new"


def test_no_one_else_reads_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    path, modes = tmp_path / "x", []
    path.write_bytes(b"old")
    path.chmod(0o600)
    monkeypatch.setattr(os, "fsync", lambda _: modes.extend(map(mode, tmp_path.iterdir())))
    replace_file(path, b"new")
    assert modes == [0o600, 0o600]


def test_the_mode_of_a_new_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "x", b"")
    finally:
        os.umask(old)
    assert mode(tmp_path / "x") == 0o640


def test_the_group_stays(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    others = [group for group in os.getgroups() if group != path.stat().st_gid]
    group = 4242 if os.geteuid() == 0 else (others or [None])[0]
    if group is None:
        pytest.skip("a user of a single group")
    os.chown(path, -1, group)
    replace_file(path, b"new")
    assert path.stat().st_gid == group


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, second = tmp_path / "folder" / "x", tmp_path / "link", tmp_path / "second"
    link.symlink_to(Path("folder") / "x")
    second.symlink_to(link)
    for data in (b"new", b"replaced"):  # a link to nothing first
        replace_file(second, data)
        assert second.is_symlink() and link.is_symlink() and not target.is_symlink()
        assert target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    link.unlink()
    link.symlink_to(second)
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(link, b"")
    assert link.is_symlink() and second.is_symlink()


def test_what_is_no_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        for call in (read_file, lambda path: replace_file(path, b"")):
            with pytest.raises(ValueError, match=f"{path}: expected a regular file"):
                call(path)
        assert not path.is_file() and path.exists()
    for call in (read_file, lambda path: replace_file(path, b"")):
        with pytest.raises(IsADirectoryError):
            call(tmp_path)
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "x", b"")


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "ø" * 127, "𝄞" * 63):
        replace_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


def test_what_a_killed_process_left_goes_away_with_the_next_call(tmp_path):
    path, other = tmp_path / "a[1].x", tmp_path / ".a[1].x.and.others"
    for target in (path, other):
        killed = run(
            "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
            "files.replace_file(path, b'killed')",
            target,
        )
        assert killed.wait() == -signal.SIGKILL
    assert not path.exists() and len(list(tmp_path.iterdir())) == 2
    replace_file(path, b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
    replace_file(other, b"new")
    assert set(tmp_path.iterdir()) == {path, other}


def test_a_file_that_is_being_written_is_not_taken_for_abandoned(tmp_path, monkeypatch):
    path, sync, found = tmp_path / "x", os.fsync, []

    def write_another(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        replace_file(path, b"inner")
        found.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", write_another)
    replace_file(path, b"outer")
    assert found == [b"inner"] and path.read_bytes() == b"outer"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_the_same_file_never_see_half_of_one(tmp_path):
    path = tmp_path / "x"
    program = """
data = str(os.getpid()).encode() * 10000
for _ in range(100):
    files.replace_file(path, data)
    read = files.read_file(path)
    assert read == read[: len(read) // 10000] * 10000, read[:100]
"""
    processes = [run(program, path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    left = tmp_path / f".x.{'0' * 32}"
    left.write_bytes(b"perhaps in use")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    replace_file(tmp_path / "x", b"new")
    assert left.exists() and (tmp_path / "x").read_bytes() == b"new"


def test_a_file_that_was_removed_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    path, lock = tmp_path / "x", files.fcntl.flock

    def remove(file, operation):  # as another process may, which takes it for abandoned
        monkeypatch.setattr(files.fcntl, "flock", lock)
        os.unlink(file.name)
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", remove)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_does_not_fit_into_memory_cannot_be_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**33)
    program = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    files.read_file(path)
except OSError as error:
    sys.exit(0 if error.filename == path else "no name")
"""
    assert run(program + "sys.exit('was read')", tmp_path / "x").wait() == 0
