"""Checkpoints with orbax: what a run needs to go on as if it had never stopped.

A checkpoint is a folder with the items `arrays` and `progress`, each with the checksums of its
files. It is renamed to its number when all of that has been written, so that a number is whole,
or its files have been damaged since: what cannot be read, or not with its checksums. What is whole
and holds other arrays than expected is another experiment's, and no damage.
"""

import contextlib
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxquant.trees import leaves_with_paths
from train import layout

_KEEP = 2
_ITEMS = ("arrays", "progress")
_SUMS = "sha256.json"  # in the folder of an item; earlier versions wrote none
_SHOWN = 3


class _DamageError(Exception):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """Trees of arrays with progress as JSON, one after the other in a folder; the last are kept.

    For the one training that holds the workdir; `read` is for everything else.
    """

    def __init__(self, folder: Path):
        """Open the folder; what a killed save left behind is removed."""
        _silence_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEEP,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # of what is there only the numbers count
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("arrays", ocp.args.StandardSave, _SummedArrays())
        handlers.add("progress", ocp.args.JsonSave, _SummedJson())
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, handler_registry=handlers
        )
        self._next = max(self._manager.all_steps(), default=-1) + 1

    def save(self, arrays: Any, progress: dict[str, Any]) -> None:
        """Save in the background; returns once the arrays may be reused.

        Raises:
          OSError: if this checkpoint, or the one before, cannot be written.
        """
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress)
        )
        with self._writing():
            self._manager.save(self._next, args=args)
        self._next += 1

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the latest arrays, placed like `like`, and progress; None if there are none.

        A damaged checkpoint is moved out of the folder, with a warning, and the one before it is
        taken.

        Args:
          like: a tree of arrays, or of shapes and dtypes with shardings, or a function that gives
            it for the progress.

        Raises:
          ValueError: if there are checkpoints, but none can be read, or the latest one holds other
            arrays; names them. Nothing is moved for that.
        """
        self.wait()
        return _latest(self._folder, _numbers(self._folder), like, self._move_away)

    def _move_away(self, number: int, error: _DamageError) -> None:
        aside = self._folder.with_name(f"{self._folder.name}.damaged")
        target = aside / f"{number}.{time.time_ns()}"
        if layout.is_primary():
            aside.mkdir(exist_ok=True)
            (self._folder / str(number)).rename(target)
            warnings.warn(f"{error}; it is now {target}, taking the one before it", stacklevel=4)
        layout.wait_for_all(f"{self._folder / str(number)}: moved away")
        self._manager.reload()

    def wait(self) -> None:
        """Wait for saves that are under way.

        Raises:
          OSError: if one of them cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves that are under way, as `wait` does, and end."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax and of what it stores with, of many types
            full = "No space left on device" in str(error)
            reason = "no space left on device" if full else _first_line(error)
            raise OSError(
                f"{self._folder}: a checkpoint could not be written ({reason}); those before it "
                "are whole"
            ) from error


