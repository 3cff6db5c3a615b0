"""What a run came to: report.json, report.md, plots; and a table over several runs."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

import jaxquant as jq
from jaxquant.tables import markdown
from jaxquant.trees import leaves_with_paths
from train.config import first_error
from train.course import RunState
from train.experiment import Job
from train.logs import read_json, to_json, write_text
from train.named import name_of

MODEL = "model.safetensors"  # in the workdir: the packed network


def round_record(plan: jq.Plan, info: jq.RoundInfo) -> dict[str, Any]:
    """Return what a round did as plain numbers: totals over the weights, and each layer's."""
    layers = plan.selection.by_depth()
    sizes = [int(np.prod(layer.shape)) for layer in layers]
    rows = {
        layer.path: {
            "weights_frozen": _short(np.mean(info.weights_frozen[layer.path])),
            "clusters_frozen": _short(np.mean(info.clusters_frozen[layer.path])),
            "error_before": _short(np.mean(info.error_before[layer.path])),
            "error_after": _short(np.mean(info.error_after[layer.path])),
            "loss": _short(info.loss[layer.path]),
            "counts": np.asarray(info.counts[layer.path]).tolist(),
        }
        for layer in layers
    }
    frozen = [rows[layer.path]["weights_frozen"] for layer in layers]
    return {"weights_frozen": float(np.average(frozen, weights=sizes)), "layers": rows}


def _short(values: Any) -> Any:
    """Return numbers in six digits, for files that are kept."""
    array = np.asarray(values, np.float64)
    return [_short(x) for x in array] if array.ndim else float(f"{array:.6g}")


