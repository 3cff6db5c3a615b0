"""Rules on paths: who is quantized, with what, and the reasons of the others."""

import collections
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.rounds.selection import natural_key


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TREE = {
    "conv_2": {"kernel": struct(3, 3, 4, 8), "bias": struct(8)},
    "conv_10": {"kernel": struct(3, 3, 8, 8), "bias": struct(8)},
    "head": {"kernel": struct(64, 10), "bias": struct(10)},
    "norm": {"scale": struct(8)},
}


def by_path(selection):
    return {layer.path: layer for layer in selection.layers}


def test_without_rules_every_matrix_with_more_weights_than_centroids_is_selected():
    tree = TREE | {"tiny": struct(4, 4), "count": struct(9, 9, dtype=jnp.int32), "x": struct(3, 6)}
    selection = jq.select(tree)
    expected = {"conv_2/kernel", "conv_10/kernel", "head/kernel", "x"}
    assert {layer.path for layer in selection.selected} == expected
    reasons = {path: layer.reason for path, layer in by_path(selection).items()}
    assert reasons["tiny"] == "16 weights, no more than 17 centroids"
    assert reasons["count"] == "dtype int32 is not floating point"
    assert reasons["norm/scale"] == "1 dimension, fewer than 2"
    assert all(layer.k == (17 if layer.reason is None else 0) for layer in selection.layers)


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = [
        jq.LayerRule("head/.*", quantize=False),
        jq.LayerRule(".*10/kernel", k=4),
        jq.LayerRule("conv_.*", bits=3, group=1),
    ]
    layers = by_path(jq.select(TREE, rules))
    assert layers["head/kernel"].reason == "left alone by rule 'head/.*'"
    assert layers["conv_10/kernel"].k == 4 and layers["conv_10/kernel"].groups is None
    assert layers["conv_2/kernel"].k == 5 and layers["conv_2/kernel"].groups == (1,)
    assert layers["conv_2/bias"].reason == "1 dimension, fewer than 2"
    assert layers["norm/scale"].reason == "no rule matches it"


def test_a_rule_may_take_biases_too():
    rules = [jq.LayerRule("head/bias", k=3, min_ndim=1)]
    layers = by_path(jq.select(TREE, rules))
    assert layers["head/bias"].reason is None and layers["head/bias"].k == 3


# Names --------------------------------------------------------------------------------------------


class Node(NamedTuple):
    b: Any


CLASHES = {
    "slash": ({"a": {"b": struct(8, 8)}, "a/b": struct(8, 8)}, "a/b", "['a']['b'] and ['a/b']"),
    "number": (
        collections.OrderedDict({0: struct(8, 8), "0": struct(8, 8)}),
        "0",
        "[0] and ['0']",
    ),
    "list": ({"a": [struct(8, 8)], "a/0": struct(4, 4)}, "a/0", "['a'][0] and ['a/0']"),
    "attribute": ({"a": Node(struct(8, 8)), "a/b": struct(8, 8)}, "a/b", "['a'].b and ['a/b']"),
    "variable": (
        nnx.State({"a": {"b": nnx.Param(jnp.ones((8, 8)))}, "a/b": nnx.Param(jnp.ones(8))}),
        "a/b",
        "['a']['b'] and ['a/b']",
    ),
}


@pytest.mark.parametrize(("tree", "path", "both"), CLASHES.values(), ids=CLASHES)
@pytest.mark.parametrize("make", [jq.select, jq.slq, jq.mlq, jq.inq])
def test_two_leaves_of_one_path_are_refused(make, tree, path, both):
    message = f"expected leaves of different paths, got two of {path!r}: {both}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tree)


