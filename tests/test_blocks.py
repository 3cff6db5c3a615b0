"""Rounds with codebooks of blocks, scaled ones, and centroids of their own dtype."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from benchmarks.common import COLLECTIVES, collective_sizes
from jaxquant.clustering import blocks
from jaxquant.clustering.kmeans import kmeans
from jaxquant.rounds import cluster
from tests.cases import mostly_slow

one_round = jax.jit(jq.quantize_round, static_argnums=0)


def normal(shape, seed=0):
    """Return weights whose outputs have deviations of their own."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.05, shape) * np.exp(rng.normal(0, 0.5, shape[-1:]))
    return jnp.asarray(values, jnp.float32)


def run(plan, params, **options):
    state, results = jq.init(plan, params), []
    for _ in range(plan.num_rounds):
        params, state, info = one_round(plan, params, state, **options)
        results.append((params, state, info))
    return results


def cut(x, numbers):
    """Return the blocks of an array [*numbers of blocks, ...] one after the other, by NumPy."""
    x = np.asarray(x)
    sizes = [size // number for size, number in zip(x.shape, numbers, strict=True)]
    places = itertools.product(*map(range, numbers))
    return [
        x[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, sizes, strict=True))]
        for place in places
    ]


def error(new, old):
    new, old = (np.asarray(x, np.float64) for x in (new, old))
    return np.sum((new - old) ** 2) / np.sum(old**2)


# Blocks ------------------------------------------------------------------------------------------

BLOCKS = {
    "outputs": ((24, 6), (-1, 1), (1, 6)),
    "groups of inputs": ((24, 4), (12, 1), (2, 4)),
    "tiles": ((12, 16), (6, 8), (2, 2)),
    "inputs of a convolution": ((3, 3, 4, 5), (-1, -1, 2, -1), (1, 1, 2, 1)),
    "outputs of stacked layers": ((2, 12, 3), (1, -1, 1), (2, 1, 3)),
}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param("slq", "groups of inputs", marks=pytest.mark.slow),
        ("slq", "outputs of stacked layers"),
        pytest.param("inq", "tiles", marks=pytest.mark.slow),
        pytest.param("slq", "outputs", marks=pytest.mark.slow),
        pytest.param("slq", "tiles", marks=pytest.mark.slow),
        pytest.param("slq", "inputs of a convolution", marks=pytest.mark.slow),
        pytest.param("inq", "outputs", marks=pytest.mark.slow),
    ],
)
def test_blocks_are_quantized_like_leaves_of_their_own(name, make):
    shape, block, numbers = BLOCKS[name]
    weights = normal(shape)
    parts = {f"w{i:02}": jnp.asarray(part) for i, part in enumerate(cut(weights, numbers))}
    options = {"rounds": (2, 5)} if make == "slq" else {"shares": (0.5, 1.0)}
    rules = [jq.LayerRule(".*", block=block), None]
    (plan, params), (apart, each) = (
        (getattr(jq, make)(tree, bits=3, rules=None if rule is None else [rule], **options), tree)
        for rule, tree in zip(rules, ({"w": weights}, parts), strict=True)
    )
    assert plan.selection.selected[0].numbers == numbers
    for (new, state, info), (news, states, infos) in zip(
        run(plan, params), run(apart, each), strict=True
    ):
        assert state.codebooks["w"].shape == (*numbers, 5)
        tables = np.asarray(state.codebooks["w"]).reshape(-1, 5)
        for i, part in enumerate(each):
            np.testing.assert_array_equal(cut(new["w"], numbers)[i], news[part])
            np.testing.assert_array_equal(cut(state.frozen["w"], numbers)[i], states.frozen[part])
            np.testing.assert_array_equal(tables[i], states.codebooks[part])
            np.testing.assert_array_equal(info.counts["w"][i], infos.counts[part])
            np.testing.assert_allclose(info.loss["w"][i], infos.loss[part], rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(info.weights_frozen["w"][i], infos.weights_frozen[part])
    assert jq.is_on_codebook(new, state)["w"]
    if make == "slq" and numbers[-1] > 1:
        off = {"w": new["w"][..., ::-1]}  # on the codebooks of others
        assert not jq.is_on_codebook(off, state)["w"]


def test_a_block_is_clustered_as_kmeans_does():
    weights = normal((64, 12))
    plan = jq.slq({"w": weights}, rounds=(1, 2), rules=[jq.LayerRule("w", k=8, block=(-1, 3))])
    (_, state, info), *_ = run(plan, {"w": weights})
    for i, part in enumerate(cut(weights, (1, 4))):
        expected = kmeans(jnp.asarray(part), 8)
        np.testing.assert_allclose(info.loss["w"][i].sum(), expected.loss, rtol=0.01)
        losses = ((part[..., None] - np.asarray(state.codebooks["w"][0, i])) ** 2).min(-1)
        np.testing.assert_allclose(info.loss["w"][i].sum(), losses.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((40, 48), (1, 48)), ((40, 48), (5, 6)), ((12, 10, 14), (12, 2, 7)), ((3, 311), (1, 311))],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_batches_give_what_blocks_give_one_by_one(monkeypatch, shape, numbers, devices):
    monkeypatch.setattr(blocks, "_BATCH_WEIGHTS", 16)  # many batches, of whatever divides
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x, tables = normal(shape), normal((*numbers, 2), seed=1)

    def one(x, table):
        return jnp.sum(x) * table, jnp.max(x)

    got = jax.jit(lambda x, tables: blocks.by_batch(one, [x], [tables], numbers))(x, tables)
    want = [(part.sum(), part.max()) for part in cut(x, numbers)]
    total, largest = (np.reshape(values, numbers) for values in zip(*want, strict=True))
    np.testing.assert_allclose(got[0], total[..., None] * tables, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], largest)