def rounds_of(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a round: accuracy before, after quantizing and after re-training, seconds."""
    accuracy = next((e["accuracy"] for e in events if e["kind"] == "float"), float("nan"))
    rows: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "quantized":
            rows.append(
                {
                    "round": event["round"],
                    "accuracy_before": accuracy,
                    "accuracy_quantized": event["accuracy"],
                    "weights_frozen": event["weights_frozen"],
                    "layers": event["layers"],
                }
            )
        elif event["kind"] == "retrained":
            accuracy = rows[-1]["accuracy"] = event["accuracy"]
            of_round = [e for e in events if e.get("round") == event["round"]]
            rows[-1]["seconds"] = seconds_of(of_round)
    return rows


def seconds_of(events: Sequence[Mapping[str, Any]]) -> float:
    """Return how long all of this took; earlier versions logged no times."""
    return sum(event.get("seconds", 0.0) for event in events)


def write(job: Job, state: RunState, events: Sequence[Mapping[str, Any]]) -> None:
    """Write report.json, report.md, plots/, the packed network."""
    float_event = next(event for event in events if event["kind"] == "float")
    result: dict[str, Any] = {
        "config": str(job.workdir.name),
        "float": {"accuracy": float_event["accuracy"], "loss": float_event["loss"]},
        "seconds": seconds_of(events),
        "device": jax.devices()[0].device_kind,
        "versions": {"jaxquant": jq.__version__, "jax": jax.__version__},
    }
    lines = [f"# {job.workdir.name}", "", f"Float network: {float_event['accuracy']:.2%}.", ""]
    rounds = rounds_of(events)
    if rounds:
        reference = state.reference["params"]
        network = jq.report(
            state.train.params, state.quant or None, reference=reference, plan=job.plan
        )
        result["quantized"] = {
            "accuracy": rounds[-1]["accuracy"],
            "bits_per_weight": network.bits_per_weight,
            "bytes": network.bytes,
            "entropy_bytes": network.entropy_bytes,
            "float_bytes": network.float_bytes,
            "file_bytes": write_packed(job.workdir / MODEL, job, state),
            "compression": network.compression,
            "on_codebook": job.plan is None
            or all(jax.tree.leaves(jq.is_on_codebook(state.train.params, state.quant))),
        }
        result["rounds"] = rounds
        lines += [_rounds_table(rounds), "", _closing(result), "", str(network), ""]
        if job.config.plots.draw:
            _plot(job, state, rounds, float_event["accuracy"])
    write_text(job.workdir / "report.json", to_json(result))
    write_text(job.workdir / "report.md", "\n".join(lines))


def write_packed(path: Path, job: Job, state: RunState) -> int:
    """Write the quantized network as `train.pretrained` reads it; return the file's bytes."""
    params = state.train.params  # of products: packed already
    if job.plan is not None:
        params = jq.pack(params, state.quant, inputs=job.plan.selection.inputs)
    variables = {"params": params}
    if jax.tree.leaves(state.train.batch_stats):
        variables["batch_stats"] = state.train.batch_stats
    metadata = {"model": name_of(job.config.model), "data": job.dataset.name}
    jq.save(path, variables, plan=job.plan, metadata=metadata)
    return path.stat().st_size


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    accuracies = ("accuracy_before", "accuracy_quantized", "accuracy")
    rows = [
        [r["round"], f"{r['weights_frozen']:.1%}", *(f"{r[name]:.2%}" for name in accuracies)]
        for r in rounds
    ]
    header = ["round", "frozen", "before", "after quantizing", "after re-training"]
    return markdown(header, rows, ">>>>>")


def _closing(result: Mapping[str, Any]) -> str:
    q = result["quantized"]
    change = 100 * (q["accuracy"] - result["float"]["accuracy"])
    on_codebook = "bit for bit" if q["on_codebook"] else "NO"
    return (
        f"Quantized network: {q['accuracy']:.2%} ({change:+.2f} points), "
        f"{q['bits_per_weight']:.2f} bits per quantized weight. Packed, with codebooks and what "
        f"stays float, it takes {q['bytes']:,} bytes in memory, {q['compression']:.1f} times less "
        f"than {q['float_bytes']:,}, and {q['file_bytes']:,} in model.safetensors with the "
        f"statistics of batch norm; an ideal entropy coder would need {q['entropy_bytes']:,} "
        f"without them. Every quantized weight on its codebook: {on_codebook}. "
        "Errors below are squared distances from the float network over its squared norm."
    )


def _plot(job: Job, state: RunState, rounds: Sequence[Mapping[str, Any]], accuracy: float) -> None:
    from train import plots

    folder = job.workdir / "plots"
    folder.mkdir(exist_ok=True)
    form = job.config.plots.format
    plots.plot_rounds(folder / f"rounds.{form}", float_accuracy=accuracy, rounds=rounds)
    if job.plan is None:
        return
    paths = [layer.path for layer in job.plan.selection.by_depth()]

    def by_path(tree: Any) -> dict[str, np.ndarray]:
        leaves = dict(leaves_with_paths(tree))
        return {path: np.asarray(leaves[path]) for path in paths}

    plots.plot_weights(
        folder / f"weights.{form}",
        weights=by_path(state.train.params),
        codebooks=by_path(state.quant.codebooks),
        frozen=by_path(state.quant.frozen),
        before=by_path(state.reference["params"]),
    )
    plots.plot_errors(
        folder / f"errors.{form}",
        layers={path: [row["layers"][path]["error_before"] for row in rounds] for path in paths},
        rounds=[row["round"] for row in rounds],
    )


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row a run, and one for runs that differ in their seed only.

    Those are called NAME_seed0, NAME_seed1, ..., as `config.seeds` does; their row holds means,
    and the lowest and highest accuracy.
    """
    header = ["run", "float", "quantized", "change", "bits per weight", "bytes", "smaller"]
    rows = [_row(*item) for item in results.items()] + _seed_rows(results)
    return markdown(header, rows, "<>>>>>>")


def curves(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with each quantized run's accuracies round by round, in per cent."""
    rows = []
    for name, result in results.items():
        rounds = result.get("rounds")
        if rounds:
            accuracies = ", ".join(f"{100 * row['accuracy']:.2f}" for row in rounds)
            last = 100 * rounds[-1]["accuracy_quantized"]
            rows.append([name, accuracies, f"{last:.2f}"])
    header = ["run", "after re-training", "last, right after quantizing"]
    return markdown(header, rows, "<<>")


def plot_curves(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw `curves` as a figure: a curve a run, or one for runs that differ in their seed only.

    Raises:
      ValueError: if no run has rounds.
    """
    from train import plots

    changes = {
        label: [
            [row["accuracy"] - run["float"]["accuracy"] for row in run["rounds"]] for run in runs
        ]
        for label, runs in _families({n: r for n, r in results.items() if r.get("rounds")}).items()
    }
    if not changes:
        raise ValueError(f"{path}: expected at least one quantized run to draw")
    plots.plot_curves(path, families=changes)


def plot_sizes(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw accuracy against the bytes of packed networks, a curve a float network.

    Networks are told apart by their bytes and accuracy as floats; what the names of their runs
    begin with alike is the name of the curve.

    Raises:
      ValueError: if no run is quantized.
    """
    from train import plots

    networks: dict[tuple[int, float], dict[str, list[Mapping[str, Any]]]] = {}
    for label, runs in _families({n: r for n, r in results.items() if "quantized" in r}).items():
        key = (runs[0]["quantized"]["float_bytes"], runs[0]["float"]["accuracy"])
        networks.setdefault(key, {})[label] = list(runs)
    if not networks:
        raise ValueError(f"{path}: expected at least one quantized run to draw")
    curves = {}
    for (size, accuracy), families in networks.items():
        points = [plots.Sized("float", size, [accuracy])]
        for runs in families.values():
            q = runs[0]["quantized"]
            label = f"{q['bits_per_weight']:.2f} bits, {q['compression']:.1f}x smaller"
            accuracies = [run["quantized"]["accuracy"] for run in runs]
            points.append(plots.Sized(label, q["bytes"], accuracies))
        curves[_common(list(families))] = points
    plots.plot_sizes(path, networks=curves)


def _common(names: Sequence[str]) -> str:
    """Return the words that names begin with alike, or else the first name."""
    words = zip(*(name.split("_") for name in names), strict=False)
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, words)
    return "_".join(column[0] for column in alike) or names[0]


def _families(
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Return runs by name, those that differ in their seed only under one: "NAME, 3 seeds"."""
    seeds: dict[str, list[str]] = {}
    for name in results:
        stem, seed, number = name.rpartition("_seed")
        seeds.setdefault(f"{stem}, " if seed and number.isdecimal() else name, []).append(name)
    return {
        f"{stem}{len(names)} seeds" if len(names) > 1 else names[0]: [results[n] for n in names]
        for stem, names in seeds.items()
    }


def _seed_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of `table` that summarize runs of the same name with several seeds."""
    quantized = {name: result for name, result in results.items() if "quantized" in result}
    return [
        _family_row(label, runs) for label, runs in _families(quantized).items() if len(runs) > 1
    ]


def _row(name: str, result: Mapping[str, Any]) -> list[str]:
    full, q = result["float"]["accuracy"], result.get("quantized")
    if q is None:
        return [name, f"{full:.2%}", *[""] * 5]
    return _cells(name, full, f"{q['accuracy']:.2%}", q["accuracy"], q)


def _family_row(label: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    accuracies = [run["quantized"]["accuracy"] for run in runs]
    mean, full = np.mean(accuracies), np.mean([run["float"]["accuracy"] for run in runs])
    spread = f"{mean:.2%} ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f})"
    sizes = {
        field: float(np.mean([run["quantized"][field] for run in runs]))
        for field in ("bits_per_weight", "bytes", "compression")
    }
    return _cells(label, float(full), spread, float(mean), sizes)


def _cells(name: str, full: float, text: str, accuracy: float, q: Mapping[str, Any]) -> list[str]:
    own = [name, f"{full:.2%}", text, f"{100 * (accuracy - full):+.2f}"]
    sizes = [f"{q['bits_per_weight']:.2f}", f"{q['bytes']:,.0f}", f"{q['compression']:.1f}x"]
    return own + sizes


@dataclasses.dataclass
class _Float:
    accuracy: float


@dataclasses.dataclass
class _Quantized:
    accuracy: float
    bits_per_weight: float
    bytes: int
    entropy_bytes: int
    float_bytes: int
    compression: float


@dataclasses.dataclass
class _Round:
    accuracy: float
    accuracy_quantized: float


@dataclasses.dataclass
class _Report:
    """What tables and figures want of a report.json."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    float: _Float
    quantized: _Quantized | None = None
    rounds: list[_Round] | None = None


_REPORT = TypeAdapter(_Report)


def read(workdir: Path) -> dict[str, Any]:
    """Return the report.json of a workdir.

    Raises:
      ValueError: if there is none, or it is not one.
    """
    path = workdir / "report.json"
    if not path.is_file():
        raise ValueError(f"{path}: expected the report of a finished run, got no such file")
    report = read_json(path)
    try:
        _REPORT.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from None
    return report
