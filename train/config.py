"""What an experiment is: a frozen dataclass, a Python file that makes one, overrides by name."""

import dataclasses
import importlib.util
import json
import re
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from jaxquant import LayerRule
from jaxquant.clustering.codebooks import MOST_CENTROIDS
from train.logs import read_json
from train.named import name_of

_MOST = 1_000_000  # of what is done one after the other

# Types and bounds are checked by `validate`, not by the classes: only a whole config can say which
# of its fields is wrong. The text beside a type is the field's meaning, which `describe` tells.
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Positive = Annotated[int, Field(ge=1, le=_MOST)]
_Amount = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Listed = Field(strict=False)  # a list is as good as a tuple


def _check_given(value: Any) -> Any:
    if isinstance(value, str) or callable(value):
        return value
    raise PydanticCustomError("given", "a valid string, a class or a function")


# A name, or a class or function of yours: itself, or as "package.module:name".
_Given = Annotated[str | Callable[..., Any], PlainValidator(_check_given)]


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from; see `train.data`."""

    name: Annotated[
        _Given,
        "digits, cifar10, mnist, imagenet2012; FILE.npz or package.module:function of your "
        "own, see docs/your_own_model.md; in a config file a function too",
    ] = "digits"
    dir: Annotated[str, "of prepared data and, in downloads/manual, of archives placed by hand"] = (
        "data"
    )
    allow_unofficial: Annotated[
        bool, "accept archives placed by hand whose checksum is not known"
    ] = False
    train_limit: Annotated[
        int,
        Field(ge=0),
        "use the first so many training images only, to rank ideas; 0: all",
    ] = 0
    holdout: Annotated[
        int,
        Field(ge=0),
        "keep the last so many training images out of training, and measure on them in place of "
        "the test images, which no choice then goes by; 0: measure on the test images",
    ] = 0
    image_size: Annotated[
        _Positive, "side of the crops of images that stay on disk (imagenet2012)"
    ] = 224
    workers: Annotated[
        int,
        Field(ge=0, le=1024),
        "processes that decode these; 0: threads of this process",
    ] = 0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices that train; see `train.layout`."""

    devices: Annotated[_Count, "over which batches are split; 0: all, of all processes"] = 1
    fsdp: Annotated[bool, "weights, masks and optimizer state are split over them too"] = False


@dataclasses.dataclass(frozen=True)
class Fit:
    """One stage of training: linear warm-up of the learning rate, cosine to zero."""

    epochs: Annotated[
        tuple[_Count, ...],
        _Listed,
        Field(min_length=1),
        "of each round; a single number serves for all of them",
    ] = (1,)
    optimizer: Annotated[
        _Given,
        "function that makes an optax optimizer, such as optax:adamw, of those of "
        "learning_rate, momentum and weight_decay that it takes by name; empty: SGD",
    ] = ""
    learning_rate: Annotated[_Amount, "after the warm-up"] = 0.1
    warmup_epochs: Annotated[_Amount, "in which the learning rate rises from zero"] = 0.0
    momentum: Annotated[_Amount, "of the optimizer, and of the centroids'"] = 0.9
    weight_decay: Annotated[_Amount, "of the optimizer; SGD adds it to the gradient"] = 1e-4
    distill_weight: Annotated[_Share, "of the float network's soft targets; 0: labels only"] = 0.0
    temperature: Annotated[float, Field(gt=0), "of these soft targets"] = 2.0
    feature_weight: Annotated[
        _Amount, "of the distance to the float network's features; 0: none"
    ] = 0.0
    mirrored_teacher: Annotated[
        bool, "the float network answers by the mean over an image and its mirror image"
    ] = False
    centroid_rate: Annotated[
        _Amount, "learning rate of frozen centroids, in learning rates; 0: fixed"
    ] = 0.0
    straight_through: Annotated[
        bool,
        "all weights train for the centroids nearest to them, and freeze when the stage ends; see "
        "jaxquant.straight_through",
    ] = False
    warmest: Annotated[_Amount, "temperature of straight_through at first; 0: none"] = 0.0
    coolest: Annotated[float, Field(gt=0), "what it falls to, before it is 0"] = 0.005
    cooling: Annotated[_Share, "share of the steps in which it falls"] = 0.9

    @property
    def has_teacher(self) -> bool:
        """Whether the float network is asked for its outputs."""
        return self.distill_weight > 0 or self.feature_weight > 0


