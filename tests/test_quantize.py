"""Rounds: the released code followed step by step, freezing, groups, slices, trees, transforms."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from benchmarks.common import collective_sizes
from jaxquant.clustering.codebooks import bounds
from jaxquant.clustering.kmeans import kmeans
from jaxquant.rounds.sharing import Codebook, join_clusters, share_centroids, with_equals
from tests.cases import mostly_further, mostly_slow

one_round = jax.jit(jq.quantize_round, static_argnums=0)
RELEASED = {"init": "power_of_two", "iterations": 10, "zero": True, "partition": "index"}


# Compiles without the dynamic program: for laws that do not depend on how good the clusters are.
FAST = {"init": "quantile"}


def normal(shape, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
    return jnp.asarray(values, dtype)


def drift(params, state, seed, scale=0.004):
    """Re-training, as far as quantization can tell: every free weight moves at random."""
    rng = np.random.default_rng(seed)

    def move(w, frozen):
        noise = jnp.asarray(rng.normal(0, scale, w.shape).astype(np.float32)).astype(w.dtype)
        return jnp.where(frozen, w, w + noise) if frozen.ndim else w

    return jax.tree.map(move, params, state.frozen)


def run(plan, params, *, rounds=None, seed=None, **options):
    """All rounds, with drift before each but the first if there is a seed: list of results."""
    state, results = jq.init(plan, params), []
    for r in range(plan.num_rounds if rounds is None else rounds):
        if seed is not None and r:
            params = drift(params, state, seed + r)
        params, state, info = one_round(plan, params, state, **options)
        results.append((params, state, info))
    return results


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# Worked by hand -----------------------------------------------------------------------------------

HAND = {"w": jnp.array([[0.0, 0.0, 1.0, 1.2], [4.0, 5.0, 4.0, 5.0]]), "b": jnp.array([7.0])}


def test_the_cluster_of_largest_loss_is_shared_first():
    plan = jq.slq(HAND, bits=2, rounds=(1, 2, 3))
    one, two, three = run(plan, HAND)
    np.testing.assert_allclose(one[2].loss["w"], [0, 0.02, 1], atol=1e-6)
    np.testing.assert_array_equal(one[2].counts["w"], [2, 2, 4])
    np.testing.assert_allclose(one[0]["w"], [[0, 0, 1, 1.2], [4.5] * 4])
    np.testing.assert_array_equal(one[1].frozen["w"], [[False] * 4, [True] * 4])
    np.testing.assert_allclose(two[0]["w"], [[0, 0, 1.1, 1.1], [4.5] * 4], rtol=1e-6)
    np.testing.assert_array_equal(two[1].frozen["w"], [[False] * 2 + [True] * 2, [True] * 4])
    assert three[1].frozen["w"].all() and three[1].round == 3
    np.testing.assert_allclose(three[1].codebooks["w"], [0, 1.1, 4.5], rtol=1e-6)
    norm = 1 + 1.44 + 2 * 16 + 2 * 25
    np.testing.assert_allclose(one[2].error_before["w"], 1.02 / norm, rtol=1e-5)
    np.testing.assert_allclose(one[2].error_after["w"], 0.02 / norm, rtol=1e-4)
    np.testing.assert_allclose(one[2].clusters_frozen["w"], 1 / 3)
    np.testing.assert_allclose(two[2].weights_frozen["w"], 6 / 8)


def test_a_free_weight_nearest_to_a_frozen_centroid_joins_it():
    plan = jq.slq(HAND, bits=2, rounds=(1, 2, 3))
    params, state, _ = one_round(plan, HAND, jq.init(plan, HAND))
    params = {**params, "w": params["w"].at[0, 0].set(4.0)}  # 0.0 drifted far
    params, state, _ = one_round(plan, params, state)
    assert params["w"][0, 0] == 4.5 and state.frozen["w"][0, 0]


def test_centroids_of_free_clusters_follow_their_weights_and_frozen_ones_stay():
    plan = jq.slq(HAND, bits=2, rounds=(1, 2, 3))
    params, state, _ = one_round(plan, HAND, jq.init(plan, HAND))
    params = {**params, "w": params["w"].at[0].set(jnp.array([-0.5, -0.5, 2.0, 2.0]))}
    _, state, _ = one_round(plan, params, state)
    np.testing.assert_allclose(state.codebooks["w"], [-0.5, 2.0, 4.5])


@pytest.mark.parametrize(
    ("partition", "first"),
    mostly_further([("loss", 2), ("magnitude", 0), ("index", 0)], ("loss", 2)),
)
def test_the_partition_says_which_cluster_goes_first(partition, first):
    params = {"w": jnp.array([[-9.0, -9.0, 0.1, 0.2], [4.0, 5.0, 4.0, 5.0]])}
    plan = jq.slq(params, bits=2, rounds=(1, 3), partition=partition)
    (_, state, _), *_ = run(plan, params, rounds=1)
    np.testing.assert_array_equal(state.frozen_centroids["w"], np.arange(3) == first)


# The authors' released code -----------------------------------------------------------------------


def released_round(w, centroids, first_to_move, frozen_clusters, bits=5):
    """NumPy port of `kmeans` and `Blob::Update` of the SLQ authors' Caffe code, float64."""
    w = np.asarray(w, np.float64).ravel()
    if centroids is None:
        m, centroids = 2.0 ** np.floor(np.log2(np.abs(w).max())), [0.0]
        for i in range(2 ** (bits - 2)):
            centroids += [m / 2**i, -m / 2**i]
    c = np.array(centroids)
    for _ in range(10):
        codes = np.argmin((w[:, None] - c[None]) ** 2, axis=1)
        for j in range(first_to_move, c.size):
            if (codes == j).any():
                c[j] = w[codes == j].mean()
    codes = np.argmin((w[:, None] - c[None]) ** 2, axis=1)
    frozen = codes < frozen_clusters
    return np.where(frozen, c[codes], w), c, frozen