def test_blocks_of_stacked_layers_lie_in_the_groups_of_their_layers():
    params = {"w": normal((4, 6, 6))}
    rules = [jq.LayerRule("w", block=(1, -1, 2))]
    plan = jq.mlq(params, groups=2, rules=rules, init="quantile")
    changed = [(p["w"] != params["w"]).any((1, 2)).tolist() for p, _, _ in run(plan, params)]
    assert changed == [[True, True, False, False]] + [[True] * 4] * 3


def test_a_block_with_nan_is_left_alone_and_told_of():
    weights = normal((12, 4)).at[3, 2].set(jnp.nan)
    plan = jq.slq({"w": weights}, rounds=(3,), rules=[jq.LayerRule("w", k=3, block=(-1, 1))])
    state = jax.eval_shape(functools.partial(jq.init, plan), {"w": weights})
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    new, state, info = one_round(plan, {"w": weights}, state)
    assert info.finite["w"].tolist() == [True, True, False, True]
    np.testing.assert_array_equal(new["w"][:, 2], weights[:, 2])
    assert state.frozen["w"].all(0).tolist() == [True, True, False, True]


@pytest.mark.slow
def test_blocks_with_moments_answer_better_and_stay_on_their_codebooks():
    weights = normal((12, 6))
    inputs = np.random.default_rng(1).normal(size=(200, 12)) @ np.diag(np.linspace(0.1, 3, 12))
    moments = {"w": jq.input_moments(jnp.asarray(inputs, jnp.float32))}
    rules = [jq.LayerRule("w", k=3, block=(6, 1))]
    plan = jq.slq({"w": weights}, rounds=(3,), rules=rules)
    ((near, _, _),) = run(plan, {"w": weights})
    ((new, state, _),) = run(plan, {"w": weights}, moments=moments)
    answers = [error(inputs @ np.asarray(w["w"]), inputs @ weights) for w in (near, new)]
    assert answers[1] < answers[0]
    assert jq.is_on_codebook(new, state)["w"]


@pytest.mark.default_promotion
def test_frozen_blocks_stay_in_an_optimizer_and_land_on_their_codebooks():
    rules = [
        jq.LayerRule("a", k=3, block=(4, 1)),
        jq.LayerRule("b", k=4, block=(-1, 1), scaled=True),
        jq.LayerRule("c", k=4, block=(4, 4), centroid_dtype="float8_e4m3fn"),
    ]
    params = {name: normal((8, 8), seed) for seed, name in enumerate("abc")}
    plan = jq.slq(params, rounds=(1, 2), rules=rules, init="quantile")
    tx = jq.incremental(optax.adamw(0.01), plan, steps_per_round=8)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(16):
        gradients = jax.tree.map(jnp.sin, params)
        before, quant = params, jq.quant_state(state)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        if step in (5, 6, 7, 13, 14, 15):  # landed
            for name, frozen in quant.frozen.items():
                np.testing.assert_array_equal(params[name][frozen], before[name][frozen])
    quant = jq.quant_state(state)
    assert all(jax.tree.leaves(jq.is_on_codebook(params, quant)))
    assert all(mask.all() for mask in quant.frozen.values())
    np.testing.assert_array_equal(jq.unpack(jq.pack(params, quant))["b"], params["b"])


