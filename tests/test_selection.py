"""Rules on paths: who is quantized, with what, and the reasons of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.selection import natural_key


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
    assert (layer.axis, layer.slices, layer.slice_shape) == (3, 8, (3, 3, 4))
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
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jq.LayerRule(**arguments)


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