def follow_released_code(params, bits, rounds):
    """Yield for each round and layer what we have, and what the released code has, from equal w."""
    plan = jq.slq(params, bits=bits, rounds=rounds, **RELEASED)
    state, centroids = jq.init(plan, params), dict.fromkeys(params)
    for r, (first, frozen_clusters) in enumerate(zip((1, *rounds), rounds, strict=False)):
        params = drift(params, state, seed=100 + r) if r else params
        before = params
        params, state, _ = one_round(plan, params, state)
        for name in params:
            theirs = released_round(before[name], centroids[name], first, frozen_clusters, bits)
            centroids[name] = theirs[1]
            ours = (params[name], state.codebooks[name], state.frozen[name])
            yield [np.asarray(x).ravel() for x in ours], theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "rounds"), mostly_slow([(5, (5, 9, 13, 15, 17)), (3, (1, 3, 5))], (3, (1, 3, 5)))
)
def test_rounds_follow_the_released_code(bits, rounds):
    params = {f"w{n}": normal((n // 4, 4), seed=n) for n in (36, 144, 1000, 2400)}
    shares = []
    for ours, theirs in follow_released_code(params, bits, rounds):
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(ours[2], theirs[2])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
        shares.append(ours[2].mean())
    assert len(shares) == 4 * len(rounds) and shares[-1] == 1


@pytest.mark.slow
def test_rounds_of_a_large_layer_follow_the_released_code():
    # A bin of 65,536 that straddles a boundary goes to one side as a whole: few weights in 10,000.
    shares = []
    for ours, theirs in follow_released_code({"w": normal((500, 400))}, 5, (5, 9, 13, 15, 17)):
        np.testing.assert_allclose(ours[1], theirs[1], atol=2e-5)
        assert (ours[2] != theirs[2]).mean() < 1e-4
        assert (np.abs(ours[0] - theirs[0]) > 2e-5).mean() < 5e-4
        shares.append(ours[2].mean())
    np.testing.assert_allclose([shares[0], shares[-1]], [0.25, 1], atol=0.01)


@pytest.mark.parametrize(
    ("options", "error"),
    mostly_slow([(RELEASED, 0.0189), ({}, 0.0085), ({"zero": True}, 0.0085)], ({}, 0.0085)),
)
def test_normalized_error_of_17_centroids_on_normal_weights(options, error):
    params = {"w": normal((500, 400))}
    info = run(jq.slq(params, **options), params, rounds=1)[0][2]
    np.testing.assert_allclose(info.error_before["w"], error, rtol=0.05)


# Freezing -----------------------------------------------------------------------------------------

LAYERS = {"a": (3, 3, 2, 8), "b": {"kernel": (3, 3, 2, 8), "bias": (8,)}}  # one program for both


def layers(seed=0, dtype=jnp.float32):
    shapes, structure = jax.tree.flatten(LAYERS, is_leaf=lambda x: isinstance(x, tuple))
    leaves = [normal(shape, seed + i, dtype) for i, shape in enumerate(shapes)]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize(
    ("partition", "dtype", "zero"),
    mostly_slow(
        [
            ("loss", jnp.float32, False),
            ("loss", jnp.bfloat16, True),
            ("magnitude", jnp.float16, False),
            ("random", jnp.bfloat16, False),
        ],
        ("loss", jnp.bfloat16, True),
    ),
)
def test_laws_of_freezing(partition, dtype, zero):
    params = layers(dtype=dtype)
    plan = jq.slq(params, rounds=(5, 9, 13, 15, 17), partition=partition, zero=zero, **FAST)
    key = jax.random.key(0) if partition == "random" else None
    results = run(plan, params, seed=1, key=key)
    before = (params, jq.init(plan, params))
    for r, (new, state, info) in enumerate(results):
        for name in ("a", ("b", "kernel")):
            get = lambda tree, n=name: functools.reduce(lambda t, i: t[i], n, tree)  # noqa: E731
            old_mask, mask = np.asarray(get(before[1].frozen)), np.asarray(get(state.frozen))
            assert (mask >= old_mask).all() and mask.sum() > old_mask.sum()
            np.testing.assert_array_equal(get(new)[old_mask], get(before[0])[old_mask])
            codebook, chosen = get(state.codebooks), np.asarray(get(state.frozen_centroids))
            assert codebook.dtype == get(new).dtype == dtype
            assert chosen.sum() == (5, 9, 13, 15, 17)[r]
            assert set(np.asarray(get(new)[mask])) <= set(np.asarray(codebook[chosen]))
            old_chosen = np.asarray(get(before[1].frozen_centroids))
            np.testing.assert_array_equal(
                codebook[old_chosen], get(before[1].codebooks)[old_chosen]
            )
            assert (codebook == 0).any() or not zero
        np.testing.assert_allclose(info.weights_frozen["a"], state.frozen["a"].mean(), rtol=1e-6)
        assert_equal_trees(new["b"]["bias"], params["b"]["bias"])
        before = (new, state)
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))
    assert len(np.unique(np.asarray(new["a"], np.float32))) <= 17
    after = one_round(plan, new, state, key=key)
    assert_equal_trees(after[:2], (new, state))  # past the last round nothing changes


def test_is_on_codebook_sees_one_bit():
    params = layers()
    ((new, state, _),) = run(jq.slq(params, rounds=(17,), **FAST), params)
    off = {**new, "a": new["a"].at[2, 1, 0, 3].set(jnp.nextafter(new["a"][2, 1, 0, 3], 1.0))}
    on = jq.is_on_codebook(off, state)
    assert not on["a"] and on["b"]["kernel"] and on["b"]["bias"]
    minus = jax.tree.map(lambda w: jnp.where(w == 0, -0.0, w), new)
    assert all(jax.tree.leaves(jq.is_on_codebook(minus, state)))


def test_negative_zeros_are_zeros():
    params = {"w": jnp.array([[-0.0, 0.0, -0.0, 1.0], [1.0, 2.0, 2.0, -0.0]])}
    ((new, state, info),) = run(jq.slq(params, bits=2, rounds=(3,), zero=True), params)
    np.testing.assert_array_equal(state.codebooks["w"], [0, 1, 2])
    assert jq.is_on_codebook(new, state)["w"] and info.loss["w"].sum() == 0


def test_zero_stays_zero_though_its_cluster_is_constant():
    params = {"w": jnp.repeat(jnp.array([1e-6, 1.0, 2.0]), 8).reshape(4, 6)}
    ((new, state, _),) = run(jq.slq(params, bits=2, rounds=(3,), zero=True), params)
    np.testing.assert_array_equal(state.codebooks["w"], [0, 1, 2])
    assert (new["w"] == 0).sum() == 8


def test_random_partitions_depend_on_the_key_alone():
    params = layers()
    plan = jq.slq(params, rounds=(5, 17), partition="random", **FAST)
    one, same, other = (
        run(plan, params, rounds=1, key=jax.random.key(s))[0][1].frozen_centroids for s in (0, 0, 1)
    )
    assert_equal_trees(one, same)
    assert (one["a"] != other["a"]).any() and (one["a"] != one["b"]["kernel"]).any()


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.floats(0, 0.05))
def test_any_drift_ends_on_the_codebook(seed, scale):
    plan = jq.slq(layers(), rounds=(5, 17), **FAST)
    params, state = layers(seed), jq.init(plan, layers(seed))
    for r in range(2):
        params = drift(params, state, seed + r, scale)
        params, state, _ = one_round(plan, params, state)
    assert all(jax.tree.leaves(jq.is_on_codebook(params, state)))
    assert state.frozen["a"].all()


