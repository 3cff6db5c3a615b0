"""What an experiment is: a frozen dataclass, a Python file that makes one, overrides by name."""

import dataclasses
import importlib.util
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxquant import LayerRule
from jaxquant.packing import MOST_CENTROIDS


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from; see `train.data`."""

    name: str = "digits"
    dir: str = "data"  # of prepared data and, in downloads/manual, of archives placed by hand
    allow_unofficial: bool = False  # accept archives placed by hand whose checksum is not known
    train_limit: int = 0  # use the first so many training images only, to rank ideas; 0: all
    image_size: int = 224  # side of the crops of images that stay on disk (imagenet2012)
    workers: int = 0  # processes that decode these; 0: threads of this process


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices that train; see `train.layout`."""

    devices: int = 1  # over which batches are split; 0: all, of all processes
    fsdp: bool = False  # weights, masks and optimizer state split over them too


@dataclasses.dataclass(frozen=True)
class Fit:
    """One stage of training: SGD with momentum, linear warm-up, cosine to zero."""

    epochs: tuple[int, ...] = (1,)  # of each round; a single number serves for all of them
    learning_rate: float = 0.1
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4  # added to the gradient
    distill_weight: float = 0.0  # of the float network's soft targets; 0: labels only
    temperature: float = 2.0
    feature_weight: float = 0.0  # of the distance to the float network's features; 0: none
    mirrored_teacher: bool = False  # it answers by the mean over an image and its mirror image
    centroid_rate: float = 0.0  # learning rate of frozen centroids, in learning rates; 0: fixed

    @property
    def has_teacher(self) -> bool:
        """Whether the float network is asked for its outputs."""
        return self.distill_weight > 0 or self.feature_weight > 0


@dataclasses.dataclass(frozen=True)
class Quantize:
    """The plan; see `jaxquant.slq`, `jaxquant.mlq` and `jaxquant.inq`."""

    method: str = "slq"  # slq, mlq, inq, qcnn (see train.products), or none
    bits: int = 5
    rounds: tuple[int, ...] = (5, 9, 13, 15, 17)  # slq: clusters frozen after each round
    groups: int = 3  # mlq
    equal: str = "layers"  # mlq: layers or weights, of which groups have equal numbers
    order: str = "boundaries_first"  # mlq
    reverse: bool = False  # mlq
    shares: tuple[float, ...] = ()  # inq: of weights; mlq, order network: of clusters; (): usual
    partition: str = ""  # "": the method's usual
    init: str = ""  # "": the method's usual
    iterations: int = -1  # Lloyd passes; -1: the method's usual, of k-means until nothing changes
    zero: bool = False
    powers_of_two: bool = False  # slq, mlq: centroids rounded to them
    sensitivity: str = "none"  # none, or fisher: squared gradients weigh clusters and losses
    sensitivity_batches: int = 32
    moment_batches: int = 0  # slq, mlq: last clusters freeze by moments of inputs; 0: by distance
    recalibrate_batches: int = 0  # batch-norm statistics renewed after quantizing; 0: kept
    words: int = 16  # qcnn: of each subspace
    length: int = 4  # qcnn: input channels of a subspace; less where it does not divide them
    sweeps: int = 2  # qcnn: of error correction; 0: k-means alone
    calibration_images: int = 256  # qcnn: of the training images, unlabelled
    # Set in the config's file only; None: all kernels, see `train.models.depth_rules`.
    rules: tuple[LayerRule, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    data: Data = Data()
    model: str = "small_cnn"
    init: str = ""  # PyTorch state_dict, .npz or .safetensors, to start from instead of training
    fit: Fit = Fit(epochs=(20,))  # of the float network
    quantize: Quantize = Quantize()
    retrain: Fit = Fit(epochs=(2,), learning_rate=0.01)  # of each round
    mesh: Mesh = Mesh()
    seed: int = 0
    batch_size: int = 128
    eval_batch_size: int = 500
    steps_per_call: int = 0  # training steps in one XLA program; 0: 1 on CPU, else 50
    save_seconds: float = 60.0  # between checkpoints within a stage; each stage ends in one
    one_program: bool = False  # all rounds in one XLA program; nothing is saved before its end
    plots: bool = True
    tensorboard: bool = True


def vary(config: Config, **changes: Mapping[str, Any]) -> Config:
    """Return the experiment with fields of its parts changed, as `retrain={"warmup_epochs": 1}`."""
    parts = {
        part: dataclasses.replace(getattr(config, part), **fields)
        for part, fields in changes.items()
    }
    return dataclasses.replace(config, **parts)


def seeds(name: str, config: Config, count: int = 3) -> dict[str, Config]:
    """Return the experiment with the seeds 0, 1, ... by name, as a study's `get_configs` does."""
    return {f"{name}_seed{i}": dataclasses.replace(config, seed=i) for i in range(count)}


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """Return the experiments of a Python file by name, with overrides like "fit.epochs=3".

    A file with `get_config()` holds one, called like the file; a study with `get_configs()` holds
    several by name.

    Raises:
      ValueError: for a file that gives no Config, an unknown name or a value that does not fit;
        one line that says what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a config file, got no such file")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        study = hasattr(module, "get_configs")
        configs = module.get_configs() if study else {path.stem: module.get_config()}
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(configs, dict) or not configs:
        raise ValueError(f"{path}: expected get_configs() to return configs by name")
    for name, config in configs.items():
        if not isinstance(config, Config):
            source = f"get_configs()[{name!r}]" if study else "get_config()"
            raise ValueError(f"{path}: expected {source} to be a Config, got {type(config)}")
        if not re.fullmatch(r"[\w.+-]*\w", str(name)):
            raise ValueError(f"{path}: expected names that can be folders, got {name!r}")
        for override in overrides:
            config = override_field(config, override)
        try:
            validate(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if study else str(error)) from None
        configs[name] = config
    return configs


def override_field(config: Any, override: str) -> Any:
    """Return the config with one field set, by "name.of.field=value"."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--config.{override}: expected --config.NAME=VALUE")
    return _replace(config, name.split("."), text, f"--config.{name}")


