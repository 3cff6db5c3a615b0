"""Gradients in parts of the batch are those of the whole batch."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import mostly_slow
from train import layers
from train.gradients import in_parts

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="elsewhere nothing is in parts"
)


class Net(nn.Module):
    """A convolution whose inputs are as large as the test wants, and a tiny one."""

    stride: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        options = {"stride": self.stride, "padding": 1, "use_bias": self.use_bias}
        x = layers.conv(8, 3, "large", **options)(x)
        return layers.conv(4, 3, "small")(nn.relu(x[:, :3, :3]))


def gradients(model, variables, x, *, parts):
    def loss(variables, x):
        if not parts:
            return jnp.sum(jnp.sin(model.apply(variables, x)))
        with nn.intercept_methods(in_parts):
            return jnp.sum(jnp.sin(model.apply(variables, x)))

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "stride", "use_bias", "parts"),
    mostly_slow(
        [(24, 1, False, 8), (15, 2, True, 5), (17, 1, True, 1), (2, 1, False, 1)], (15, 2, True, 5)
    ),
)
def test_gradients_in_parts_are_those_of_the_whole_batch(batch, stride, use_bias, parts):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, 31, 32, 32))  # more than 2**18 bytes for three images
    model = Net(stride, use_bias)
    variables = model.init(keys[1], x)
    plain, ours = (gradients(model, variables, x, parts=on) for on in (False, True))
    (loss, plain_grad), (our_loss, our_grad) = plain(variables, x), ours(variables, x)
    np.testing.assert_allclose(our_loss, loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), our_grad, plain_grad
    )
    programs = [jax.jit(f).lower(variables, x).compile().as_text() for f in (plain, ours)]
    count = [len(re.findall(r" convolution\(", program)) for program in programs]
    assert count[1] - count[0] == parts - 1  # the large layer's kernel, not the small one's