def test_the_first_round_clusters_as_kmeans_does():
    params = layers()
    plan = jq.slq(params, rounds=(17,))
    ((_, state, info),) = run(plan, params)
    expected = jax.jit(functools.partial(kmeans, k=17))(params["a"])
    np.testing.assert_allclose(state.codebooks["a"], expected.centroids, rtol=1e-6)
    np.testing.assert_array_equal(info.counts["a"], expected.counts)
    np.testing.assert_allclose(info.loss["a"].sum(), expected.loss, rtol=1e-5)


# Layer groups -------------------------------------------------------------------------------------

DEEP = {f"layer_{i}": {"kernel": normal((8, 8), seed=i)} for i in (0, 1, 2, 10)}
DEPTH = ["layer_0", "layer_1", "layer_2", "layer_10"]


@pytest.mark.parametrize(
    ("order", "reverse"),
    mostly_further(
        [("boundaries_first", False), ("boundaries_first", True), ("layer_by_layer", False)],
        *(("boundaries_first", True), ("layer_by_layer", False)),
    ),
)
def test_only_the_layers_whose_share_grows_change(order, reverse):
    plan = jq.mlq(DEEP, groups=2, order=order, reverse=reverse, **FAST)
    halves = [DEPTH[:2], DEPTH[2:]]
    first, second = halves[::-1] if reverse else halves
    turns = {"boundaries_first": [first, second] * 2}.get(order, [first, first, second, second])
    shares = {"boundaries_first": [2 / 3, 2 / 3, 1, 1]}.get(order, [2 / 3, 1, 2 / 3, 1])
    before = (DEEP, jq.init(plan, DEEP))
    for (params, state, info), turn, share in zip(run(plan, DEEP), turns, shares, strict=True):
        for name in DEPTH:
            moved = bool((params[name]["kernel"] != before[0][name]["kernel"]).any())
            frozen = np.mean(state.frozen_centroids[name]["kernel"])
            assert moved == (name in turn)
            if name in turn:
                np.testing.assert_allclose(frozen, share)
                np.testing.assert_allclose(info.clusters_frozen[f"{name}/kernel"], share)
            else:
                assert_equal_trees(state.codebooks[name], before[1].codebooks[name])
                assert_equal_trees(state.frozen[name], before[1].frozen[name])
        before = (params, state)
    assert all(jax.tree.leaves(jq.is_on_codebook(params, state)))


