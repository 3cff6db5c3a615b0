"""Several methods from one float network: the experiments, one table, one figure."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxquant.tables import markdown
from train.config import Config, Quantize, vary
from train.logs import read_json, write_text

_FLOAT = "float"
_NETWORK = "float.safetensors"  # in the folder of that experiment
_ROUNDS = 5
# Clusters after each of at most five rounds, by bits.
_CLUSTERS = {5: (5, 9, 13, 15, 17), 4: (2, 4, 6, 8, 9), 3: (1, 2, 3, 4, 5), 2: (1, 2, 3)}
_SHARES = (0.5, 0.75, 0.875, 0.95, 1.0)  # of weights: INQ's, in five rounds
_WORDS = ((64, 4), (32, 4), (16, 4), (16, 8))  # of Q-CNN, and channels of a subspace
LABELS = {
    "slq": "SLQ",
    "mlq": "MLQ",
    "inq": "INQ",
    "powers": "SLQ, powers of two",
    "qcnn": "Q-CNN",
    "nearest": "rounding to nearest",
}


def methods(config: Config, *, epochs: int) -> dict[str, Config]:
    """Return an experiment of each method at equal budget, by name: the family, then the variant.

    Args:
      config: data, network, and how it is trained and re-trained; of `quantize` what all share.
      epochs: of re-training in each of five rounds; what has fewer rounds has as many in all.
    """
    made: dict[str, Config] = {}

    def add(name: str, stages: int, **quantize: Any) -> None:
        ends = [_ROUNDS * epochs * r // max(stages, 1) for r in range(stages + 1)]
        each = tuple(end - start for start, end in itertools.pairwise(ends))
        made[name] = vary(config, quantize=quantize, retrain={"epochs": each or (0,)})

    for bits, clusters in _CLUSTERS.items():
        slq = {"method": "slq", "bits": bits, "rounds": clusters}
        at_once = {"rounds": clusters[-1:], "init": "linear", "iterations": 0}
        add(f"slq_{bits}", len(clusters), **slq)
        add(f"powers_{bits}", len(clusters), **slq, powers_of_two=True)
        add(f"inq_{bits}", _ROUNDS, method="inq", bits=bits, shares=_SHARES)
        add(f"nearest_{bits}", 0, **slq | at_once)
    add("mlq_2", _ROUNDS, method="mlq", bits=2, groups=4, order="boundaries_together", zero=True)
    for words, length in _WORDS:
        add(f"qcnn_{words}x{length}", 0, method="qcnn", words=words, length=length)
    return made


def run(configs: Mapping[str, Config], chosen: Iterable[str], workdir: Path) -> str:
    """Run experiments from one float network, and write comparison.md and a figure beside it.

    Where the configs have no `init`, that network is trained first, once. What is finished is not
    run again. Rows are called FAMILY_VARIANT; those of a family are a curve in the figure.

    Args:
      configs: all experiments by name.
      chosen: the names of those to run now.
      workdir: a folder for each.

    Returns:
      The table.

    Raises:
      ValueError: as `experiment.prepare`, and for configs that do not start alike.
    """
    from train import experiment, loop, summary

    start = _shared_start(configs)
    if _FLOAT in configs and not start.init:
        raise ValueError(f"expected other names than {_FLOAT}, the network that all start from")
    for name in chosen:  # all of them, before the first one starts
        experiment.check(configs[name])
        if configs[name].quantize.method == "none":
            raise ValueError(f"{name}: expected a quantize.method to compare, got none")
    if not start.init:
        init = str(_train_float(start, workdir / _FLOAT))
        configs = {name: _from_network(config, init) for name, config in configs.items()}
    loop.run_all(experiment.prepare_all({name: configs[name] for name in chosen}, workdir))
    done = [name for name in configs if (workdir / name / "report.json").is_file()]
    reports = {name: summary.read(workdir / name) for name in done}
    text = table(reports, {name: configs[name] for name in done})
    write_text(workdir / "comparison.md", text + "\n")
    write_figure(workdir / f"comparison.{start.plots.format}", reports)
    return text


def _from_network(config: Config, init: str) -> Config:
    return dataclasses.replace(config, init=init, fit=dataclasses.replace(config.fit, epochs=(0,)))


def as_run(config: Config, workdir: Path) -> Config:
    """Return the config with which a workdir was run, if it is a row's of `run`: that has a start.

    Any other config comes back as it is.
    """
    path = workdir / "config.json"
    if config.init or not path.is_file():
        return config
    try:
        init = read_json(path)["init"]
        shared = Path(init).parts[-2:] == (_FLOAT, _NETWORK)
    except (ValueError, KeyError, TypeError):
        return config  # who compares the two says what is wrong with the file
    return _from_network(config, init) if shared else config


def _train_float(config: Config, workdir: Path) -> Path:
    """Return the file of the float network, which is trained if it has not been."""
    from train import experiment, loop, verbs

    path = workdir / _NETWORK
    if not path.is_file():
        config = dataclasses.replace(config, quantize=Quantize(method="none"))
        loop.run_all({_FLOAT: experiment.prepare(config, workdir)})
        if not (workdir / "report.json").is_file():
            raise ValueError(f"{workdir}: another process trains the float network, wait for it")
        verbs.export(config, workdir, path, pytorch=False)  # it has names for any leaf
    return path


def table(reports: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Config]) -> str:
    """Return a Markdown table with a row for each report, the float network first."""
    header = ["method", "accuracy", "change", "bits per weight", "bytes", "entropy-coded"]
    rows: list[list[object]] = []
    for name, report in reports.items():
        full, q = report["float"]["accuracy"], report["quantized"]
        if not rows:
            floats = f"{q['float_bytes']:,}"
            rows.append(["float", f"{full:.2%}", "", "32.00", floats, "", "", ""])
        accuracy = [f"{q['accuracy']:.2%}", f"{100 * (q['accuracy'] - full):+.2f}"]
        sizes = [f"{q['bits_per_weight']:.2f}", f"{q['bytes']:,}", f"{q['entropy_bytes']:,}"]
        smaller = f"{q['float_bytes'] / q['entropy_bytes']:.1f}x"
        epochs = _epochs(configs[name], len(report["rounds"]))
        rows.append([name, *accuracy, *sizes, smaller, epochs])
    return markdown([*header, "smaller", "epochs re-trained"], rows, "<" + 7 * ">")


def _epochs(config: Config, rounds: int) -> int:
    """Return the epochs of re-training in all."""
    if config.quantize.method == "qcnn":
        return 0
    epochs = config.retrain.epochs
    return epochs[0] * rounds if len(epochs) == 1 else sum(epochs)


def write_figure(path: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw accuracy against entropy-coded bytes, a curve for each family."""
    from train import plots

    families: dict[str, list[tuple[int, float]]] = {}
    for name, report in reports.items():
        family, q = name.partition("_")[0], report["quantized"]
        point = (q["entropy_bytes"], q["accuracy"])
        families.setdefault(LABELS.get(family, family), []).append(point)
    if families:
        first = next(iter(reports.values()))
        full = (first["quantized"]["float_bytes"], first["float"]["accuracy"])
        plots.plot_comparison(path, families=families, full=full)


def _shared_start(configs: Mapping[str, Config]) -> Config:
    """Return a config of the float network that all start from.

    Raises:
      ValueError: if they differ in anything but `quantize` and `retrain`; names it.
    """
    (name, first), *others = configs.items()
    for other, config in others:
        odd = [
            field.name
            for field in dataclasses.fields(Config)
            if field.name not in ("quantize", "retrain")
            and getattr(config, field.name) != getattr(first, field.name)
        ]
        if odd:
            raise ValueError(
                f"{other}: expected the {odd[0]} of {name}, to start from one network, got "
                f"{getattr(config, odd[0])!r}"
            )
    return first
