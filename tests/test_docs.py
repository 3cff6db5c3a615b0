"""The examples of the README run, one after the other, in a user's place."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import summary

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.mark.default_promotion
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    shapes = {"embed": (40, 8), "dense": (32, 24), "top/head": (24, 40), "blocks/a": (3, 20, 20)}
    params: dict = {}
    for path, shape in shapes.items():
        node = params
        for key in path.split("/"):
            node = node.setdefault(key, {})
        node["kernel"] = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def loss(params, batch):
        return sum(jnp.mean(jnp.square(leaf - batch)) for leaf in jax.tree.leaves(params))

    names = {
        "params": params,
        "loss": loss,
        "batches": [jnp.float32(0.1), jnp.float32(-0.1)],
        "x": jnp.ones((2, 32)),
        "images": jnp.ones((2, 32)),
        "nn": nn,
        "module": nn.Dense(24, use_bias=False),
        "jnp": jnp,
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for block in blocks:
        if "intercept_linen" in block:  # of a network that is this layer alone
            names["packed"] = names["packed"]["dense"]
        exec(block, names)
    assert len(blocks) >= 5
    assert "top/head/kernel" in capsys.readouterr().out  # the report
    assert (tmp_path / "model.safetensors").is_file()
    expected = names["images"] @ names["params"]["dense"]["kernel"]
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4)


def test_published_tables_are_those_of_the_published_reports():
    folders = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/report.json"))
    results = {folder.name: summary.read(folder) for folder in folders}
    assert results
    published = (ROOT / "docs" / "results.md").read_text()
    assert summary.table(results) in published and summary.curves(results) in published
    for name, result in results.items():
        assert result["config"] == name and result["quantized"]["on_codebook"]
        assert f"| {100 * result['quantized']['accuracy']:.2f} % |" in README.read_text()
