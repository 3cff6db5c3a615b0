"""The start of one of many small blocks, against the optimum over the same cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.clustering.optimum import optimum
from jaxquant.clustering.points import prefix, sorted_points
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
