"""One experiment from start to end: train or load, then rounds of quantizing and re-training."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.trees import leaves_with_paths
from train import (
    compare,
    data,
    engine,
    experiment,
    layout,
    pretrained,
    products,
    program,
    signals,
    summary,
)
from train.checkpoints import Checkpoints, read
from train.config import Config, Fit
from train.course import Progress, RunState, Unit, describe, seconds_left, units
from train.experiment import Job, check, lock, refuse_other
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
    config, functions = job.config, _functions(job)
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
    _check_finite("training diverged", state.train.params, state.train.batch_stats)
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


def _functions(job: Job) -> engine.Engine:
    return engine.build(job.config, job.dataset, job.task, job.layout, job.inputs, job.plan)


def _fresh(job: Job, functions: engine.Engine) -> RunState:
    """Return the state at the start of a run."""
    variables = job.initial
    if variables is None:
        # The key is an argument: XLA would fold the random numbers of a constant one, slowly.
        variables = jax.jit(job.task.init)(jax.random.key(job.config.seed))
    variables = jq.unpack(jax.tree.map(jnp.asarray, dict(variables)))
    quant: Any = () if job.plan is None else jq.init(job.plan, variables["params"])
    variables, quant = job.layout.place((_complete(variables), quant))
    return RunState(_start_stage(functions, variables, quant, job.config.fit), quant, variables)


def _abstract(job: Job, functions: engine.Engine, stage: Fit | None = None) -> RunState:
    """Return the shapes and places of a run's states, by default as long as it fits floats."""
    stage = stage or job.config.fit

    def state(variables: Any) -> RunState:
        quant: Any = () if job.plan is None else jq.init(job.plan, variables["params"])
        return RunState(_start_stage(functions, variables, quant, stage), quant, variables)

    return job.layout.describe(jax.eval_shape(state, _complete(job.shapes)))


def _saved(job: Job, functions: engine.Engine, record: Mapping[str, Any]) -> RunState:
    """Return the shapes and places of the state beside a record: stages' optimizers may differ."""
    progress = Progress(**record["progress"])
    begun = units(job.config, job.plan)[: progress.units + (progress.steps > 0)]
    rounds = begun and begun[-1].round >= 0
    return _abstract(job, functions, job.config.retrain if rounds else job.config.fit)


def _complete(variables: Any) -> dict[str, Any]:
    """Return variables with the same collections, whether a network has batch norm or not."""
    return {"batch_stats": {}, **variables}


def _start_stage(
    functions: engine.Engine, variables: Any, quant: Any, stage: Fit
) -> engine.TrainState:
    # As arrays of the host: Python's numbers would have a type of their own, and a compilation.
    numbers = (np.float32(stage.momentum), np.float32(stage.weight_decay))
    return functions.start(variables, quant, *numbers, optimizer=stage.optimizer)


