"""Trees of every make: the paths of their leaves, and NNX's brought to one form.

Flax NNX gives the same parameters as a module, as a state of variables or as a state of arrays, and
an optimizer sees one form when it starts and another when it updates. Here all of them become
nested dictionaries of arrays, and results go back into the form that was given. Flax is not
imported: whoever holds a module has imported it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def pure(tree: Any, *, only_parameters: bool = False) -> Any:
    """Return a tree with NNX's modules, states and variables as nested dictionaries of arrays.

    A module stands for its `nnx.state` without random streams. Any other tree is returned as it is.

    Args:
      tree: any pytree.
      only_parameters: leave out the variables that are no `nnx.Param`, such as batch statistics,
        unless none is one.
    """
    if not is_nnx(tree):
        return tree
    nnx, tree = _nnx(), _as_states(tree)
    kept = _kept(tree, only_parameters)

    def plain(node: Any) -> Any:
        if isinstance(node, nnx.State):
            children = {key: everywhere(child) for key, child in node.items()}
            return {key: child for key, child in children.items() if jax.tree.leaves(child)}
        if isinstance(node, nnx.Variable):
            return nnx.as_pure(node) if isinstance(node, kept) else None  # None has no leaves
        return node

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(plain, tree, is_leaf=_is_node)

    return everywhere(tree)


def replaced(tree: Any, new: Any, *, only_parameters: bool = False) -> Any:
    """Return a tree in the form that was given, with what `pure` returned of it replaced.

    Args:
      tree: what `pure` was given; a module comes back as its state.
      new: of the structure of `pure(tree)`; arrays may have become trees of their own.
      only_parameters: as for `pure`; other variables stay as they are.
    """
    if not is_nnx(tree):
        return new
    structure = jax.tree.structure(pure(tree, only_parameters=only_parameters))
    leaves = iter(structure.flatten_up_to(new))
    nnx, tree = _nnx(), _as_states(tree)
    kept = _kept(tree, only_parameters)

    def put(node: Any) -> Any:
        if isinstance(node, nnx.Variable) and not isinstance(node, kept):
            return node
        own = jax.tree.structure(node)
        return own.unflatten([next(leaves) for _ in range(own.num_leaves)])

    return jax.tree.map(put, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def is_nnx(tree: Any) -> bool:
    """Return whether a tree holds a module, a state or a variable of Flax NNX."""
    return _nnx() is not None and any(map(_is_node, jax.tree.leaves(tree, is_leaf=_is_node)))


def is_module(tree: Any) -> bool:
    """Return whether a tree is a module of Flax NNX, of which a round returns the state."""
    nnx = _nnx()
    return nnx is not None and isinstance(tree, nnx.Pytree)


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return pairs of a path such as "a/b/kernel" and a leaf, in the order of flattening.

    The arrays of NNX variables are named as the variables are, without the "value" inside.

    Raises:
      ValueError: for two leaves of one path, such as those of `{"a": {"b": x}, "a/b": y}`.
    """
    pairs = jax.tree_util.tree_flatten_with_path(pure(tree), is_leaf)[0]
    keys: dict[str, Any] = {}
    for key, _ in pairs:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if path in keys:
            both = " and ".join(map(jax.tree_util.keystr, (keys[path], key)))
            raise ValueError(f"expected leaves of different paths, got two of {path!r}: {both}")
        keys[path] = key
    return list(zip(keys, (leaf for _, leaf in pairs), strict=True))


def check_structure(tree: Any, other: Any, wanted: str) -> None:
    """Raise a ValueError if the other tree differs, naming the leaf at which they part."""
    expected, got = jax.tree.structure(tree), jax.tree.structure(other)
    if expected == got:
        return
    paths, given = ([path for path, _ in leaves_with_paths(x)] for x in (tree, other))
    missing = next((path for path in paths if path not in given), None)
    surplus = next((path for path in given if path not in paths), None)
    if missing is not None:
        raise ValueError(f"expected {wanted}, got no leaf {missing!r}")
    if surplus is not None:
        raise ValueError(f"expected {wanted}, got a leaf {surplus!r}")
    raise ValueError(f"expected {wanted} {expected}, got {got}")


def check_leaves(
    name: str, tree: Any, expected: Sequence[tuple[str, tuple[int, ...] | None]]
) -> list[Any]:
    """Return the leaves, or raise a ValueError that names the first that is not as expected.

    Args:
      name: of the tree.
      tree: any pytree.
      expected: path and shape of each leaf; None for any shape.
    """
    pairs = leaves_with_paths(tree)
    for (path, leaf), (wanted, shape) in zip(pairs, expected, strict=False):
        if path != wanted:
            raise ValueError(f"{name}: expected the leaf {wanted}, got {path}")
        check_shape(f"{name}: {path}", leaf, shape)
    if len(pairs) != len(expected):
        raise ValueError(f"{name}: expected {len(expected)} leaves, got {len(pairs)}")
    return [leaf for _, leaf in pairs]


def check_shape(name: str, leaf: Any, shape: tuple[int, ...] | None) -> None:
    """Raise a ValueError for a leaf of another shape; None stands for any."""
    if shape is not None and jnp.shape(leaf) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {jnp.shape(leaf)}")


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def _is_node(node: Any) -> bool:
    nnx = _nnx()
    return isinstance(node, nnx.Pytree | nnx.State | nnx.Variable)


def _as_states(tree: Any) -> Any:
    """Return the tree with modules as their states: a variable that two share is in them once."""
    nnx = _nnx()

    def state(node: Any) -> Any:
        return nnx.state(node, nnx.Not(nnx.RngState)) if isinstance(node, nnx.Pytree) else node

    return jax.tree.map(state, tree, is_leaf=_is_node)


def _kept(tree: Any, only_parameters: bool) -> Any:
    """Return the type of the variables that are kept."""
    nnx = _nnx()
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    has_parameters = any(isinstance(node, nnx.Param) for node in nodes)
    return nnx.Param if only_parameters and has_parameters else nnx.Variable