def _replace(node: Any, names: list[str], text: str, flag: str) -> Any:
    fields = typing.get_type_hints(type(node))
    head, *rest = names
    if head not in fields:
        raise ValueError(f"{flag}: expected one of {', '.join(fields)}, got {head!r}")
    value = getattr(node, head)
    if rest and not dataclasses.is_dataclass(value):
        raise ValueError(f"{flag}: expected {head} to have fields, but it is a value")
    if not rest and dataclasses.is_dataclass(value):
        inner = ", ".join(f"{head}.{f.name}" for f in dataclasses.fields(value))
        raise ValueError(f"{flag}: expected one of its fields: {inner}")
    new = _replace(value, rest, text, flag) if rest else _parse(text, fields[head], flag)
    return dataclasses.replace(node, **{head: new})


def _parse(text: str, kind: Any, flag: str) -> Any:
    """Convert the text of an override to the field's type."""
    origin = typing.get_origin(kind)
    if origin is not tuple and kind not in (bool, int, float, str):
        raise ValueError(f"{flag}: set this in the config's file, not on the command line")
    if origin is tuple:
        entry = typing.get_args(kind)[0]
        parts = text.strip("()[] ").rstrip(",").split(",")
        return tuple(_parse(part.strip(), entry, flag) for part in parts)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{flag}: expected true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{flag}: expected {kind.__name__}, got {text!r}") from None


