"""An experiment before it runs: what a user may have got wrong, and whose the workdir is."""

import contextlib
import dataclasses
import fcntl
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxquant as jq
from train import config as configs
from train import data, engine, layout, networks, pretrained, products, tasks
from train.config import Config, Data
from train.logs import write_text
from train.named import name_of


class Job(NamedTuple):
    """A checked experiment: nothing in it lies on a device yet."""

    config: Config
    workdir: Path
    dataset: data.Dataset
    task: tasks.Task
    shapes: Any  # variables as shape and dtype structs
    initial: Any  # variables from config.init, maybe packed, or None
    plan: jq.Plan | None
    layout: layout.Layout
    inputs: tuple[str, ...]  # paths of the weights whose inputs' moments rounds take


def prepare(config: Config, workdir: Path) -> Job:
    """Check an experiment and claim its workdir, before any device work.

    Raises:
      ValueError, OSError: as `check`, and for a workdir of another config.
    """
    return prepare_all({"": config}, workdir)[""]


def prepare_all(chosen: Mapping[str, Config], workdir: Path) -> dict[str, Job]:
    """Check experiments and claim a folder of the workdir for each, none before all are right.

    Raises:
      ValueError, OSError: as `prepare`.
    """
    jobs = {name: check(config)._replace(workdir=workdir / name) for name, config in chosen.items()}
    if layout.is_primary():  # the first process does it for all
        for job in jobs.values():
            refuse_other(job.config, job.workdir)
        for job in jobs.values():
            _claim(job.config, job.workdir)
    return jobs


def check(config: Config, *, start: bool = True) -> Job:
    """Check everything that a user may have got wrong, before any device work.

    Args:
      config: of the experiment.
      start: whether it is to start; where a checkpoint is only read, `config.init` may be gone.

    Raises:
      ValueError, OSError: with one line that says what is wrong and where.
    """
    config = configs.validate(config)
    dataset = _parted(config.data)
    if config.batch_size > dataset.train.size:
        raise ValueError(
            f"batch_size: expected at most {dataset.train.size}, got {config.batch_size}"
        )
    if config.retrain.mirrored_teacher and not dataset.flip:
        raise ValueError(
            f"retrain.mirrored_teacher: expected images that may be mirrored, got those of "
            f"{dataset.name}"
        )
    if config.one_program and not isinstance(dataset.train, data.Images):
        raise ValueError(
            f"one_program: expected images that are in memory, got those of {dataset.name}"
        )
    if not config.task and not dataset.num_classes:
        raise ValueError(
            f"task: expected a function of your own for the inputs and targets of {dataset.name}, "
            "got none; without one, data are images and labels"
        )
    image = jax.ShapeDtypeStruct((1, *dataset.train.image_shape), jnp.float32)
    network = networks.build(
        config.model, num_classes=dataset.num_classes, image=image, classifies=not config.task
    )
    task = tasks.build(config.task, network, dataset)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    inputs_shape, rules = image, network.rules
    if config.task:
        inputs_shape = tasks.inputs(task, dataset)
        if rules is None:
            rules = networks.by_use(lambda key, _: task.init(key), task.answer, inputs_shape)
        _check_teacher(config, task)
    for stage in ("fit", "retrain"):
        optimizer = getattr(config, stage).optimizer
        engine.check_optimizer(f"{stage}.optimizer", optimizer, shapes["params"])
    if config.retrain.feature_weight and not _has_features(task, shapes, inputs_shape):
        raise ValueError(
            f"retrain.feature_weight: expected 0, {name_of(config.model)} gives no features"
        )
    initial = None
    if config.init and start:
        initial = pretrained.load(config.init, shapes, unused=network.unused)
    if start and initial is None and not config.fit.epochs[0]:
        raise ValueError("expected init=FILE or fit.epochs above 0, got neither")
    plan = make_plan(config, shapes["params"], rules)
    if config.quantize.method == "qcnn":
        _check_products(config, network.module, shapes, inputs_shape)
    inputs = ()
    if config.quantize.moment_batches and plan is not None:
        inputs = tuple(layer.path for layer in plan.selection.selected)
    if plan is not None and len(config.retrain.epochs) not in (1, plan.num_rounds):
        raise ValueError(
            f"retrain.epochs: expected 1 or {plan.num_rounds} numbers, one a round, "
            f"got {len(config.retrain.epochs)}"
        )
    if config.one_program and (plan is None or 0 in config.retrain.epochs):
        raise ValueError(
            "one_program: expected rounds of at least one epoch each, got "
            + ("no plan" if plan is None else f"retrain.epochs {config.retrain.epochs}")
        )
    return Job(config, Path(), dataset, task, shapes, initial, plan, layout.make(config), inputs)


