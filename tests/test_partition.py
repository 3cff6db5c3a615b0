"""Which clusters freeze next: priorities, and how many of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxquant.rounds.partition import PARTITIONS, choose, priority

LOSSES = jnp.array([1.0, 3.0, 0.0, 2.0])
CENTROIDS = jnp.array([-4.0, -0.1, 0.5, 3.0])
jitted_choose = jax.jit(choose)


@pytest.mark.parametrize(
    ("partition", "order"),
    [("loss", [1, 3, 0, 2]), ("magnitude", [0, 3, 2, 1]), ("index", [0, 1, 2, 3])],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_order_of_clusters(partition, order, dtype):
    priorities = priority(partition, LOSSES, CENTROIDS.astype(dtype))
    assert priorities.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.argsort(-priorities), order)
    batch = priority(partition, jnp.stack([LOSSES] * 2), jnp.stack([CENTROIDS.astype(dtype)] * 2))
    np.testing.assert_array_equal(batch, jnp.stack([priorities] * 2))


def test_random_order_is_uniform_over_keys():
    draws = [priority("random", LOSSES, CENTROIDS, key=jax.random.key(i)) for i in range(200)]
    first = np.bincount([int(jnp.argmax(draw)) for draw in draws], minlength=4)
    assert first.min() > 30
    same = priority("random", LOSSES, CENTROIDS, key=jax.random.key(0))
    np.testing.assert_array_equal(same, draws[0])


@pytest.mark.parametrize("partition", ["distance", "random", None])
def test_unknown_partitions_and_a_missing_key_are_refused(partition):
    message = "expected a partition among .*, with a key for random"
    with pytest.raises(ValueError, match=message):
        priority(partition, LOSSES, CENTROIDS)


def test_every_listed_partition_exists():
    for partition in PARTITIONS:
        assert priority(partition, LOSSES, CENTROIDS, key=jax.random.key(0)).shape == (4,)


def test_frozen_clusters_count_towards_the_share():
    frozen = jnp.array([False, False, True, False])
    chosen = choose(LOSSES, frozen, jnp.float32(0.5))
    np.testing.assert_array_equal(chosen, [False, True, True, False])


def test_ties_go_to_the_lower_index():
    chosen = choose(jnp.zeros(4), jnp.zeros(4, bool), jnp.float32(0.5))
    np.testing.assert_array_equal(chosen, [True, True, False, False])


@pytest.mark.parametrize(("share", "amount"), [(5 / 17, 1), (9 / 17, 3), (13 / 17, 4), (1, 5)])
def test_a_share_of_another_k_goes_to_the_nearest_cluster(share, amount):
    assert choose(jnp.arange(5.0), jnp.zeros(5, bool), jnp.float32(share)).sum() == amount


@pytest.mark.parametrize("k", [3, 5, 17, 33, 129])
def test_a_share_of_m_of_k_freezes_m_clusters(k):
    choose_many = jax.jit(jax.vmap(choose, in_axes=(None, None, 0)))
    shares = jnp.asarray(np.arange(k + 1) / k, jnp.float32)
    chosen = choose_many(jnp.arange(k, dtype=jnp.float32), jnp.zeros(k, bool), shares)
    np.testing.assert_array_equal(chosen.sum(axis=1), np.arange(k + 1))


@given(
    hnp.arrays(np.float32, 6, elements=st.sampled_from([-np.inf, 0, 1, 2, 3, np.inf])),
    hnp.arrays(bool, 6),
    st.integers(0, 6),
)
def test_laws_of_choice(priorities, frozen, amount):
    chosen = np.asarray(jitted_choose(priorities, frozen, np.float32(amount / 6)))
    assert (chosen >= frozen).all()
    assert chosen.sum() == max(amount, frozen.sum())
    new, left = chosen & ~frozen, ~chosen
    if new.any() and left.any():
        assert priorities[new].min() >= priorities[left].max()
    more = np.asarray(jitted_choose(priorities, chosen, np.float32(min(amount + 1, 6) / 6)))
    assert (more >= chosen).all()