def test_groups_of_the_rules_decide():
    rules = [jq.LayerRule("layer_2/kernel", group=0), jq.LayerRule(".*", group=1)]
    plan = jq.mlq(DEEP, rules=rules, **FAST)
    assert plan.schedule.shape == (4, 2)
    params, _, _ = run(plan, DEEP, rounds=1)[0]
    changed = [name for name in DEPTH if (params[name]["kernel"] != DEEP[name]["kernel"]).any()]
    assert changed == ["layer_2"]


@pytest.mark.parametrize("partition", ["loss", "magnitude"])
def test_the_network_order_ranks_the_clusters_of_all_layers(partition):
    params = {f"w{i}": normal((8, 8), seed=i) * (1 + i) for i in range(4)}
    rounds = (0.25, 0.5, 1.0)
    plan = jq.mlq(params, order="network", rounds=rounds, partition=partition, **FAST)
    seen = np.zeros(12, bool)
    for (_, state, info), share in zip(run(plan, params, seed=3), rounds, strict=True):
        rank = {
            "loss": np.concatenate([info.loss[name] for name in params]),
            "magnitude": np.abs(np.concatenate([state.codebooks[name] for name in params])),
        }[partition]
        rank[seen] = np.inf
        expected = np.zeros(12, bool)
        expected[np.argsort(-rank, kind="stable")[: round(12 * share)]] = True
        got = np.concatenate([state.frozen_centroids[name] for name in params])
        np.testing.assert_array_equal(got, expected)
        seen = expected
    assert len({int(np.sum(x)) for x in np.split(seen, 4)}) == 1


# Slices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", mostly_slow([0, -1], 0))
@pytest.mark.slow
def test_slices_are_quantized_like_leaves_of_their_own(axis):
    stack = normal((3, 8, 9)) * jnp.array([1.0, 2.0, 0.5]).reshape(3, 1, 1)
    rules = [jq.LayerRule("w", axis=axis)]
    params = {"w": jnp.moveaxis(stack, 0, axis)}
    parts = {f"w{i}": stack[i] for i in range(3)}
    plan, apart = (
        jq.slq(params, bits=3, rounds=(2, 5), rules=rules),
        jq.slq(parts, bits=3, rounds=(2, 5)),
    )
    for (new, state, info), (each, states, infos) in zip(
        run(plan, params), run(apart, parts), strict=True
    ):
        slices = jnp.moveaxis(new["w"], axis, 0)
        masks = jnp.moveaxis(state.frozen["w"], axis, 0)
        tables = state.codebooks["w"].reshape(3, 5)
        for i in range(3):
            np.testing.assert_array_equal(slices[i], each[f"w{i}"])
            np.testing.assert_array_equal(masks[i], states.frozen[f"w{i}"])
            np.testing.assert_array_equal(tables[i], states.codebooks[f"w{i}"])
            np.testing.assert_array_equal(info.counts["w"][i], infos.counts[f"w{i}"])
            np.testing.assert_allclose(info.loss["w"][i], infos.loss[f"w{i}"], rtol=1e-6)
            np.testing.assert_allclose(info.weights_frozen["w"][i], infos.weights_frozen[f"w{i}"])
    assert jq.is_on_codebook(new, state)["w"]
    off = {"w": jnp.flip(new["w"], axis)}  # every slice on the codebook of another
    assert not jq.is_on_codebook(off, state)["w"]