def read(folder: Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return what `Checkpoints.restore` does, and write nothing: a training may be at the folder.

    Of a damaged checkpoint it warns, and takes the one before it.

    Raises:
      ValueError: as `Checkpoints.restore`.
    """
    _silence_orbax()
    while True:
        numbers = _numbers(folder)

        def tell(number: int, error: _DamageError, numbers: list[int] = numbers) -> None:
            del number
            if _numbers(folder)[:1] != numbers[:1]:
                raise error
            warnings.warn(f"{error}; taking the one before it", stacklevel=4)

        try:
            return _latest(folder, numbers, like, tell)
        except Exception:
            if _numbers(folder)[:1] == numbers[:1]:
                raise
            # There is a later one now, for which this one may have been deleted.


def _silence_orbax() -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are raised as well


def _numbers(folder: Path) -> list[int]:
    """Return the checkpoints that have been written whole, the latest first."""
    names = [path.name for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(map(int, names), reverse=True)


# Reading -----------------------------------------------------------------------------------------


def _latest(
    folder: Path, numbers: Sequence[int], like: Any, pass_over: Callable[[int, _DamageError], None]
) -> tuple[Any, dict[str, Any]] | None:
    """Return what the first checkpoint holds that is not damaged, or None if there are none.

    Raises:
      ValueError: if all of them are damaged, or as `_read`.
    """
    for number in numbers:
        try:
            return _read(folder / str(number), like)
        except _DamageError as error:
            pass_over(number, error)
    if numbers:
        raise ValueError(
            f"{folder}: expected a checkpoint that can be read, got none of {len(numbers)}"
        )
    return None


def _read(folder: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Return what a checkpoint holds; with several processes all of them have to call it.

    Raises:
      _DamageError: if it cannot be read.
      ValueError: if it holds other arrays, or nobody can say whether it is damaged.
    """
    summed = _check_sums(folder)
    try:
        saved = ocp.StandardCheckpointHandler().metadata(epath.Path(folder / "arrays")).tree
        progress = dict(ocp.JsonCheckpointHandler().restore(epath.Path(folder / "progress")))
        like = like(progress) if callable(like) else like
        differences = _differences(saved, like)
        if not differences:
            return _restore(folder / "arrays", saved, like), progress
    except Exception as error:  # whatever comes of reading damaged files
        reason = f"{folder}: this checkpoint cannot be read ({_first_line(error)})"
        of_memory = isinstance(error, MemoryError | jax.errors.JaxRuntimeError)
        if summed or of_memory or jax.process_count() > 1:  # each may see another damage
            raise ValueError(f"{reason}; move it away to take the one before it") from error
        raise _DamageError(reason) from error
    raise ValueError(f"{folder}: expected the arrays of this config, got {differences}")


def _restore(folder: Path, saved: Any, like: Any) -> Any:
    """Return arrays by their names: empty nodes, of which a tree may have others, are none."""
    wanted, structure = _named(like), jax.tree.structure(like)
    target = jax.tree.unflatten(
        jax.tree.structure(saved), [_abstract(wanted[name]) for name in _named(saved)]
    )
    args = ocp.args.StandardRestore(target)
    restored = _named(ocp.StandardCheckpointHandler().restore(epath.Path(folder), args=args))
    return jax.tree.unflatten(structure, [restored[name] for name in wanted])


def _differences(saved: Any, like: Any) -> str:
    """Return how saved arrays differ from expected ones in names, shapes and types, or nothing."""
    got, expected = ({n: _kind(x) for n, x in _named(t).items()} for t in (saved, like))
    others = [
        f"{name} as {got[name]} instead of {kind}"
        for name, kind in expected.items()
        if got.get(name, kind) != kind
    ]
    listed = {
        "missing": sorted(expected.keys() - got.keys()),
        "unexpected": sorted(got.keys() - expected.keys()),
        "different": others,
    }
    return ", ".join(
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
        for what, names in listed.items()
        if names
    )


def _named(tree: Any) -> dict[str, Any]:
    return dict(leaves_with_paths(tree))


def _kind(array: Any) -> str:
    return f"{jnp.dtype(array.dtype)}{list(array.shape)}"


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


# Checksums ---------------------------------------------------------------------------------------


class _SummedArrays(ocp.StandardCheckpointHandler):
    """Checksums are the last thing that is written before an item gets its name."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        _write_sums(Path(directory))


class _SummedJson(ocp.JsonCheckpointHandler):
    """The same for JSON."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        _write_sums(Path(directory))


def _write_sums(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in files}
    (folder / _SUMS).write_text(json.dumps(sums))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sums(folder: Path) -> bool:
    """Return whether all of a checkpoint has checksums; the first process compares them.

    Raises:
      _DamageError: if they are not those of its files.
    """
    items = [folder / item for item in _ITEMS if (folder / item / _SUMS).is_file()]
    wrong = [path for item in items for path in _wrong_files(item)] if layout.is_primary() else []
    if layout.highest(len(wrong)):
        names = [path.relative_to(folder).as_posix() for path in wrong[:_SHOWN]]
        raise _DamageError(
            f"{folder}: this checkpoint cannot be read, its files are not those that were written "
            f"({', '.join(names)})"
        )
    return len(items) == len(_ITEMS)


def _wrong_files(item: Path) -> list[Path]:
    """Return the files that are not as they were written."""
    try:
        sums = dict(json.loads((item / _SUMS).read_bytes()))
    except (ValueError, TypeError, RecursionError, FileNotFoundError):
        return [item / _SUMS]
    return [item / name for name, expected in sums.items() if not _has_sum(item / name, expected)]


def _has_sum(path: Path, expected: str) -> bool:
    try:
        return _sum(path) == expected
    except PermissionError:
        raise
    except (OSError, ValueError):  # it is not there, the disk is damaged, or the name is
        return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
