"""The examples of the README run, one after the other, in a user's place."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"


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
