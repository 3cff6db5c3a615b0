"""Where a function of arrays runs: outside of jit, inside, or on a mesh of explicit axes.

Outside of jit JAX compiles every loop anew at each call. On explicit axes JAX tracks shardings by
type and asks for them: what is computed of weights here, histograms above all, has no sharding that
could be told from its operands, and is nobody's business outside, so XLA is left to choose it, as
with automatic axes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def compiled(function: Callable[..., Any], /, *args: Any, like: Any = None, **options: Any) -> Any:
    """Return `function(*args, **options)`, compiled once for these options and shapes.

    Inside of jit it becomes a part of the program that is being traced.

    Args:
      function: of trees of arrays; the same object at every call.
      args: its arguments.
      like: tree that is a prefix of the result: arrays whose shardings the result gets, or
        partition specs, where the arguments have explicit axes; None stands for arrays that all
        devices hold.
      options: more arguments, hashable.
    """
    leaves = jax.tree.leaves(args)
    sharded = next((leaf for leaf in leaves if is_explicit(jax.typeof(leaf))), None)
    placing = None
    if sharded is not None:
        specs = jax.tree.map(
            _spec, like, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec)
        )
        leaves, structure = jax.tree.flatten(specs)
        placing = jax.typeof(sharded).sharding.mesh, tuple(leaves), structure
    return _run(function, tuple(sorted(options.items())), placing, *args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function: Callable[..., Any], options: Any, placing: Any, *args: Any) -> Any:
    function = functools.partial(function, **dict(options))
    if placing is None:
        return function(*args)
    mesh, leaves, structure = placing
    specs = jax.tree.unflatten(structure, leaves)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=specs)(*args)


def _spec(like: jax.Array | PartitionSpec | None) -> PartitionSpec:
    if like is None:
        return PartitionSpec()
    return like if isinstance(like, PartitionSpec) else jax.typeof(like).sharding.spec


def is_explicit(kind: Any) -> bool:
    """Return whether arrays of a type are on a mesh of explicit axes, by all devices or spread."""
    return AxisType.Explicit in kind.sharding.mesh.axis_types
