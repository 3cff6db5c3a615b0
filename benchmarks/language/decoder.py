"""What a few hundred steps of training make of few centroids, in a small decoder trained here.

    pip install --no-deps gensim==4.4.0                                             # its news
    python -m benchmarks.language.decoder --file decoder.safetensors

The decoder is trained first, if its file is not there: ten minutes on two cores. Then ways of
training it with few centroids, at equal bits and steps, with the float model as teacher; each way
has the best of two rates, which are relative to the spread of a kernel. Kernels alone are trained
and quantized.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxquant as jq
from benchmarks import common
from benchmarks.bits import WHOLE
from benchmarks.language import models, settings, smollm2, texts, training
from benchmarks.language.__main__ import stored

SIZES = {"width": 64, "hidden": 176, "heads": 2, "key_heads": 1}
DEPTH, WINDOW, BATCH = 5, 128, 8  # layers, characters, windows
HELD_OUT, CALIBRATING = 96, 64  # windows to measure on, batches to calibrate on
RATES = (0.008, 0.016)  # of a kernel's spread a step, at first
_STEPS, _RATE, _WARM = 2_500, 4e-3, 200  # of training the floats
_NOTES = f"""\
A decoder like SmolLM2, {DEPTH} blocks of width {SIZES["width"]}, of the characters of Python's
documentation and of Lee's news. KL is that of the float model's predictions to those of the
quantized model, a character of {HELD_OUT} held-out windows of {WINDOW}; training sees others."""


def characters() -> tuple[np.ndarray, int]:
    """Return windows [number, WINDOW] of both texts, in a random order, and how many characters."""
    text = "".join(texts.texts().values())
    _, codes = np.unique(list(text), return_inverse=True)
    windows = codes[: len(codes) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int32)
    return np.random.default_rng(0).permutation(windows), int(codes.max()) + 1


def model(words: int) -> smollm2.SmolLM2:
    """Return the decoder with random weights."""
    return smollm2.SmolLM2(words, DEPTH, rngs=nnx.Rngs(0), **SIZES)


def pretrained(words: int, windows: np.ndarray, path: Path) -> smollm2.SmolLM2:
    """Return the decoder of a file, which is made by training on windows if it is not there."""
    if not path.exists():
        params = models.by_path(_trained(model(words), windows))
        save_file({name: np.asarray(leaf) for name, leaf in params.items()}, path)
    return models.loaded(
        lambda rngs: smollm2.SmolLM2(words, DEPTH, rngs=rngs, **SIZES), load_file(path)
    )


def _trained(model: smollm2.SmolLM2, windows: np.ndarray) -> models.Params:
    """Return parameters after training to predict the next character."""
    forward, params = models.function(model), nnx.to_pure_dict(nnx.state(model))
    rates = optax.warmup_cosine_decay_schedule(0.0, _RATE, _WARM, _STEPS)
    tx = optax.adamw(rates, b2=0.99, weight_decay=0.1)

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            logits = forward(params, batch)[:, :-1]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, rng = tx.init(params), np.random.default_rng(1)
    for number in range(_STEPS):
        batch = windows[rng.choice(len(windows), 2 * BATCH, replace=False)]
        params, opt_state, value = step(params, opt_state, batch)
        if number % 250 == 0:
            print(f"step {number}: {value:.4f}", flush=True)
    return params


def task(path: Path) -> models.Task:
    """Return the decoder of a file, see `pretrained`."""
    windows, words = characters()
    held_out, others = windows[:HELD_OUT], windows[HELD_OUT:]
    own = pretrained(words, others, path)
    forward, params = jax.jit(models.function(own)), nnx.to_pure_dict(nnx.state(own))
    expected = jax.nn.log_softmax(forward(params, held_out))

    @jax.jit
    def divergence(params: models.Params) -> jax.Array:
        ours = jax.nn.log_softmax(forward(params, held_out))
        return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - ours), axis=-1))

    number = len(others) // BATCH
    batches = list(jnp.asarray(others[: number * BATCH].reshape(number, BATCH, WINDOW)))
    return models.Task(
        model=own,
        outputs="categorical",
        batches=batches[:CALIBRATING],
        columns=("KL",),
        measure=lambda params: (float(divergence(params)),),
        notes=_NOTES,
        training=batches,
        distance=models.divergence(forward),
    )


def ways(task: models.Task, k: int, steps: int) -> dict[str, Callable[..., Any]]:
    """Return the ways to put kernels on k centroids and a scale a channel, functions of a rate."""
    rules = settings.rules_of(task, k, (WHOLE, 1), scaled=True)
    seen = settings.calibration(task, 1)
    taught = functools.partial(training.distilled, task, rules, steps=steps)
    frozen = functools.partial(training.in_rounds, task, calibration=seen, rules=rules, steps=steps)
    slq = functools.partial(jq.slq, rounds=range(1, k + 1))
    return {
        "one round, calibrated": lambda rate: settings.quantized(task, rules, calibrated=1),
        "SLQ in rounds": lambda rate: frozen(slq, rate=rate),
        "MLQ in rounds": lambda rate: frozen(functools.partial(jq.mlq, groups=2), rate=rate),
        "straight through": lambda rate: taught(None, rate=rate, warm=0.0),
        "straight through, calibrated": lambda rate: taught(seen, rate=rate, warm=0.0),
        "softly, then straight through, calibrated": lambda rate: taught(seen, rate=rate),
    }


def main() -> None:
    """Print the table, each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, required=True, help="of the float decoder")
    parser.add_argument("--only", default=".*", help="ways, a regular expression of whole names")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 5], help="centroids")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    own = task(options.file)
    weights = sum(kernel.size for kernel in models.kernels(own.params).values())
    print(f"{common.machine()}\n\n{own.notes}\n", flush=True)
    rates = [f"KL at {rate}" for rate in RATES]
    print(common.markdown(["k", "way", "bits", *rates, "seconds"], []), flush=True)
    for k in options.k:
        for name, way in ways(own, k, options.steps).items():
            if not re.fullmatch(options.only, name):
                continue
            start, losses, kernels = time.perf_counter(), [], {}
            for rate in RATES[: 1 if name.startswith("one round") else None]:
                kernels = way(rate)
                new = {path: jq.unpack(kernel) for path, kernel in kernels.items()}
                losses.append(own.measure(models.replaced(own.params, new))[0])
            bits = 8 * stored(kernels) / weights
            spent = (time.perf_counter() - start) / len(losses)
            losses = [f"{loss:.4f}" for loss in losses] + [""] * (len(RATES) - len(losses))
            print(f"| {k} | {name} | {bits:.3f} | {' | '.join(losses)} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
