"""Which leaves of a parameter tree are quantized, and how: ordered rules on paths."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.codebooks import num_centroids


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What to do with the leaves whose whole path matches a regular expression.

    Attributes:
      pattern: for `re.fullmatch` on a path such as "block_1/dense/kernel".
      bits: `k = num_centroids(bits)`; not together with `k`. Neither: the plan's own k.
      k: number of centroids.
      group: layer group, from 0; a sequence gives one to each slice along `axis`. None: by depth.
      axis: axis along which every slice has a codebook of its own, as in stacked layers.
      quantize: False leaves the matching leaves alone.
      min_ndim: leaves of fewer dimensions (biases, normalization) are left alone.
      depth: leaves of a greater number are deeper, whatever their names; those of the same number
        are in natural order of their paths, see `Selection.by_depth`.
    """

    pattern: str
    _: dataclasses.KW_ONLY
    bits: int | None = None
    k: int | None = None
    group: int | Sequence[int] | None = None
    axis: int | None = None
    quantize: bool = True
    min_ndim: int = 2
    depth: int = 0

    def __post_init__(self):
        """Check what can be checked without parameters."""
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"expected a regular expression, got {self.pattern!r}: {error}"
            ) from None
        if self.bits is not None and self.k is not None:
            raise ValueError(f"rule {self.pattern!r}: expected bits or k, got both")
        if self.bits is not None:
            num_centroids(self.bits)
        if self.k is not None and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"rule {self.pattern!r}: expected k to be at least 1, got {self.k!r}")
        if not isinstance(self.depth, int):
            raise ValueError(
                f"rule {self.pattern!r}: expected depth to be an integer, got {self.depth!r}"
            )
        if isinstance(self.group, Sequence):
            object.__setattr__(self, "group", tuple(self.group))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """The setting of one leaf; `reason` is None exactly if the leaf is quantized."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    k: int = 0
    axis: int | None = None
    groups: tuple[int, ...] | None = None  # one a slice; None: not yet decided
    depth: int = 0
    reason: str | None = None

    @property
    def slices(self) -> int:
        """Number of codebooks."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of what shares a codebook."""
        if self.axis is None:
            return self.shape
        return tuple(n for i, n in enumerate(self.shape) if i != self.axis)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The settings of all leaves, in the order in which the tree flattens; hashable."""

    layers: tuple[Layer, ...]

    @property
    def selected(self) -> tuple[Layer, ...]:
        """The leaves that are quantized."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    def by_depth(self) -> tuple[Layer, ...]:
        """The leaves that are quantized, from input to output as far as rules and names tell.

        By their rules' `depth`, then in natural order of their paths: Conv_2 before Conv_10.
        """
        return tuple(
            sorted(self.selected, key=lambda layer: (layer.depth, natural_key(layer.path)))
        )


def natural_key(path: str) -> list[tuple[bool, int, str]]:
    """Return a sorting key that compares runs of digits as numbers.

    >>> sorted(["Conv_10/kernel", "Conv_2/kernel"], key=natural_key)
    ['Conv_2/kernel', 'Conv_10/kernel']
    """
    parts = re.split(r"(\d+)", path)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return pairs of a path such as "a/b/kernel" and a leaf, in the order of flattening."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]


def select(params: Any, rules: Sequence[LayerRule] | None = None, *, k: int = 17) -> Selection:
    """Decide for every leaf whether and how it is quantized.

    The first rule that matches the whole path wins; a leaf that no rule matches is left alone.
    Without rules, every leaf with two dimensions or more is selected. Left alone are also, each
    with its reason, leaves that are not floating point, that have fewer dimensions than the rule's
    `min_ndim`, or that have no more weights (a codebook) than centroids.

    Args:
      params: any pytree of arrays or of shape and dtype structs.
      rules: ordered.
      k: number of centroids where a rule does not say.

    Raises:
      ValueError: for a rule that decided about no leaf, an axis or groups that a leaf does not
        have; the message names rule and path.

    >>> tree = {"dense": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    >>> [(layer.path, layer.reason) for layer in select(tree).layers]
    [('dense/bias', '1 dimension, fewer than 2'), ('dense/kernel', None)]
    """
    default = LayerRule(".*")
    used: set[int] = set()
    layers = []
    for path, leaf in leaves_with_paths(params):
        position, rule = _first_match(path, rules, default)
        used.add(position)
        layers.append(_setting(path, jnp.shape(leaf), _dtype(leaf), rule, k))
    unused = [rule.pattern for i, rule in enumerate(rules or ()) if i not in used]
    if unused:
        paths = ", ".join(layer.path for layer in layers[:5])
        raise ValueError(
            f"expected every rule to be the first to match some leaf, but {unused[0]!r} is not; "
            f"the leaves are {paths}{', ...' if len(layers) > 5 else ''}"
        )
    return Selection(tuple(layers))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _first_match(
    path: str, rules: Sequence[LayerRule] | None, default: LayerRule
) -> tuple[int, LayerRule | None]:
    if rules is None:
        return -1, default
    matches = ((i, rule) for i, rule in enumerate(rules) if re.fullmatch(rule.pattern, path))
    return next(matches, (-1, None))


def _setting(path: str, shape: tuple, dtype: Any, rule: LayerRule | None, k: int) -> Layer:
    layer = Layer(path=path, shape=tuple(shape), dtype=str(dtype))
    if rule is None or not rule.quantize:
        reason = "no rule matches it" if rule is None else f"left alone by rule {rule.pattern!r}"
        return dataclasses.replace(layer, reason=reason)
    k = rule.k or (num_centroids(rule.bits) if rule.bits else k)
    axis = _check_axis(layer, rule)
    layer = dataclasses.replace(layer, k=k, axis=axis, depth=rule.depth)
    reason = _reason(layer, dtype, rule)
    if reason is not None:
        return Layer(path=path, shape=layer.shape, dtype=layer.dtype, reason=reason)
    return dataclasses.replace(layer, groups=_check_groups(layer, rule))


def _reason(layer: Layer, dtype: Any, rule: LayerRule) -> str | None:
    ndim, size = len(layer.shape), math.prod(layer.slice_shape)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"dtype {dtype} is not floating point"
    if ndim < rule.min_ndim:
        return f"{ndim} dimension{'s' * (ndim != 1)}, fewer than {rule.min_ndim}"
    if size <= layer.k:
        return f"{size} weights, no more than {layer.k} centroids"
    return None


def _check_axis(layer: Layer, rule: LayerRule) -> int | None:
    if rule.axis is None:
        return None
    ndim = len(layer.shape)
    if not -ndim <= rule.axis < ndim:
        raise ValueError(
            f"{layer.path}: rule {rule.pattern!r} expected an axis {rule.axis}, got {layer.shape}"
        )
    return rule.axis % ndim


def _check_groups(layer: Layer, rule: LayerRule) -> tuple[int, ...] | None:
    if rule.group is None:
        return None
    group = rule.group
    groups = (group,) * layer.slices if isinstance(group, int) else tuple(group)
    if len(groups) != layer.slices or any(not isinstance(g, int) or g < 0 for g in groups):
        raise ValueError(
            f"{layer.path}: rule {rule.pattern!r} expected {layer.slices} groups >= 0, got {groups}"
        )
    return groups
