"""INQ against a NumPy port, shares of weights in general, power-of-two and ternary codebooks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from benchmarks.common import collective_sizes
from jaxquant.clustering.codebooks import start_inq, start_ternary, to_powers_of_two
from jaxquant.clustering.histogram import histogram
from jaxquant.rounds.partition import WEIGHT_PARTITIONS, threshold, weight_priority
from tests.cases import mostly_slow
from tests.test_quantize import FAST, drift, normal, one_round, run

TWO_BITS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0)


# The port -----------------------------------------------------------------------------------------


def port_exponents(largest, bits):
    """n1 and n2 of Zhou et al., section 2.1."""
    n1 = int(np.floor(np.log2(4 * float(largest) / 3)))
    return n1, int(n1 + 1 - 2 ** (bits - 1) / 2)


def port_quantize(w, n1, n2):
    """Equation 4, weight by weight; what is larger than the last interval is clamped."""
    beta = [0.0] + [2.0**n for n in range(n2, n1 + 1)]
    out = np.zeros_like(w)
    for index, x in np.ndenumerate(w.astype(np.float64)):
        for low, high in itertools.pairwise(beta):
            top = np.inf if high == beta[-1] else 1.5 * high
            if (low + high) / 2 <= abs(x) < top:
                out[index] = np.sign(x) * high
    return out


def port_round(w, mask, share, n1, n2):
    """Freeze the largest of the free weights, up to a share of all."""
    amount = int(np.floor(np.float32(share) * w.size + np.float32(0.5))) - mask.sum()
    free = np.sort(np.abs(w[~mask]))[::-1]
    mask = mask | ((np.abs(w) >= free[amount - 1]) & (amount > 0))
    return np.where(mask, port_quantize(w, n1, n2), w).astype(w.dtype), mask


@pytest.mark.parametrize(
    ("bits", "shares"),
    mostly_slow(
        [(5, (0.5, 0.75, 0.875, 1.0)), (3, (0.3, 0.8, 1.0)), (2, TWO_BITS)], (3, (0.3, 0.8, 1.0))
    ),
)
def test_rounds_are_those_of_a_numpy_port(bits, shares):
    params = {"conv": normal((3, 3, 8, 16)), "dense": normal((64, 10), seed=1), "bias": jnp.ones(3)}
    plan = jq.inq(params, bits=bits, shares=shares)
    exponents = {p: port_exponents(np.abs(params[p]).max(), bits) for p in ("conv", "dense")}
    masks = {p: np.zeros(params[p].shape, bool) for p in exponents}
    state = jq.init(plan, params)
    for r in range(plan.num_rounds):
        if r:
            params = drift(params, state, r, scale=0.03)  # so that some outgrow the codebook
        want = {
            p: port_round(np.asarray(params[p]), masks[p], shares[r], *exponents[p])
            for p in exponents
        }
        params, state, info = one_round(plan, params, state)
        for path, (weights, mask) in want.items():
            np.testing.assert_array_equal(params[path], weights)
            np.testing.assert_array_equal(state.frozen[path], mask)
            np.testing.assert_allclose(info.weights_frozen[path], mask.mean(), rtol=1e-6)
            masks[path] = mask
    assert all(jax.tree.leaves(jq.is_on_codebook(params, state)))
    np.testing.assert_array_equal(params["bias"], 1.0)


# Codebooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "bits", "magnitudes"),
    [
        (1.0, 2, [1.0]),
        (1.0, 3, [1.0, 0.5]),
        (1.4999, 3, [1.0, 0.5]),
        (1.5, 3, [2.0, 1.0]),
        (0.75, 2, [1.0]),
        (0.7499, 2, [0.5]),
        (3.0, 5, [4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (0.0, 3, [0.0, 0.0]),
    ],
)
def test_the_codebook_by_hand(largest, bits, magnitudes):
    x = jnp.linspace(-largest, largest * 0.9, 40)
    got = start_inq(histogram(x), jq.num_centroids(bits))
    want = [0.0] + [sign * m for m in magnitudes for sign in (1, -1)]
    np.testing.assert_array_equal(got, want)


def test_a_weight_that_outgrows_the_codebook_is_clamped_and_the_codebook_stays():
    params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    plan = jq.inq(params, bits=3, shares=(0.5, 1.0))
    params, state, _ = one_round(plan, params, jq.init(plan, params))
    free = np.argwhere(~np.asarray(state.frozen["w"]))[0]
    params = {"w": params["w"].at[tuple(free)].set(-50.0)}
    params, state, _ = one_round(plan, params, state)
    assert params["w"][tuple(free)] == -1.0
    np.testing.assert_array_equal(state.codebooks["w"], [0, 1, -1, 0.5, -0.5])


def test_the_codebook_is_fixed_though_the_first_share_freezes_no_weight():
    params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    plan = jq.inq(params, bits=3, shares=(0.001, 1.0))
    params, state, _ = one_round(plan, params, jq.init(plan, params))
    assert not state.frozen["w"].any()
    _, state, _ = one_round(plan, {"w": params["w"] * 8}, state)
    np.testing.assert_array_equal(state.codebooks["w"], [0, 1, -1, 0.5, -0.5])


@settings(max_examples=100, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_the_nearest_power_of_two(x):
    got = float(to_powers_of_two(jnp.float32(x)))
    if abs(x) < 2.0**-125:  # XLA flushes subnormal numbers
        assert abs(got) <= 2.0**-125
        return
    powers = np.sign(x) * np.exp2(np.arange(-126, 127, dtype=np.float64))
    assert got in powers
    assert abs(got - x) == np.min(np.abs(powers - x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slq_with_powers_of_two(dtype):
    start = {"w": normal((40, 50), dtype=dtype)}
    plan = jq.slq(start, bits=4, rounds=(3, 9), powers_of_two=True, **FAST)
    seen = None
    for params, state, _ in run(plan, start, seed=3):
        codebook = np.asarray(state.codebooks["w"], np.float64)
        fractions, _ = np.frexp(np.abs(codebook[codebook != 0]))
        assert (fractions == 0.5).all()
        frozen = np.asarray(state.frozen_centroids["w"])
        if seen is not None:
            np.testing.assert_array_equal(codebook[seen[1]], seen[0][seen[1]])
        seen = codebook, frozen
        assert np.isin(np.asarray(params["w"], np.float64)[state.frozen["w"]], codebook).all()
    assert state.frozen["w"].all()


def test_powers_of_two_of_clusters_lose_less_than_those_of_inq():
    params = {"w": normal((40, 50))}
    plans = jq.slq(params, bits=4, powers_of_two=True), jq.inq(params, bits=4)
    errors = [
        float(one_round(plan, params, jq.init(plan, params))[2].error_before["w"]) for plan in plans
    ]
    assert errors[0] < 0.9 * errors[1]


def best_ternary_loss(x):
    """Every number of nonzero weights tried: -a, 0, a with a their mean magnitude."""
    ordered = np.sort(np.abs(x.astype(np.float64)).ravel())[::-1]
    counts = np.arange(1, ordered.size + 1)
    return np.sum(ordered**2) - np.max(np.cumsum(ordered) ** 2 / counts)


ternary = jax.jit(lambda x: start_ternary(histogram(x), 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["normal", "laplace", "skewed", "few"]))
def test_the_ternary_codebook_is_the_best_symmetric_one(seed, kind):
    rng = np.random.default_rng(seed)
    x = {
        "normal": rng.normal(size=200),
        "laplace": rng.laplace(size=200),
        "skewed": rng.exponential(size=200) - 0.3,
        "few": rng.choice([-1.0, 0.0, 0.25, 3.0], 200),
    }[kind].astype(np.float32)
    low, zero, high = centroids = np.asarray(ternary(jnp.asarray(x)))
    assert zero == 0 and low == -high
    loss = np.sum(np.min(np.square(x[:, None] - centroids), axis=1))
    assert loss == pytest.approx(best_ternary_loss(x), rel=1e-4, abs=1e-4)
    large = np.abs(x) > 0.7 * np.mean(np.abs(x))  # TWN's own approximation
    approximate = np.sum((np.abs(x) - np.mean(np.abs(x)[large]) * large) ** 2)
    assert loss <= approximate * 1.0001 + 1e-4


def test_a_ternary_codebook_of_zeros_and_one_of_tiny_weights():
    np.testing.assert_array_equal(ternary(jnp.zeros(200)), 0)
    tiny = ternary(jnp.zeros(200).at[:3].set(jnp.array([-1e-30, 2e-30, 1e-30])))
    np.testing.assert_allclose(tiny, np.array([-1, 0, 1]) * 4e-30 / 3, rtol=1e-4)


def test_ternary_rounds_keep_the_symmetric_codebook():
    params = {"w": normal((20, 30))}
    plan = jq.mlq(params, groups=1, init="ternary", iterations=0)
    first, last = run(plan, params, seed=0)
    np.testing.assert_array_equal(first[1].codebooks["w"], last[1].codebooks["w"])
    low, zero, high = last[1].codebooks["w"]
    assert low == -high and zero == 0 and jq.is_on_codebook(*last[:2])["w"]


# Shares of weights --------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_threshold_is_that_of_a_sort(data):
    size = data.draw(st.sampled_from([1, 40]))
    word = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**16 - 1, 2**16, 2**32 - 1])
    values = np.array(data.draw(st.lists(word, min_size=size, max_size=size)), np.uint32)
    frozen = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    if frozen.all():
        frozen[0] = False
    amount = data.draw(st.integers(1, int((~frozen).sum())))
    got = _threshold(jnp.asarray(values), jnp.asarray(frozen), jnp.int32(amount))
    assert int(got) == np.sort(values[~frozen])[::-1][amount - 1]


_threshold = jax.jit(lambda x, frozen, amount: threshold(lambda x: x, [x], frozen, amount))


@pytest.mark.parametrize("partition", WEIGHT_PARTITIONS)
@pytest.mark.parametrize("dtype", mostly_slow([jnp.float32, jnp.bfloat16], jnp.bfloat16))
def test_laws_of_shares_of_weights(partition, dtype):
    shares = (0.3, 0.6, 0.61, 1.0)
    before = {"w": normal((30, 50), dtype=dtype)}
    plan = jq.inq(before, bits=4, shares=shares, partition=partition)
    key = jax.random.key(3) if partition == "random" else None
    frozen_before = np.zeros((30, 50), bool)
    for r, (params, state, info) in enumerate(run(plan, before, seed=7, key=key)):
        frozen = np.asarray(state.frozen["w"])
        assert (frozen | ~frozen_before).all()
        np.testing.assert_array_equal(
            np.asarray(params["w"])[frozen_before], np.asarray(before["w"])[frozen_before]
        )
        if partition == "random" or dtype == jnp.float32:  # else many weights are equal
            assert frozen.sum() == np.floor(np.float32(shares[r]) * 1500 + 0.5)
        assert frozen.mean() == pytest.approx(float(info.weights_frozen["w"]))
        on = np.isin(np.asarray(params["w"]), np.asarray(state.codebooks["w"]))
        assert on[frozen].all()
        assert info.error_after["w"] <= info.error_before["w"]
        before, frozen_before = params, frozen
    assert frozen.all() and info.error_after["w"] == 0


def test_the_partition_says_which_weights_go_first():
    params = {"w": jnp.array([[0.9, -1.0, 0.26, 0.74], [0.5, 0.3, -0.05, 0.62]])}
    first = {}
    for partition in ("magnitude", "loss"):
        plan = jq.inq(params, bits=3, shares=(0.25, 1.0), partition=partition)
        _, state, _ = one_round(plan, params, jq.init(plan, params))
        first[partition] = params["w"][state.frozen["w"]].tolist()
    np.testing.assert_allclose(first["magnitude"], [0.9, -1.0])
    np.testing.assert_allclose(first["loss"], [0.26, 0.74])  # 0.24 from 0.5


def test_sensitivity_weighs_the_loss_of_weights():
    params = {"w": jnp.array([[0.9, -1.0, 0.26, 0.74], [0.5, 0.3, -0.05, 0.62]])}
    plan = jq.inq(params, bits=3, shares=(0.125, 1.0), partition="loss")
    sensitivity = {"w": jnp.ones((2, 4)).at[1, 3].set(9.0)}
    _, state, info = one_round(plan, params, jq.init(plan, params), sensitivity=sensitivity)
    assert np.argwhere(state.frozen["w"]).tolist() == [[1, 3]]
    distances = np.array([0.1, 0, 0.24, 0.24, 0, 0.2, 0.05])
    norm = np.sum(np.square(params["w"]) * sensitivity["w"])
    np.testing.assert_allclose(info.error_after["w"], np.sum(distances**2) / norm, rtol=1e-4)


def test_random_shares_depend_on_the_key_alone():
    params = {"w": normal((20, 20)), "v": normal((20, 20))}
    plan = jq.inq(params, shares=(0.5, 1.0), partition="random")
    masks = [
        one_round(plan, params, jq.init(plan, params), key=jax.random.key(seed))[1].frozen
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(masks[0]["w"], masks[1]["w"])
    assert (masks[0]["w"] != masks[2]["w"]).any() and (masks[0]["w"] != masks[0]["v"]).any()


def test_shares_of_weights_of_kmeans_clusters():
    start = {"w": normal((40, 40))}
    shares = (0.0001, 0.5, 1.0)  # the first freezes none of 1600 weights
    plan = jq.inq(start, bits=3, shares=shares, init="quantile", iterations=None)
    old = None
    for params, state, _ in run(plan, start, seed=1):
        frozen = np.asarray(state.frozen["w"])
        codebook = np.asarray(state.codebooks["w"])
        members = np.isin(codebook, np.unique(np.asarray(params["w"])[frozen]))
        np.testing.assert_array_equal(members, state.frozen_centroids["w"])
        if old is not None:
            np.testing.assert_array_equal(codebook[old[1]], old[0][old[1]])
        old = codebook, members
    assert frozen.all()


def test_each_slice_has_its_own_codebook_and_share():
    w = jnp.stack([normal((20, 10)), 8 * normal((20, 10), seed=1)])
    rule = jq.LayerRule("w", axis=0)
    plan = jq.inq({"w": w}, bits=3, rules=[rule], shares=(0.25, 1.0))
    params, state, info = one_round(plan, {"w": w}, jq.init(plan, {"w": w}))
    for i in range(2):
        alone = jq.inq({"w": w[i]}, bits=3, shares=(0.25, 1.0))
        one, one_state, _ = one_round(alone, {"w": w[i]}, jq.init(alone, {"w": w[i]}))
        np.testing.assert_array_equal(params["w"][i], one["w"])
        np.testing.assert_array_equal(state.frozen["w"][i], one_state.frozen["w"])
    np.testing.assert_allclose(info.weights_frozen["w"], [0.25, 0.25])


def test_a_layer_of_nan_under_jit_is_left_alone():
    params = {"w": normal((10, 10)), "bad": normal((10, 10))}
    plan = jq.inq(params, shares=(0.5, 1.0))
    state = jq.init(plan, params)
    params, state, _ = one_round(plan, params, state)
    damaged = {**params, "bad": params["bad"].at[0, 0].set(jnp.nan)}
    new, after, info = one_round(plan, damaged, state)
    assert not info.finite["bad"] and info.finite["w"]
    np.testing.assert_array_equal(new["bad"], damaged["bad"])
    np.testing.assert_array_equal(after.frozen["bad"], state.frozen["bad"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "axis_type"),
    mostly_slow(
        itertools.product(["magnitude", "random"], [AxisType.Auto, AxisType.Explicit]),
        ("magnitude", AxisType.Auto),
    ),
)
def test_eight_devices_give_the_same_and_send_counts_only(axis_type, partition):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params = {"w": normal((256, 512))}  # a small leaf is sorted, and gathered for that
    plan = jq.inq(params, shares=(0.5, 1.0), partition=partition)
    sharded = jax.device_put(params, NamedSharding(mesh, P("x", "y")))
    key = jax.random.key(0)
    want = one_round(plan, params, jq.init(plan, params), key=key)
    with jax.set_mesh(mesh):
        state = jq.init(plan, sharded)
        got = one_round(plan, sharded, state, key=key)
        text = one_round.lower(plan, sharded, state, key=key).compile().as_text()
    np.testing.assert_array_equal(got[0]["w"], want[0]["w"])
    assert got[0]["w"].sharding.spec == P("x", "y")
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert collective_sizes(text, operation) == []
    assert collective_sizes(text, "all-reduce")


def test_the_drop_in_runs_the_rounds():
    import optax

    params = {"w": normal((16, 16))}
    plan = jq.inq(params, bits=3, shares=(0.5, 1.0))
    tx = jq.incremental(optax.adamw(1e-3), plan, 3)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.tree.map(jnp.sign, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(12):
        params, opt_state = step(params, opt_state)
    state = jq.quant_state(opt_state)
    assert state.frozen["w"].all() and jq.is_on_codebook(params, state)["w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ()}, "expected shares that grow from 0 to 1, got"),
        ({"shares": (0.5, 0.5, 1.0)}, "expected shares that grow from 0 to 1, got"),
        ({"shares": (0.5, 0.9)}, "a last row of ones"),
        ({"shares": (0.5, 1.5)}, "expected shares in"),
        ({"partition": "index"}, "expected partition to be one of .* for shares of weights"),
        ({"bits": 1}, "w: expected an odd k for init='inq', got 2"),
        ({"bits": 3, "init": "ternary"}, "w: expected k = 3 for init='ternary', got 5"),
    ],
)
def test_plans_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jq.inq({"w": jnp.zeros((8, 8))}, **options)


def test_random_shares_need_a_key():
    params = {"w": normal((8, 8))}
    plan = jq.inq(params, bits=3, partition="random")
    with pytest.raises(ValueError, match="expected a key for partition='random', got None"):
        jq.quantize_round(plan, params, jq.init(plan, params))
    with pytest.raises(ValueError, match="with bits for random, got 'random'"):
        weight_priority("random", params["w"], jnp.zeros(1))
