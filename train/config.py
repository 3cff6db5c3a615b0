"""What an experiment is: a frozen dataclass, a Python file that makes one, overrides by name."""

import dataclasses
import importlib.util
import json
import re
import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from jaxquant import LayerRule
from jaxquant.clustering.codebooks import MOST_CENTROIDS
from train.logs import read_json

_MOST = 1_000_000  # of what is done one after the other

# Types and bounds are checked by `validate`, not by the classes: only a whole config can say which
# of its fields is wrong.
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Positive = Annotated[int, Field(ge=1, le=_MOST)]
_Amount = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Listed = Field(strict=False)  # a list is as good as a tuple


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from; see `train.data`."""

    name: str = "digits"
    dir: str = "data"  # of prepared data and, in downloads/manual, of archives placed by hand
    allow_unofficial: bool = False  # accept archives placed by hand whose checksum is not known
    # Use the first so many training images only, to rank ideas; 0: all.
    train_limit: Annotated[int, Field(ge=0)] = 0
    image_size: _Positive = 224  # side of the crops of images that stay on disk (imagenet2012)
    # Processes that decode these; 0: threads of this process.
    workers: Annotated[int, Field(ge=0, le=1024)] = 0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices that train; see `train.layout`."""

    devices: _Count = 1  # over which batches are split; 0: all, of all processes
    fsdp: bool = False  # weights, masks and optimizer state split over them too


@dataclasses.dataclass(frozen=True)
class Fit:
    """One stage of training: SGD with momentum, linear warm-up, cosine to zero."""

    # Of each round; a single number serves for all of them.
    epochs: Annotated[tuple[_Count, ...], _Listed, Field(min_length=1)] = (1,)
    learning_rate: _Amount = 0.1
    warmup_epochs: _Amount = 0.0
    momentum: _Amount = 0.9
    weight_decay: _Amount = 1e-4  # added to the gradient
    distill_weight: _Share = 0.0  # of the float network's soft targets; 0: labels only
    temperature: Annotated[float, Field(gt=0)] = 2.0
    feature_weight: _Amount = 0.0  # of the distance to the float network's features; 0: none
    mirrored_teacher: bool = False  # it answers by the mean over an image and its mirror image
    centroid_rate: _Amount = 0.0  # learning rate of frozen centroids, in learning rates; 0: fixed
    # All weights train for the centroids nearest to them, and freeze when the stage ends; see
    # `jaxquant.straight_through`.
    straight_through: bool = False
    # Its temperature at first, which falls to `coolest` in a share of the steps, `cooling`, and
    # is 0 for the rest.
    warmest: _Amount = 0.0
    coolest: Annotated[float, Field(gt=0)] = 0.02
    cooling: _Share = 0.7

    @property
    def has_teacher(self) -> bool:
        """Whether the float network is asked for its outputs."""
        return self.distill_weight > 0 or self.feature_weight > 0


@dataclasses.dataclass(frozen=True)
class Quantize:
    """The plan; see `jaxquant.slq`, `jaxquant.mlq` and `jaxquant.inq`."""

    # qcnn: see `train.products`.
    method: Literal["slq", "mlq", "inq", "qcnn", "none"] = "slq"
    bits: int = 5
    # slq: clusters frozen after each round.
    rounds: Annotated[tuple[_Positive, ...], _Listed] = (5, 9, 13, 15, 17)
    groups: _Positive = 3  # mlq
    equal: Literal["layers", "weights"] = "layers"  # mlq: of which groups have equal numbers
    order: Literal["boundaries_first", "boundaries_together", "layer_by_layer", "network"] = (
        "boundaries_first"  # mlq
    )
    reverse: bool = False  # mlq
    # inq: of weights; mlq, order network: of clusters; (): usual.
    shares: Annotated[tuple[_Share, ...], _Listed] = ()
    partition: str = ""  # "": the method's usual
    init: str = ""  # "": the method's usual
    # Lloyd passes; -1: the method's usual, of k-means until nothing changes.
    iterations: Annotated[int, Field(ge=-1, le=_MOST)] = -1
    zero: bool = False
    powers_of_two: bool = False  # slq, mlq: centroids rounded to them
    # fisher: squared gradients weigh clusters and losses.
    sensitivity: Literal["none", "fisher"] = "none"
    sensitivity_batches: _Positive = 32
    # slq, mlq: the last clusters freeze by moments of inputs; 0: by distance.
    moment_batches: _Count = 0
    recalibrate_batches: _Count = 0  # batch-norm statistics renewed after quantizing; 0: kept
    words: Annotated[int, Field(ge=1, le=MOST_CENTROIDS)] = 16  # qcnn: of each subspace
    length: _Positive = 4  # qcnn: input channels of a subspace; less where it does not divide them
    sweeps: _Count = 2  # qcnn: of error correction; 0: k-means alone
    calibration_images: _Positive = 256  # qcnn: of the training images, unlabelled
    # Set in the config's file only; None: all kernels, see `train.models.depth_rules`.
    rules: Annotated[tuple[LayerRule, ...] | None, _Listed] = None


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    # Holds for its parts too.
    __pydantic_config__ = ConfigDict(
        strict=True, revalidate_instances="always", allow_inf_nan=False
    )

    data: Data = Data()
    model: str = "small_cnn"
    init: str = ""  # PyTorch state_dict, .npz or .safetensors, to start from instead of training
    fit: Fit = Fit(epochs=(20,))  # of the float network
    quantize: Quantize = Quantize()
    retrain: Fit = Fit(epochs=(2,), learning_rate=0.01)  # of each round
    mesh: Mesh = Mesh()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    batch_size: _Positive = 128
    eval_batch_size: _Positive = 500
    steps_per_call: _Count = 0  # training steps in one XLA program; 0: 1 on CPU, else 50
    save_seconds: _Amount = 60.0  # between checkpoints within a stage; each stage ends in one
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