# Without rules: vectors of stacked layers are no matrices -----------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.RMSNorm()(x)), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=20)
        x, _ = scan(name="blocks")(nn.Embed(64, 16)(tokens), None)
        return nn.Dense(64)(nn.LayerNorm()(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(16, rngs=rngs)


class NnxDecoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 16, rngs=rngs)
        self.blocks = nnx.vmap(NnxBlock)(nnx.Rngs(0).split(20))
        self.head = nnx.Linear(16, 64, rngs=rngs)


STACKED = {
    "linen": (
        lambda: jax.eval_shape(Decoder().init, jax.random.key(0), jnp.zeros((2, 8), int))["params"],
        {
            "Dense_0/kernel",
            "Embed_0/embedding",
            "blocks/Dense_0/kernel",
            *(
                f"blocks/MultiHeadDotProductAttention_0/{name}/kernel"
                for name in ("key", "out", "query", "value")
            ),
        },
    ),
    "nnx": (
        lambda: NnxDecoder(nnx.Rngs(0)),
        {"embed/embedding", "blocks/dense/kernel", "head/kernel"},
    ),
    "dictionaries": (
        lambda: {
            "embed": struct(64, 16),
            "layers": {"w": struct(20, 16, 32), "b": struct(20, 32), "g": struct(20, 16)},
            "attn_norm": {"weight": struct(20, 16)},
            "head": struct(16, 64),
        },
        {"embed", "layers/w", "head"},
    ),
    "one dictionary": (
        lambda: {
            "embed": struct(64, 16),
            "w_up": struct(20, 16, 32),
            "b_up": struct(20, 32),
            "ln_1": struct(20, 16),
            "head": struct(16, 64),
            "final": struct(16),
        },
        {"embed", "w_up", "head"},
    ),
    "haiku": (
        lambda: {
            "layer/~/linear": {"w": struct(20, 16, 32), "b": struct(20, 32)},
            "layer/~/layer_norm": {"scale": struct(20, 16), "offset": struct(20, 16)},
        },
        {"layer/~/linear/w"},
    ),
    "attention, not stacked": (
        lambda: {
            "query": struct(16, 2, 8),
            "out": struct(2, 8, 16),
            "up": struct(16, 64),
            "gate": struct(16, 8),
        },
        {"query", "out", "up", "gate"},
    ),
    "windows, not stacked": (
        lambda: {
            "first": struct(3, 3, 3, 16),
            "second": struct(3, 3, 16, 32),
            "color": struct(3, 16),
            "normal_mixture": struct(16, 32),
        },
        {"first", "second", "color", "normal_mixture"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), STACKED.values(), ids=STACKED)
def test_without_rules_vectors_of_stacked_layers_are_left_alone(make, expected):
    selection = jq.select(make())
    assert {layer.path for layer in selection.selected} == expected
    for layer in selection.layers:
        assert layer.reason is None or len(layer.shape) < 2 or layer.reason.split(", by its ")[1]


def test_the_report_says_why_and_a_rule_says_otherwise():
    stack = {"w": jnp.ones((20, 16, 32)), "g": jnp.ones((20, 16)), "scale": jnp.ones((20, 16))}
    plan = jq.slq(stack, bits=2)
    for own in (plan, None):
        report = jq.report(stack, jq.init(plan, stack), plan=own)
        assert {layer.path: layer.reason for layer in report.layers} == {
            "g": "a vector for each of 20 stacked layers, by its shape",
            "scale": "a bias or a scale, by its name",
            "w": None,
        }
    rules = [jq.LayerRule(".*")]
    assert len(jq.select(stack, rules).selected) == 3


def test_a_partial_match_is_none():
    with pytest.raises(ValueError, match="'conv' is not; the leaves are conv_10/bias, conv_10/k"):
        jq.select(TREE, [jq.LayerRule("conv")])


def test_a_rule_that_another_shadows_is_an_error_naming_it():
    rules = [jq.LayerRule(".*"), jq.LayerRule("head/kernel", bits=8)]
    message = "expected every rule to be the first to match some leaf, but 'head/kernel' is not"
    with pytest.raises(ValueError, match=message):
        jq.select(TREE, rules)


def test_an_axis_gives_every_slice_a_codebook():
    rules = [jq.LayerRule("conv_2/kernel", axis=-1, bits=3, group=range(8))]
    layer = by_path(jq.select(TREE, rules))["conv_2/kernel"]
    assert (layer.numbers, layer.slices, layer.block) == ((1, 1, 1, 8), 8, (3, 3, 4, 1))
    assert layer.groups == tuple(range(8))
    small = by_path(jq.select(TREE, [jq.LayerRule("head/kernel", axis=0, bits=5)]))
    assert small["head/kernel"].reason == "10 weights, no more than 17 centroids"


def test_depth_order_counts_numbers():
    paths = [layer.path for layer in jq.select(TREE).by_depth()]
    assert paths == ["conv_2/kernel", "conv_10/kernel", "head/kernel"]


def test_a_rules_depth_comes_before_names():
    rules = [
        jq.LayerRule("conv_2/.*", depth=1),
        jq.LayerRule("head/.*", depth=-1),
        jq.LayerRule(".*"),
    ]
    paths = [layer.path for layer in jq.select(TREE, rules).by_depth()]
    assert paths == ["head/kernel", "conv_10/kernel", "conv_2/kernel"]
    rules = [jq.LayerRule("conv_.*", depth=1), jq.LayerRule(".*")]
    paths = [layer.path for layer in jq.select(TREE, rules).by_depth()]
    assert paths == ["head/kernel", "conv_2/kernel", "conv_10/kernel"]


def test_layer_groups_follow_the_depth_of_rules():
    rules = [jq.LayerRule("conv_.*", depth=1), jq.LayerRule(".*")]
    layers = by_path(jq.mlq(TREE, groups=3, rules=rules).selection)
    groups = {path: layer.groups for path, layer in layers.items() if layer.reason is None}
    assert groups == {"head/kernel": (0,), "conv_2/kernel": (1,), "conv_10/kernel": (2,)}


@given(st.lists(st.text("ab/_0123456789²", max_size=8)))
def test_natural_keys_compare(paths):
    assert sorted(sorted(paths), key=natural_key) == sorted(paths, key=natural_key)


def test_structs_and_arrays_select_alike_and_selections_hash():
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), TREE)
    one, other = jq.select(TREE), jq.select(arrays)
    assert one == other and hash(one) == hash(other)
    assert one == jq.select(jax.tree.map(np.asarray, arrays))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "("}, r"expected a regular expression, got '\('"),
        ({"pattern": None}, "expected a regular expression, got None"),
        ({"pattern": "a", "bits": 2, "k": 3}, "rule 'a': expected bits or k, got both"),
        ({"pattern": "a", "bits": 0}, "expected bits to be 1 to 16, got 0"),
        ({"pattern": "a", "k": 0}, "rule 'a': expected k to be at least 1, got 0"),
        ({"pattern": "a", "depth": 0.5}, "rule 'a': expected depth to be an integer, got 0.5"),
        ({"pattern": "a", "depth": None}, "rule 'a': expected depth to be an integer, got None"),
        ({"pattern": "a", "axis": (0, 2)}, r"rule 'a': expected axis to be an integer, got \(0, 2"),
        ({"pattern": "a", "axis": True}, "rule 'a': expected axis to be an integer, got True"),
        ({"pattern": "a", "axis": np.True_}, "rule 'a': expected axis to be an integer, got"),
        ({"pattern": "a", "k": True}, "rule 'a': expected k to be an integer, got True"),
        ({"pattern": "a", "k": "3"}, "rule 'a': expected k to be an integer, got '3'"),
        ({"pattern": "a", "min_ndim": 1.0}, "rule 'a': expected min_ndim to be an integer"),
        ({"pattern": "a", "group": "01"}, "rule 'a': expected group to be an integer, or one for"),
        ({"pattern": "a", "group": (0, 1.5)}, "rule 'a': expected group to be an integer, or one"),
        ({"pattern": "a", "group": False}, "rule 'a': expected group to be an integer, or one"),
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jq.LayerRule(**arguments)