@dataclasses.dataclass(frozen=True)
class Quantize:
    """The plan; see `jaxquant.slq`, `.mlq` and `.inq`, and for qcnn `train.products`."""

    method: Annotated[Literal["slq", "mlq", "inq", "qcnn", "none"], "how weights are quantized"] = (
        "slq"
    )
    bits: Annotated[int, "of a weight: 2**(bits - 1) + 1 centroids a layer"] = 5
    rounds: Annotated[tuple[_Positive, ...], _Listed, "slq: clusters frozen after each round"] = (
        5,
        9,
        13,
        15,
        17,
    )
    groups: Annotated[_Positive, "mlq: of layers, one frozen a round"] = 3
    equal: Annotated[Literal["layers", "weights"], "mlq: of which groups have equal numbers"] = (
        "layers"
    )
    order: Annotated[
        Literal["boundaries_first", "boundaries_together", "layer_by_layer", "network"],
        "mlq: in which clusters freeze",
    ] = "boundaries_first"
    reverse: Annotated[bool, "mlq: deep layers first"] = False
    shares: Annotated[
        tuple[_Share, ...],
        _Listed,
        "frozen after each round, inq: of weights; mlq with order network: of clusters; "
        "empty: the method's usual",
    ] = ()
    partition: Annotated[
        str,
        "which clusters or weights freeze first: loss, magnitude, index, random; empty: the "
        "method's usual",
    ] = ""
    init: Annotated[
        str,
        "start of k-means: optimal, quantile, linear, power_of_two, inq, ternary; empty: the "
        "method's usual",
    ] = ""
    iterations: Annotated[
        int,
        Field(ge=-1, le=_MOST),
        "Lloyd passes; -1: the method's usual, of k-means until nothing changes",
    ] = -1
    zero: Annotated[bool, "one centroid is zero"] = False
    powers_of_two: Annotated[bool, "slq, mlq: centroids are rounded to them"] = False
    sensitivity: Annotated[
        Literal["none", "fisher"], "fisher: squared gradients weigh clusters and losses"
    ] = "none"
    sensitivity_batches: Annotated[_Positive, "batches by which gradients are measured"] = 32
    moment_batches: Annotated[
        _Count, "slq, mlq: the last clusters freeze by moments of inputs in these; 0: by distance"
    ] = 0
    recalibrate_batches: Annotated[
        _Count, "by which batch-norm statistics are renewed after quantizing; 0: kept"
    ] = 0
    words: Annotated[int, Field(ge=1, le=MOST_CENTROIDS), "qcnn: of each subspace"] = 16
    length: Annotated[
        _Positive, "qcnn: input channels of a subspace; less where it does not divide them"
    ] = 4
    sweeps: Annotated[_Count, "qcnn: of error correction; 0: k-means alone"] = 2
    calibration_images: Annotated[_Positive, "qcnn: of the training images, unlabelled"] = 256
    rules: Annotated[
        tuple[LayerRule, ...] | None,
        _Listed,
        "which weights, and how; set in the config's file only; None: all kernels, in the "
        "order of depth",
    ] = None


@dataclasses.dataclass(frozen=True)
class Plots:
    """Figures of a finished run; see `train.plots`."""

    draw: Annotated[bool, "whether there are any"] = True
    format: Annotated[Literal["png", "pdf", "svg"], "of their files"] = "png"


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    # Holds for its parts too.
    __pydantic_config__ = ConfigDict(
        strict=True, revalidate_instances="always", allow_inf_nan=False
    )

    data: Annotated[Data, "where images come from"] = Data()
    model: Annotated[
        _Given,
        "small_cnn, lenet5, resnet20, resnet32, resnet44, resnet56, alexnet, vgg16, "
        "googlenet, resnet18; package.module:name of a class or a function of your own "
        "that gives a module of Flax Linen or NNX, see docs/your_own_model.md; in a config "
        "file the class or function too",
    ] = "small_cnn"
    task: Annotated[
        _Given,
        "what is learned: package.module:function that gives a train.tasks.Task, see "
        "docs/your_own_model.md; in a config file the function too; empty: classes of images",
    ] = ""
    init: Annotated[
        str,
        "file to start from instead of training: a PyTorch state_dict as .npz or "
        ".safetensors, or a packed network",
    ] = ""
    fit: Annotated[Fit, "training of the float network"] = Fit(epochs=(20,))
    quantize: Annotated[Quantize, "the plan"] = Quantize()
    retrain: Annotated[Fit, "re-training of each round"] = Fit(epochs=(2,), learning_rate=0.01)
    mesh: Annotated[Mesh, "the devices that train"] = Mesh()
    seed: Annotated[int, Field(ge=0, lt=2**32), "of all random numbers"] = 0
    batch_size: Annotated[_Positive, "images of a training step"] = 128
    eval_batch_size: Annotated[_Positive, "images measured at once"] = 500
    steps_per_call: Annotated[_Count, "training steps in one XLA program; 0: 1 on CPU, else 50"] = 0
    save_seconds: Annotated[
        _Amount, "between checkpoints within a stage; each stage ends in one"
    ] = 60.0
    one_program: Annotated[
        bool, "all rounds in one XLA program; nothing is saved before its end"
    ] = False
    plots: Annotated[Plots, "figures of a finished run"] = Plots()
    tensorboard: Annotated[bool, "write events for TensorBoard"] = True


class Described(NamedTuple):
    """A field of a config, or a part with fields."""

    name: str  # as overrides take it
    default: str | None  # likewise; None for a part
    meaning: str
    choices: tuple[str, ...]  # if there are no others


def describe(part: Any = None, prefix: str = "") -> Iterator[Described]:
    """Yield the fields of a config, or of a part of one: first its own, then those of its parts."""
    part = Config() if part is None else part
    hints = typing.get_type_hints(type(part), include_extras=True)
    parts = []
    for field in dataclasses.fields(part):
        name, value, kind = f"{prefix}{field.name}", getattr(part, field.name), hints[field.name]
        meaning = next(text for text in reversed(kind.__metadata__) if isinstance(text, str))
        if dataclasses.is_dataclass(value):
            parts.append((Described(name, None, meaning, ()), value))
            continue
        literal = typing.get_origin(kind.__origin__) is Literal
        choices = typing.get_args(kind.__origin__) if literal else ()
        yield Described(name, _as_text(value), meaning, choices)
    for described, value in parts:
        yield described
        yield from describe(value, f"{described.name}.")


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    # A class of yours may have fields too, and is a value.
    part = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if rest and not part:
        raise ValueError(f"{flag}: expected {head} to have fields, but it is a value")
    if not rest and part:
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
        whole = [rule.pattern for rule in quantize.rules or () if rule.centroid_dtype == "int8"]
        if whole and retrain.centroid_rate:
            raise ValueError(
                f"retrain.centroid_rate: expected 0, centroids of {whole[0]!r} are int8, which has "
                "no gradient"
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
    "plots",  # earlier versions: true or false
    "tensorboard",
)


def to_json(config: Config) -> str:
    """Return the config as JSON, for the workdir; classes and functions by their names."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=name_of) + "\n"


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
