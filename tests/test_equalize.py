"""Equalized channels: the same function, equal scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import models
from train.equalize import equalize


def make(name, shape):
    model = models.build(name, num_classes=10)
    x = jax.random.normal(jax.random.key(1), shape)
    variables = model.init(jax.random.key(0), x, train=False)
    # Statistics and channels of all sizes, a channel that is nearly dead and one that is.
    rng = np.random.default_rng(0)

    def vary(path, leaf):
        factors = rng.uniform(0.1, 3.0, leaf.shape[-1]).astype(np.float32)
        if path[-1].key == "kernel" and "conv" in path[-2].key:
            factors[:2] = 1e-3, 0.0
        return leaf * factors if path[-1].key != "bias" else leaf + factors

    return model, jax.tree_util.tree_map_with_path(vary, variables), x


def rms(kernel):
    return np.sqrt(np.mean(np.square(kernel), axis=(0, 1, 2)))


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet20", (4, 16, 16, 3)), ("small_cnn", (4, 8, 8, 1))]
)
def test_the_function_stays_and_the_scales_are_equal(name, shape):
    model, variables, x = make(name, shape)
    params, batch_stats = equalize(variables["params"], variables["batch_stats"])
    new = {"params": params, "batch_stats": batch_stats}
    assert jax.tree.structure(new) == jax.tree.structure(dict(variables))
    before = model.apply(variables, x, train=False)
    np.testing.assert_allclose(model.apply(new, x, train=False), before, rtol=1e-3, atol=1e-4)
    kernels = [
        (old, leaf)
        for (path, leaf), old in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(variables["params"]),
            strict=True,
        )
        if leaf.ndim == 4
    ]
    assert kernels
    for old, kernel in kernels:
        scales = rms(kernel)
        assert scales[1] == 0.0
        np.testing.assert_allclose(np.delete(scales, 1), scales[0], rtol=1e-4)
        assert not np.allclose(rms(old), rms(old)[0], rtol=0.1)
    np.testing.assert_array_equal(
        params["linear"]["kernel"], variables["params"]["linear"]["kernel"]
    )


def test_a_network_without_batch_norm_stays():
    params = {"conv1": {"kernel": jnp.arange(36.0).reshape(3, 3, 2, 2)}}
    assert equalize(params, {}) == (params, {})