@pytest.mark.parametrize("integer", [np.int64, np.int8, np.uint32, np.array, jnp.int32])
def test_integers_of_any_type_make_the_same_rule(integer):
    def rule(integer):
        return jq.LayerRule(
            "w", k=integer(3), axis=integer(0), depth=integer(1), min_ndim=integer(2), group=groups
        )

    groups: Any = range(4)
    expected = rule(int)
    groups = [integer(i) for i in range(4)]
    assert rule(integer) == expected and hash(rule(integer)) == hash(expected)
    groups = np.arange(4)
    assert rule(integer) == expected
    tree = {"w": struct(4, 8)}
    assert jq.select(tree, [rule(integer)]) == jq.select(tree, [expected])
    assert jq.select(tree, k=integer(3)) == jq.select(tree, k=3)


@pytest.mark.parametrize("k", [0, True, 2.5, "3", None])
def test_a_number_of_centroids_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match="expected k to be an integer of at least 1, got"):
        jq.select(TREE, k=k)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            jq.LayerRule("head/kernel", axis=2),
            r"head/kernel: rule 'head/kernel' expected an axis 2, got \(64, 10\)",
        ),
        (jq.LayerRule("head/kernel", axis=-3), "expected an axis -3"),
        (
            jq.LayerRule("head/kernel", axis=1, group=(0, 1)),
            r"head/kernel: rule 'head/kernel' expected 10 groups >= 0, got \(0, 1\)",
        ),
        (jq.LayerRule("head/kernel", group=-1), r"expected 1 groups >= 0, got \(-1,\)"),
    ],
)
def test_rules_that_do_not_fit_a_leaf_name_both(rule, message):
    with pytest.raises(ValueError, match=message):
        jq.select(TREE, [rule])
