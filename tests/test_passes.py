"""What layers get in a forward pass; what `find` refuses is in test_products.py."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from tests.test_products import Net, images
from train import passes


def test_moments_of_all_layers_come_from_one_pass():
    model, x = Net(), images(0)
    variables = model.init(jax.random.key(0), x)
    layers = passes.find(model, variables, x, ["z/kernel", "a/kernel"])
    got = jax.jit(lambda x: passes.input_moments(model, layers, variables, x))(x)
    assert sorted(got) == ["a/kernel", "z/kernel"]
    z = jq.input_moments(x, window=(3, 3), window_strides=2, padding=((1, 1), (1, 1)))
    np.testing.assert_allclose(got["z/kernel"], z, rtol=1e-5, atol=1e-6)
    answers = model.apply(variables, x)
    kernel, bias = (variables["params"]["a"][name] for name in ("kernel", "bias"))
    squares = jnp.einsum("in,ij,jn->n", kernel, got["a/kernel"], kernel)
    np.testing.assert_allclose(squares, jnp.mean((answers - bias[None]) ** 2, axis=0), rtol=1e-4)
