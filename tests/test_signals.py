"""Ctrl-C and SIGTERM: at once in one line, whatever the main thread does; saved first in a run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from train import signals

BUSY = {
    "python": "while True: pass",
    "c": "hashlib.pbkdf2_hmac('sha256', b'x', b'x', 10**9)",  # no Python until it is done
    "callback": "weakref.finalize(Thing(), loop)",  # where exceptions are swallowed
}
START = """
import hashlib, weakref
from train import signals
class Thing: pass
def loop():
    while True: pass
signals.install()
print("started", flush=True)
"""
DEFERRED = """
with signals.deferred(lambda number: print("told", number, flush=True)):
    print("deferred", flush=True)
    {busy}
"""


def start(code):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY)
def test_a_signal_ends_in_one_line_whatever_runs(busy, number):
    process = start(START + busy)
    time.sleep(0.1)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert error == f"stopped by {number.name}\n"


@pytest.mark.parametrize("busy", [BUSY["python"], BUSY["c"]], ids=["python", "c"])
def test_the_second_signal_does_not_wait(busy):
    process = start(START + DEFERRED.format(busy=busy))
    assert process.stdout is not None and process.stdout.readline() == "deferred\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "stopped by SIGINT\n")


def test_after_a_deferral_signals_end_at_once_again():
    code = (
        START
        + "import signal, time"
        + DEFERRED.format(busy="signal.raise_signal(2); time.sleep(0.5)")
        + "loop()"
    )
    process = start(code)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["deferred\n", "told 2\n"]
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "stopped by SIGTERM\n")


def test_a_deferral_puts_handlers_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    told = []
    with signals.deferred(told.append):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert told == [signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_ctrl_c_while_the_program_starts_is_one_line(tmp_path, seconds):
    command = [sys.executable, "-m", "train", "--config", "configs/digits_slq.py", "--workdir"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "stopped by SIGINT\n")
