r"""Cost of `jaxquant.freeze_quantized` in a training step.

    python -m benchmarks.freeze                      # about one minute on two cores

First table: one training step (forward, backward, update) of a small convolutional network, batch
of 128 images of 32 x 32 x 3, with `freeze_quantized` last in the chain against the same without it.
Half of each kernel is frozen. The target is a ratio of at most 1.03.

Second table: the update alone of one matrix of 4M weights, without a network around it: the worst
case, where the optimizer is all there is.

The two programs run in turns, A B B A, in one process; the ratio is the median over the pairs of
neighbors, so that a slow moment of the machine meets both.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks import common
from jaxquant.rounds.transforms import freeze_quantized

OPTIMIZERS = {
    "sgd, momentum 0.9": functools.partial(optax.sgd, 1e-3, momentum=0.9),
    "adamw": functools.partial(optax.adamw, 1e-3),
}


class Network(nn.Module):
    """Four convolutions and a linear layer: 0.12M weights."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map [batch, 32, 32, 3] images to [batch, 10] logits."""
        x = images
        for features, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), (stride, stride))(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def training_step(
    tx: optax.GradientTransformationExtraArgs, **extra: Any
) -> tuple[Callable[..., Any], Any]:
    """Return a jitted step and what it carries from step to step."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (128, 32, 32, 3))
    labels = jax.random.randint(key, (128,), 0, 10)
    network = Network()
    params = network.init(key, images)["params"]

    def loss_fn(params: Any) -> jax.Array:
        logits: Any = network.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, extra: dict[str, Any]) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    frozen = {name: half_frozen(params) for name in extra}
    return lambda carry: step(carry, frozen), (params, tx.init(params))


def update_alone(
    tx: optax.GradientTransformationExtraArgs, **extra: Any
) -> tuple[Callable[..., Any], Any]:
    """Return a jitted update of one large matrix and what it carries from step to step."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (2048, 2048))}
    grads = jax.tree.map(lambda p: p * 1e-3, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, grads: Any, extra: dict[str, Any]) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    frozen = {name: half_frozen(params) for name in extra}
    return lambda carry: step(carry, grads, frozen), (params, tx.init(params))


def half_frozen(params: Any) -> Any:
    """Return a mask of the larger weights of each kernel, and a scalar False for the others."""
    return jax.tree.map(
        lambda p: jnp.abs(p) > jnp.median(jnp.abs(p)) if p.ndim >= 2 else jnp.array(False), params
    )


def compare(make: Callable[..., Any], optimizer: Callable[[], Any], pairs: int) -> list[str]:
    """Time both programs in turns; return milliseconds without, with, and their ratio."""
    plain = make(optax.with_extra_args_support(optimizer()))
    masked = make(optax.chain(optimizer(), freeze_quantized()), frozen=True)
    programs = [list(plain), list(masked)]

    def run(which: int) -> float:
        step, carry = programs[which]
        start = time.perf_counter()
        programs[which][1] = jax.block_until_ready(step(carry))
        return time.perf_counter() - start

    for _ in range(5):
        run(0)
        run(1)
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        first = i % 2
        taken = {first: run(first), 1 - first: run(1 - first)}
        times.append((taken[0], taken[1]))
    ratios = sorted(after / before for before, after in times)
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    return [
        f"{statistics.median(before for before, _ in times) * 1e3:.2f}",
        f"{statistics.median(after for _, after in times) * 1e3:.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
    ]


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    print(common.machine())
    header = ["optimizer", "ms without", "ms with", "ratio (median)", "middle half of the ratios"]
    for title, make in {
        "Training step of a small convolutional network, batch 128": training_step,
        "Update alone, 4M weights": update_alone,
    }.items():
        rows = [[name, *compare(make, tx, args.pairs)] for name, tx in OPTIMIZERS.items()]
        print(f"\n### {title}, {args.pairs} pairs\n\n{common.markdown(header, rows)}", flush=True)


if __name__ == "__main__":
    main()
