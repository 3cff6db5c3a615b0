"""A language model that generates text from packed weights: a tiny one, and SmolLM2 where it is."""

import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from benchmarks import generation, gguf
from jaxquant import platform
from jaxquant.packing.ops import choice

pytestmark = pytest.mark.default_promotion
WIDTH, HIDDEN, WORDS, LAYERS, SIZE = 64, 96, 50, 2, generation.HEAD_SIZE
SHAPES = {
    "query": (WIDTH, 2 * SIZE),
    "key": (WIDTH, SIZE),
    "value": (WIDTH, SIZE),
    "out": (2 * SIZE, WIDTH),
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
TOKENS = jnp.array([7, 11, 3, 40, 3, 29])


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[-1] ** 0.5


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 10))
    layers = {name: normal(next(keys), LAYERS, *shape) for name, shape in SHAPES.items()}
    norms = {name: jnp.full((LAYERS, WIDTH), 4.0) for name in generation.NORMS}
    embedding = normal(next(keys), WORDS, WIDTH)
    return {"embedding": embedding, "layers": layers | norms, "norm": jnp.ones(WIDTH)}


@pytest.fixture(scope="module")
def packed(params):
    """As `generation.quantize` packs, but on levels that need not be found."""
    return jax.jit(pack)(params)


def pack(params):
    levels = jnp.broadcast_to(jnp.linspace(-0.3, 0.3, 16), (LAYERS, 1, 1, 16))
    layers = {
        name: leaf if name in generation.NORMS else jq.pack_array(leaf, levels, scales(leaf))
        for name, leaf in params["layers"].items()
    }
    embedding = jq.pack_array(params["embedding"], jnp.linspace(-0.4, 0.4, 256))
    return params | {"layers": layers, "embedding": embedding}


def scales(leaf):
    """Return a scale for 32 inputs of each output, in each layer."""
    stacked, inputs, outputs = leaf.shape
    numbers = stacked, inputs // 32, outputs, 1
    return jax.random.uniform(jax.random.key(1), numbers, minval=0.5, maxval=2).astype(jnp.bfloat16)


@pytest.fixture
def on_one_device(monkeypatch):
    """Products as on one device, where no weight is unpacked as a whole."""
    monkeypatch.setattr(platform, "is_one_device", lambda: True)
    monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)
    jax.clear_caches()  # of programs for several devices
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("on_one_device")
def test_packed_weights_generate_the_same_tokens(packed):
    expected, number = jax.jit(generation.generate, static_argnums=2)(jq.unpack(packed), TOKENS, 12)
    tokens, made = jq.packed(generation.generate)(packed, TOKENS, 12)
    assert tokens.tolist() == expected.tolist()
    assert int(made) == int(number) > 1
    assert len(set(tokens.tolist())) > 1


def test_nothing_is_unpacked(packed):
    assert generation.summary(packed, 8) == "rows: 1, product: 7, transposed product: 1"
    uses = jq.packed(generation.generate).report(packed, TOKENS, 12)
    assert not uses.unpacked
    assert {use.how for use in uses} == {"rows", "product", "transposed product"}


def test_the_end_stops(params, monkeypatch):
    tokens, _ = jax.jit(generation.generate, static_argnums=2)(params, TOKENS, 6)
    end = tokens.tolist()[3]
    monkeypatch.setattr(generation, "END", end)
    jax.clear_caches()  # of the program with another end
    stopped, made = jax.jit(generation.generate, static_argnums=2)(params, TOKENS, 6)
    assert int(made) == tokens.tolist().index(end)
    assert set(stopped.tolist()[int(made) :]) == {end}


@pytest.mark.parametrize("arrange", [lambda params: params, generation.unstack])
def test_the_cache_changes_nothing(params, arrange):
    params = arrange(params)
    expected = jax.jit(generation.predicted)(params, TOKENS)
    cache = generation.empty_cache(params, 9)  # places that are not reached must not be seen
    step = jax.jit(generation.step)
    for position, token in enumerate(TOKENS):
        logits, cache = step(params, cache, token[None], position)
        np.testing.assert_allclose(logits[0], expected[position], rtol=1e-4, atol=1e-4)


