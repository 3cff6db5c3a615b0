"""Kernels that are trained on few centroids: straight through, with the float model as teacher."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxquant as jq
from benchmarks.language import models


def distilled(
    task: models.Task,
    rules: Sequence[jq.LayerRule],
    calibration: jq.Calibration,
    *,
    steps: int,
    rate: float,
) -> dict[str, jq.PackedArray]:
    """Return packed kernels after training that the float model teaches.

    Codebooks and scales begin as one calibrated round leaves them, weights as they were; Adam, on
    kernels and tables alike, its rate falling along a cosine to zero. All else stays as it is.

    Args:
      task: the model, with texts to train on: its batches, over and over.
      rules: of its kernels.
      calibration: of the model.
      steps: of training, a batch each.
      rate: of learning; of codebooks and scales a third of it.
    """
    params, function = task.params, task.function
    plan = jq.slq(params, rounds=(1,), rules=rules)
    _, state, _ = jq.quantize_round(plan, params, jq.init(plan, params), calibration=calibration)
    state = jq.release(state)
    trained = {
        "kernels": models.kernels(params),
        "codebooks": state.codebooks,
        "scales": state.scales,
    }
    rates = {"kernels": rate, "codebooks": rate / 3, "scales": rate / 3}
    optimizers: dict[Any, optax.GradientTransformation] = {
        name: optax.adam(optax.cosine_decay_schedule(own, steps)) for name, own in rates.items()
    }
    tx = optax.partition(optimizers, {name: name for name in rates})

    def tables(trained: dict[str, Any]) -> jq.QuantState:
        return state._replace(codebooks=trained["codebooks"], scales=trained["scales"])

    @jax.jit
    def step(trained: dict[str, Any], opt_state: Any, batch: jax.Array) -> tuple[Any, ...]:
        def loss(trained: dict[str, Any]) -> jax.Array:
            own = models.replaced(params, trained["kernels"])
            seen = jq.straight_through(plan, own, tables(trained))
            return distance(function(seen, batch), function(params, batch), task.outputs)

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(gradients, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    opt_state = tx.init(trained)
    for number in range(steps):
        batch = task.batches[number % len(task.batches)]
        trained, opt_state, _ = step(trained, opt_state, batch)
    own = models.replaced(params, trained["kernels"])
    return models.kernels(jq.pack(*jq.settle(plan, own, tables(trained))))


def distance(ours: jax.Array, theirs: jax.Array, outputs: str) -> jax.Array:
    """Return the mean divergence of predictions, or squared distance of embeddings."""
    if outputs == "normal":
        return jnp.mean(jnp.sum(jnp.square(ours - theirs), axis=-1))
    ours, theirs = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))
