"""Freezing that changes a layer's answers least: ports, brute force, laws, rounds, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import meshes
from jaxquant.rounds import compensation
from jaxquant.rounds.compensation import compensate
from tests.cases import mostly_further, mostly_slow

quick = jax.jit(compensate)
one_round = jax.jit(jq.quantize_round, static_argnums=0)
CENTROIDS = np.array([-0.1, 0.0, 0.1], np.float32)
ALL = np.ones(3, bool)
OUTER = np.array([True, False, True])


def make_layer(rows, outputs, seed=0):
    """Return weights, and second moments of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rows, rows)) * np.exp(0.5 * rng.normal(size=rows))[:, None]
    inputs = rng.normal(size=(8 * rows, rows)) @ mix
    weights = rng.normal(0, 0.1, (rows, outputs)).astype(np.float32)
    return weights, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def make_groups(rows, outputs, seed=0, groups=3):
    """Return weights, and second moments of inputs as they matter for each group of outputs."""
    weights, _ = make_layer(rows, outputs, seed)
    return weights, np.stack([make_layer(rows, 1, 100 * seed + i)[1] for i in range(groups)])


def of_each(moments, outputs):
    """Return the moments of each output in float64, [N, D, D]."""
    moments = np.asarray(moments, np.float64).reshape(-1, *moments.shape[-2:])
    return np.repeat(moments, outputs // len(moments), axis=0)


def errors(new, old, moments):
    """Return the squared error of each output's answers."""
    off = np.asarray(new, np.float64) - np.asarray(old, np.float64)
    return np.einsum("in,nij,jn->n", off, of_each(moments, off.shape[1]), off)


def nearest_codes(weights):
    return jq.assign(jnp.asarray(weights), jnp.asarray(CENTROIDS))


def with_nearest(weights, frozen):
    return np.where(frozen, weights, CENTROIDS[np.asarray(nearest_codes(weights))])


def port_of_gptq(weights, centroids, moments):
    """GPTQ as published: float64, a column of the inverse's Cholesky factor at a time."""
    order = np.argsort(-np.diag(moments), kind="stable")
    rest = weights[order].astype(np.float64)
    damped = moments[order][:, order].astype(np.float64)
    damped += 0.01 * np.mean(np.diag(damped)) * np.eye(len(damped))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    new = np.zeros_like(rest)
    for i in range(len(rest)):
        new[i] = centroids[np.abs(rest[i][:, None] - centroids).argmin(-1)]
        rest[i + 1 :] -= np.outer(upper[i, i + 1 :], (rest[i] - new[i]) / upper[i, i])
    result = np.empty_like(new)
    result[order] = new
    return result


@pytest.mark.parametrize("rows", mostly_further([5, 64, 150], 150))  # one block, exactly, several
def test_one_pass_is_gptq(rows, monkeypatch):
    monkeypatch.setattr(compensation, "_PASSES", 1)
    monkeypatch.setattr(compensation, "_SWEEPS", 0)
    weights, moments = make_layer(rows, 12)
    found = jax.jit(lambda *x: compensate(*x))(
        weights, np.zeros(weights.shape, bool), CENTROIDS, ~ALL, moments
    )
    port = port_of_gptq(weights, CENTROIDS.astype(np.float64), moments)
    nearest = with_nearest(weights, np.zeros(weights.shape, bool))
    port_is_better = errors(port, weights, moments) < errors(nearest, weights, moments)
    expected = np.where(port_is_better, port, nearest)
    # Float32 may turn a tie, and all that comes after it in that output.
    same = np.all(np.abs(found.weights - expected) < 1e-6, axis=0)
    assert same.mean() > 0.8
    np.testing.assert_allclose(
        errors(found.weights, weights, moments).sum(),
        errors(expected, weights, moments).sum(),
        rtol=0.05,
    )


def test_no_output_answers_worse_than_with_the_nearest_centroids(monkeypatch):
    monkeypatch.setattr(compensation, "_PASSES", 1)
    monkeypatch.setattr(compensation, "_SWEEPS", 0)
    weights, moments = make_layer(4, 300)
    frozen = np.zeros(weights.shape, bool)
    nearest = errors(with_nearest(weights, frozen), weights, moments)
    port = errors(port_of_gptq(weights, CENTROIDS.astype(np.float64), moments), weights, moments)
    assert np.any(port > 1.1 * nearest)  # GPTQ alone does
    found = jax.jit(lambda *x: compensate(*x))(weights, frozen, CENTROIDS, ~ALL, moments)
    assert np.all(errors(found.weights, weights, moments) <= nearest * (1 + 1e-3))


def test_the_error_is_a_fraction_of_the_nearest_centroids():
    weights, moments = make_layer(144, 16)
    frozen = np.zeros(weights.shape, bool)
    nearest = errors(with_nearest(weights, frozen), weights, moments).sum()
    found = quick(weights, frozen, CENTROIDS, ~ALL, moments)
    assert errors(found.weights, weights, moments).sum() < 0.5 * nearest
    moved = quick(weights, frozen, CENTROIDS, OUTER, moments)
    assert (
        errors(moved.weights, weights, moments).sum()
        < errors(found.weights, weights, moments).sum()
    )
    assert float(moved.codebook[1]) == 0.0


def test_small_layers_come_near_the_best_of_all_choices():
    ratios = []
    for seed in range(20):
        weights, moments = make_layer(6, 1, seed)
        choices = np.array(list(itertools.product(CENTROIDS, repeat=6))).T
        best = errors(choices, weights, moments).min()
        frozen = np.zeros(weights.shape, bool)
        found = quick(weights, frozen, CENTROIDS, ~ALL, moments)
        ratios.append(errors(found.weights, weights, moments)[0] / best)
    assert min(ratios) > 1 - 1e-4
    assert np.median(ratios) < 1.05


def test_after_enough_sweeps_no_single_weight_could_do_better(monkeypatch):
    monkeypatch.setattr(compensation, "_SWEEPS", 50)
    weights, moments = make_layer(70, 8)
    found = jax.jit(lambda *x: compensate(*x))(
        weights, np.zeros(weights.shape, bool), CENTROIDS, ~ALL, moments
    )
    new = np.asarray(found.weights)
    now = errors(new, weights, moments)
    others = [
        errors(np.where(np.arange(70)[:, None] == row, centroid, new), weights, moments)
        for row in range(70)
        for centroid in CENTROIDS
    ]
    assert (np.min(others, axis=0) >= now * (1 - 1e-4)).all()


@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    refit=st.booleans(),
    dead=st.booleans(),
    make=st.sampled_from([make_layer, make_groups]),
)
def test_what_compensation_promises(seed, share, refit, dead, make):
    weights, moments = make(20, 6, seed)
    if dead:  # inputs that are always zero
        moments[..., 3, :], moments[..., 3] = 0, 0
    frozen = np.random.default_rng(seed).random(weights.shape) < share
    movable = OUTER & refit
    found = jax.tree.map(np.asarray, quick(weights, frozen, CENTROIDS, movable, moments))
    np.testing.assert_array_equal(found.weights[frozen], weights[frozen])
    np.testing.assert_array_equal(found.codebook[~movable], CENTROIDS[~movable])
    np.testing.assert_array_equal(found.weights[~frozen], found.codebook[found.codes[~frozen]])
    nearest = errors(with_nearest(weights, frozen), weights, moments)
    got = errors(found.weights, weights, moments)
    assert got.sum() <= nearest.sum() * (1 + 1e-3) + 1e-9


