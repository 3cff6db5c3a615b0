"""The start of one of many small blocks, against the optimum over the same cells."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.clustering.optimum import coarsen, optimum
from jaxquant.clustering.points import means, prefix, sorted_points
from jaxquant.clustering.starts import short_clusters

RNG = np.random.default_rng(0)
ARRAYS = {
    "normal": RNG.standard_normal(128),
    "Student t": RNG.standard_t(3, 128),
    "mean 10": RNG.standard_normal(128) + 10,
    "two modes": RNG.choice([0.0, 1e3], 128) + 1e-3 * RNG.standard_normal(128),
    "as many values as centroids": RNG.permutation(np.arange(128) % 8) * 1.0,
    "few values, and many cells without": RNG.permutation(np.arange(128) % 14) ** 2.0,
    "one value": np.full(128, 3.0),
}


def loss(x, centroids):
    return np.min(np.square(x[:, None] - np.asarray(centroids, np.float64)), axis=1).sum()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_clusters_of_few_cells_are_those_of_the_optimum(name, zero):
    x = ARRAYS[name].astype(np.float32)
    points = sorted_points(jnp.asarray(x))[0]
    best = optimum(points, prefix(points), 8, zero=zero, cells=32).centroids
    short = short_clusters(points, prefix(points), 8, zero=zero, cells=32)
    unit = float(points.scale)
    assert not zero or 0 in short
    np.testing.assert_allclose(loss(x, short / unit), loss(x, best / unit), rtol=1e-5, atol=1e-12)


def test_it_is_one_of_a_batch():
    x = jnp.asarray(np.stack([ARRAYS["normal"], ARRAYS["one value"]]), jnp.float32)

    def start(x):
        points = sorted_points(x)[0]
        return short_clusters(points, prefix(points), 8, zero=True, cells=32)

    together = jax.jit(jax.vmap(start))(x)
    for own, found in zip(x, together, strict=True):
        np.testing.assert_allclose(found, start(own), rtol=1e-6)


@pytest.mark.parametrize("cells", [1, 2, 3, 64, 512])
@pytest.mark.parametrize("digits", [50, 500, 5000])
def test_wide_gaps_at_the_end_begin_cells_of_their_own(cells, digits):
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal(30_000) * digits) / digits
    x = np.r_[x, np.repeat([996.0, 1000.0, 1004.0], [50, 2000, 50])]
    points = sorted_points(jnp.asarray(x, jnp.float32))[0]
    groups = coarsen(points, prefix(points), cells)
    np.testing.assert_array_equal(np.sum(groups.mass), x.size)
    edges = np.asarray(groups.edges)
    assert edges[0] == 0 and edges[-1] == x.size
    if cells >= 64:
        assert {30_000, 30_050, 32_050} <= set(edges.tolist())


@pytest.mark.parametrize("weighing", ["counts", "whole masses", "masses"])
@pytest.mark.parametrize("center", [0.0, 1e6, -3e4])
def test_means_are_the_nearest_floats(center, weighing):
    rng = np.random.default_rng(0)
    x = (center + rng.standard_normal(3000)).astype(np.float32)
    weight = {
        "counts": None,
        "whole masses": rng.integers(0, 5, x.size).astype(np.float32),
        "masses": rng.uniform(size=x.size).astype(np.float32),
    }[weighing]
    points = sorted_points(jnp.asarray(x), weight)[0]
    if weighing == "whole masses":
        points = points._replace(mass=jnp.round(points.mass * weight.max()).astype(jnp.int32))
    edges = np.r_[0, np.sort(rng.choice(np.arange(1, x.size), 60, replace=False)), x.size]
    found = means(prefix(points), jnp.asarray(edges), jnp.zeros(len(edges) - 1))
    values = np.asarray(points.value).astype(np.longdouble)
    mass = np.ones(x.size) if points.mass is None else np.asarray(points.mass)
    mass = mass.astype(np.longdouble)
    pairs = list(itertools.pairwise(edges))
    some = [mass[a:b].sum() > 0 for a, b in pairs]
    pairs = [pair for pair, own in zip(pairs, some, strict=True) if own]
    exact = np.array([(values[a:b] * mass[a:b]).sum() / mass[a:b].sum() for a, b in pairs])
    high, low = (np.asarray(part)[some] for part in found)
    np.testing.assert_array_equal(high, exact.astype(np.float32))
    error = high.astype(np.longdouble) + low - exact
    assert np.max(np.abs(error)) <= 2.0**-32 * np.max(np.abs(values))