def test_slices_of_stacked_layers_lie_in_groups_of_their_own():
    params = {"w": normal((4, 6, 6))}
    plan = jq.mlq(params, groups=2, rules=[jq.LayerRule("w", axis=0)], **FAST)
    results = run(plan, params)
    changed = [(p["w"] != params["w"]).any((1, 2)).tolist() for p, _, _ in results]
    assert changed == [[True, True, False, False]] + [[True] * 4] * 3
    np.testing.assert_allclose(results[2][2].clusters_frozen["w"], [1, 1, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("shape", "axis"), mostly_slow([((1, 8, 8), 0), ((8, 1, 8), -2)], ((8, 1, 8), -2))
)
def test_an_axis_of_one_slice_is_no_axis(shape, axis):
    params = {"w": normal(shape)}
    plan = jq.slq(params, bits=2, rounds=(3,), rules=[jq.LayerRule("w", axis=axis)], **FAST)
    ((new, state, _),) = run(plan, params)
    assert jq.is_on_codebook(new, state)["w"]
    assert jq.report(new, state).layers[0].distinct == 3
    ((flat, _, _),) = run(jq.slq(params, bits=2, rounds=(3,), **FAST), params)
    assert_equal_trees(new, flat)


# Sensitivity --------------------------------------------------------------------------------------


def test_sensitivity_weighs_clustering_and_losses():
    params = {"w": normal((6, 8)), "b": normal(3)}
    rng = np.random.default_rng(7)
    fisher = {"w": jnp.asarray(rng.exponential(3.0, (6, 8)).astype(np.float32)), "b": jnp.ones(3)}
    plan = jq.slq(params, bits=3, rounds=(2, 5), init="linear", iterations=4)
    (_, state, info), *_ = run(plan, params, rounds=1, sensitivity=fisher)
    w, h = (np.asarray(tree["w"], np.float64).ravel() for tree in (params, fisher))
    c = np.linspace(w.min(), w.max(), 5)
    for _ in range(4):
        codes = np.argmin(np.abs(w[:, None] - c), axis=1)
        c = np.array([np.average(w[codes == j], weights=h[codes == j]) for j in range(5)])
    codes = np.argmin(np.abs(w[:, None] - c), axis=1)
    losses = np.bincount(codes, h * (w - c[codes]) ** 2, minlength=5)
    np.testing.assert_allclose(state.codebooks["w"], c, rtol=1e-4)
    np.testing.assert_allclose(info.loss["w"], losses, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(info.error_before["w"], losses.sum() / (h * w**2).sum(), rtol=1e-3)
    np.testing.assert_array_equal(
        np.flatnonzero(state.frozen_centroids["w"]), np.sort(np.argsort(-losses)[:2])
    )


@pytest.mark.slow
def test_sensitivity_of_zero_everywhere_is_no_sensitivity():
    params = {"w": normal((6, 8))}
    plan = jq.slq(params, bits=3, rounds=(2, 5))
    (_, with_zeros, _), *_ = run(plan, params, rounds=1, sensitivity={"w": jnp.zeros((6, 8))})
    (_, without, _), *_ = run(plan, params, rounds=1)
    np.testing.assert_allclose(with_zeros.codebooks["w"], without.codebooks["w"], rtol=1e-4)
    assert_equal_trees(with_zeros.frozen, without.frozen)


def test_sensitivity_may_be_of_lower_precision():
    params = {"w": normal((6, 8))}
    plan = jq.slq(params, bits=3, rounds=(2, 5))
    fisher = {"w": jnp.ones((6, 8), jnp.bfloat16)}
    (_, state, _), *_ = run(plan, params, rounds=1, sensitivity=fisher)
    assert state.codebooks["w"].dtype == jnp.float32


# Transformations ----------------------------------------------------------------------------------

SMALL = {"w": normal((6, 8)), "v": normal((5, 9), seed=1), "b": normal(3)}
SMALL_PLAN = jq.slq(SMALL, bits=3, rounds=(2, 4, 5), **FAST)


def test_all_rounds_trace_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def counted(plan, params, state):
        traces.append(plan)
        return jq.quantize_round(plan, params, state)

    params, state = SMALL, jq.init(SMALL_PLAN, SMALL)
    for _ in range(SMALL_PLAN.num_rounds + 1):
        params, state, _ = counted(SMALL_PLAN, params, state)
    same = jq.slq(
        SMALL, bits=3, rounds=(2, 4, 5), **FAST
    )  # equal plans are the same static argument
    counted(same, SMALL, jq.init(same, SMALL))
    assert len(traces) == 1


def test_scan_over_the_rows_is_the_loop():
    def body(carry, _):
        *carry, info = jq.quantize_round(SMALL_PLAN, *carry)
        return tuple(carry), info

    start = (SMALL, jq.init(SMALL_PLAN, SMALL))
    (params, state), infos = jax.jit(lambda c: jax.lax.scan(body, c, None, length=3))(start)
    results = run(SMALL_PLAN, SMALL)
    assert_equal_trees((params, state), results[-1][:2])
    for r, (_, _, info) in enumerate(results):
        jax.tree.map(
            lambda many, one, r=r: np.testing.assert_allclose(many[r], one, rtol=1e-5), infos, info
        )


@pytest.mark.slow
def test_vmap_over_networks_is_the_loop():
    networks = [jax.tree.map(lambda x, i=i: jnp.roll(x, 1, 0) * (i + 1), SMALL) for i in range(3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *networks)
    state = jax.tree.map(lambda x: jnp.stack([x] * 3), jq.init(SMALL_PLAN, SMALL))
    f = jax.jit(jax.vmap(functools.partial(jq.quantize_round, SMALL_PLAN)))
    got = batch, state
    for _ in range(2):
        *got, _ = f(*got)
    for i, network in enumerate(networks):
        want = run(SMALL_PLAN, network, rounds=2)[-1][:2]
        jax.tree.map(
            lambda many, one, i=i: np.testing.assert_allclose(many[i], one, rtol=1e-5),
            tuple(got),
            want,
        )


def test_eager_is_jitted():
    params = {"w": SMALL["w"]}
    plan = jq.slq(params, bits=3, rounds=(2, 5), init="linear", iterations=2)
    eager = jq.quantize_round(plan, params, jq.init(plan, params))
    (jitted,) = run(plan, params, rounds=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eager, jitted)


def test_shapes_and_dtypes_are_a_fixed_point():
    state = jax.eval_shape(functools.partial(jq.init, SMALL_PLAN), SMALL)
    out = jax.eval_shape(functools.partial(jq.quantize_round, SMALL_PLAN), SMALL, state)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, out[1], state)
    assert all(jax.tree.leaves(same))


def test_sharded_parameters_give_the_same_result():
    spec = P("x", "y")
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": normal((16, 8)), "v": normal((16, 8), seed=1)}
    plan = jq.slq(params, bits=3, rounds=(2, 5), **FAST)
    sharded = jax.device_put(params, NamedSharding(mesh, spec))
    for one, many in zip(run(plan, params), run(plan, sharded), strict=True):
        assert_equal_trees(many[:2], one[:2])
    assert many[0]["w"].sharding.spec == spec


def test_a_layer_that_waits_reports_the_weights_that_are_frozen_and_no_others():
    """Free weights that moved to frozen centroids are not frozen before their layer's next turn."""
    params = {name: normal((16, 16), seed) for seed, name in enumerate("ab")}
    plan = jq.mlq(params, groups=2, rules=[jq.LayerRule(".*")], **FAST)
    state = jq.init(plan, params)
    for turn in range(plan.num_rounds):
        if turn == 2:
            params["a"] = params["a"].at[0, 0].set(jnp.nan)  # such a layer waits, too
        params, state, info = one_round(plan, params, state)
        for name, mask in state.frozen.items():
            np.testing.assert_allclose(info.weights_frozen[name], mask.mean(), rtol=1e-6)
        params = drift(params, state, turn, scale=0.02)


def test_members_of_equal_centroids_freeze_together():
    weights = jnp.array([0.9, 1.0, 1.2, 3.0])
    centroids, chosen = jnp.array([1.0, 1.0, 3.0]), jnp.array([False, True, False])
    assert with_equals(centroids, chosen).tolist() == [True, True, False]
    last, codes = bounds(centroids)
    codebook, moving = Codebook(last, centroids[codes]), with_equals(centroids, chosen)[codes]
    tables = codebook, moving, jnp.bool_(True)
    frozen = join_clusters(jnp.zeros(4, bool), weights, *tables)
    assert frozen.tolist() == [True, True, True, False]
    assert share_centroids(frozen, weights, *tables).tolist() == [1.0, 1.0, 1.0, 3.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_a_round_on_eight_devices_sends_histograms_and_codebooks_only(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shapes = {"both": (512, 768), "conv": (3, 3, 128, 256), "stack": (4, 256, 512), "all": (300, 7)}
    specs = {"both": P("x", "y"), "conv": P(None, None, None, "x"), "all": P()}
    specs["stack"] = P(None, "x", "y")
    params = {
        name: jax.device_put(jnp.zeros(shape), NamedSharding(mesh, specs[name]))
        for name, shape in shapes.items()
    }
    plan = jq.slq(params, bits=3, rules=[jq.LayerRule("stack", axis=0), jq.LayerRule(".*")])
    with jax.set_mesh(mesh):
        text = one_round.lower(plan, params, jq.init(plan, params)).compile().as_text()
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert collective_sizes(text, operation) == []
    assert len(collective_sizes(text, "all-reduce")) >= 4
    if axis_type == AxisType.Auto:  # the text would show it
        gathers = jax.jit(lambda x: jq.kmeans(x.ravel(), 5)).lower(params["both"]).compile()
        assert collective_sizes(gathers.as_text(), "all-gather")


def test_a_round_overwrites_what_is_donated_and_takes_no_copy_of_the_network():
    params = {f"layer_{i}": jax.ShapeDtypeStruct((2048, 2048), "float32") for i in range(8)}
    plan = jq.slq(params, bits=2, rounds=(3,), **FAST)
    state = jax.eval_shape(functools.partial(jq.init, plan), params)
    donating = jax.jit(jq.quantize_round, static_argnums=0, donate_argnums=(1, 2))
    memory = donating.lower(plan, params, state).compile().memory_analysis()
    leaf = 4 * 2048**2
    size = 8 * leaf
    assert memory.alias_size_in_bytes >= 1.25 * size  # weights and masks
    # A leaf and its histogram, for more layers too.
    assert memory.temp_size_in_bytes < 3 * leaf + 2**20


def test_a_round_of_blocks_writes_in_place():
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}
    rules = [jq.LayerRule("w", block=(-1, 1))]
    plan = jq.slq(params, bits=2, rounds=(3,), rules=rules, **FAST)
    state = jax.eval_shape(functools.partial(jq.init, plan), params)
    donating = jax.jit(jq.quantize_round, static_argnums=0, donate_argnums=(1, 2))
    memory = donating.lower(plan, params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 4 * 4096**2  # no copy of the leaf, transposed or not


# Trees --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    kernel: jax.Array
    rest: list


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6)(nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))))