def _start(
    job: Job, functions: engine.Engine, checkpoints: Checkpoints
) -> tuple[RunState, Progress, list[dict[str, Any]]]:
    """Return the state to go on from, how far it has come, and the log so far."""
    restored = checkpoints.restore(functools.partial(_saved, job, functions))
    if restored is None:
        return _fresh(job, functions), Progress(), []
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
        if unit.round >= 0 and self.job.config.retrain.straight_through:
            state = _settled(self.functions, state)
        result = self._evaluate(state)
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
        if unit.round >= 0:
            state = self._quantize(number, unit, state)
        return self._restart(state, self._stage(unit))

    def _restart(self, state: RunState, stage: Fit) -> RunState:
        """Return the state with a fresh optimizer."""
        variables = {"params": state.train.params, "batch_stats": state.train.batch_stats}
        return state._replace(train=_start_stage(self.functions, variables, state.quant, stage))

    def _stage(self, unit: Unit) -> Fit:
        return self.job.config.fit if unit.round < 0 else self.job.config.retrain

    def _quantize(self, number: int, unit: Unit, state: RunState) -> RunState:
        plan, started = self.job.plan, time.monotonic()
        assert plan is not None
        params, batch_stats = state.train.params, state.train.batch_stats
        key = self._key(number, 1)
        train_data = self.job.dataset.train
        guides = self.functions.guides(params, batch_stats, train_data, key)
        params, quant, info = self.functions.quantize(
            plan, params, state.quant, guides, engine.key_data(self._key(number, 2))
        )
        self._check_finite(unit, info)
        batch_stats = self.functions.recalibrate(
            params, batch_stats, train_data, self._key(number, 3)
        )
        train = state.train._replace(params=params, batch_stats=batch_stats)
        result = self._evaluate(state._replace(train=train))
        self._log_quantized(number, unit, info, result, time.monotonic() - started)
        if self.job.config.retrain.straight_through:  # from the codebooks, and the weights before
            quant, train = jq.release(quant), train._replace(params=state.train.params)
        return state._replace(quant=quant, train=train)

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
                train, quant, metrics = self.functions.train(
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
                    distill=unit.round >= 0 and config.retrain.has_teacher,
                    move_centroids=unit.round >= 0 and config.retrain.centroid_rate > 0,
                    optimizer=self._stage(unit).optimizer,
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
        keys = [
            [engine.key_data(self._key(number, purpose)) for purpose in (1, 2, 3)]
            for number, unit in numbered
            if unit.first
        ]
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
                self._check_finite(unit, info)
                result = program.result(records.quantized, unit.round, size)
                self._log_quantized(number, unit, info, result, 0.0)
            loss, correct = float(records.epoch_loss[index]), int(records.epoch_correct[index])
            done = Progress(loss=loss, correct=correct, seconds=seconds)
            self._log_epoch(number, unit, done, steps, ())
            if unit.last:
                result = program.result(records.retrained, unit.round, size)
                self._log_retrained(number, unit, result, 0.0)
        return state._replace(train=train, quant=quant)

    def _check_finite(self, unit: Unit, info: jq.RoundInfo) -> None:
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

    def _key(self, number: int, purpose: int) -> jax.Array:
        """Keys depend on the seed and the unit alone: a resumed run draws the same numbers."""
        key = jax.random.fold_in(jax.random.key(self.job.config.seed), number)
        return jax.random.fold_in(key, purpose)


def _settled(functions: engine.Engine, state: RunState) -> RunState:
    """Return the state with all weights on their centroids, at the end of straight-through."""
    params, quant = functions.settle(state.train.params, state.quant)
    return state._replace(quant=quant, train=state.train._replace(params=params))


def _check_loss(stage: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{stage}: training diverged, the loss is {loss}")


def _check_finite(what: str, *trees: Any) -> None:
    """Raise a FloatingPointError that names what is NaN or infinite, of weights or statistics."""
    leaves = [item for tree in trees for item in leaves_with_paths(tree)]
    bad = [path for path, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]
    if bad:
        raise FloatingPointError(f"{what}: NaN or infinite values in {', '.join(bad)}")


def evaluate(config: Config, workdir: Path | None, *, mirrored: bool = False) -> dict[str, float]:
    """Return accuracy and loss of the workdir's latest checkpoint, or else of config.init.

    With `mirrored` by the mean of the answers to an image and its mirror image.
    """
    if workdir is not None:
        job, functions, state = _restore(config, workdir)
        variables = {"params": state.train.params, "batch_stats": state.train.batch_stats}
    elif config.init:
        config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, epochs=(0,)))
        job = check(config)
        functions = _functions(job)
        variables = jax.tree.map(jnp.asarray, dict(job.initial))  # a packed one runs as it is
    else:
        raise ValueError("expected --config.init=FILE or --workdir DIR, got neither")
    if mirrored and not job.dataset.flip:
        raise ValueError(
            f"--mirrored: expected images that may be mirrored, got those of {job.dataset.name}"
        )
    batch_stats = variables.get("batch_stats", {})
    test = job.dataset.test
    result = functions.evaluate(variables["params"], batch_stats, test, mirrored=mirrored)
    if not math.isfinite(result["loss"]):
        raise FloatingPointError(f"expected a finite loss, got {result['loss']}")
    return result


def export(config: Config, workdir: Path, output: Path, *, pytorch: bool) -> int:
    """Write the network of the latest checkpoint to a file; return its bytes.

    Args:
      config: of the experiment.
      workdir: of the experiment.
      output: a safetensors file.
      pytorch: plain float tensors under PyTorch's names; else packed, after the last round only.
    """
    if config.quantize.method == "none" and not pytorch:
        raise ValueError("expected a quantized network to pack, got quantize.method none")
    job, _, state = _restore(config, workdir)
    params, batch_stats = state.train.params, state.train.batch_stats
    if pytorch:
        return pretrained.save({"params": jq.unpack(params), "batch_stats": batch_stats}, output)
    if config.quantize.method == "qcnn" and jax.tree.structure(params) == jax.tree.structure(
        job.shapes["params"]
    ):
        raise ValueError(f"{workdir}: expected a finished run to pack, got one under way")
    return summary.write_packed(output, job, state)


def _restore(config: Config, workdir: Path) -> tuple[Job, engine.Engine, RunState]:
    """Return an experiment at its latest checkpoint; nothing is written."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{workdir}: expected a workdir with checkpoints, got none")
    config = compare.as_run(config, workdir)
    refuse_other(config, workdir)
    job = check(config, start=False)._replace(workdir=workdir)
    functions = _functions(job)
    restored = read(folder, functools.partial(_saved, job, functions))
    if restored is None:
        raise ValueError(f"{workdir}: expected at least one checkpoint, got none")
    state, record = restored
    if config.retrain.straight_through and int(state.quant.round):
        state = _settled(functions, state)  # what it is worth so far
    _check_finite(f"{workdir}: its latest checkpoint", state.train.params, state.train.batch_stats)
    return job, functions, _with_products(job, state, Progress(**record["progress"]))


def _with_products(job: Job, state: RunState, progress: Progress) -> RunState:
    """Return the state with the products of a finished run, of which no checkpoint is saved."""
    path, config = job.workdir / summary.MODEL, job.config
    done = progress.units == len(units(config, job.plan))
    if config.quantize.method != "qcnn" or not done or not path.is_file():
        return state
    variables = _complete(pretrained.load(path, job.shapes))
    return state._replace(train=state.train._replace(**variables))
