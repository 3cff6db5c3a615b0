"""One block as a round clusters it: small or large, alone or in a batch, easy or hard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kmeans import loss_of

from jaxquant.clustering import blocks
from jaxquant.clustering.kmeans import kmeans
from jaxquant.clustering.options import Clustering
from jaxquant.clustering.solver import cluster_block, is_small
from tests.cases import mostly_slow

LARGE = 70_000


@functools.partial(jax.jit, static_argnames=("clustering", "dtype"))
def cluster(x, weight, codebook, frozen, clustering=Clustering(), dtype=jnp.float32):  # noqa: B008
    return cluster_block(x, weight, codebook, frozen, clustering=clustering, dtype=dtype)


def anew(x, k, weight=None, **options):
    """Cluster from the start, results as NumPy arrays."""
    x = jnp.asarray(x)
    result = cluster(x, weight, jnp.zeros(k, jnp.float32), jnp.zeros(k, bool), **options)
    return jax.tree.map(np.asarray, result)


def normal(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def exact_optimum_at_any_scale(x, k, weight):
    """As `exact_optimum`, with costs that grow from one entry on: no digits are lost to others."""
    order = np.argsort(x)
    x, weight = x[order], weight[order]
    best = np.r_[0, np.full(x.size, np.inf)]
    mass, mean, cost = np.zeros((3, x.size))
    costs = np.full((x.size + 1, x.size), np.inf)  # [end, start]
    for i, (value, own) in enumerate(zip(x, weight, strict=True)):
        here = slice(i + 1)
        step = value - mean[here]
        cost[here] += mass[here] * own / (mass[here] + own) * step**2
        mass[here] += own
        mean[here] += own / mass[here] * step
        costs[i + 1, here] = cost[here]
    for _ in range(k):
        best[1:] = (costs[1:] + best[:-1]).min(axis=1)
        best[0] = np.inf
    return best[-1]


HARD = {
    "an outlier at 1e5 deviations": lambda rng, n: np.r_[rng.normal(size=n - 1), 1e5],
    "outliers at 1e10": lambda rng, n: np.r_[rng.normal(size=n - 2), -1e10, 1e10],
    "narrow modes": lambda rng, n: np.r_[0, 1][rng.integers(0, 2, n)] + rng.normal(0, 1e-3, n),
    "narrow modes and one far away": lambda rng, n: np.r_[
        np.r_[0, 1][rng.integers(0, 2, n - 9)] + rng.normal(0, 1e-3, n - 9), [1e5] * 9
    ],
    "modes 1e6 apart": lambda rng, n: np.r_[0, 1e6][rng.integers(0, 2, n)] + rng.normal(size=n),
    "lognormal": lambda rng, n: np.exp(5 * rng.normal(size=n)),
    "finfo.min and 0": lambda rng, n: np.where(rng.uniform(size=n) < 0.5, 0, -3.4028235e38),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_hard_blocks_are_within_a_hundredth_of_the_optimum(name, dtype):
    if name == "finfo.min and 0" and dtype != np.float32:
        pytest.skip("infinite in bfloat16")
    values = HARD[name](np.random.default_rng(0), 300).astype(dtype)
    counts = np.random.default_rng(1).integers(180, 300, 300)  # as large in total for all
    counts[-2:] = 1
    unit = np.abs(values.astype(np.float64)).max()
    for x, weight in ((values, None), (np.repeat(values, counts), counts)):
        assert is_small(x.size) == (weight is None)
        result = anew(x, 5)
        own = np.ones(values.size) if weight is None else weight
        best = exact_optimum_at_any_scale(values.astype(np.float64) / unit, 5, own)
        loss = loss_of(values.astype(np.float64) / unit, result.centroids / unit, weight)
        assert loss <= 1.01 * best
        assert (np.diff(result.centroids) >= 0).all() and result.counts.sum() == x.size


@pytest.mark.slow
@pytest.mark.parametrize("weighted", mostly_slow([False, True], True))
def test_blocks_in_batches_are_those_one_by_one(monkeypatch, weighted):
    monkeypatch.setattr(blocks, "_BATCH_WEIGHTS", 256)
    x = jnp.asarray(normal(64 * 32)).reshape(64, 32)
    weight = jnp.abs(jnp.asarray(normal(64 * 32, 1))).reshape(64, 32)
    numbers, k = (2, 32), 4
    frozen = jnp.zeros((*numbers, k), bool).at[1, ::2, 0].set(True)
    codebooks = jnp.broadcast_to(jnp.float32([-1.5, -0.5, 0.5, 1.5]), (*numbers, k))

    def function(x, weight, codebook, frozen):
        return cluster(x, weight if weighted else None, codebook, frozen)

    got = jax.jit(lambda *a: blocks.by_batch(function, a[:2], a[2:], numbers))(
        x, weight, codebooks, frozen
    )
    for i, j in ((0, 0), (0, 31), (1, 0), (1, 1), (1, 31)):
        own = x[32 * i : 32 * (i + 1), j], weight[32 * i : 32 * (i + 1), j]
        want = jax.jit(function)(*own, codebooks[i, j], frozen[i, j])
        here = jax.tree.map(lambda a, at=(i, j): a[at], got)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), here, want)
        assert not frozen[i, j].any() or here.centroids[0] == -1.5


def test_a_block_without_frozen_centroids_starts_anew_and_reaches_what_kmeans_does():
    x = normal(3000)
    result, expected = anew(x, 8), jax.jit(kmeans, static_argnums=1)(x, 8)
    np.testing.assert_allclose(result.losses.sum(), expected.loss, rtol=2e-3)
    np.testing.assert_allclose(result.losses.sum(), loss_of(x, result.centroids), rtol=1e-5)
    np.testing.assert_allclose(result.norm, np.sum(x.astype(np.float64) ** 2), rtol=1e-5)


@pytest.mark.parametrize("size", [500, LARGE])
@pytest.mark.parametrize(
    "dtype", mostly_slow([jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8], jnp.float8_e4m3fn)
)
def test_clusters_are_those_of_the_rounded_centroids(size, dtype):
    x = normal(size) * 30
    result = anew(x, 5, dtype=dtype)
    assert result.centroids.dtype == dtype
    wide = result.centroids.astype(np.float32)
    np.testing.assert_array_equal(wide, jnp.asarray(wide).astype(dtype).astype(jnp.float32))
    np.testing.assert_allclose(result.losses.sum(), loss_of(x, wide), rtol=1e-5)


@pytest.mark.parametrize("size", [500, LARGE])
def test_weights_and_losses_are_in_units_of_the_sample_weights(size):
    x, weight = normal(size), np.abs(normal(size, 1)) * 7
    result = anew(x, 5, weight)
    wide = weight.astype(np.float64)
    np.testing.assert_allclose(result.losses.sum(), loss_of(x, result.centroids, wide), rtol=1e-4)
    np.testing.assert_allclose(result.norm, np.sum(wide * x.astype(np.float64) ** 2), rtol=1e-5)


@pytest.mark.parametrize("size", [500, LARGE])
def test_options_hold(size):
    x = normal(size)
    result = anew(x, 5, clustering=Clustering(zero=True, powers_of_two=True))
    assert 0 in result.centroids
    others = np.abs(result.centroids[result.centroids != 0])
    np.testing.assert_array_equal(np.frexp(others)[0], 0.5)
    inq = anew(x, 5, clustering=Clustering(init="inq", iterations=0)).centroids
    np.testing.assert_array_equal(inq[0], 0)
    np.testing.assert_array_equal(inq[1::2], -inq[2::2])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("size", [500, LARGE])
def test_what_cannot_be_clustered_is_said(size, bad):
    x = normal(size)
    assert anew(x, 5).finite
    x[size // 2] = bad
    assert not anew(x, 5).finite


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "best"}, "expected init to be one of"),
        ({"iterations": -1}, "expected iterations to be an integer of at least 0, got -1"),
        ({"bins": 0}, "expected bins to be an integer of at least 1, got 0"),
        ({"cells": 1.5}, "expected cells to be an integer of at least 1, got 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Clustering(**options)
