"""Checkpoints with orbax: what a run needs to go on as if it had never stopped."""

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_KEEP = 2


class Checkpoints:
    """Trees of arrays with progress as JSON, one after the other in a folder; the last are kept."""

    def __init__(self, folder: Path):
        """Open the folder; what a killed save left behind is removed."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are raised as well
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, cleanup_tmp_directories=True)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("arrays", ocp.args.StandardSave, ocp.StandardCheckpointHandler())
        handlers.add("arrays", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        handlers.add("progress", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        handlers.add("progress", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
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

        One that cannot be read is moved out of the folder, with a warning, and the one before it
        is taken. (Not if several processes read it together, of which each may see another damage.)

        Raises:
          ValueError: if there are checkpoints, but none can be read.
        """
        numbers = sorted(self._manager.all_steps(), reverse=True)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for number in numbers:
            try:
                restored = self._manager.restore(
                    number,
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
                    ),
                )
            except Exception as error:  # whatever comes of reading damaged files
                if jax.process_count() > 1:
                    raise ValueError(
                        f"{self._folder / str(number)}: expected a checkpoint that can be read; "
                        f"move it away to take the one before it ({_first_line(error)})"
                    ) from error
                self._move_away(number, error)
            else:
                return restored["arrays"], restored["progress"]
        if numbers:
            raise ValueError(
                f"{self._folder}: expected a checkpoint that can be read, got none of "
                f"{len(numbers)}; the same command starts anew"
            )
        return None

    def _move_away(self, number: int, error: Exception) -> None:
        aside = self._folder.with_name(f"{self._folder.name}.damaged")
        aside.mkdir(exist_ok=True)
        target = aside / f"{number}.{time.time_ns()}"
        (self._folder / str(number)).rename(target)
        self._manager.reload()
        warnings.warn(
            f"{self._folder / str(number)}: this checkpoint cannot be read and is now {target}; "
            f"taking the one before it ({_first_line(error)})",
            stacklevel=2,
        )

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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