# Scales and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", mostly_slow(["bfloat16", "float32"], "bfloat16"))
def test_scaled_blocks_share_a_codebook(scaled):
    weights = normal((48, 32))
    rule = jq.LayerRule("w", k=8, block=(-1, 1), scaled=scaled)
    plan = jq.slq({"w": weights}, rounds=(8,), rules=[rule])
    ((new, state, info),) = run(plan, {"w": weights})
    scale, codebook = state.scales["w"], state.codebooks["w"]
    assert scale.shape == (1, 32, 1) and scale.dtype == scaled and codebook.shape == (1, 1, 8)
    table = np.asarray(codebook, np.float32) * np.asarray(scale, np.float32)
    codes = np.abs(np.asarray(weights)[..., None] - table).argmin(-1)
    np.testing.assert_array_equal(new["w"], np.take_along_axis(table, codes[..., None], -1)[..., 0])
    np.testing.assert_allclose(info.error_before["w"][0], error(new["w"], weights), rtol=1e-3)
    # One codebook for outputs of all deviations is worse, one for each of them better.
    others = [jq.LayerRule("w", k=8), jq.LayerRule("w", k=8, block=(-1, 1))]
    plans = [jq.slq({"w": weights}, rounds=(8,), rules=[rule]) for rule in others]
    one, each = (error(run(plan, {"w": weights})[0][0]["w"], weights) for plan in plans)
    assert each < error(new["w"], weights) < one


@pytest.mark.slow
def test_turns_of_codebook_and_scales_never_raise_the_error(monkeypatch):
    weights = normal((40, 12))
    rule = jq.LayerRule("w", k=4, block=(10, 1), scaled="float32")
    errors = []
    for turns in (1, 2, 6):
        monkeypatch.setattr(cluster, "_ALTERNATIONS", turns)
        # A plan of its own for each: what is traced is kept by plan.
        plan = jq.slq({"w": weights}, rounds=(4,), iterations=100 + turns, rules=[rule])
        ((new, _, _),) = run(plan, {"w": weights})
        errors.append(error(new["w"], weights))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.slow
def test_sensitivities_weigh_scales():
    weights = np.asarray(normal((16, 2)))
    important = np.ones_like(weights)
    important[8:] = 1e-6
    rule = jq.LayerRule("w", k=2, block=(-1, 1), scaled="float32")
    plan = jq.slq({"w": weights}, rounds=(2,), rules=[rule])
    params, weighed = {"w": jnp.asarray(weights)}, {"w": jnp.asarray(important)}
    ((plain, _, _),) = run(plan, params)
    ((new, _, _),) = run(plan, params, sensitivity=weighed)
    assert error(new["w"][:8], weights[:8]) < error(plain["w"][:8], weights[:8])


@pytest.mark.parametrize(
    ("dtype", "centroid_dtype", "shape"),
    [
        pytest.param("float32", "bfloat16", None, marks=pytest.mark.slow),
        pytest.param("float32", "float8_e4m3fn", (1, 1, 1), marks=pytest.mark.slow),
        ("bfloat16", "int8", (1, 1, 1)),
    ],
)
def test_centroids_of_another_dtype_are_what_is_stored(dtype, centroid_dtype, shape):
    weights = normal((16, 16)).astype(dtype)
    rule = jq.LayerRule("w", k=8, block=(8, 8), centroid_dtype=centroid_dtype)
    plan = jq.slq({"w": weights}, rounds=(4, 8), rules=[rule])
    (_, first, _), (new, state, _) = run(plan, {"w": weights})
    assert state.codebooks["w"].dtype == centroid_dtype and new["w"].dtype == dtype
    if shape is None:
        assert state.scales is None
    else:
        assert state.scales["w"].shape == shape
        np.testing.assert_array_equal(state.scales["w"], first.scales["w"])
    packed = jq.pack(new, state)
    assert packed["w"].codebook.dtype == centroid_dtype
    np.testing.assert_array_equal(jq.unpack(packed)["w"], new["w"])
    assert error(new["w"], weights) < 0.05
    frozen = np.asarray(first.frozen_centroids["w"])
    np.testing.assert_array_equal(
        np.asarray(state.codebooks["w"])[frozen], np.asarray(first.codebooks["w"])[frozen]
    )


@pytest.mark.slow
def test_stored_centroids_are_ranked_by_the_size_that_they_have_in_the_leaf():
    weights = normal((16, 16))
    params = {"a": weights, "b": 100 * weights}
    rules = [jq.LayerRule(".", k=4, block=(8, 8), centroid_dtype="int8")]
    plan = jq.mlq(params, order="network", partition="magnitude", rounds=(0.5, 1.0), rules=rules)
    (_, state, _), *_ = run(plan, params)
    assert state.frozen_centroids["b"].mean() > 0.8 > 0.2 > state.frozen_centroids["a"].mean()


