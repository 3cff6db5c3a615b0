"""What a run tells: a progress bar or lines, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxquant.files import replace_file


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    replace_file(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
      ValueError: for anything but a JSON object, naming the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def to_json(value: Any) -> str:
    """Return JSON on one line; what it has no numbers for, NaN and infinities, is null."""
    return json.dumps(_without_nan(value), allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """Events of a run, in memory, in metrics.jsonl and, for numbers, in TensorBoard.

    `events` holds everything up to the last checkpoint, so that a resumed run writes the same file
    as one that was never stopped. Of several processes one writes.
    """

    def __init__(
        self,
        workdir: Path,
        events: list[dict[str, Any]],
        *,
        epoch: int,
        tensorboard: bool,
        write: bool = True,
    ):
        """Write the events so far, all from before `epoch`, and go on after them."""
        self.events = list(events)
        self._path = workdir / "metrics.jsonl" if write else None
        if self._path is not None:
            write_text(self._path, "".join(map(to_json, self.events)))
        self._writer = None
        if tensorboard and write:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(
                str(workdir / "tensorboard"), flush_secs=10, purge_step=epoch
            )

    def add(self, kind: str, epoch: int, **values: Any) -> None:
        """Record one event; epochs count from the start of the run, a stage without any as one."""
        event = {"kind": kind, "epoch": epoch, **values}
        self.events.append(event)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(to_json(event))
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{kind}/{name}", value, epoch)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()


def say(message: str) -> None:
    """Print a line, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return a time for a person, such as "40 s", "12 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def show_progress(
    items: Iterable[Any], *, title: str, unit: str, size: int, total: int
) -> Iterator[Any]:
    """Yield the items; on a terminal with a bar and the time left, else a line now and then.

    Args:
      items: to go through.
      title: of the bar.
      unit: of the speed, such as "img".
      size: units an item.
      total: number of items.
    """
    if sys.stderr.isatty():
        bar = tqdm(total=total * size, desc=title, unit=unit, leave=False, unit_scale=True)
        for item in items:
            yield item
            bar.update(size)
        bar.close()
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > 30 and done < total:
            last = now
            speed = done * size / (now - start)
            left = (now - start) / done * (total - done)
            say(f"{title}: {done}/{total}, {speed:,.0f} {unit}/s, {duration(left)} left of it")