def title(job: Job) -> str:
    """Return a line that says what learns what."""
    train, test = job.dataset.train.size, job.dataset.test.size
    classes, what = job.dataset.num_classes, name_of(job.config.model)
    if job.config.task:
        what += f" for {name_of(job.config.task)}"
    kind = f"{classes} classes, {train:,} images" if classes else f"{train:,} examples"
    use = "held out to measure with" if job.config.data.holdout else "to test with"
    return f"{what} on {job.dataset.name}, {kind} to train on and {test:,} {use}"


def _check_teacher(config: Config, task: tasks.Task) -> None:
    for field, function in (("distill_weight", "imitate"), ("mirrored_teacher", "answer_mirrored")):
        value = getattr(config.retrain, field)
        if value and getattr(task, function) is None:
            none = "false" if value is True else "0"
            raise ValueError(
                f"retrain.{field}: expected {none}, {name_of(config.task)} gives no {function}"
            )


def _has_features(task: tasks.Task, shapes: Any, image: Any) -> bool:
    return bool(jax.eval_shape(task.answer, shapes, image, None)[0].features)


def _check_products(config: Config, model: Any, shapes: Any, image: Any) -> None:
    if model is None:
        raise ValueError("quantize.method: expected a network of Flax Linen for qcnn")
    if config.mesh.devices != 1 or jax.process_count() > 1:
        raise ValueError("mesh.devices: expected 1, product quantization runs on one device")
    products.check(model, shapes, image, config.quantize)


def _parted(settings: Data) -> data.Dataset:
    """Return the dataset with what is trained on and what is measured on."""
    dataset = _load_data(dataclasses.replace(settings, train_limit=0, holdout=0))
    size, holdout = dataset.train.size, settings.holdout
    if holdout >= size:
        raise ValueError(f"data.holdout: expected fewer than {size} images, got {holdout}")
    if holdout:
        dataset = dataset._replace(test=dataset.train.part(size - holdout, size))
    kept = min(size - holdout, settings.train_limit or size)
    return dataset._replace(train=dataset.train.part(0, kept))


@functools.lru_cache(maxsize=1)  # the experiments of a study share it
def _load_data(settings: Data) -> data.Dataset:
    return data.load(
        settings.name,
        data_dir=settings.dir,
        allow_unofficial=settings.allow_unofficial,
        image_size=settings.image_size,
        workers=settings.workers,
    )


def refuse_other(config: Config, workdir: Path) -> None:
    """Raise a ValueError for a workdir that another config has been run in."""
    path = workdir / "config.json"
    if path.is_file():
        changed = configs.difference_from(path, config)
        if changed:
            raise ValueError(f"{workdir}: expected the config it was started with, got {changed}")
        return
    for name in ("checkpoints", "report.json"):
        if (workdir / name).exists():
            raise ValueError(
                f"{workdir}: expected the config.json of what ran here beside {name}, got no such "
                "file"
            )


def _claim(config: Config, workdir: Path) -> None:
    """Create the workdir, with the config that runs in it."""
    path = workdir / "config.json"
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_text(path, configs.to_json(config))


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[bool]:
    """Hold a workdir; gives whether no other process does. A killed process holds nothing.

    Of several processes that run together, the first one holds it for all.
    """
    if not layout.is_primary():
        yield True
        return
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def make_plan(
    config: Config, params: Any, by_depth: Sequence[jq.LayerRule] | None
) -> jq.Plan | None:
    """Return the config's plan, or None; `by_depth` are the rules of one that has none."""
    q = config.quantize
    if q.method in ("none", "qcnn"):
        return None
    rules = by_depth if q.rules is None else q.rules
    options: dict[str, Any] = {"bits": q.bits, "rules": rules, "zero": q.zero}
    options |= _given(partition=q.partition, init=q.init)
    if q.iterations >= 0:
        options["iterations"] = q.iterations
    if q.method == "inq":
        return jq.inq(params, **options, **_given(shares=q.shares))
    options["powers_of_two"] = q.powers_of_two
    if q.method == "slq":
        return jq.slq(params, rounds=q.rounds, **options)
    depth = {"groups": q.groups, "equal": q.equal} if q.order != "network" else {}
    given = _given(rounds=q.shares, reverse=q.reverse)
    return jq.mlq(params, order=q.order, **depth, **options, **given)


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that a config sets; for the others the plan has its own defaults."""
    return {name: value for name, value in options.items() if value}
