"""The examples of the README and the pages run in a user's place; what they name is there."""

import ast
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.trees import pure
from tests.cases import mostly_further, mostly_slow, unpadded
from train import __main__ as cli
from train import summary

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def stand_ins():
    """Return what examples take for granted: parameters, a loss, batches, a network."""
    rng = np.random.default_rng(0)
    shape = 32, 24  # layers that are alike are clustered by one program
    shapes = {"embed": shape, "dense": shape, "top/head": shape, "blocks/a": (3, 20, 20)}
    params: dict = {}
    for path, shape in shapes.items():
        node = params
        for key in path.split("/"):
            node = node.setdefault(key, {})
        node["kernel"] = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def loss(params, batch):
        return sum(jnp.mean(jnp.square(leaf - batch)) for leaf in jax.tree.leaves(params))

    return {
        "params": params,
        "loss": loss,
        "forward": lambda params, batch: batch * jnp.ones((4, 32)) @ params["dense"]["kernel"],
        "batches": [jnp.float32(0.1), jnp.float32(-0.1)],
        "x": jnp.ones((2, 32)),
        "images": jnp.ones((2, 32)),
        "nn": nn,
        "module": nn.Dense(24, use_bias=False),
        "jnp": jnp,
    }


@pytest.mark.default_promotion
def test_the_examples_of_a_training_loop_run(capsys):
    names = {**stand_ins(), "jax": jax, "jq": jq, "optax": optax}
    names["plan"] = jq.mlq(names["params"], groups=2)
    rounds, rules, centroids = _blocks((ROOT / "docs" / "training.md").read_text())
    exec(rounds, names)
    assert all(jax.tree.leaves(jq.is_on_codebook(names["params"], names["state"])))
    assert "top/head/kernel" in capsys.readouterr().out
    before = names["params"]["dense"]["kernel"]
    exec(centroids, names)
    assert np.all(names["params"]["dense"]["kernel"] != before)
    assert all(jax.tree.leaves(jq.is_on_codebook(names["params"], names["state"])))
    exec(rules, names)
    paths = [layer.path for layer in names["plan"].selection.by_depth()]
    assert paths[0] == "top/head/kernel" and "embed/kernel" not in paths


@pytest.mark.default_promotion
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = stand_ins()
    blocks = _blocks(README.read_text())
    for block in blocks:
        if "module.apply" in block:  # of a network that is this layer alone
            names["packed"] = names["packed"]["dense"]
        exec(block, names)
    assert len(blocks) >= 5
    assert "top/head/kernel" in capsys.readouterr().out  # the report
    assert (tmp_path / "model.safetensors").is_file()
    expected = names["images"] @ names["params"]["dense"]["kernel"]
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4)


SELECTED = {
    "Linen": ["Dense_0/kernel", "Dense_1/kernel"],
    "NNX": ["hidden/kernel", "out/kernel"],
    "NNX by split and merge": ["hidden/kernel", "out/kernel"],
    "Equinox": ["layers/0/weight", "layers/1/weight"],
    "Haiku and other dictionaries": ["mlp/~/linear_0/w", "mlp/~/linear_1/w"],
    "Tuples and lists": ["0/0", "1/0"],
    "Tied weights": ["code"],
    "Stacked layers": ["Dense_0/kernel"],
    "A decoder-only transformer": [
        *(f"blocks/attention/{name}/kernel" for name in ("key", "out", "query", "value")),
        "blocks/down/kernel",
        "blocks/up/kernel",
    ],
    "LoRA on a packed base": ["Dense_0/kernel", "Dense_1/kernel"],
}


@pytest.fixture(scope="module")
def trees():
    """Return the sections of docs/trees.md by title, and the names that the first one defines."""
    first, *sections = (ROOT / "docs" / "trees.md").read_text().split("\n## ")
    names: dict = {}
    exec("".join(_blocks(first)), names)
    return {text.partition("\n")[0]: "".join(_blocks(text)) for text in sections}, names


def test_there_is_an_example_for_each_make_of_tree(trees):
    assert list(trees[0]) == list(SELECTED)


