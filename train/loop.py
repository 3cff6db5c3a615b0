"""One experiment from start to end: train or load, then rounds of quantizing and re-training."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from train import (
    data,
    engine,
    experiment,
    layout,
    products,
    program,
    signals,
    stages,
    states,
    summary,
)
from train.checkpoints import Checkpoints
from train.config import Fit
from train.course import Progress, RunState, Unit, describe, seconds_left, units
from train.experiment import Job, lock
from train.logs import Log, duration, say, show_progress


def run_all(jobs: Mapping[str, Job]) -> None:
    """Run experiments one after the other, but for those done or in another process' hands."""
    for name, job in jobs.items():
        if (job.workdir / "report.json").is_file():
            continue
        with lock(job.workdir) as free:
            if free:
                say(f"== {name}: {experiment.title(job)}")
                run(job)
            else:
                say(f"== {name}: another process is at it")


def run(job: Job) -> dict[str, Any]:
    """Run, or continue, an experiment; returns the content of report.json."""
    config, functions = job.config, states.functions(job)
    # Closing waits for the save that is under way, after an interrupt too.
    with contextlib.closing(Checkpoints(job.workdir / "checkpoints")) as checkpoints:
        state, progress, events = _start(job, functions, checkpoints)
        log = Log(
            job.workdir,
            events,
            epoch=progress.units,
            tensorboard=config.tensorboard,
            write=layout.is_primary(),
        )
        with contextlib.closing(log):
            keeper = _Keeper(config.save_seconds, checkpoints, log)
            run_units = units(config, job.plan)
            worker = _Worker(job, functions, log, keeper, run_units)
            with signals.deferred(keeper.tell):
                while progress.units < len(run_units):
                    number, unit = progress.units, run_units[progress.units]
                    if config.one_program and unit.round >= 0:
                        state = worker.work_through(number, run_units[number:], state)
                        progress = Progress(units=len(run_units))
                    else:
                        state = worker.work(number, unit, state, progress)
                        progress = Progress(units=number + 1)
                    if keeper.due() or run_units[progress.units - 1].last:
                        keeper.save(state, progress)
                keeper.due()
                keeper.stop_if_told()  # during the last save
            state = layout.gather(state)
            if config.quantize.method == "qcnn":
                state = worker.quantize_products(len(run_units), state)
    states.check_finite("training diverged", state.train.params, state.train.batch_stats)
    if layout.is_primary():
        summary.write(job, state, log.events)
    layout.wait_for_all(f"{job.workdir}: report")
    return summary.read(job.workdir)


@dataclasses.dataclass
class _Keeper:
    """Saves the run, and ends it if the process is told to stop."""

    save_seconds: float
    checkpoints: Checkpoints
    log: Log
    saved: float = dataclasses.field(default_factory=time.monotonic)
    told: int = 0  # to stop, by a signal that may come at any moment: its number
    stopping: int = 0  # as all processes have agreed

    def tell(self, number: int) -> None:
        """Have the run stop at its next step."""
        self.told = number

    def due(self) -> bool:
        """Return whether it is time to save, all processes at the same step."""
        late = time.monotonic() - self.saved > self.save_seconds
        urgency = layout.highest(self.told or int(late))
        self.stopping = urgency if urgency > 1 else 0  # no signal that stops has the number 1
        return urgency > 0

    def save(self, state: RunState, progress: Progress) -> None:
        """Save, and end the process if it was told to."""
        record = {"progress": progress._asdict(), "events": self.log.events}
        self.checkpoints.save(state, record)
        self.saved = time.monotonic()
        self.stop_if_told()

    def stop_if_told(self) -> None:
        """End the process: the exit code says by which signal, as shells do."""
        if self.stopping:
            self.checkpoints.wait()
            name = signal.Signals(self.stopping).name
            say(f"stopped by {name}, all is saved: the same command continues")
            raise SystemExit(128 + self.stopping)


