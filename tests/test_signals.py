"""Ctrl-C and SIGTERM: at once in one line, whatever the main thread does; saved first in a run."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from train import signals

BUSY = {
    "python": "loop()",
    "c": "hashlib.pbkdf2_hmac('sha256', b'x', b'x', 10**9)",  # no Python until it is done
    "callback": "weakref.finalize(Thing(), loop)",  # where exceptions are swallowed
}
START = """
import hashlib, multiprocessing, os, time, weakref
from train import signals
class Thing: pass
def loop():
    while True: pass
signals.install()
"""
DEFERRED = """
with signals.deferred(lambda number: print("told", number, flush=True)):
    print("deferred", flush=True)
    {busy}
"""
WORKERS = """
with signals.withheld():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()  # needs another process, whose start lets signals through
    context.Process(target=print, args=("worked",)).start()
print("both", flush=True)
loop()
"""


@contextlib.contextmanager
def running(*arguments):
    """Give a process of Python in a session of its own, and end it."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def assert_ended(process, number, out=""):
    """Check that a process ends by a signal in one line."""
    told, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + number, f"stopped by {number.name}\n")
    assert out is None or told == out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY)
def test_a_signal_ends_in_one_line_whatever_runs(busy, number):
    with running("-c", f"{START}print('started', flush=True)\n{busy}") as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(0.1)
        process.send_signal(number)
        assert_ended(process, number)


@pytest.mark.parametrize("busy", [BUSY["python"], BUSY["c"]], ids=["python", "c"])
def test_the_second_signal_does_not_wait(busy):
    with running("-c", START + DEFERRED.format(busy=busy)) as process:
        assert process.stdout.readline() == "deferred\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert_ended(process, signal.SIGINT, out=None)


def test_after_a_deferral_signals_end_at_once_again():
    busy = "os.kill(os.getpid(), 2); time.sleep(0.5)"
    with running("-c", f"{START}{DEFERRED.format(busy=busy)}\nloop()") as process:
        assert [process.stdout.readline() for _ in range(2)] == ["deferred\n", "told 2\n"]
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        assert_ended(process, signal.SIGTERM)


def test_processes_that_are_started_are_left_to_their_parent():
    """A terminal sends Ctrl-C to all of them, while they import as well."""
    with running("-c", START + WORKERS) as process:
        assert process.stdout.readline() == "both\n"
        os.killpg(process.pid, signal.SIGINT)
        assert_ended(process, signal.SIGINT, out="worked\n")


def test_a_deferral_puts_handlers_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    told = []
    with signals.deferred(told.append):
        signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_ctrl_c_while_the_program_starts_is_one_line(tmp_path, seconds):
    arguments = ["--config", "configs/digits_slq.py", "--workdir", str(tmp_path / "run")]
    with running("-m", "train", *arguments) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert_ended(process, signal.SIGINT, out=None)  # the program may have begun by then