@pytest.mark.default_promotion
@pytest.mark.parametrize(
    "title",
    mostly_further(
        mostly_slow(SELECTED, *(title for title in SELECTED if "transformer" not in title)),
        *("Equinox", "Stacked layers"),
    ),
)
def test_trees_of_every_make_are_trained_and_quantized(title, trees, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections, names = trees
    exec(sections[title], names)
    plan, params, state = names["plan"], pure(names["params"], only_parameters=True), names["state"]
    assert [layer.path for layer in plan.selection.selected] == SELECTED[title]
    assert int(state.round) == plan.num_rounds
    assert jax.tree.structure(params) == jax.tree.structure(state.frozen)
    assert all(map(bool, jax.tree.leaves(jq.is_on_codebook(params, state))))
    leaves = dict(
        zip((x.path for x in plan.selection.layers), jax.tree.leaves(params), strict=True)
    )
    for layer in plan.selection.layers:
        values = np.unique(np.asarray(leaves[layer.path]))
        if layer.reason is None:
            assert len(values) <= layer.k * layer.slices, layer.path
        elif "LoRA" not in title:  # which trains nothing of the base
            assert len(values) > 3, layer.path  # left alone, and trained


@pytest.mark.further
@pytest.mark.default_promotion
def test_a_training_job_changes_three_lines_and_moves_to_another_mesh():
    text = (ROOT / "docs" / "scale.md").read_text()
    names: dict = {}
    job, restored = _blocks(text)
    assert [line.split("  # +")[0] for line in job.splitlines() if line.endswith("# +")] == [
        "import jaxquant as jq",
        "plan = jq.slq(params, bits=5)",
        "tx = jq.incremental(tx, plan, steps_per_round=10)",
    ]
    exec(job, names)
    frozen = jq.quant_state(names["opt_state"]).frozen
    for name, parts in (("up", (64, 128)), ("down", (128, 64))):
        for array in (frozen[name], names["params"][name], names["opt_state"].inner[1][0].mu[name]):
            assert {shard.data.shape for shard in array.addressable_shards} == {parts}
            assert len(array.sharding.device_set) == 8
    assert int(jq.quant_state(names["opt_state"]).round) == 3
    exec(restored, names)
    assert int(names["state"].round) == names["plan"].num_rounds == 5
    for name in ("up", "down"):
        assert len(names["params"][name].sharding.device_set) == 2
        assert len(np.unique(names["params"][name])) <= 17
    assert names["train_step"]._cache_size() == 2  # one program for each mesh


@pytest.mark.default_promotion
@pytest.mark.slow
def test_the_examples_of_other_methods_run(capsys):
    names: dict = {}
    for block in _blocks((ROOT / "docs" / "methods.md").read_text()):
        exec(block, names)
    assert jq.is_on_codebook(names["params"], names["state"])["dense"]["kernel"]
    assert names["errors"][-1] < names["errors"][0]
    near, close = (
        jnp.sum(jnp.square(names["x"] @ (names[name]["dense"]["kernel"] - names["kernel"])))
        for name in ("near", "close")
    )
    assert close < 0.5 * near
    assert "dense/kernel" in capsys.readouterr().out
    got = names["inputs"] @ jq.unpack(names["array"])
    np.testing.assert_allclose(names["y"], got, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_example_of_blocks_runs(capsys):
    names: dict = {}
    exec("".join(_blocks((ROOT / "docs" / "blocks.md").read_text())), names)
    assert all(jax.tree.leaves(jq.is_on_codebook(names["new"], names["state"])))
    for name, leaf in jq.unpack(names["packed"]).items():
        np.testing.assert_array_equal(leaf, names["new"][name])
    assert "| layers | 4x64x64 | 8 | 8 |" in unpadded(capsys.readouterr().out)


@pytest.mark.default_promotion
@pytest.mark.slow
def test_the_recipes_for_language_models_run(capsys):
    names: dict = {}
    for block in _blocks((ROOT / "docs" / "language_models.md").read_text()):
        exec(block, names)
    assert all(jax.tree.leaves(jq.is_on_codebook(names["quantized"], names["state"])))
    assert names["mixed"].bits <= 3.5
    assert "| layers/1/up |" in unpadded(capsys.readouterr().out)
    for layer in names["quantized"]["layers"]:
        for name in ("up", "down"):
            assert len(np.unique(layer[name][:, 0])) <= 3


@pytest.mark.default_promotion
@pytest.mark.parametrize("page", ["index", "faq"])
def test_the_examples_of_the_first_pages_run(page, capsys):
    names: dict = {}
    for block in _blocks((ROOT / "docs" / f"{page}.md").read_text()):
        exec(block, names)
    if page == "index":
        assert len(np.unique(names["params"]["dense"])) == 3
        assert "dense" in capsys.readouterr().out  # the report
        expected = names["x"] @ names["params"]["dense"]
        np.testing.assert_allclose(names["y"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.further
@pytest.mark.default_promotion
@pytest.mark.parametrize("name", mostly_slow(["cnn", "language_model"], "cnn"))
def test_the_notebooks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert bool(cell["outputs"]) == ("print(" in "".join(cell["source"]))  # it was run
    quantized, trained = names["quantized"], names["trained"]
    if name == "cnn":
        assert names["accuracy"](trained) > 0.85
        assert names["accuracy"](quantized) > names["accuracy"](trained) - 0.1
        assert (tmp_path / "digits.safetensors").is_file()
    else:
        full, nearest, calibrated, ternary = (
            float(names["loss"](names[key], names["held_out"]))
            for key in ("trained", "nearest", "quantized", "ternary")
        )
        assert full - 0.01 < calibrated < nearest and ternary < full + 0.2


def test_every_public_name_is_in_the_api_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: jaxquant\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(jq.__all__)  # once each
    members = re.findall(r"members: \[(.*)\]", pages)[0].split(", ")
    public = [
        x for x in vars(jq.product).values() if getattr(x, "__module__", "") == jq.product.__name__
    ]
    assert sorted(members) == sorted(x.__name__ for x in public if x.__name__[0] != "_")
    for name in set(jq.__all__) - {"product"} | {f"product.{member}" for member in members}:
        assert f"`{name}`" in (ROOT / "docs" / "api" / "index.md").read_text()


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", README.read_text())
    assert links
    for path, anchor in links:
        target = ROOT / path if path else README
        assert target.is_file(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, (path, anchor)


def test_pypi_shows_the_readme_with_absolute_links(monkeypatch):
    monkeypatch.chdir(ROOT)
    tree = ast.parse(Path("setup.py").read_text())  # which would build, were it run
    tree.body = [x for x in tree.body if getattr(x, "name", "") == "description"]
    names: dict = {"Path": Path, "re": re, "tomllib": tomllib}
    exec(compile(tree, "setup.py", "exec"), names)
    text = names["description"]()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == len(re.findall(r"\]\(", README.read_text()))
    assert all(link.startswith(("https://", "#")) for link in links)
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert images and all(x.startswith("https://raw.githubusercontent.com/") for x in images)


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == jq.__version__
    assert f"\nversion: {jq.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{jq.__version__}}}" in (ROOT / "docs" / "citing.md").read_text()
    assert f"\n## [{jq.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.further
def test_the_example_of_your_own_model_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "your_own_model.md").read_text().split("\n## A task of your own")[0]
    *files, after = _blocks(text)
    for content in files:
        (tmp_path / content.split()[1]).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = command.removeprefix("python ").split()
        if program == "-m":
            assert arguments.pop(0) == "train"
            assert cli.main(arguments) == 0, command
        else:
            runpy.run_path(program)
    out = capsys.readouterr().out
    for name in ("my_network:Cnn", "my_network:NnxCnn"):
        assert f"{name} on my_images.npz, 10 classes, 1,442 images to train on and 355 to te" in out
    for run, form in (("linen", "png"), ("nnx", "pdf")):
        plots = sorted(path.name for path in (tmp_path / "runs" / run / "plots").iterdir())
        assert plots == [f"{name}.{form}" for name in ("errors", "rounds", "weights")]
        report = summary.read(tmp_path / "runs" / run)
        assert report["quantized"]["on_codebook"] and report["quantized"]["accuracy"] > 0.8
        assert list(report["rounds"][0]["layers"]) == [
            f"{layer}/kernel" for layer in ("first", "second", "answer")
        ]
    names: dict = {}
    exec(after, names)
    labels = np.load("my_images.npz")["labels"][:5]
    assert (np.argmax(names["logits"], -1) == labels).mean() >= 0.6
    monkeypatch.delitem(sys.modules, "my_network")


@pytest.mark.further
def test_the_example_of_a_task_of_your_own_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "your_own_model.md").read_text().split("\n## A task of your own")[1]
    (content,), (command,) = _blocks(text), re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    (tmp_path / content.split()[1]).write_text(content)
    monkeypatch.chdir(tmp_path)
    program = "python -m train "
    assert command.startswith(program)
    assert cli.main(command.removeprefix(program).split()) == 0
    assert "354 examples to train on and 88 to test with" in capsys.readouterr().out
    workdir = tmp_path / "runs" / "regression"
    report = summary.read(workdir)
    assert report["float"]["loss"] < 0.7 and report["float"]["accuracy"] > 0.7  # 1 is the mean's
    assert report["quantized"]["on_codebook"] and report["quantized"]["accuracy"] > 0.65
    assert list(report["rounds"][0]["layers"]) == [
        f"{layer}/kernel" for layer in ("first", "second", "answer")
    ]
    names: dict = {}
    exec(content, names)
    variables = jq.load(workdir / summary.MODEL)
    data = names["patients"]()
    test = slice(4, None, 5)
    answers = jq.packed(names["Mlp"]().apply)(variables, jnp.asarray(data["inputs"][test]))
    known = data["targets"][np.arange(len(data["targets"])) % 5 != 4]
    predicted = np.asarray(answers)[:, 0] * known.std() + known.mean()
    right = np.mean(np.abs(predicted - data["targets"][test]) < 77)
    assert right == pytest.approx(report["quantized"]["accuracy"], abs=0.012)  # one patient


def _blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_published_tables_are_those_of_the_published_reports():
    folders = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/report.json"))
    results = {folder.name: summary.read(folder) for folder in folders}
    assert results
    published = (ROOT / "docs" / "results.md").read_text()
    assert summary.table(results) in published and summary.curves(results) in published
    families: dict[str, list[dict]] = {}
    for name, result in results.items():
        assert result["config"] == name and result["quantized"]["on_codebook"]
        families.setdefault(re.sub(r"_seed\d+$", "", name), []).append(result)
    for runs in families.values():
        full, q = 100 * runs[0]["float"]["accuracy"], runs[0]["quantized"]
        accuracies = [100 * run["quantized"]["accuracy"] for run in runs]
        mean = np.mean(accuracies)
        spread = f" ({min(accuracies):.2f} to {max(accuracies):.2f})" if len(runs) > 1 else ""
        row = f"| {full:.2f} % | {mean:.2f} %{spread} | {mean - full:+.2f} "
        row += f"| {q['bits_per_weight']:.2f} | {q['compression']:.1f}x |"
        assert row in README.read_text()
