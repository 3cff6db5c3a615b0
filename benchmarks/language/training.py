"""Kernels that are trained on few centroids, with the float model as teacher."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxquant as jq
from benchmarks.language import models

TEMPERATURES, WARM = (0.5, 0.02), 0.7  # at the start and at the end of a share of the steps
_TABLES = 0.02  # of the rate of kernels: a table moves the borders between all its clusters
_LANDING = 4  # updates of the last round, which put weights on the codebook bit for bit


def distilled(
    task: models.Task,
    rules: Sequence[jq.LayerRule],
    calibration: jq.Calibration | None,
    *,
    steps: int,
    rate: float,
    warm: float = WARM,
    begun: float = 0.0,
) -> dict[str, jq.PackedArray]:
    """Return packed kernels after training that the float model teaches.

    Codebooks and scales begin as one calibrated round leaves them. The loss sees kernels softly
    quantized at a temperature that falls, then as they will be. Adam, its rate falling along a
    cosine to zero; steps are relative to the spread of a kernel, of a codebook, and to a scale. All
    else stays as it is.

    Args:
      task: the model.
      rules: of its kernels.
      calibration: of the model; None starts from the codebooks of the weights alone.
      steps: of training, a batch each.
      rate: of learning.
      warm: share of the steps at a temperature above 0; 0 trains straight through.
      begun: how far on the way to what that round makes of them weights begin, 0 where they were.
    """
    params = task.params
    plan = jq.slq(params, rounds=(1,), rules=rules)
    rounded, first, _ = jq.quantize_round(
        plan, params, jq.init(plan, params), calibration=calibration
    )
    first = jq.release(first)
    trained = {
        "kernels": jax.tree.map(
            lambda old, new: (1 - begun) * old + begun * new,
            *(models.kernels(tree) for tree in (params, rounded)),
        ),
        "codebooks": first.codebooks,
        "scales": jax.tree.map(lambda scale: scale.astype(jnp.float32), first.scales),
    }
    sizes = {
        "kernels": jax.tree.map(jnp.std, models.kernels(params)),
        "codebooks": jax.tree.map(lambda x: _TABLES * jnp.std(x), trained["codebooks"]),
        "scales": jax.tree.map(lambda x: _TABLES * x, trained["scales"]),
    }
    tx = _optimizer(rate, steps, sizes)

    def tables(trained: dict[str, Any]) -> jq.QuantState:
        """Return the tables as they are stored: the loss sees scales rounded."""
        narrow = jax.tree.map(lambda x, old: x.astype(old.dtype), trained["scales"], first.scales)
        return first._replace(codebooks=trained["codebooks"], scales=narrow)

    @jax.jit
    def step(trained: Any, opt_state: Any, batch: jax.Array, temperature: Any) -> tuple[Any, ...]:
        def loss(trained: dict[str, Any]) -> jax.Array:
            own = models.replaced(params, trained["kernels"])
            seen = jq.straight_through(plan, own, tables(trained), temperature=temperature)
            return task.distance(seen, params, batch)

        updates, opt_state = tx.update(jax.grad(loss)(trained), opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    opt_state = tx.init(trained)
    for number, batch in enumerate(_batches(task, steps)):
        trained, opt_state = step(trained, opt_state, batch, temperature(number / steps, warm))
    own = models.replaced(params, trained["kernels"])
    return models.kernels(jq.pack(*jq.settle(plan, own, tables(trained))))


def temperature(done: float, warm: float = WARM) -> float:
    """Return the temperature after a share of the steps is done."""
    first, last = TEMPERATURES
    return first * (last / first) ** (done / warm) if done < warm else 0.0


def in_rounds(
    task: models.Task,
    make: Callable[..., jq.Plan],
    rules: Sequence[jq.LayerRule],
    calibration: jq.Calibration,
    *,
    steps: int,
    rate: float,
) -> dict[str, jq.PackedArray]:
    """Return packed kernels whose clusters froze in calibrated rounds, training between them.

    Args:
      task: the model.
      make: of the plan, for parameters and rules; its first round is before the first step, its
        last behind the last, when nothing is left to train.
      rules: of its kernels.
      calibration: of the model.
      steps: of training, a batch each.
      rate: of learning; in each round it falls along a cosine to zero.
    """
    params, whole = task.params, task.params
    plan = make(params, rules=rules)
    own = steps // (plan.num_rounds - 1)
    inner = _optimizer(rate, own, jax.tree.map(jnp.std, params))
    tx = jq.incremental(inner, plan, own, restart=True)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, ...]:
        # All else stays as it is.
        gradients = jax.grad(task.distance)(params, whole, batch)
        still = jax.tree.map(jnp.zeros_like, gradients)
        gradients = models.replaced(still, models.kernels(gradients))
        updates, opt_state = tx.update(gradients, opt_state, params, calibration=calibration)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for batch in _batches(task, own * (plan.num_rounds - 1) + _LANDING):
        params, opt_state = step(params, opt_state, batch)
    return models.kernels(jq.pack(params, jq.quant_state(opt_state)))


def _optimizer(rate: float, steps: int, sizes: Any) -> optax.GradientTransformation:
    """Return Adam, its rate falling along a cosine, with steps relative to sizes."""
    return optax.chain(
        optax.adam(optax.cosine_decay_schedule(rate, steps)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, sizes)),
    )


def _batches(task: models.Task, steps: int) -> list[jax.Array]:
    return [task.training[number % len(task.training)] for number in range(steps)]