def validate(config: Config) -> None:
    """Raise a ValueError, one line, for values that no run could use."""
    quantize, fit, retrain = config.quantize, config.fit, config.retrain
    _one_of("quantize.method", quantize.method, ("slq", "mlq", "inq", "qcnn", "none"))
    _one_of("quantize.sensitivity", quantize.sensitivity, ("none", "fisher"))
    _at_least("batch_size", config.batch_size, 1)
    _at_least("eval_batch_size", config.eval_batch_size, 1)
    _at_least("steps_per_call", config.steps_per_call, 0)
    _at_least("seed", config.seed, 0)
    _at_least("mesh.devices", config.mesh.devices, 0)
    _at_least("save_seconds", config.save_seconds, 0)
    _at_least("data.train_limit", config.data.train_limit, 0)
    _at_least("data.image_size", config.data.image_size, 1)
    _at_least("data.workers", config.data.workers, 0)
    _at_least("quantize.iterations", quantize.iterations, -1)
    _at_least("quantize.sensitivity_batches", quantize.sensitivity_batches, 1)
    _at_least("quantize.moment_batches", quantize.moment_batches, 0)
    if quantize.moment_batches and quantize.method in ("inq", "qcnn"):
        raise ValueError(
            f"quantize.moment_batches: expected 0 for {quantize.method}, got "
            f"{quantize.moment_batches}"
        )
    _at_least("quantize.recalibrate_batches", quantize.recalibrate_batches, 0)
    _at_least("quantize.length", quantize.length, 1)
    _at_least("quantize.sweeps", quantize.sweeps, 0)
    _at_least("quantize.calibration_images", quantize.calibration_images, 1)
    if not 1 <= quantize.words <= MOST_CENTROIDS:
        raise ValueError(f"quantize.words: expected 1 to {MOST_CENTROIDS}, got {quantize.words}")
    for name, stage in (("fit", fit), ("retrain", retrain)):
        for epochs in stage.epochs:
            _at_least(f"{name}.epochs", epochs, 0)
        for field in (
            "learning_rate",
            "warmup_epochs",
            "momentum",
            "weight_decay",
            "feature_weight",
            "centroid_rate",
        ):
            _at_least(f"{name}.{field}", getattr(stage, field), 0)
        if not 0 <= stage.distill_weight <= 1:
            raise ValueError(f"{name}.distill_weight: expected 0 to 1, got {stage.distill_weight}")
        if not stage.temperature > 0:
            raise ValueError(f"{name}.temperature: expected more than 0, got {stage.temperature}")
    if retrain.mirrored_teacher and not retrain.has_teacher:
        raise ValueError(
            "retrain.mirrored_teacher: expected distill_weight or feature_weight above 0"
        )
    if retrain.centroid_rate and (quantize.method == "inq" or quantize.powers_of_two):
        raise ValueError("retrain.centroid_rate: expected 0, trained centroids leave powers of two")
    if len(fit.epochs) != 1:
        raise ValueError(f"fit.epochs: expected one number, got {fit.epochs}")
    for field, lacking in (
        ("distill_weight", "teacher"),
        ("feature_weight", "teacher"),
        ("mirrored_teacher", "teacher"),
        ("centroid_rate", "centroids"),
    ):
        value = getattr(fit, field)
        if value:
            none = "false" if value is True else "0"
            raise ValueError(f"fit.{field}: expected {none}, the float network has no {lacking}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")


# Fields, in a run that has begun.
_CHANGEABLE = (
    "mesh.",
    "save_seconds",
    "data.dir",
    "data.workers",
    "eval_batch_size",
    "plots",
    "tensorboard",
)


def to_json(config: Config) -> str:
    """Return the config as JSON, for the workdir."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def difference(old: str, new: str) -> str:
    """Return the fields in which two configs in JSON differ, on one line; empty if none.

    What does not change the result does not count: a run may continue on other devices. Nor does a
    field that came later than the old config and has its default, which is what was done before.
    """
    usual, flat_old, flat_new = (
        _flatten(json.loads(text)) for text in (to_json(Config()), old, new)
    )
    flat_old = usual | flat_old
    names = sorted(
        name
        for name in {*flat_old, *flat_new}
        if flat_old.get(name) != flat_new.get(name) and not name.startswith(_CHANGEABLE)
    )
    return ", ".join(f"{name}: {flat_old.get(name)!r} -> {flat_new.get(name)!r}" for name in names)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    dot = f"{prefix}." if prefix else ""
    return {k: v for name, x in node.items() for k, v in _flatten(x, f"{dot}{name}").items()}
