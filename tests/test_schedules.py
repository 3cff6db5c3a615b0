"""The tables: single level, multiple levels in every order, the network ranking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.clustering.options import Clustering
from jaxquant.rounds.schedules import EQUALS, ORDERS

DEEP = {f"layer_{i}": jax.ShapeDtypeStruct((8, 8), jnp.float32) for i in range(12)}
THREE = {name: DEEP[name] for name in ("layer_0", "layer_1", "layer_2")}


def groups(plan):
    return {layer.path: layer.groups for layer in plan.selection.selected}


def test_slq_at_five_bits_is_the_column_of_the_paper():
    plan = jq.slq(DEEP)
    expected = np.float32([[5 / 17], [9 / 17], [13 / 17], [15 / 17], [1]])
    np.testing.assert_array_equal(plan.schedule, expected)
    assert plan.schedule.dtype == np.float32 and plan.num_rounds == 5
    assert set(groups(plan).values()) == {(0,)}


@pytest.mark.parametrize(
    ("order", "reverse", "table"),
    [
        (
            "boundaries_first",
            False,
            [[2, 0, 0], [2, 2, 0], [2, 2, 2], [3, 2, 2], [3, 3, 2], [3] * 3],
        ),
        (
            "boundaries_first",
            True,
            [[0, 0, 2], [0, 2, 2], [2, 2, 2], [2, 2, 3], [2, 3, 3], [3] * 3],
        ),
        ("boundaries_together", False, [[2, 2, 2], [3, 2, 2], [3, 3, 2], [3] * 3]),
        ("boundaries_together", True, [[2, 2, 2], [2, 2, 3], [2, 3, 3], [3] * 3]),
        ("layer_by_layer", False, [[2, 0, 0], [3, 0, 0], [3, 2, 0], [3, 3, 0], [3, 3, 2], [3] * 3]),
        ("layer_by_layer", True, [[0, 0, 2], [0, 0, 3], [0, 2, 3], [0, 3, 3], [2, 3, 3], [3] * 3]),
    ],
)
def test_mlq_tables_of_three_groups(order, reverse, table):
    plan = jq.mlq(THREE, order=order, reverse=reverse)
    np.testing.assert_allclose(plan.schedule, np.array(table) / 3, rtol=1e-6)


def test_groups_are_contiguous_in_natural_depth():
    got = groups(jq.mlq(DEEP, groups=3))
    assert [got[f"layer_{i}"] for i in range(12)] == [(i // 4,) for i in range(12)]


@pytest.mark.parametrize("order", ORDERS)
@given(
    bits=st.integers(1, 6),
    count=st.integers(1, 12),
    reverse=st.booleans(),
    layers=st.integers(1, 12),
    equal=st.sampled_from(EQUALS),
)
def test_every_plan_keeps_its_invariants(order, bits, count, reverse, layers, equal):
    params = {name: DEEP[name] for name in list(DEEP)[:layers]}
    depth = {"groups": min(count, layers), "equal": equal, "reverse": reverse}
    plan = jq.mlq(params, order=order, bits=bits, **({} if order == "network" else depth))
    assert (np.diff(plan.schedule, axis=0) >= 0).all() and (plan.schedule[-1] == 1).all()
    used = sorted({g for layer in plan.selection.selected for g in layer.groups})
    assert equal == "weights" or used == list(range(plan.schedule.shape[1]))
    grows = np.diff(np.pad(plan.schedule[:, used], ((1, 0), (0, 0))), axis=0) > 0
    assert grows.any(axis=1).all()  # no idle round


def test_the_boundary_share_is_all_clusters_but_one():
    plan = jq.mlq(THREE, bits=3)
    np.testing.assert_allclose(plan.schedule[0], [4 / 5, 0, 0])


def test_the_network_order_is_one_column_of_the_given_shares():
    plan = jq.mlq(DEEP, order="network")
    np.testing.assert_allclose(plan.schedule[:, 0], [0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
    assert plan.network and set(groups(plan).values()) == {(0,)}
    assert not jq.mlq(DEEP).network


def test_groups_of_the_rules_win_and_need_no_more():
    rules = [jq.LayerRule("layer_0", group=1), jq.LayerRule("layer_1", group=0)]
    two = {name: DEEP[name] for name in ("layer_0", "layer_1")}
    plan = jq.mlq(two, rules=rules)
    assert groups(plan) == {"layer_0": (1,), "layer_1": (0,)} and plan.schedule.shape == (4, 2)
    mixed = jq.mlq(THREE, rules=[*rules, jq.LayerRule(".*")], groups=3)
    assert groups(mixed)["layer_2"] == (2,)


def test_groups_of_equal_weights_split_the_wide_layers():
    widths = [16] * 6 + [64] * 3  # 256 weights each, then 4096: an eighth of a group, then three
    params = {f"layer_{i}": jax.ShapeDtypeStruct((n, n), jnp.float32) for i, n in enumerate(widths)}
    plan = jq.mlq(params, groups=3, equal="weights")
    assert [g for (g,) in groups(plan).values()] == [0] * 6 + [0, 1, 2]
    by_layers = jq.mlq(params, groups=3)
    assert [g for (g,) in groups(by_layers).values()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_layer_that_fills_several_groups_leaves_no_idle_round():
    params = {
        name: jax.ShapeDtypeStruct((n, 8), jnp.float32)
        for name, n in zip("abc", (8, 80, 8), strict=True)
    }
    plan = jq.mlq(params, groups=3, equal="weights", order="layer_by_layer")
    assert groups(plan) == {"a": (0,), "b": (1,), "c": (2,)}
    plan = jq.mlq({"a": params["a"], "b": params["b"]}, groups=2, equal="weights")
    assert groups(plan) == {"a": (0,), "b": (1,)}
    first = {"a": params["b"], "b": params["c"], "c": params["a"]}  # "a" fills both first groups
    plan = jq.mlq(first, groups=3, equal="weights")
    assert groups(plan) == {"a": (1,), "b": (2,), "c": (2,)}
    np.testing.assert_allclose(
        plan.schedule, [[1, 2 / 3, 0], [1, 2 / 3, 2 / 3], [1, 1, 2 / 3], [1, 1, 1]], rtol=1e-6
    )


def test_slq_has_one_group_whatever_the_rules_say():
    plan = jq.slq(DEEP, rules=[jq.LayerRule(".*", group=2)])
    assert plan.schedule.shape == (5, 1) and set(groups(plan).values()) == {(0,)}


def test_stacked_layers_are_spread_over_the_groups():
    params = {"stack": jax.ShapeDtypeStruct((6, 8, 8), jnp.float32)}
    plan = jq.mlq(params, rules=[jq.LayerRule("stack", axis=0)])
    assert groups(plan)["stack"] == (0, 0, 1, 1, 2, 2)


def test_equal_plans_are_equal_and_hash_alike():
    one, other = jq.slq(DEEP, zero=True), jq.slq(DEEP, zero=True)
    assert one == other and hash(one) == hash(other) and one != jq.slq(DEEP)
    assert jax.jit(lambda plan: jnp.int32(plan.num_rounds), static_argnums=0)(one) == 5


def test_options_of_the_clustering_are_kept():
    for make in (jq.slq, jq.mlq):
        plan = make(DEEP, init="power_of_two", iterations=10, zero=True, partition="index")
        assert plan.clustering == Clustering(init="power_of_two", iterations=10, zero=True)
        assert plan.partition == "index"


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (jq.mlq, {"equal": "bytes"}, "expected equal to be one of .* got 'bytes'"),
        (jq.slq, {"rounds": ()}, r"expected rounds that grow from 1, got \(\)"),
        (jq.slq, {"rounds": (5, 5, 17)}, "expected rounds that grow from 1"),
        (jq.slq, {"rounds": (0, 17)}, "expected a round to be an integer of at least 1, got 0"),
        (jq.slq, {"bits": 0}, "expected bits to be 1 to 16, got 0"),
        (jq.slq, {"partition": "size"}, "expected partition to be one of .* got 'size'"),
        (jq.slq, {"init": "best"}, "expected init to be one of optimal, .* got 'best'"),
        (jq.slq, {"init": None}, "expected init to be one of optimal, .* got None"),
        (
            jq.slq,
            {"iterations": -1},
            "expected iterations to be an integer of at least 0, got -1",
        ),
        (
            jq.slq,
            {"rules": [jq.LayerRule(".*", k=4)], "init": "power_of_two"},
            "layer_0: expected an odd k for init='power_of_two', got 4",
        ),
        (
            jq.slq,
            {"rules": [jq.LayerRule(".*", quantize=False)]},
            "expected at least one leaf to quantize, got none .layer_0: left alone by rule",
        ),
        (jq.mlq, {"order": "depth"}, "expected order to be one of .* got 'depth'"),
        (jq.mlq, {"groups": 0}, "expected groups to be an integer of at least 1, got 0"),
        (jq.mlq, {"groups": 1.5}, "expected groups to be an integer of at least 1, got 1.5"),
        (jq.mlq, {"groups": 13}, "expected at most as many groups as layers, 12, got groups=13"),
        (jq.mlq, {"order": "network", "rounds": (0.5,)}, "shares in .0, 1. and a last row of ones"),
        (
            jq.mlq,
            {"order": "network", "rounds": (0.5, 0.4, 1)},
            "shares that never fall from round",
        ),
        (jq.mlq, {"order": "network", "rounds": (-0.5, 1)}, "expected shares in .0, 1."),
        (jq.mlq, {"order": "network", "rounds": ()}, r"expected a schedule .rounds, groups., got"),
    ],
)
def test_bad_arguments_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(DEEP, **arguments)


def test_a_plan_of_ones_own_is_checked():
    plan = jq.slq(DEEP)
    with pytest.raises(
        ValueError,
        match=r"layer_0: expected groups below 1, one for each of 1 slices, got \(3,\)",
    ):
        layers = (dataclasses.replace(plan.selection.layers[0], groups=(3,)),)
        dataclasses.replace(plan, selection=jq.Selection(layers))
    with pytest.raises(ValueError, match="a last row of ones"):
        dataclasses.replace(plan, table=((0.5,),))
    with pytest.raises(
        ValueError, match=r"expected at least one leaf to quantize, got none \(no lea"
    ):
        jq.slq({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clustering": {"init": "linear"}}, "expected clustering to be a Clustering, got {"),
        ({"clustering": Clustering(init="inq"), "bits": 1}, "layer_0: expected an odd k"),
        ({"clustering": Clustering(cells=16)}, "layer_0: expected cells to be .* at least 17"),
        ({"partition": "size"}, "expected partition to be one of"),
        ({"shares_of": "layers"}, "expected shares_of clusters or weights, got 'layers'"),
        ({"table": ((0.5,), (0.4,), (1.0,))}, "expected shares that never fall"),
        ({"table": ((0.5,), (0.4, 1.0))}, "expected a schedule .rounds, groups., got"),
        ({"table": "abc"}, "expected a schedule .rounds, groups., got 'abc'"),
        ({"table": ((float("nan"),), (1.0,))}, "expected shares in .0, 1."),
        ({"table": ((1.0, 1.0),), "network": True}, "expected one group where all layers"),
        ({"selection": jq.Selection(())}, "expected at least one leaf to quantize"),
    ],
)
def test_a_plan_changed_by_hand_is_checked_at_once(changes, message):
    plan = jq.slq(DEEP, bits=changes.pop("bits", 5))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "ternry"}, "expected init to be one of optimal, .* got 'ternry'"),
        ({"iterations": 1.5}, "expected iterations to be an integer of at least 0, got 1.5"),
        ({"bins": 0}, "expected bins to be an integer of at least 1, got 0"),
    ],
)
def test_options_of_the_clustering_are_checked(options, message):
    for make in (jq.slq, jq.mlq, jq.inq, lambda _, **options: Clustering(**options)):
        with pytest.raises(ValueError, match=message):
            make(DEEP, **options)


def test_a_table_by_hand_may_be_an_array():
    clustering = Clustering(iterations=np.int64(3))
    plan = dataclasses.replace(jq.slq(DEEP), table=np.array([[0.5], [1.0]]), clustering=clustering)
    assert plan == dataclasses.replace(plan) and hash(plan) == hash(dataclasses.replace(plan))
    assert plan.table == ((0.5,), (1.0,)) and type(plan.clustering.iterations) is int


@pytest.mark.parametrize(
    ("order", "option"),
    [
        ("network", {"groups": 2}),
        ("network", {"equal": "weights"}),
        ("network", {"reverse": True}),
        *((order, {"rounds": (0.5, 1.0)}) for order in ORDERS if order != "network"),
    ],
)
def test_options_that_an_order_does_not_read_are_refused(order, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"expected no {name} for order='{order}', got"):
        jq.mlq(DEEP, order=order, **option)


@pytest.mark.parametrize("make", [jq.slq, jq.mlq, jq.inq])
def test_more_centroids_than_can_be_packed_are_refused_by_the_leaf(make):
    tree = {name: jax.ShapeDtypeStruct((40, 40), "float32") for name in "abc"}
    with pytest.raises(ValueError, match=r"a: expected 1 to 256 centroids, .* packed, got 257"):
        make(tree, bits=9)


def test_slq_leaves_out_rounds_in_which_no_layer_freezes_a_cluster():
    tree = {"a": jax.ShapeDtypeStruct((9, 9), "float32")}
    five = jq.slq(tree, bits=3)  # shares of 17 applied to 5 clusters: 1, 3, 4, 4, 5
    np.testing.assert_array_equal(np.floor(five.schedule[:, 0] * 5 + 0.5), [1, 3, 4, 5])
    assert jq.slq(tree, bits=5).num_rounds == 5
    assert jq.slq(tree, bits=3, rounds=(1, 2, 3, 4, 5)).num_rounds == 5
    assert jq.slq(tree, bits=1).schedule.tolist() == [[np.float32(9 / 17)], [1.0]]


def test_mlq_keeps_the_channels_of_one_layer_in_one_group():
    tree = {name: jax.ShapeDtypeStruct((4, 40), "float32") for name in ("a", "b")}
    channels = jq.mlq(tree, groups=2, rules=[jq.LayerRule(".", axis=-2, k=3)])
    stacked = {layer.path: layer.groups for layer in channels.selection.layers}
    assert stacked == {"a": (0, 0, 1, 1), "b": (0, 0, 1, 1)}  # axis 0: a stack of layers
    columns = jq.mlq(tree, groups=2, rules=[jq.LayerRule(".", axis=1, k=3)])
    assert {layer.path: set(layer.groups or ()) for layer in columns.selection.layers} == {
        "a": {0},
        "b": {1},
    }