def trees():
    linen = Net().init(jax.random.key(0), jnp.ones((1, 9)))["params"]
    _, params, _ = nnx.split(nnx.Linear(8, 9, rngs=nnx.Rngs(0)), nnx.Param, ...)
    return {
        "tuple and list": ((SMALL["w"], [SMALL["v"], SMALL["b"]]), ["0", "1/0"]),
        "named tuple": (Pair(SMALL["w"], [SMALL["v"]]), ["kernel", "rest/0"]),
        "linen": (linen, ["Dense_0/kernel", "Dense_1/kernel"]),
        "nnx": (params, None),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_slow(trees(), "tuple and list"))
def test_any_tree_of_parameters(name):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params, paths = trees()[name]
    plan = jq.slq(params, bits=2, rounds=(3,), **FAST)
    ((new, state, info),) = run(plan, params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert paths is None or sorted(info.loss) == paths
    assert len(info.loss) >= 1
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))
    for old, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        assert leaf.dtype == old.dtype
        assert len(np.unique(leaf)) == 3 or (leaf == old).all()


def test_leaves_that_are_no_weights_pass_through():
    params = {
        "w": SMALL["w"],
        "step": jnp.arange(9).reshape(3, 3),
        "key": jax.random.key(3),
        "rate": 0.5,
        "numpy": np.ones(4, np.float32),
    }
    plan = jq.slq(params, bits=2, rounds=(3,), **FAST)
    ((new, state, _),) = run(plan, params)
    for name in ("step", "rate", "numpy"):
        np.testing.assert_array_equal(new[name], params[name])
    assert new["key"] == params["key"]
    assert jax.tree.structure(state.frozen) == jax.tree.structure(params)
    assert jq.report(new, state).quantized[0].path == "w"


