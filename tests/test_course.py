"""The course of a run: its epochs, how far it has come, how long it will take."""

import jax
import pytest

import jaxquant as jq
from train import course
from train.config import Config, Fit
from train.course import Progress
from train.logs import duration

PARAMS = {"a": jax.ShapeDtypeStruct((8, 8), "float32")}
PLAN = jq.slq(PARAMS, bits=2, rounds=(2, 3))


def units(fit=(2,), retrain=(2, 1)):
    return course.units(Config(fit=Fit(epochs=fit), retrain=Fit(epochs=retrain)), PLAN)


def test_a_run_is_the_epochs_of_its_stages():
    stages = [(unit.stage, unit.epoch, unit.first, unit.last) for unit in units()]
    assert stages == [
        ("float", 0, True, False),
        ("float", 1, False, True),
        ("round 1", 0, True, False),
        ("round 1", 1, False, True),
        ("round 2", 0, True, True),
    ]
    assert len(units(retrain=(3,))) == 8


@pytest.mark.parametrize(
    ("progress", "fit", "expected"),
    [
        (Progress(), (2,), "0 of 5 epochs"),
        (Progress(units=3), (2,), "3 of 5 epochs"),
        (Progress(units=3, steps=7), (2,), "3 of 5 epochs and 7 steps of the next"),
        (Progress(units=1, steps=7), (0,), "0 of 3 epochs and 7 steps of the next"),
    ],
)
def test_a_stage_without_epochs_is_none(progress, fit, expected):
    assert course.describe(progress, units(fit)) == expected


def test_the_time_left_is_what_the_like_took_before():
    events = [
        {"kind": "epoch", "round": 0, "seconds": 90.0},  # with a compilation
        {"kind": "epoch", "round": 0, "seconds": 10.0},
        {"kind": "epoch", "round": 0, "seconds": 12.0},
        {"kind": "float", "seconds": 1.0},
    ]
    # Three epochs, each as the median one, and two measurements at the ends of stages.
    assert course.seconds_left(events, units()[2:]) == 3 * 12 + 2 * 1
    events += [
        {"kind": "quantized", "round": 1, "seconds": 5.0},
        {"kind": "epoch", "round": 1, "seconds": 20.0},
    ]
    assert course.seconds_left(events, units()[3:]) == 20 + 1 + 5 + 20 + 1
    events += [{"kind": "quantized", "round": 2, "seconds": 1.0}]
    assert course.seconds_left(events, units()[4:]) == 1 + 20 + 1  # the first one was compiled
    assert course.seconds_left([{"kind": "epoch", "round": 0}], units()) == 0  # earlier versions
    assert course.seconds_left(events, []) == 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3570, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations_are_for_persons(seconds, expected):
    assert duration(seconds) == expected