@pytest.mark.slow
def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest_centroid():
    weights, _ = make_layer(30, 5)
    found = quick(
        weights, np.zeros(weights.shape, bool), CENTROIDS, ~ALL, np.eye(30, dtype=np.float32)
    )
    np.testing.assert_array_equal(found.codes, nearest_codes(weights))


def test_moments_that_say_nothing_leave_the_nearest_centroid():
    weights, _ = make_layer(30, 5)
    for value in (0.0, np.nan):
        moments = np.full((30, 30), value, np.float32)
        found = quick(weights, np.zeros(weights.shape, bool), CENTROIDS, OUTER, moments)
        np.testing.assert_array_equal(found.codes, nearest_codes(weights))
        np.testing.assert_array_equal(found.codebook, CENTROIDS)


# Blocks -------------------------------------------------------------------------------------------

NUMBERS = [(1, 6), (4, 1), (4, 3)]  # of blocks of inputs and of outputs, in a layer of 20 by 6


def make_codebooks(numbers, seed=0):
    """Return codebooks in no order, one for each block, and flags of those that may move."""
    rng = np.random.default_rng(seed)
    tables = 0.1 * rng.normal(size=(*numbers, 3)).astype(np.float32)
    return tables, rng.random(tables.shape) < 0.7


def for_each(numbers, tables, shape):
    """Return each weight's codebook, [D, N, k]."""
    rows, columns = (np.arange(size) // (size // n) for size, n in zip(shape, numbers, strict=True))
    return tables[rows[:, None], columns[None]]


def nearest_of(weights, own):
    """Return the nearest centroid of each weight's codebook."""
    codes = np.abs(weights[..., None].astype(np.float64) - own).argmin(-1)
    return np.take_along_axis(own, codes[..., None], -1)[..., 0]


def by_block(errors, numbers):
    return errors.reshape(numbers[1], -1).sum(1)


def least_squares(weights, frozen, found, numbers, movable, moments):
    """Return the least error of any centroids that may move, under the codes that were found."""
    slots = for_each(numbers, np.arange(found.codebook.size).reshape(movable.shape), weights.shape)
    slots = np.take_along_axis(slots, found.codes[..., None].astype(int), -1)[..., 0]
    moves = ~frozen & movable.reshape(-1)[slots]
    root = np.linalg.cholesky(of_each(moments, weights.shape[1])).transpose(0, 2, 1)
    members = (slots[..., None] == np.arange(movable.size)) & moves[..., None]  # [D, N, centroids]
    answers = np.einsum("nij,jns->ins", root, members).reshape(weights.size, -1)
    rest = np.where(moves, weights, weights - found.weights.astype(np.float64))
    rest = np.einsum("nij,jn->in", root, rest)
    best = np.linalg.lstsq(answers, rest.reshape(-1), rcond=None)[0]
    return np.sum(np.square(rest.reshape(-1) - answers @ best))


@given(
    seed=st.integers(0, 10_000),
    numbers=st.sampled_from(NUMBERS),
    share=st.sampled_from([0.0, 0.3]),
    refit=st.booleans(),
)
def test_what_compensation_promises_of_blocks(seed, numbers, share, refit):
    weights, moments = make_layer(20, 6, seed)
    tables, movable = make_codebooks(numbers, seed)
    movable = movable & refit
    frozen = np.random.default_rng(seed).random(weights.shape) < share
    found = jax.tree.map(np.asarray, quick(weights, frozen, tables, movable, moments))
    np.testing.assert_array_equal(found.weights[frozen], weights[frozen])
    np.testing.assert_array_equal(found.codebook[~movable], tables[~movable])
    own = for_each(numbers, found.codebook, weights.shape)
    shared = np.take_along_axis(own, found.codes[..., None].astype(int), -1)[..., 0]
    np.testing.assert_array_equal(found.weights[~frozen], shared[~frozen])
    near = nearest_of(weights, for_each(numbers, tables, weights.shape))
    before = errors(np.where(frozen, weights, near), weights, moments)
    after = errors(found.weights, weights, moments)
    limit = (1 + 1e-3) * before + 1e-9
    assert np.all(by_block(after, numbers) <= by_block(limit, numbers))
    if not refit:
        assert np.all(after <= limit)


def test_groups_of_outputs_go_by_moments_of_their_own():
    weights, moments = make_groups(20, 6)
    energies = np.sqrt(np.diagonal(moments, axis1=1, axis2=2))
    moments *= (energies[0] / energies)[:, :, None] * (energies[0] / energies)[:, None]  # one order
    frozen = np.random.default_rng(0).random(weights.shape) < 0.2
    found = quick(weights, frozen, CENTROIDS, ~ALL, moments)
    apart = [
        quick(weights[:, part], frozen[:, part], CENTROIDS, ~ALL, own)
        for part, own in zip((np.s_[:2], np.s_[2:4], np.s_[4:]), moments, strict=True)
    ]
    np.testing.assert_array_equal(
        found.weights, np.concatenate([own.weights for own in apart], axis=1)
    )
    same = quick(weights, frozen, CENTROIDS, OUTER, np.stack([moments[1]] * 3))
    one = quick(weights, frozen, CENTROIDS, OUTER, moments[1])
    np.testing.assert_allclose(same.weights, one.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_outputs_with_codebooks_of_their_own_are_layers_of_their_own():
    weights, moments = make_layer(20, 6)
    tables, movable = make_codebooks((1, 6))
    frozen = np.random.default_rng(0).random(weights.shape) < 0.2
    found = quick(weights, frozen, tables, movable, moments)
    alone = jax.jit(jax.vmap(compensate, in_axes=(1, 1, 0, 0, None)))(
        weights[:, :, None], frozen[:, :, None], tables[0], movable[0], moments
    )
    np.testing.assert_allclose(found.weights, alone.weights[..., 0].T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.codebook[0], alone.codebook, rtol=1e-4, atol=1e-6)


def test_kernels_are_cut_along_each_of_their_axes():
    # [2, 3, 4] of inputs in blocks of [1, 3, 2]: two along the window, two along the channels.
    groups = compensation._groups((2, 3, 4, 5), (2, 1, 2, 1))
    assert groups.tolist() == [3 * [[0, 0, 1, 1]], 3 * [[2, 2, 3, 3]]]
    weights, moments = make_layer(20, 6)
    tables, movable = make_codebooks((4, 3))
    frozen = np.zeros(weights.shape, bool)
    found = quick(weights, frozen, tables, movable, moments)
    shape = (4, 5, 6)
    kernel = quick(
        weights.reshape(shape), frozen.reshape(shape), tables[:, None], movable[:, None], moments
    )
    np.testing.assert_allclose(kernel.weights.reshape(20, 6), found.weights, rtol=1e-6)
    np.testing.assert_allclose(kernel.codebook[:, 0], found.codebook, rtol=1e-6)


def test_small_layers_in_groups_come_near_the_best_of_all_choices():
    ratios = []
    for seed in range(20):
        weights, moments = make_layer(6, 1, seed)
        tables, movable = make_codebooks((2, 1), seed)
        own = for_each((2, 1), tables, weights.shape)[:, 0]
        choices = np.array(list(itertools.product(*own))).T
        best = errors(choices, weights, moments).min()
        found = quick(
            weights, np.zeros(weights.shape, bool), tables, np.zeros_like(movable), moments
        )
        ratios.append(errors(found.weights, weights, moments)[0] / best)
    assert min(ratios) > 1 - 1e-4
    assert np.median(ratios) < 1.05


@pytest.mark.parametrize(
    ("numbers", "make"), [((1, 6), make_layer), ((4, 3), make_layer), ((1, 1), make_groups)]
)
def test_centroids_end_at_the_least_squares_of_their_codes(numbers, make):
    ratios = []
    for seed in range(5):
        weights, moments = make(20, 6, seed)
        tables, movable = make_codebooks(numbers, seed)
        frozen = np.random.default_rng(seed).random(weights.shape) < 0.2
        found = jax.tree.map(np.asarray, quick(weights, frozen, tables, movable, moments))
        best = least_squares(weights, frozen, found, numbers, movable, moments)
        ratios.append(errors(found.weights, weights, moments).sum() / best)
    assert min(ratios) > 1 - 1e-3
    assert max(ratios) < (1.001 if numbers[0] == 1 else 1.1)


@pytest.mark.slow
def test_moved_centroids_are_rounded_to_their_dtype_and_gain_all_the_same():
    for seed in range(10):
        weights, moments = make_layer(20, 6, seed)
        tables, movable = make_codebooks((4, 3), seed)
        narrow = jnp.asarray(tables, jnp.float8_e4m3fn)
        found = quick(weights, np.zeros(weights.shape, bool), narrow, movable, moments)
        assert found.codebook.dtype == narrow.dtype
        wide, start = (np.asarray(x.astype(jnp.float32)) for x in (found.codebook, narrow))
        assert np.any(wide != start)
        own = for_each((4, 3), wide, weights.shape)
        np.testing.assert_array_equal(found.weights, nearest_of(np.asarray(found.weights), own))
        near = nearest_of(weights, for_each((4, 3), start, weights.shape))
        limit = by_block(errors(near, weights, moments), (4, 3)) * (1 + 1e-3)
        assert np.all(by_block(errors(found.weights, weights, moments), (4, 3)) <= limit)


@pytest.mark.slow
def test_least_squares_that_lose_by_rounding_are_not_taken():
    weights, moments = make_layer(20, 6)
    tables, movable = make_codebooks((4, 3))
    layer = compensation._Layer(
        jnp.asarray(weights),
        jnp.zeros(weights.shape, bool),
        jnp.asarray(moments)[None],
        jnp.zeros((1, *moments.shape)),
        jnp.arange(20, dtype=jnp.int32) // 5,
        jnp.asarray(movable),
        jnp.bool_(False),
    )
    near = nearest_of(weights, for_each((4, 3), tables, weights.shape))
    start = compensation._Found(jnp.asarray(near), jnp.asarray(tables), jnp.ones((4, 3, 1)))
    codes = compensation._codes(layer, start)
    solved = compensation._refit_codebook(layer, start, codes, jnp.dtype(jnp.float32))
    before, best, after = (
        by_block(errors(found.weights, weights, moments), (4, 3))
        for found in (
            start,
            solved,
            compensation._refit_codebook(layer, solved, codes, jnp.dtype(jnp.float8_e5m2)),
        )
    )
    assert np.all(best < 0.99 * before)
    assert np.all(after <= best)


# Scales -------------------------------------------------------------------------------------------


def make_scales(numbers, seed=0):
    """Return a scale for each block, and a codebook that all share."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 1.5, (*numbers, 1)).astype(np.float32)
    return np.array([[[-0.12, -0.03, 0.0, 0.05, 0.1]]], np.float32), scale


@given(
    seed=st.integers(0, 10_000),
    numbers=st.sampled_from(NUMBERS),
    share=st.sampled_from([0.0, 0.3]),
    refit=st.booleans(),
)
def test_what_compensation_promises_of_scaled_blocks(seed, numbers, share, refit):
    weights, moments = make_layer(20, 6, seed)
    codebook, scale = make_scales(numbers, seed)
    movable = (codebook != 0) & refit
    frozen = np.random.default_rng(seed).random(weights.shape) < share
    found = jax.tree.map(np.asarray, quick(weights, frozen, codebook, movable, moments, scale))
    np.testing.assert_array_equal(found.weights[frozen], weights[frozen])
    np.testing.assert_array_equal(found.codebook[~movable], codebook[~movable])
    if not refit:
        np.testing.assert_array_equal(found.scale, scale)
    assert np.all(found.scale > 0)
    own = for_each(numbers, found.codebook * found.scale, weights.shape)
    shared = np.take_along_axis(own, found.codes[..., None].astype(int), -1)[..., 0]
    np.testing.assert_array_equal(found.weights[~frozen], shared[~frozen])
    near = nearest_of(weights, for_each(numbers, codebook * scale, weights.shape))
    before = errors(np.where(frozen, weights, near), weights, moments)
    after = errors(found.weights, weights, moments)
    assert after.sum() <= (1 + 1e-3) * before.sum() + 1e-9
    if not refit:
        assert np.all(after <= (1 + 1e-3) * before + 1e-9)


@pytest.mark.parametrize("numbers", [(1, 6), (4, 3)])
def test_scales_end_at_the_least_squares_of_their_codes(numbers):
    for seed in range(5):
        weights, moments = make_layer(20, 6, seed)
        codebook, scale = make_scales(numbers, seed)
        frozen = np.random.default_rng(seed).random(weights.shape) < 0.2
        args = weights, frozen, codebook, codebook != 0, moments, scale
        found = jax.tree.map(np.asarray, quick(*args))
        rows, columns = (
            np.arange(n) // (n // number) for n, number in zip(weights.shape, numbers, strict=True)
        )
        blocks = rows[:, None] * numbers[1] + columns[None]
        units = np.where(frozen, 0, found.codebook.reshape(-1)[found.codes])
        members = units[..., None] * (blocks[..., None] == np.arange(np.prod(numbers)))
        root = np.linalg.cholesky(moments.astype(np.float64)).T
        answers = np.einsum("ij,jns->ins", root, members).reshape(weights.size, -1)
        rest = (root @ np.where(frozen, 0, weights)).reshape(-1)
        best = np.linalg.lstsq(answers, rest, rcond=None)[0]
        least = np.sum(np.square(rest - answers @ best))
        ratio = errors(found.weights, weights, moments).sum() / least
        assert 1 - 1e-3 < ratio < 1.01


def test_shared_codebooks_and_scales_gain_more_together():
    weights, moments = make_layer(144, 16)
    codebook, scale = make_scales((1, 16))
    frozen = np.zeros(weights.shape, bool)

    def error(movable, scale):
        found = quick(weights, frozen, codebook, movable, moments, scale)
        return errors(found.weights, weights, moments).sum()

    fixed = error(np.zeros(codebook.shape, bool), scale)
    assert error(codebook != 0, scale) < 0.8 * fixed


def test_moved_scales_are_rounded_to_their_dtype():
    weights, moments = make_layer(20, 6)
    codebook, scale = make_scales((1, 6))
    frozen = np.zeros(weights.shape, bool)
    narrow = jnp.asarray(scale, jnp.bfloat16)
    found = quick(weights, frozen, codebook, codebook != 0, moments, narrow)
    assert found.scale.dtype == jnp.bfloat16
    assert jnp.any(found.scale != narrow)
    own = for_each((1, 6), found.codebook * found.scale.astype(jnp.float32), weights.shape)
    np.testing.assert_array_equal(found.weights, nearest_of(np.asarray(found.weights), own))


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    mostly_further(
        [
            ((20, 6), (-1, 1), None),
            ((20, 6), (5, 1), "bfloat16"),
            ((3, 20, 6), (1, 10, 2), None),
            ((20, 6), (5, 2), "int8"),  # whose codebook stays
        ],
        ((20, 6), (5, 1), "bfloat16"),
    ),
)
def test_rounds_keep_scaled_weights_on_their_codebook_and_gain(shape, block, dtype):
    weights, moments = make_layer(20, shape[-1])
    if len(shape) == 3:
        weights = np.stack([weights, 2 * weights, -weights])
        moments = np.stack(3 * [moments])
    params = {"w": jnp.asarray(weights)}
    rule = jq.LayerRule("w", k=4, block=block, scaled=True, centroid_dtype=dtype)
    plan = jq.slq(params, rounds=(4,), rules=[rule])
    state = jq.init(plan, params)
    near, *_ = one_round(plan, params, state)
    new, state, _ = one_round(plan, params, state, moments={"w": jnp.asarray(moments)})
    assert all(jax.tree.leaves(jq.is_on_codebook(new, state)))
    np.testing.assert_array_equal(jq.unpack(jq.pack(new, state))["w"], new["w"])
    layers = zip(*(x.reshape(-1, 20, 6) for x in (new["w"], near["w"], weights)), strict=True)
    for after, before, own in layers:
        own_moments = moments.reshape(-1, 20, 20)[0]
        gained = errors(after, own, own_moments).sum() / errors(before, own, own_moments).sum()
        assert gained < 0.9


@pytest.mark.slow
def test_codebooks_of_many_centroids_are_searched_alike(monkeypatch):
    weights, moments = make_layer(20, 6)
    tables, movable = make_codebooks((4, 3))
    args = weights, np.zeros(weights.shape, bool), tables, movable, moments
    expected = quick(*args)
    monkeypatch.setattr(compensation, "MOST_COMPARES", 1)
    found = jax.jit(lambda *x: compensate(*x))(*args)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-5)
    np.testing.assert_array_equal(found.codes, expected.codes)


def test_codebooks_that_do_not_fit_are_refused():
    weights, moments = make_layer(20, 6)
    tables, movable = make_codebooks((3, 1))
    with pytest.raises(ValueError, match=r"expected codebooks for weights of shape \(20, 6\)"):
        compensate(weights, weights > 9, tables, movable, moments)


# Moments of inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    "padding", ["SAME", "SAME_LOWER", "VALID", [(0, 1), (2, 0)], [(0, -1), (2, 0)]]
)
@pytest.mark.parametrize("dilation", [1, 2])
def test_moments_give_the_mean_square_of_a_convolutions_answers(strides, padding, dilation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 7, 8, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 2, 4, 5)), jnp.float32)
    answers = jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    options = {"window": (3, 2), "window_strides": strides, "padding": padding}
    moments = jq.input_moments(x, **options, kernel_dilation=dilation)
    matrix = kernel.reshape(-1, 5)
    got = np.einsum("in,ij,jn->n", matrix, moments, matrix)
    np.testing.assert_allclose(got, jnp.mean(answers**2, (0, 1, 2)), rtol=1e-4)


def test_moments_of_a_dense_layer():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)), jnp.float32)
    np.testing.assert_allclose(jq.input_moments(x), x.T @ x / 50, rtol=1e-4, atol=1e-5)
    by_time = jq.input_moments(x.reshape(5, 2, 5, 6))
    np.testing.assert_allclose(by_time, x.T @ x / 50, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected inputs of at least 2 axes, got \(6,\)"):
        jq.input_moments(x[0])
    with pytest.raises(ValueError, match=r"expected inputs of 4 axes, got \(50, 6\)"):
        jq.input_moments(x, window=(3, 3))
    with pytest.raises(ValueError, match=r"expected windows of \(3, 5\) to fit, got inputs"):
        jq.input_moments(
            jnp.ones((1, 4, 4, 2)), window=(3, 3), kernel_dilation=(1, 2), padding="VALID"
        )


@pytest.mark.parametrize(("batch", "parts"), [(12, 4), (7, 7), (1, 1)])
def test_moments_of_a_large_batch_come_in_parts(batch, parts, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 6, 6, 3)), jnp.float32)
    whole = jq.input_moments(x, window=(3, 3))
    monkeypatch.setattr(
        "jaxquant.calibration.moments._PART_BYTES", 3 * 36 * 27 * 4
    )  # windows of three images
    meshes._run.clear_cache()  # traced anew
    np.testing.assert_allclose(jq.input_moments(x, window=(3, 3)), whole, rtol=1e-5, atol=1e-6)
    program = str(jax.make_jaxpr(lambda x: jq.input_moments(x, window=(3, 3)))(x))
    assert (f"length={parts}" in program) == (parts > 1)


# Rounds -------------------------------------------------------------------------------------------


assert_equal = np.testing.assert_array_equal


def make_tree(dtype=np.float32):
    first, first_moments = make_layer(36, 8, 1)
    second, second_moments = make_layer(20, 6, 2)
    params = {
        "a": {"kernel": jnp.asarray(first.reshape(3, 3, 4, 8), dtype), "bias": jnp.zeros(8)},
        "b": {"kernel": jnp.asarray(second, dtype)},
    }
    return params, {"a/kernel": jnp.asarray(first_moments), "b/kernel": jnp.asarray(second_moments)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        (jnp.float32, "boundaries_together"),
        pytest.param(jnp.bfloat16, "layer_by_layer", marks=pytest.mark.slow),
    ],
)
def test_rounds_with_moments_freeze_for_good_and_end_on_the_codebook(dtype, order):
    params, moments = make_tree(dtype)
    plan = jq.mlq(params, groups=2, order=order, zero=True)
    state, shares = jq.init(plan, params), np.zeros(2)
    for number in range(plan.num_rounds):
        before = params, state
        params, state, info = one_round(plan, params, state, moments=moments)
        for group, path in enumerate(("a", "b")):
            old, new = before[0][path]["kernel"], params[path]["kernel"]
            frozen = before[1].frozen[path]["kernel"]
            assert_equal(np.asarray(new)[frozen], np.asarray(old)[frozen])
            if plan.schedule[number, group] == shares[group]:
                assert_equal(new, old)
                assert_equal(state.frozen[path]["kernel"], frozen)
            # Far enough for free weights to come near a frozen centroid.
            noise = 0.03 * jax.random.normal(jax.random.key(number), new.shape)
            moved = jnp.where(state.frozen[path]["kernel"], new, new + noise.astype(dtype))
            params[path] = {**params[path], "kernel": moved}
        shares = plan.schedule[number]
    for path in ("a", "b"):
        assert bool(jnp.all(state.frozen[path]["kernel"]))
        assert bool(jq.is_on_codebook(params, state)[path]["kernel"])
        assert float(info.error_after[f"{path}/kernel"]) == 0
        assert float(jnp.min(jnp.abs(state.codebooks[path]["kernel"]))) == 0  # pinned
    packed = jq.pack(params, state)
    jax.tree.map(np.testing.assert_array_equal, jq.unpack(packed), params)


@pytest.mark.slow
def test_a_round_with_moments_answers_better_and_touches_no_other_layer():
    params, moments = make_tree()
    plan = jq.mlq(params, groups=2, order="layer_by_layer")
    params, state, _ = one_round(plan, params, jq.init(plan, params))  # boundaries of the first
    plain, _, _ = one_round(plan, params, state)
    got, new_state, _ = one_round(plan, params, state, moments=moments)
    np.testing.assert_array_equal(got["b"]["kernel"], params["b"]["kernel"])
    assert not np.any(new_state.frozen["b"]["kernel"])
    old = params["a"]["kernel"].reshape(36, 8)
    error, plain_error = (
        errors(x["a"]["kernel"].reshape(36, 8), old, np.asarray(moments["a/kernel"])).sum()
        for x in (got, plain)
    )
    assert error < 0.8 * plain_error


KERNELS = [  # shape, inputs, blocks, and the same kernel as [inputs, outputs]
    ((8, 2, 3), 1, (-1, 1, -1), (-1, 3)),
    ((2, 3, 8), -1, (-1, -1, 2), (2, -1)),
    ((6, 2, 4), -2, (-1, 1, -1), (4, -1)),
]


@pytest.mark.parametrize(
    ("shape", "inputs", "block", "flat_block"), mostly_slow(KERNELS, KERNELS[2])
)
def test_moments_are_of_the_axes_that_a_rule_says(shape, inputs, block, flat_block):
    weights, moments = make_layer(8, 6)
    # The same kernel as [inputs, outputs], and with the axes of either side split.
    own = shape[:inputs] if inputs > 0 else shape[inputs:]
    others = shape[inputs:] if inputs > 0 else shape[:inputs]
    kernel = weights.reshape(*own, *others)
    if inputs < 0:
        kernel = np.moveaxis(kernel, range(len(own)), range(inputs, 0))
    assert kernel.shape == shape

    def frozen(kernel, **rule):
        tree = {"w": jnp.asarray(kernel)}
        plan = jq.slq(tree, rounds=(3,), bits=2, rules=[jq.LayerRule("w", **rule)])
        state = jq.init(plan, tree)
        return np.asarray(one_round(plan, tree, state, moments={"w": moments})[0]["w"])

    found, expected = frozen(kernel, inputs=inputs, block=block), frozen(weights, block=flat_block)
    if inputs < 0:
        found = np.moveaxis(found, range(inputs, 0), range(-inputs))
    np.testing.assert_allclose(found.reshape(8, 6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "size", "message"),
    [
        ({"inputs": 1}, 16, r"moments: w: expected shape \(8, 8\), got \(16, 16\)"),
        ({"inputs": 3}, 8, r"w: rule 'w' expected inputs to leave axes of inputs and of outputs"),
        ({"inputs": 0}, 8, "rule 'w': expected inputs to be 1, -1 or more, got 0"),
        ({"inputs": 1, "block": (-1, -1, 1)}, 8, "w: expected blocks that cut no axis of outputs"),
    ],
)
def test_inputs_that_do_not_fit_are_named(rule, size, message):
    tree = {"w": jnp.ones((8, 2, 3))}
    with pytest.raises(ValueError, match=message):
        plan = jq.slq(tree, rounds=(2,), bits=2, rules=[jq.LayerRule("w", **rule)])
        jq.quantize_round(plan, tree, jq.init(plan, tree), moments={"w": jnp.eye(size)})


@pytest.mark.slow
def test_moments_say_nothing_before_a_layer_is_whole():
    params, moments = make_tree()
    plan = jq.slq(params, bits=2, rounds=(1, 2, 3))
    state = jq.init(plan, params)
    for last in (False, False, True):
        plain, plain_state, _ = one_round(plan, params, state)
        params, state, info = one_round(plan, params, state, moments=moments)
        same = [np.array_equal(plain[x]["kernel"], params[x]["kernel"]) for x in ("a", "b")]
        assert same == [not last, not last]
        jax.tree.map(assert_equal, state.frozen, plain_state.frozen)
    assert info.weights_frozen == {"a/kernel": 1, "b/kernel": 1}


@pytest.mark.slow
def test_a_round_moves_the_centroids_that_are_neither_pinned_nor_frozen():
    params, moments = make_tree()
    matrix = params["b"]["kernel"]
    plan = jq.slq(params, bits=2, rounds=(3,), zero=True)
    start = jq.init(plan, params)
    _, plain, _ = one_round(plan, params, start)
    got, state, _ = one_round(plan, params, start, moments=moments)
    centroids = plain.codebooks["b"]["kernel"]
    found = quick(
        matrix, jnp.zeros(matrix.shape, bool), centroids, centroids != 0, moments["b/kernel"]
    )
    np.testing.assert_allclose(got["b"]["kernel"], found.weights, rtol=1e-5)
    np.testing.assert_allclose(state.codebooks["b"]["kernel"], found.codebook, rtol=1e-5)
    assert np.any(found.codebook != centroids)


@pytest.mark.slow
def test_a_layer_without_moments_is_assigned_as_before():
    params, moments = make_tree()
    plan = jq.slq(params, bits=2, rounds=(3,))
    state = jq.init(plan, params)
    plain, _, _ = one_round(plan, params, state)
    got, _, _ = one_round(plan, params, state, moments={"a/kernel": moments["a/kernel"]})
    np.testing.assert_array_equal(got["b"]["kernel"], plain["b"]["kernel"])
    assert np.any(got["a"]["kernel"] != plain["a"]["kernel"])


@pytest.mark.slow
def test_stacked_layers_are_compensated_for_one_by_one():
    layers = [make_layer(12, 4, seed) for seed in range(3)]
    stack = {"w": jnp.stack([weights for weights, _ in layers])}
    plan = jq.slq(stack, bits=2, rounds=(3,), rules=[jq.LayerRule("w", axis=0)])
    moments = {"w": jnp.stack([m for _, m in layers])}
    got, state, _ = one_round(plan, stack, jq.init(plan, stack), moments=moments)
    for i, (weights, own) in enumerate(layers):
        alone = {"w": jnp.asarray(weights)}
        plan = jq.slq(alone, bits=2, rounds=(3,))
        expected, alone_state, _ = one_round(
            plan, alone, jq.init(plan, alone), moments={"w": jnp.asarray(own)}
        )
        np.testing.assert_allclose(got["w"][i], expected["w"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            state.codebooks["w"][i].reshape(-1), alone_state.codebooks["w"], rtol=1e-5
        )


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_sharded_layer_is_compensated_for_as_a_whole_one(axis_type):
    params, moments = make_tree()
    plan = jq.slq(params, bits=2, rounds=(3,), zero=True)
    expected, expected_state, _ = one_round(plan, params, jq.init(plan, params), moments=moments)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {
        "a": {"kernel": P(None, None, "model", "data"), "bias": P()},
        "b": {"kernel": P("data")},
    }
    put = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    with jax.set_mesh(mesh):
        got, state, _ = one_round(plan, put, jq.init(plan, put), moments=moments)
    for path in ("a", "b"):
        assert got[path]["kernel"].sharding.is_equivalent_to(
            put[path]["kernel"].sharding, put[path]["kernel"].ndim
        )
        np.testing.assert_allclose(
            got[path]["kernel"], expected[path]["kernel"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            state.codebooks[path]["kernel"], expected_state.codebooks[path]["kernel"], rtol=1e-5
        )


def test_moments_that_do_not_fit_are_named():
    params, moments = make_tree()
    plan = jq.slq(params, bits=2, rounds=(3,))
    state = jq.init(plan, params)
    call = functools.partial(jq.quantize_round, plan, params, state)
    with pytest.raises(ValueError, match="moments: expected paths of selected leaves, got a/bias"):
        call(moments={"a/bias": moments["a/kernel"]})
    with pytest.raises(ValueError, match=r"moments: b/kernel: expected shape \(20, 20\), got"):
        call(moments={"b/kernel": moments["a/kernel"]})
    with pytest.raises(ValueError, match="moments: b/kernel"):
        call(moments={"b/kernel": jnp.full((20, 20), jnp.nan)})
    with pytest.raises(ValueError, match="b/kernel: expected groups into which its 6 outputs can"):
        call(moments={"b/kernel": jnp.zeros((4, 20, 20))})
    twins = {name: jnp.ones((4, 6)) for name in "ab"}
    own = {"a": jnp.eye(4), "b": jnp.zeros((2, 4, 4))}
    with pytest.raises(ValueError, match="moments: b: expected the groups of outputs that a of"):
        plan_of_twins = jq.slq(twins, bits=2, rounds=(3,))
        jq.quantize_round(plan_of_twins, twins, jq.init(plan_of_twins, twins), moments=own)
    plan = jq.inq(params)
    with pytest.raises(ValueError, match="moments: expected a plan of shares of clusters"):
        jq.quantize_round(plan, params, jq.init(plan, params), moments=moments)
    stack = {"w": jnp.ones((3, 8, 4))}
    plan = jq.slq(stack, bits=2, rounds=(3,), rules=[jq.LayerRule("w", axis=0)])
    with pytest.raises(ValueError, match=r"moments: w: expected shape \(3, 8, 8\), got \(8, 8\)"):
        jq.quantize_round(plan, stack, jq.init(plan, stack), moments={"w": jnp.eye(8)})
