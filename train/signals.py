"""Ctrl-C and SIGTERM: they end the program at once or, while a run trains, once it is saved.

Python's own way, KeyboardInterrupt, is raised wherever the main thread happens to be: in a callback
that swallows it, or not at all while XLA compiles. So a thread waits for the signals; it runs
whatever the others do.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_deferred = False  # whether the next signal may wait for a save
_ending = threading.Lock()


def install() -> None:
    """From now on end the process, in one line, at these signals; in its main thread."""
    receive, send = os.pipe()
    os.set_blocking(send, False)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    for number in _NUMBERS:
        signal.signal(number, _end)
    threading.Thread(target=_watch, args=(receive,), daemon=True).start()


@contextlib.contextmanager
def withheld() -> Iterator[None]:
    """Start processes that never get these signals, which a terminal sends to all processes."""
    from multiprocessing import resource_tracker

    # Its own start, with the first process, would let signals through again. It is not to say that
    # it frees what is left when the program ends.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deferred(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the first signal's number instead of ending; a second one ends all the same.

    Args:
      stop: has the process ended when all is saved; only notes that it has to, as it is called
        between any two instructions.
    """
    global _deferred
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    _deferred = True
    before = {number: signal.signal(number, lambda n, _: stop(n)) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _deferred = False


def _watch(receive: int) -> None:
    global _deferred
    while True:
        for number in os.read(receive, 64):  # a byte for each signal
            if not _deferred:
                _end(number)
            if os.isatty(2):
                os.write(2, b"\nstopping when this step is saved; once more to stop at once\n")
            _deferred = False


def _end(number: int, _: Any = None) -> None:
    """End the process as a kill would, after which the same command continues."""
    if _ending.acquire(blocking=False):
        line = f"stopped by {signal.Signals(number).name}\n"
        os.write(2, f"\n{line}".encode() if os.isatty(2) else line.encode())
        os._exit(128 + number)