# Of a folder; those of tables and figures beside it end otherwise.
_NAME = r"(?!.*\.(md|png)$)[\w.+-]*\w"


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """Return the experiments of a Python file by name, with overrides like "fit.epochs=3".

    A file with `get_config()` holds one, called like the file; a study with `get_configs()` holds
    several by name. The file is run, as any Python program: load only those that you would run.

    Raises:
      ValueError: for a file that gives no Config, an unknown name or a value that does not fit;
        one line that says what was expected.
    """
    path = Path(path)
    configs, study = _run(path)
    loaded = {}
    for name, config in configs.items():
        if not isinstance(config, Config):
            source = f"get_configs()[{name!r}]" if study else "get_config()"
            raise ValueError(f"{path}: expected {source} to be a Config, got {type(config)}")
        if not (isinstance(name, str) and re.fullmatch(_NAME, name)):
            raise ValueError(f"{path}: expected names that can be folders, got {name!r}")
        for override in overrides:
            config = override_field(config, override)
        try:
            loaded[name] = validate(config)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}" if study else f"{path}: {error}") from None
    return loaded


def _run(path: Path) -> tuple[dict[Any, Any], bool]:
    """Run a config file; return what it gives by name, and whether it is a study."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a config file, got no such file")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        study = hasattr(module, "get_configs")
        configs = module.get_configs() if study else {path.stem: module.get_config()}
    except (Exception, SystemExit) as error:  # whatever comes of running it
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(configs, dict) or not configs:
        raise ValueError(f"{path}: expected get_configs() to return configs by name")
    return configs, study


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
    """Convert the text of an override to the field's type, within whatever bounds."""
    if type(None) in typing.get_args(kind):
        raise ValueError(f"{flag}: set this in the config's file, not on the command line")
    value: Any = text
    if typing.get_origin(kind) is tuple:
        inside = text.strip("()[] ").rstrip(",")
        value = inside.split(",") if inside else []
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(first_error(error, flag)) from None


def validate(config: Config) -> Config:
    """Return the config with tuples and floats where it has lists and whole numbers instead.

    Raises:
      ValueError: one line, for types and values that no run could use.
    """
    try:
        config = _ADAPTER.validate_python(config)
    except ValidationError as error:
        raise ValueError(first_error(error)) from None
    _check_together(config)
    return config


_ADAPTER = TypeAdapter(Config)
# What pydantic would say in other words.
_EXPECTED = {
    "greater_than": "more than {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "less than {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
    "literal_error": "one of {expected}",
    "too_short": "at least one number",
    "missing": "to be there",
}


def first_error(error: ValidationError, *flag: str) -> str:
    """Say on one line which field is wrong, what was expected and what came instead."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in (*flag, *first["loc"]))
    known = _EXPECTED.get(first["type"])
    expected = known.format(**first.get("ctx", {})) if known else first["msg"]
    expected = expected.removeprefix("Input should be ")
    return f"{where}: expected {expected}, got {reprlib.repr(first['input'])}"


def _check_together(config: Config) -> None:
    """Raise a ValueError for values that do not go together."""
    quantize, fit, retrain = config.quantize, config.fit, config.retrain
    if quantize.moment_batches and quantize.method in ("inq", "qcnn"):
        raise ValueError(
            f"quantize.moment_batches: expected 0 for {quantize.method}, got "
            f"{quantize.moment_batches}"
        )
    if retrain.mirrored_teacher and not retrain.has_teacher:
        raise ValueError(
            "retrain.mirrored_teacher: expected distill_weight or feature_weight above 0"
        )
    if retrain.centroid_rate and (quantize.method == "inq" or quantize.powers_of_two):
        raise ValueError("retrain.centroid_rate: expected 0, trained centroids leave powers of two")
    if retrain.straight_through:
        if quantize.method != "slq" or len(quantize.rounds) != 1:
            raise ValueError(
                "retrain.straight_through: expected quantize.method slq with one round, which "
                f"gives the codebooks, got {quantize.method} with rounds {quantize.rounds}"
            )
        if config.one_program:
            raise ValueError("one_program: expected false with retrain.straight_through")
    elif retrain.warmest:
        raise ValueError(
            f"retrain.warmest: expected 0 without retrain.straight_through, got {retrain.warmest}"
        )
    if len(fit.epochs) != 1:
        raise ValueError(f"fit.epochs: expected one number, got {fit.epochs}")
    for field, lacking in (
        ("distill_weight", "teacher"),
        ("feature_weight", "teacher"),
        ("mirrored_teacher", "teacher"),
        ("centroid_rate", "centroids"),
        ("straight_through", "centroids"),
        ("warmest", "centroids"),
    ):
        value = getattr(fit, field)
        if value:
            none = "false" if value is True else "0"
            raise ValueError(f"fit.{field}: expected {none}, the float network has no {lacking}")


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


def difference_from(path: Path, config: Config) -> str:
    """Return the fields in which a config differs from that in a file of `to_json`.

    Raises:
      ValueError: if the file holds no such thing, naming it.
    """
    return difference(json.dumps(read_json(path)), to_json(config))


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
