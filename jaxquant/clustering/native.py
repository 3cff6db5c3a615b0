"""Clusters of many small blocks in C++ on CPU: the same steps, one block at a time in the cache.

XLA sorts and searches all blocks side by side, a whole array at a time: on CPU that is bound by
memory, and takes several times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import cpp, platform
from jaxquant.clustering.lloyd import MOST_PASSES
from jaxquant.clustering.options import Clustering
from jaxquant.clustering.starts import longest_cluster
from jaxquant.cpp.calls import call_or

_CELLS = 64, 128  # for a start from which Lloyd's passes go on, at least
_MOST = 256  # centroids: tables of the dynamic program stay in the cache


def supports(x: jax.Array, k: int, clustering: Clustering) -> bool:
    """Return whether blocks like this one are clustered here."""
    plain = clustering.init == "optimal" and not clustering.powers_of_two
    narrow = x.dtype.itemsize <= 4 and k <= _MOST and clustering.cells is None
    here = platform.name() == "cpu" and platform.is_one_device() and cpp.missing() is None
    return plain and narrow and here


def cluster(
    otherwise: Callable[..., Sequence[jax.Array]],
    x: jax.Array,
    sample_weight: jax.Array | None,
    codebook: jax.Array,
    frozen: jax.Array,
    *,
    clustering: Clustering,
    dtype: jax.typing.DTypeLike,
) -> list[jax.Array]:
    """Return centroids, counts, losses, norm and whether it can be clustered, of one block.

    Args:
      otherwise: function of these arrays with the same results.
      x: [n] floating point.
      sample_weight: like `x`, or None.
      codebook: [k] the centroids of the last round.
      frozen: [k] bool, centroids that keep their value.
      clustering: options.
      dtype: of the new codebook.
    """
    of_block = [(jnp.float32, ()), (jnp.bool_, ())]
    of_codebook = [(own, codebook.shape) for own in (dtype, jnp.int32, jnp.float32)]
    results = [jax.ShapeDtypeStruct(shape, own) for own, shape in (*of_codebook, *of_block)]
    k, size = codebook.shape[0], x.size
    cells = min(max(2 * k, _CELLS[size >= 2048]), size)
    digits, least_exponent, least, largest = _format(dtype)
    options = {
        "cells": cells,
        "longest": longest_cluster(cells, k) if 2 * k <= size else cells,
        "iterations": -1 if clustering.iterations is None else clustering.iterations,
        "passes": MOST_PASSES,
        "zero": clustering.zero,
        "digits": np.int32(digits),
        "least_exponent": np.int32(least_exponent),
        "least": np.float32(least),
        "largest": np.float32(largest),
    }

    def of_blocks(
        x: jax.Array, weight: jax.Array | None, codebooks: jax.Array, frozen: jax.Array
    ) -> list[jax.Array]:
        weight = jnp.zeros((0, 0)) if weight is None else weight
        wide = [array.astype(jnp.float32) for array in (x, weight, codebooks)]
        shapes = [
            jax.ShapeDtypeStruct((len(x), *result.shape), _as_called(result.dtype))
            for result in results
        ]
        return list(jax.ffi.ffi_call("jaxquant_clusters", shapes)(*wide, frozen, **options))

    return call_or(of_blocks, otherwise, [x, sample_weight, codebook, frozen], results)


def _as_called(dtype: Any) -> Any:
    """Return the dtype in which the call returns what is of another then."""
    return dtype if dtype in (jnp.int32, jnp.bool_) else jnp.float32


def _format(dtype: jax.typing.DTypeLike) -> tuple[int, int, float, float]:
    """Return the digits behind the first, the least exponent, the least and largest number."""
    if jnp.issubdtype(dtype, jnp.integer):
        integers = jnp.iinfo(dtype)
        digits = integers.bits - 1
        return digits, digits, float(integers.min), float(integers.max)
    floats = jnp.finfo(dtype)
    return floats.nmant, floats.minexp, float(floats.min), float(floats.max)
