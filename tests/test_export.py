"""Rounds, alone and inside an optimizer, as programs for platforms that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq

PLATFORMS = ("cpu", "cuda", "tpu")
SHAPES = {
    "a": jax.ShapeDtypeStruct((24, 16), "float32"),
    "b": jax.ShapeDtypeStruct((16, 10), "bfloat16"),
}
PLAN = jq.mlq(SHAPES, groups=2)
TX = jq.incremental(optax.adamw(1e-2), PLAN, 3)


def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), SHAPES)


def quantize(params, state):
    return jq.quantize_round(PLAN, params, state)[:2]


def step(params, opt_state):
    grads = jax.grad(lambda p: sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in p.values()))(
        params
    )
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def scanned(params, opt_state):
    def body(carry, _):
        return step(*carry), None

    return jax.lax.scan(body, (params, opt_state), length=15)[0]


@pytest.mark.default_promotion
@pytest.mark.parametrize(
    ("function", "start"),
    [
        pytest.param(quantize, lambda p: jq.init(PLAN, p), id="quantize_round"),
        pytest.param(step, TX.init, id="incremental", marks=pytest.mark.slow),
        pytest.param(scanned, TX.init, id="scan_over_incremental", marks=pytest.mark.slow),
    ],
)
def test_it_exports_for_every_platform_and_runs_as_exported(function, start):
    args = params(), start(params())
    leaves, structure = jax.tree.flatten(args)  # NamedTuples have no serialized form
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*structure.unflatten(leaves))))
    data = jax.export.export(flat, platforms=PLATFORMS)(*leaves).serialize()
    exported = jax.export.deserialize(data)
    assert exported.platforms == PLATFORMS
    for got, expected in zip(exported.call(*leaves), flat(*leaves), strict=True):
        np.testing.assert_array_equal(got, expected)
