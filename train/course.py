"""The course of a run: its epochs one after the other, what it holds, how far it has come."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jaxquant as jq
from train.config import Config
from train.engine import TrainState


class Unit(NamedTuple):
    """An epoch of the run, or a stage without epochs."""

    round: int  # -1: the float network
    epoch: int  # within the stage
    epochs: int  # of the stage

    @property
    def first(self) -> bool:
        """Whether a stage starts."""
        return self.epoch == 0

    @property
    def last(self) -> bool:
        """Whether a stage ends."""
        return self.epoch >= self.epochs - 1

    @property
    def stage(self) -> str:
        """What it belongs to, for a person."""
        return "float" if self.round < 0 else f"round {self.round + 1}"


class RunState(NamedTuple):
    """Everything that a checkpoint holds, besides the log."""

    train: TrainState
    quant: Any  # QuantState, or () without a plan
    reference: Any  # float variables: teacher, and what errors are measured against


class Progress(NamedTuple):
    """How far a run has come."""

    units: int = 0  # done
    steps: int = 0  # done of the epoch of the next unit
    loss: float = 0.0  # sums over these steps
    correct: float = 0.0
    seconds: float = 0.0  # that they took


def units(config: Config, plan: jq.Plan | None) -> list[Unit]:
    """Return the run as a list: the float network's epochs, then those of each round."""
    rounds = plan.num_rounds if plan is not None else 0
    retrain = config.retrain.epochs * (1 if len(config.retrain.epochs) == rounds else rounds)
    stages = [(-1, config.fit.epochs[0]), *enumerate(retrain[:rounds])]
    return [
        Unit(round_, epoch, epochs) for round_, epochs in stages for epoch in range(max(1, epochs))
    ]


def describe(progress: Progress, run_units: Sequence[Unit]) -> str:
    """Return how far a run has come, in epochs and steps of the next one."""
    done = _epochs(run_units[: progress.units])
    steps = f" and {progress.steps} steps of the next" if progress.steps else ""
    return f"{done} of {_epochs(run_units)} epochs{steps}"


def _epochs(run_units: Iterable[Unit]) -> int:
    return sum(unit.epochs > 0 for unit in run_units)


def seconds_left(events: Sequence[Mapping[str, Any]], left: Sequence[Unit]) -> float:
    """Return about how long the units that are left will take, by what those before them took.

    Epochs of re-training are taken to be as long as each other or, before the first one, as those
    of the float network; what has not happened yet, such as quantizing, to take no time.
    """

    def usual(kind: str, *, again: bool = False) -> float:
        times = [
            event["seconds"]
            for event in events
            if event["kind"] == kind and "seconds" in event and (event.get("round", 0) or not again)
        ]
        return statistics.median_low(times) if times else 0.0

    floats, measured, quantized = map(usual, ("epoch", "float", "quantized"))
    retrained = usual("epoch", again=True) or floats
    total = 0.0
    for unit in left:
        total += (floats if unit.round < 0 else retrained) * (unit.epochs > 0)
        total += quantized * unit.first + measured * unit.last
    return total