@pytest.mark.slow
def test_past_the_last_round_what_is_left_of_another_plan_freezes():
    state = run(SMALL_PLAN, SMALL, rounds=1)[0][1]
    ended = state._replace(round=jnp.int32(SMALL_PLAN.num_rounds))
    assert not all(x.all() for x in jax.tree.leaves(ended.frozen_centroids))
    shorter = dataclasses.replace(SMALL_PLAN, table=((1.0,),))
    for plan, start in ((shorter, ended._replace(round=jnp.int32(1))), (SMALL_PLAN, ended)):
        params, new_state, _ = one_round(plan, SMALL, start)
        assert new_state.frozen["w"].all() and new_state.frozen["v"].all()
        assert new_state.round == plan.num_rounds
        assert_equal_trees(one_round(plan, params, new_state)[:2], (params, new_state))


def test_a_state_of_more_rounds_than_the_plan_is_refused():
    state = jq.init(SMALL_PLAN, SMALL)._replace(round=jnp.int32(SMALL_PLAN.num_rounds + 1))
    with pytest.raises(ValueError, match=f"state.round: expected at most {SMALL_PLAN.num_rounds}"):
        jq.quantize_round(SMALL_PLAN, SMALL, state)


@pytest.mark.parametrize("restored", [dict, tuple])
def test_a_state_that_lost_its_type_is_refused(restored):
    state = jq.init(SMALL_PLAN, SMALL)
    lost = restored(state._asdict() if restored is dict else state)
    for call in (
        lambda: jq.quantize_round(SMALL_PLAN, SMALL, lost),
        lambda: jq.is_on_codebook(SMALL, lost),
        lambda: jq.centroid_gradients(SMALL, SMALL, lost),
        lambda: jq.set_centroids(SMALL, lost, state.codebooks),
        lambda: jq.pack(SMALL, lost),
        lambda: jq.report(SMALL, lost),
    ):
        with pytest.raises(ValueError, match=f"expected a jq.QuantState, got {restored.__name__}"):
            call()


@pytest.mark.parametrize("bad", mostly_further([-1.0, np.inf, np.nan], np.inf))
def test_sensitivities_that_cannot_weigh_are_refused_by_name_or_the_layer_is_left(bad):
    ones = jax.tree.map(jnp.ones_like, SMALL)
    sensitivity = {**ones, "v": ones["v"].at[0, 0].set(bad)}
    state = jq.init(SMALL_PLAN, SMALL)
    kind = ">= 0, got 1 negative of 45" if bad < 0 else "got 1 NaN or infinite of 45"
    with pytest.raises(ValueError, match=f"sensitivity: v.*{kind}"):
        jq.quantize_round(SMALL_PLAN, SMALL, state, sensitivity=sensitivity)
    params, new_state, info = one_round(SMALL_PLAN, SMALL, state, sensitivity=sensitivity)
    assert not info.finite["v"] and info.finite["w"]
    assert_equal_trees(params["v"], SMALL["v"])
    assert not new_state.frozen["v"].any() and new_state.frozen["w"].any()


def test_a_lone_largest_float_and_zeros_are_clustered_exactly():
    params = {"w": jnp.zeros((8, 8)).at[3, 3].set(np.finfo(np.float32).min)}
    plan = jq.slq(params, rules=[jq.LayerRule("w", k=2)], rounds=(2,))
    new, _, info = one_round(plan, params, jq.init(plan, params))
    assert_equal_trees(new, params)
    assert info.finite["w"] and info.error_before["w"] == 0