def test_a_list_of_packed_layers(packed):
    apart = generation.unstack(packed)
    assert all(isinstance(layer["up"], jq.PackedArray) for layer in apart["layers"])
    got, expected = (jq.packed(generation.predicted)(tree, TOKENS) for tree in (apart, packed))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# Files and tokens --------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write(path, metadata, tensors):
    """Write a GGUF file of integers and texts, and of tensors (shape, format, bytes)."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        is_text = isinstance(value, str)
        parts += [text(key), struct.pack("<I", 8 if is_text else 4)]
        parts.append(text(value) if is_text else struct.pack("<I", value))
    body = b""
    for name, (shape, kind, data) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        parts += [text(name), sizes, struct.pack("<IQ", kind, len(body))]
        body += data + b"\0" * (-len(data) % 32)
    head = b"".join(parts)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


def test_reads_every_format(tmp_path):
    floats = np.arange(6, dtype="<f4").reshape(2, 3)
    codes = np.arange(16, dtype=np.uint8) | 0xF0
    tensors = {
        "wide": ((2, 3), 0, floats.tobytes()),
        "half": ((2, 3), 1, floats.astype("<f2").tobytes()),
        "four": ((1, 32), 3, np.array([0.5, -1], "<f2").tobytes() + codes.tobytes()),
        "eight": ((32,), 8, np.float16(2).tobytes() + np.arange(-16, 16, dtype="i1").tobytes()),
    }
    write(tmp_path / "small.gguf", {"name": "small", "number": 5}, tensors)
    file = gguf.Reader(tmp_path / "small.gguf")
    assert file.metadata == {"name": "small", "number": 5}
    np.testing.assert_array_equal(file.tensors["wide"], floats)
    np.testing.assert_array_equal(file.tensors["half"], floats)
    np.testing.assert_array_equal(file.tensors["four"][0, :16], np.arange(16) / 2 - 1)
    np.testing.assert_array_equal(file.tensors["four"][0, 16:], 6.5)
    np.testing.assert_array_equal(file.tensors["eight"], np.arange(-32, 32, 2))


def test_refuses_what_is_no_gguf_file(tmp_path):
    (tmp_path / "other").write_bytes(b"GGML and more")
    with pytest.raises(ValueError, match="expected a GGUF file"):
        gguf.Reader(tmp_path / "other")


def test_tokens():
    letters = sorted(gguf._LETTERS)
    merges = ["a b", "Ġ ab", "ab ab"]
    words = ["<end>", *letters, "ab", "Ġab", "abab"]
    metadata = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] + [1] * (len(words) - 1),
    }
    tokenizer = gguf.Tokenizer(metadata)
    for line in ["abab ab", "ab<end>a  1 23\n\n é__ab'll ², \t ", ""]:
        assert tokenizer.decode(tokenizer.encode(line)) == line
    got = [words[token] for token in tokenizer.encode("abab ab<end>  12")]
    assert got == ["abab", "Ġab", "<end>", "Ġ", "Ġ", "1", "2"]


@pytest.fixture(scope="module")
def real():
    path = os.environ.get("JAXQUANT_SMOLLM2")
    if not path:
        pytest.skip("JAXQUANT_SMOLLM2 names no GGUF file of SmolLM2-135M-Instruct")
    return generation.load(Path(path))


def test_the_real_model_predicts(real, optimized):
    """As well as an implementation in PyTorch, which gives the loss 1.7132 here."""
    params, tokenizer = real
    tokens = tokenizer.encode("The capital of France is Paris. The capital of Germany is Berlin.")
    tokens = jnp.asarray(tokens)
    logits = jax.jit(generation.predicted)(params, tokens)
    perplexity, divergence = generation.measure(logits, logits, tokens)
    np.testing.assert_allclose(np.log(perplexity), 1.7132, atol=1e-3)
    assert divergence == 0


def test_the_real_model_answers(real, optimized):
    params, tokenizer = real
    prompt = jnp.asarray(
        tokenizer.encode(generation.conversation("What is the capital of France?"))
    )
    tokens, made = jax.jit(generation.generate, static_argnums=2)(params, prompt, 24)
    assert "Paris" in tokenizer.decode(tokens.tolist()[: int(made)])