def _start(
    job: Job, functions: engine.Engine, checkpoints: Checkpoints
) -> tuple[RunState, Progress, list[dict[str, Any]]]:
    """Return the state to go on from, how far it has come, and the log so far."""
    restored = checkpoints.restore(functools.partial(states.saved_shapes, job, functions))
    if restored is None:
        return states.fresh(job, functions), Progress(), []
    state, record = restored
    progress = Progress(**record["progress"])
    done = describe(progress, units(job.config, job.plan))
    say(f"{job.workdir}: continuing after {done}")
    return state, progress, record["events"]


@dataclasses.dataclass(frozen=True)
class _Worker:
    """Does the units of a run."""

    job: Job
    functions: engine.Engine
    log: Log
    keeper: _Keeper
    units: Sequence[Unit]

    def work(self, number: int, unit: Unit, state: RunState, progress: Progress) -> RunState:
        """Do one unit: quantize if a round starts, train an epoch, measure if a stage ends."""
        if unit.first and not progress.steps:
            state = self._begin_stage(number, unit, state)
        if unit.epochs:
            state = self._train_epoch(number, unit, state, progress)
        if not unit.last:
            return state
        started = time.monotonic()
        train, quant, result = stages.end(
            self._stage(unit), self.functions, state.train, state.quant, self.job.dataset.test
        )
        state = state._replace(train=train, quant=quant)
        seconds = time.monotonic() - started
        if unit.round < 0:
            _check_loss("float", result["loss"])
            self.log.add("float", number, **result, seconds=seconds)
            params, batch_stats = state.train.params, state.train.batch_stats
            variables = {"params": params, "batch_stats": batch_stats}
            # A copy: the training step gives its arguments' memory to its results.
            state = state._replace(reference=jax.tree.map(jnp.copy, variables))
            say(f"float: accuracy {result['accuracy']:.2%}")
        else:
            self._log_retrained(number, unit, result, seconds)
        return state

    def _begin_stage(self, number: int, unit: Unit, state: RunState) -> RunState:
        if unit.round < 0:
            return self._restart(state, self.job.config.fit)
        return self._begin_round(number, unit, state)

    def _restart(self, state: RunState, stage: Fit) -> RunState:
        """Return the state with a fresh optimizer."""
        variables = {"params": state.train.params, "batch_stats": state.train.batch_stats}
        return state._replace(
            train=states.start_stage(self.functions, variables, state.quant, stage)
        )

    def _stage(self, unit: Unit) -> Fit:
        return self.job.config.fit if unit.round < 0 else self.job.config.retrain

    def _begin_round(self, number: int, unit: Unit, state: RunState) -> RunState:
        job, stage, started = self.job, self.job.config.retrain, time.monotonic()
        assert job.plan is not None
        train, quant, info, result = stages.begin_round(
            stage,
            self.functions,
            job.plan,
            state.train,
            state.quant,
            job.dataset.train,
            job.dataset.test,
            self._round_keys(number),
            np.float32(stage.momentum),
            np.float32(stage.weight_decay),
        )
        self._check_round(unit, info)
        self._log_quantized(number, unit, info, result, time.monotonic() - started)
        return state._replace(train=train, quant=quant)

    def quantize_products(self, number: int, state: RunState) -> RunState:
        """Quantize the trained network by products: a stage without epochs, so not saved within."""
        config, dataset, started = self.job.config, self.job.dataset, time.monotonic()
        rows = engine.epoch_order(self._key(number, 1), dataset.train.size, 1).ravel()
        rows = rows[: config.quantize.calibration_images]
        parts = products.equal_parts(rows, config.batch_size)
        key = engine.key_data(self._key(number, 4))
        batches = [
            self.job.task.prepare(batch.images, None)
            for batch in engine.feed(self.job.layout, dataset.train, parts, key=key)
        ]
        variables = {"params": state.train.params, "batch_stats": state.train.batch_stats}
        module = self.job.task.network.module
        assert module is not None
        params, errors = products.quantize(
            module,
            variables,
            batches,
            config.quantize,
            key=self._key(number, 2),
            tell=say,
        )
        batch_stats = self.functions.recalibrate(
            jq.unpack(params), state.train.batch_stats, dataset.train, self._key(number, 3)
        )
        train = state.train._replace(params=params, batch_stats=batch_stats)
        state = state._replace(train=train)
        result = self._evaluate(state)
        _check_loss("products", result["loss"])
        layers = {
            path: {"error_before": error.before, "error_after": error.after}
            for path, error in errors.items()
        }
        quantized = {"weights_frozen": 1.0, "layers": layers, **result}
        seconds = time.monotonic() - started
        self.log.add("quantized", number, round=1, **quantized, seconds=seconds)
        self.log.add("retrained", number, round=1, **result, seconds=0.0)
        say(f"quantized: accuracy {result['accuracy']:.2%}")
        return state

    def _train_epoch(
        self, number: int, unit: Unit, state: RunState, progress: Progress
    ) -> RunState:
        config, epoch = self.job.config, self._epoch(number, unit)
        steps = len(epoch.order)
        size = self.functions.steps_per_call
        starts = show_progress(
            range(progress.steps, steps, size),
            title=f"{unit.stage}, epoch {unit.epoch + 1}/{unit.epochs}",
            unit="img",
            size=size * config.batch_size,
            total=-(-(steps - progress.steps) // size),
        )
        feed = engine.feed(
            self.job.layout,
            self.job.dataset.train,
            [epoch.order[start : start + size] for start in range(progress.steps, steps, size)],
            key=epoch.key,
            first=progress.steps * config.batch_size,
        )
        with contextlib.closing(feed):
            started = time.monotonic()
            batches = next(feed)
            for start in starts:
                train, quant, metrics = stages.train(
                    self._stage(unit),
                    self.functions,
                    state.train,
                    state.quant,
                    state.reference,
                    batches,
                    np.int32(start),
                    epoch.key,
                    epoch.rates[start : start + size],
                    None
                    if epoch.temperatures is None
                    else epoch.temperatures[start : start + size],
                )
                if start + size < steps:  # while the devices are at work
                    batches = next(feed)
                state = state._replace(train=train, quant=quant)
                progress = Progress(
                    units=number,
                    steps=min(start + size, steps),
                    loss=progress.loss + float(metrics["loss"]),
                    correct=progress.correct + float(metrics["correct"]),
                    seconds=progress.seconds + time.monotonic() - started,
                )
                started = time.monotonic()
                _check_loss(unit.stage, progress.loss)
                if self.keeper.due() and progress.steps < steps:
                    self.keeper.save(state, progress)
        left = self.units[number + 1 :]
        self._log_epoch(number, unit, progress, steps, left)
        return state

    def _epoch(self, number: int, unit: Unit) -> program.Epoch:
        """Return what an epoch trains on: the images of each step, its rate, the key."""
        config, stage = self.job.config, self._stage(unit)
        order = engine.epoch_order(
            self._key(number, 4), self.job.dataset.train.size, config.batch_size
        )
        own = slice(unit.epoch * len(order), (unit.epoch + 1) * len(order))
        temperatures = None
        if stage.straight_through:
            temperatures = engine.temperatures(stage, unit.epochs, len(order))[own]
        return program.Epoch(
            round=unit.round,
            first=unit.first,
            last=unit.last,
            order=order,
            rates=engine.learning_rates(stage, unit.epochs, len(order))[own],
            temperatures=temperatures,
            key=engine.key_data(self._key(number, 5)),
        )

    def work_through(self, first: int, run_units: Sequence[Unit], state: RunState) -> RunState:
        """Do all rounds in one program, and log what the loop would have logged."""
        config, plan = self.job.config, self.job.plan
        train_data, test_data = self.job.dataset.train, self.job.dataset.test
        assert plan is not None
        assert isinstance(train_data, data.Images) and isinstance(test_data, data.Images)
        numbered = list(enumerate(run_units, first))
        epochs = [self._epoch(*item) for item in numbered]
        keys = [self._round_keys(number) for number, unit in numbered if unit.first]
        state = self._restart(state, config.retrain)  # an optimizer as that of the rounds
        run_program = program.build(config, plan, self.functions.parts)
        say(f"rounds 1 to {plan.num_rounds} in one program")
        started = time.monotonic()
        train, quant, records = jax.jit(run_program, donate_argnums=(0, 1))(
            state.train,
            state.quant,
            state.reference,
            *program.put_data(self.functions.parts, train_data, test_data),
            np.array(keys),
            np.float32(config.retrain.momentum),
            np.float32(config.retrain.weight_decay),
            program.make_steps(epochs),
        )
        records = jax.tree.map(np.asarray, records)
        # Of all in one program: the epochs share it.
        seconds = (time.monotonic() - started) / len(epochs)
        size = test_data.size
        for index, (number, unit) in enumerate(numbered):
            steps = len(epochs[index].order)
            if unit.first:
                info = jax.tree.map(lambda rows, at=unit.round: rows[at], records.info)
                self._check_round(unit, info)
                result = program.result(records.quantized, unit.round, size)
                self._log_quantized(number, unit, info, result, 0.0)
            loss, correct = (float(of[index]) for of in (records.epoch_loss, records.epoch_correct))
            done = Progress(loss=loss, correct=correct, seconds=seconds)
            self._log_epoch(number, unit, done, steps, ())
            if unit.last:
                result = program.result(records.retrained, unit.round, size)
                self._log_retrained(number, unit, result, 0.0)
        return state._replace(train=train, quant=quant)

    def _check_round(self, unit: Unit, info: jq.RoundInfo) -> None:
        diverged = [path for path, finite in info.finite.items() if not bool(jnp.all(finite))]
        if diverged:
            raise FloatingPointError(
                f"round {unit.round + 1}: training diverged, NaN or infinite weights in "
                f"{', '.join(diverged)}; the last checkpoint is from before this round"
            )

    def _log_epoch(
        self, number: int, unit: Unit, done: Progress, steps: int, left: Sequence[Unit]
    ) -> None:
        """Log an epoch's mean loss, accuracy and time, of sums over its steps."""
        title, loss = f"{unit.stage}, epoch {unit.epoch + 1}/{unit.epochs}", done.loss / steps
        _check_loss(title, loss)
        images = steps * self.job.config.batch_size
        result = {"loss": loss, "train_accuracy": done.correct / images, "seconds": done.seconds}
        self.log.add("epoch", number, round=unit.round + 1, **result)
        remaining = seconds_left(self.log.events, left)
        say(
            f"{title}: loss {loss:.4f}, accuracy {done.correct / images:.2%} in training, "
            f"{images / max(done.seconds, 1e-9):,.0f} images/s"
            + (f", {duration(remaining)} left" if left else "")
        )

    def _log_quantized(
        self,
        number: int,
        unit: Unit,
        info: jq.RoundInfo,
        result: dict[str, float],
        seconds: float,
    ) -> None:
        plan = self.job.plan
        assert plan is not None
        _check_loss(f"round {unit.round + 1}, quantized", result["loss"])
        record = summary.round_record(plan, info)
        record |= {**result, "seconds": seconds}
        self.log.add("quantized", number, round=unit.round + 1, **record)
        say(
            f"round {unit.round + 1}/{plan.num_rounds}: {record['weights_frozen']:.1%} frozen, "
            f"{result['accuracy']:.2%} after quantizing"
        )

    def _log_retrained(
        self, number: int, unit: Unit, result: dict[str, float], seconds: float
    ) -> None:
        _check_loss(f"round {unit.round + 1}", result["loss"])
        self.log.add("retrained", number, round=unit.round + 1, **result, seconds=seconds)
        count = "1 epoch" if unit.epochs == 1 else f"{unit.epochs} epochs"
        say(f"round {unit.round + 1}: {result['accuracy']:.2%} after {count} of re-training")

    def _evaluate(self, state: RunState) -> dict[str, float]:
        params, batch_stats = state.train.params, state.train.batch_stats
        return self.functions.evaluate(params, batch_stats, self.job.dataset.test)

    def _round_keys(self, number: int) -> np.ndarray:
        return np.stack([engine.key_data(self._key(number, purpose)) for purpose in (1, 2, 3)])

    def _key(self, number: int, purpose: int) -> jax.Array:
        """Keys depend on the seed and the unit alone: a resumed run draws the same numbers."""
        key = jax.random.fold_in(jax.random.key(self.job.config.seed), number)
        return jax.random.fold_in(key, purpose)


def _check_loss(stage: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{stage}: training diverged, the loss is {loss}")
