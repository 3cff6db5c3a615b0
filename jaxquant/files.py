"""Regular files, read without waiting and replaced whole or not at all."""

import contextlib
import errno
import os
import re
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file; a pipe, which may never end, is refused at once.

    Raises:
      ValueError: for what is no regular file.
      OSError: if it cannot be read.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        _check_regular(os.fstat(file.fileno()), path)
        try:
            return file.read()
        except MemoryError:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from None


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all, in the place of an older one, whose rights it keeps.

    A symbolic link stays, and what it leads to is replaced. What a killed process left goes away
    with the next call for the same path; any number of processes may write to it.

    Raises:
      ValueError: for what is no regular file.
      OSError: if it cannot be written.
    """
    path = Path(os.path.realpath(path))
    old = _status(path)
    with contextlib.suppress(OSError):  # no right to look into the folder
        _remove_abandoned(path)
    with _temporary(path, 0o666 if old is None else 0o600) as temporary:
        with temporary.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            _copy_rights(old, temporary)
        os.replace(temporary, path)


def _status(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file, None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    _check_regular(status, path)
    return status


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a regular file, got a pipe or a device")


def _copy_rights(old: os.stat_result, path: Path) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(PermissionError):
            os.chown(path, old.st_uid, old.st_gid)
    path.chmod(stat.S_IMODE(old.st_mode))  # after the owner, whose change takes rights away


@contextlib.contextmanager
def _temporary(path: Path, mode: int) -> Iterator[Path]:
    """Create an empty file beside `path`, locked for as long as its process writes it."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with contextlib.ExitStack() as stack:
        while True:
            temporary = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}")
            file = stack.enter_context(open(temporary, "xb", opener=opener))
            stack.callback(temporary.unlink, missing_ok=True)
            if sys.platform == "win32":  # no such locks, and an open file cannot be renamed
                file.close()
                break
            with contextlib.suppress(OSError):  # a file system without locks: nothing is removed
                fcntl.flock(file, fcntl.LOCK_EX)
            if temporary.exists():  # nobody took it for abandoned before it was locked
                break
        yield temporary


def _prefix(path: Path) -> str:
    return f".{path.name[:50]}."  # with 32 characters more, at most the 255 bytes of a name


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose processes were killed, and hold no lock."""
    if sys.platform == "win32":
        return
    name = re.compile(re.escape(_prefix(path)) + "[0-9a-f]{32}")
    for found in filter(name.fullmatch, os.listdir(path.parent)):
        with contextlib.suppress(OSError), path.with_name(found).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.with_name(found).unlink()