def test_neighbouring_floats_stay_apart():
    values = np.float32([1 + 2**-23, 1 + 2**-22])
    params = {"w": jnp.array(np.resize(values, (8, 8)))}
    plan = jq.slq(params, rules=[jq.LayerRule("w", k=2)], rounds=(2,))
    new, state, _ = one_round(plan, params, jq.init(plan, params))
    assert_equal_trees(new, params)
    assert jq.is_on_codebook(new, state)["w"]


# NaN ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", mostly_further([np.nan, np.inf, -np.inf], np.nan))
def test_a_layer_with_nan_or_infinity_is_refused_by_name_or_left_as_it_was(bad):
    broken = {**SMALL, "w": SMALL["w"].at[1, 2].set(bad)}
    with pytest.raises(
        ValueError, match="expected finite values in w, got 1 NaN or infinite of 48"
    ):
        jq.init(SMALL_PLAN, broken)
    state = jq.init(SMALL_PLAN, SMALL)
    with pytest.raises(ValueError, match="expected finite values in w, got 1"):
        jq.quantize_round(SMALL_PLAN, broken, state)
    params, new_state, info = one_round(SMALL_PLAN, broken, state)
    assert_equal_trees(params["w"], broken["w"])
    for tree, old in zip(new_state[:3], state[:3], strict=True):
        assert_equal_trees(tree["w"], old["w"])
    assert not info.finite["w"] and info.finite["v"]
    expected = run(SMALL_PLAN, SMALL, rounds=1)[0]
    np.testing.assert_array_equal(params["v"], expected[0]["v"])
    params, new_state, _ = one_round(SMALL_PLAN, SMALL, new_state)  # repaired: it goes on
    assert new_state.frozen_centroids["w"].sum() == 4


def test_a_layer_with_nan_takes_no_places_in_the_ranking_of_the_network():
    params = {f"w{i}": normal((8, 8), seed=i) for i in range(3)}
    plan = jq.mlq(params, order="network", rounds=(1 / 3, 1.0), **FAST)
    broken = {**params, "w1": params["w1"].at[0, 0].set(jnp.nan)}
    _, state, info = one_round(plan, broken, jq.init(plan, params))
    assert not info.finite["w1"] and not state.frozen_centroids["w1"].any()
    assert state.frozen_centroids["w0"].sum() + state.frozen_centroids["w2"].sum() == 3


def test_sensitivity_with_nan_is_refused_by_name_or_the_layer_left_as_it_was():
    fisher = jax.tree.map(jnp.ones_like, SMALL)
    fisher["v"] = fisher["v"].at[0, 0].set(jnp.nan)
    state = jq.init(SMALL_PLAN, SMALL)
    with pytest.raises(ValueError, match="expected finite values in sensitivity: v, got 1 NaN"):
        jq.quantize_round(SMALL_PLAN, SMALL, state, sensitivity=fisher)
    params, _, info = one_round(SMALL_PLAN, SMALL, state, sensitivity=fisher)
    assert_equal_trees(params["v"], SMALL["v"])
    assert not info.finite["v"] and info.finite["w"]


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "w": p["w"].T}, r"params: w: expected shape \(6, 8\), got \(8, 6\)"),
        (lambda p: {"v": p["v"], "w": p["w"]}, "params: expected the leaf b, got v"),
        (lambda p: {**p, "z": p["b"]}, "params: expected 3 leaves, got 4"),
        (lambda p: {**p, "c": p["b"]}, "params: expected the leaf v, got c"),
    ],
)
def test_a_tree_that_is_not_the_plans_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jq.init(SMALL_PLAN, change(SMALL))
    with pytest.raises(ValueError, match=message):
        jq.quantize_round(SMALL_PLAN, change(SMALL), jq.init(SMALL_PLAN, SMALL))


def test_a_state_or_sensitivity_that_is_not_the_plans_is_refused():
    state = jq.init(SMALL_PLAN, SMALL)
    go = functools.partial(jq.quantize_round, SMALL_PLAN, SMALL)
    other = jq.init(jq.slq(SMALL, bits=2, rounds=(3,)), SMALL)
    with pytest.raises(ValueError, match=r"state.codebooks: v: expected shape \(5,\), got \(3,\)"):
        go(other)
    with pytest.raises(ValueError, match=r"state\.frozen: expected the leaf b, got w"):
        go(state._replace(frozen={"w": state.frozen["w"]}))
    with pytest.raises(ValueError, match=r"state.frozen: v: expected shape \(5, 9\), got \(\)"):
        go(state._replace(frozen=jax.tree.map(lambda _: jnp.bool_(False), SMALL)))
    with pytest.raises(ValueError, match="sensitivity: expected the leaf b, got w"):
        go(state, sensitivity={"w": SMALL["w"]})
    with pytest.raises(ValueError, match=r"sensitivity: v: expected shape \(5, 9\), got \(6, 8\)"):
        go(state, sensitivity={**SMALL, "v": SMALL["w"]})


def test_a_random_partition_needs_a_key():
    plan = jq.slq(SMALL, bits=2, rounds=(3,), partition="random")
    with pytest.raises(ValueError, match="expected a key for partition='random', got None"):
        jq.quantize_round(plan, SMALL, jq.init(plan, SMALL))
