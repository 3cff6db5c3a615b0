"""Checkpoints with orbax: what a run needs to go on as if it had never stopped."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_KEEP = 2


class Checkpoints:
    """Numbered checkpoints of a tree of arrays and of progress as JSON, in one folder."""

    def __init__(self, folder: Path):
        """Open the folder; what a killed save left behind is removed."""
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, cleanup_tmp_directories=True)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("arrays", ocp.args.StandardSave, ocp.StandardCheckpointHandler())
        handlers.add("arrays", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        handlers.add("progress", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        handlers.add("progress", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, handler_registry=handlers
        )

    def save(self, number: int, arrays: Any, progress: dict[str, Any]) -> None:
        """Save in the background; returns once the arrays may be reused."""
        self._manager.save(
            number,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress)
            ),
        )

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the latest arrays, placed like `like`, and progress; None if there are none."""
        latest = self._manager.latest_step()
        if latest is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            latest,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
            ),
        )
        return restored["arrays"], restored["progress"]

    def close(self) -> None:
        """Wait for saves that are under way."""
        self._manager.wait_until_finished()
        self._manager.close()
