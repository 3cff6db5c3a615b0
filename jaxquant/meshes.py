"""Arrays on meshes of explicit axes, whose shardings JAX tracks by type and asks for.

What is computed of weights here, histograms above all, has no sharding that could be told from its
operands, and is nobody's business outside: XLA is left to choose it, as with automatic axes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def with_auto_axes(function: Callable[..., Any], args: tuple[Any, ...], *, like: Any) -> Any:
    """Return `function(*args)`, computed with automatic axes if the arguments have explicit ones.

    Args:
      function: of trees of arrays.
      args: its arguments.
      like: tree that is a prefix of the result: arrays whose shardings the result gets, or
        partition specs; None stands for arrays that all devices hold.
    """
    sharded = next((leaf for leaf in jax.tree.leaves(args) if is_explicit(leaf)), None)
    if sharded is None:
        return function(*args)
    mesh = jax.typeof(sharded).sharding.mesh
    specs = jax.tree.map(_spec, like, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))

    @jax.jit  # eager operations would have no mesh, and those without operands no devices
    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(function, out_sharding=specs)(*args)

    return run(*args)


def _spec(like: jax.Array | PartitionSpec | None) -> PartitionSpec:
    if like is None:
        return PartitionSpec()
    return like if isinstance(like, PartitionSpec) else jax.typeof(like).sharding.spec


def is_explicit(x: jax.Array) -> bool:
    """Return whether an array is spread over explicit axes: its type says so."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)