@pytest.mark.slow
def test_a_window_of_one_is_no_stack(tmp_path):
    kernel = normal((1, 1, 12, 16))
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 3, 12)), jnp.float32)
    moments = {"w": jq.input_moments(inputs, window=(1, 1))}
    rules = [
        jq.LayerRule("w", k=4, centroid_dtype="float8_e4m3fn"),
        jq.LayerRule("w", k=4, block=(-1, -1, -1, 1)),
    ]
    for rule in rules:
        plan = jq.slq({"w": kernel}, rounds=(4,), rules=[rule])
        ((new, state, _),) = run(plan, {"w": kernel}, moments=moments)
        jq.save(tmp_path / "w", jq.pack(new, state))
        packed = jq.load(tmp_path / "w")["w"]
        np.testing.assert_array_equal(jq.unpack(packed), new["w"])
        want = jnp.einsum("bhwi,io->bhwo", inputs, new["w"][0, 0])
        np.testing.assert_allclose(jq.conv(inputs, packed), want, rtol=1e-4, atol=1e-5)


# Programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "spec", "options"),
    [
        pytest.param((-1, 1), P(None, "x"), {}, marks=pytest.mark.slow),
        ((8, 64), P("x", None), {}),
        pytest.param((64, 1), P("y", "x"), {}, marks=pytest.mark.slow),
        pytest.param((-1, 1), P(None, "x"), {"scaled": True}, marks=pytest.mark.further),
    ],
)
def test_blocks_that_do_not_cross_devices_send_no_weights(block, spec, options):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    params = {"w": jax.device_put(jnp.zeros((512, 1024)), sharding)}
    plan = jq.slq(params, init="quantile", rules=[jq.LayerRule("w", k=4, block=block, **options)])
    text = one_round.lower(plan, params, jq.init(plan, params)).compile().as_text()
    sizes = [size for name in COLLECTIVES for size in collective_sizes(text, name)]
    assert max(sizes, default=0) <= 2**17  # of tables, a few entries a block; weights: 2**19


def test_leaves_that_are_alike_are_one_program():
    def sorts(number):
        params = {f"w{i}": jax.ShapeDtypeStruct((64, 32), "float32") for i in range(number)}
        plan = jq.slq(params, bits=2, rounds=(3,))
        state = jax.eval_shape(functools.partial(jq.init, plan), params)
        text = one_round.lower(plan, params, state).as_text()
        return len(re.findall(r"stablehlo\.(?:sort|while)", text))

    assert sorts(12) == sorts(2) > 0


# Rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"block": (7, 1)}, r"w: rule .* divides axis 0 of \(64, 96\), got 7; near it are 4 and 8"),
        ({"block": (-1, 100)}, r"axis 1 of \(64, 96\), got 100; near it are 96"),
        ({"block": (1, -1, 1)}, r"w: rule 'w' expected 3 axes for block=.* got \(64, 96\)"),
        ({"block": (0, 1)}, "expected block to be sizes from 1, or -1 for a whole axis"),
        ({"block": 8}, "expected block to be an integer for each axis, got 8"),
        ({"block": (8, 8.0)}, "expected block to be an integer for each axis"),
        ({"block": (8, 8), "axis": 0}, "expected axis or block, got both"),
        ({"block": (8, 8), "scaled": "int8"}, "expected scaled to be a bool or one of"),
        ({"centroid_dtype": "float64"}, "expected centroid_dtype to be one of float32, bfloat16"),
        ({"centroid_dtype": "int4"}, "expected centroid_dtype to be one of"),
    ],
)
def test_rules_that_cannot_be_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        jq.slq({"w": jax.ShapeDtypeStruct((64, 96), "float32")}, rules=[jq.LayerRule("w", **rule)])


def test_centroids_that_the_leaf_cannot_hold_are_refused():
    tree = {"w": jax.ShapeDtypeStruct((64, 96), "bfloat16")}
    with pytest.raises(ValueError, match="w: rule 'w' expected centroids that bfloat16 holds"):
        jq.select(tree, [jq.LayerRule("w", centroid_dtype="float16")])


def test_blocks_of_no_more_weights_than_centroids_are_left_alone():
    tree = {"w": jax.ShapeDtypeStruct((64, 96), "float32")}
    (layer,) = jq.select(tree, [jq.LayerRule("w", k=16, block=(16, 1))]).layers
    assert layer.reason == "16 weights, no more than 16 centroids"
