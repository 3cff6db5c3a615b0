"""Tables over runs, and those that the documentation shows."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.cases import unpadded
from train import plots, summary


def run(accuracy: float) -> dict:
    """Return what a report.json holds of a run, as far as tables go."""
    quantized = {"accuracy": accuracy, "bits_per_weight": 2.0, "bytes": 1000, "compression": 15.0}
    return {"float": {"accuracy": 0.9}, "quantized": quantized}


def test_a_table_summarizes_runs_that_differ_in_their_seed():
    results = {
        "a_seed0": run(0.88),
        "float": {"float": {"accuracy": 0.9}},
        "a_seed1": run(0.89),
        "a_seed2": run(0.9),
        "b_seed0": run(0.5),
        "c_seeds": run(0.5),
    }
    lines = unpadded(summary.table(results)).splitlines()
    assert lines[2] == "| a_seed0 | 90.00% | 88.00% | -2.00 | 2.00 | 1,000 | 15.0x |"
    assert lines[3] == "| float | 90.00% | | | | | |"
    assert lines[8:] == [
        "| a, 3 seeds | 90.00% | 89.00% (88.00 to 90.00) | -1.00 | 2.00 | 1,000 | 15.0x |"
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_curves_are_the_accuracies_after_the_rounds():
    rounds = [
        {"accuracy": 0.9, "accuracy_quantized": 0.8},
        {"accuracy": 0.8754, "accuracy_quantized": 0.5},
    ]
    table = summary.curves({"a": {**run(0.8754), "rounds": rounds}, "float": {}})
    lines = unpadded(table).splitlines()
    assert lines[2:] == ["| a | 90.00, 87.54 | 50.00 |"]


def test_a_packed_network_has_the_inputs_that_rules_say(tmp_path):
    params = {"w": jnp.arange(24.0).reshape(2, 3, 4) % 3}
    plan = jq.slq(params, rounds=(3,), rules=[jq.LayerRule("w", k=3, inputs=1)])
    params, quant, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    job = SimpleNamespace(
        plan=plan, config=SimpleNamespace(model="own"), dataset=SimpleNamespace(name="own")
    )
    state = SimpleNamespace(train=SimpleNamespace(params=params, batch_stats={}), quant=quant)
    size = summary.write_packed(tmp_path / "x", job, state)  # pyright: ignore[reportArgumentType]
    assert size == (tmp_path / "x").stat().st_size
    packed = jq.load(tmp_path / "x")["params"]["w"]
    assert (packed.rows, packed.columns) == ((2,), (3, 4))


def test_a_figure_has_a_curve_for_each_run_and_one_for_those_that_differ_in_their_seed(
    tmp_path, monkeypatch
):
    drawn = {}
    monkeypatch.setattr(plots, "plot_curves", lambda path, *, families: drawn.update(families))
    runs = {name: {**run(0.88), "rounds": [{"accuracy": 0.88}]} for name in ("a", "a_seed0")}
    results = {**runs, "float": run(0.9), "a_seed1": {**run(0.9), "rounds": [{"accuracy": 0.91}]}}
    summary.plot_curves(tmp_path / "a.png", results)
    assert {label: np.round(x, 6).tolist() for label, x in drawn.items()} == {
        "a": [[-0.02]],
        "a, 2 seeds": [[-0.02], [0.01]],
    }
    with pytest.raises(ValueError, match=r"a\.png: expected at least one quantized run"):
        summary.plot_curves(tmp_path / "a.png", {"float": run(0.9)})


def test_a_figure_of_sizes_has_a_curve_for_each_float_network(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "plot_sizes", lambda path, *, networks: drawn.update(networks))

    def sized(accuracy, full, size=16_000):
        made = run(accuracy)
        made["quantized"]["float_bytes"] = size
        return {**made, "float": {"accuracy": full}}

    results = {
        "net_a_mlq_seed0": sized(0.8, 0.9),
        "net_a_mlq_seed1": sized(0.85, 0.9),
        "net_a_slq": sized(0.9, 0.9),
        "net_b_slq": sized(0.9, 0.95),
        "float": {"float": {"accuracy": 0.9}},
    }
    summary.plot_sizes(tmp_path / "a.png", results)
    label = "2.00 bits, 15.0x smaller"
    assert drawn == {
        "net_a": [
            ("float", 16_000, [0.9]),
            (label, 1000, [0.8, 0.85]),
            (label, 1000, [0.9]),
        ],
        "net_b_slq": [("float", 16_000, [0.95]), (label, 1000, [0.9])],
    }
    with pytest.raises(ValueError, match=r"a\.png: expected at least one quantized run"):
        summary.plot_sizes(tmp_path / "a.png", {"float": {"float": {"accuracy": 0.9}}})
