"""All rounds in one program: the same run as the loop's, and several at once under vmap."""

import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.test_engine import Tiny, begin, make_dataset, task_of
from train import __main__ as cli
from train import engine, layout, program
from train.config import Config, Fit, Quantize

pytestmark = pytest.mark.usefixtures("experiments")

RUN = [
    *("--config", "configs/digits_mlq.py"),
    "--config.fit.epochs=1",
    "--config.retrain.epochs=2,1",
    "--config.retrain.distill_weight=0.5",
    "--config.quantize.groups=1",
    "--config.quantize.recalibrate_batches=2",
    "--config.batch_size=128",
    "--config.plots.draw=false",
]
EVERYTHING = [
    "--config.retrain.feature_weight=1",
    "--config.retrain.centroid_rate=0.1",
    "--config.quantize.sensitivity=fisher",
    "--config.quantize.sensitivity_batches=2",
    "--config.quantize.moment_batches=2",
    "--config.retrain.optimizer=tests.own:clipped",
]


def run(workdir, *arguments):
    assert cli.main([*RUN, *arguments, "--workdir", str(workdir)]) == 0
    events = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return events, json.loads((workdir / "report.json").read_text())


def assert_close(ours, theirs, *, accuracy, loss):
    """Check that two logs tell of the same steps, and of the same numbers but for rounding."""
    assert [(e["kind"], e["epoch"]) for e in ours] == [(e["kind"], e["epoch"]) for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
        for name in {"accuracy", "train_accuracy"} & set(b):
            assert a[name] == pytest.approx(b[name], abs=accuracy)
        if b["kind"] == "quantized":
            assert a["weights_frozen"] == pytest.approx(b["weights_frozen"], abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], EVERYTHING])
def test_one_program_is_the_loop(options, tmp_path, capsys):
    """With everything a minute, of compilation: `pytest --run-slow tests/test_program.py`."""
    events, report = run(tmp_path / "loop", *options)
    assert [e["kind"] for e in events].count("quantized") == 2
    in_one, in_one_report = run(tmp_path / "one", *options, "--config.one_program=true")
    assert "rounds 1 to 2 in one program" in capsys.readouterr().out
    assert_close(in_one, events, accuracy=0.003, loss=1e-3)  # one image is 0.0028
    assert in_one_report["quantized"]["on_codebook"] is True
    assert in_one_report["quantized"]["file_bytes"] == pytest.approx(
        report["quantized"]["file_bytes"], abs=20
    )
    # What is done is not done again.
    run(tmp_path / "one", *options, "--config.one_program=true")
    out = capsys.readouterr().out
    assert "continuing after 4 of 4 epochs" in out and "in one program" not in out


@pytest.mark.slow
def test_one_program_on_four_devices(tmp_path):
    """Half a minute."""
    events, _ = run(tmp_path / "one", *EVERYTHING, "--config.one_program=true")
    split = (
        *EVERYTHING,
        "--config.mesh.devices=4",
        "--config.mesh.fsdp=true",
        "--config.one_program=true",
    )
    assert_close(run(tmp_path / "four", *split)[0], events, accuracy=0.02, loss=1e-2)


def experiment(seed, rate, *, partition="loss"):
    """Return a function of one program's Steps and what else it takes, on a tiny network."""
    config = Config(
        quantize=Quantize(method="slq", bits=2, rounds=(2, 3), partition=partition),
        retrain=Fit(epochs=(1, 2), learning_rate=rate),
        batch_size=10,
        seed=seed,
    )
    dataset = make_dataset()
    functions = engine.build(config, dataset, task_of(Tiny(), dataset), layout.make(config))
    variables = Tiny().init(jax.random.key(7), jnp.zeros((1, 4, 4, 2)), train=False)
    plan = jq.slq(variables["params"], bits=2, rounds=(2, 3), partition=partition)
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(9)]
    epochs = [
        program.Epoch(
            round=round_,
            first=first,
            last=last,
            order=engine.epoch_order(keys[i], 40, 10),
            rates=engine.learning_rates(config.retrain, 2, 4)[:4],
            key=engine.key_data(keys[3 + i]),
        )
        for i, (round_, first, last) in enumerate(
            [(0, True, True), (1, True, False), (1, False, True)]
        )
    ]
    quant = jq.init(plan, variables["params"])
    train = dataset.train
    test = dataset.test
    return functools.partial(
        program.build(config, plan, functions.parts),
        begin(functions, variables, quant),
        quant,
        variables,
        *program.put_data(functions.parts, train, test),
        np.array([[engine.key_data(k) for k in keys[3 * i : 3 * i + 3]] for i in range(2)]),
        np.float32(0.9),
        np.float32(1e-4),
    ), program.make_steps(epochs)


@pytest.mark.slow
def test_several_seeds_and_learning_rates_run_as_one():
    members = [experiment(seed, rate) for seed, rate in ((0, 0.1), (1, 0.1), (0, 0.3))]
    steps = jax.tree.map(
        lambda axis, *fields: fields[0] if axis is None else np.stack(fields),
        program.MAPPED,
        *(steps for _, steps in members),
        is_leaf=lambda axis: axis is None,
    )
    one = members[0][0]
    together = jax.jit(jax.vmap(one, in_axes=(program.MAPPED,)))(steps)
    alone = jax.jit(one)
    for i, (_, own_steps) in enumerate(members):
        expected = alone(own_steps)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), expected, rtol=1e-3, atol=1e-4
        )
    kernels = np.asarray(together[0].params["dense"]["kernel"])
    assert all(len(np.unique(kernel)) <= 3 for kernel in kernels)
    assert (kernels[0] != kernels[1]).any() and (kernels[0] != kernels[2]).any()


@pytest.mark.slow
def test_branches_stay_branches_under_vmap():
    one, steps = experiment(0, 0.1)
    steps = jax.tree.map(
        lambda axis, field: field if axis is None else np.stack([field] * 2),
        program.MAPPED,
        steps,
        is_leaf=lambda axis: axis is None,
    )
    jaxpr = jax.make_jaxpr(jax.vmap(one, in_axes=(program.MAPPED,)))(steps)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    names = [eqn.primitive.name for eqn in scan.params["jaxpr"].eqns]
    assert names.count("cond") == 2  # start a round, end a round


@pytest.mark.slow
def test_it_exports_for_every_platform_and_runs_as_exported():
    one, steps = experiment(0, 0.1)
    leaves, structure = jax.tree.flatten(steps)  # NamedTuples have no serialized form
    flat = jax.jit(lambda *leaves: jax.tree.leaves(one(structure.unflatten(leaves))))
    data = jax.export.export(flat, platforms=("cpu", "cuda", "tpu"))(*leaves).serialize()
    got = jax.export.deserialize(data).call(*leaves)
    chex.assert_trees_all_close(got, flat(*leaves), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.retrain.epochs=1,0", "one_program: expected rounds of at least one epoch each"),
        ("--config.quantize.method=none", "one_program: expected rounds .* got no plan"),
    ],
)
def test_mistakes_are_one_line(argument, message, tmp_path, capsys):
    arguments = [*RUN, "--config.one_program=true", argument, "--workdir", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
