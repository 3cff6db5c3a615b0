"""Which leaves of a parameter tree are quantized, and how: ordered rules on paths."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.checks import integer, whole_number, whole_numbers
from jaxquant.clustering.codebooks import num_centroids
from jaxquant.trees import is_nnx, leaves_with_paths, pure


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What to do with the leaves whose whole path matches a regular expression.

    Attributes:
      pattern: for `re.fullmatch` on a path such as "block_1/dense/kernel".
      bits: `k = num_centroids(bits)`; not together with `k`. Neither: the plan's own k.
      k: number of centroids.
      group: layer group, from 0; a sequence gives one to each of the blocks along the first axis
        that is cut into some. None: by depth.
      axis: axis along which every slice has a codebook of its own, as in stacked layers: short for
        a block of 1 along this axis and -1 along the others.
      block: what shares a codebook: its size along each axis, -1 for the whole axis. (-1, 1) is a
        codebook for each output of a kernel [inputs, outputs], (128, 1) one for each 128 inputs of
        an output, (8, 64) one for each tile. Not together with `axis`.
      scaled: whether all blocks share one codebook (each entry of axis 0 one, where blocks have a
        size of 1 along it and there are other axes to cut), and have a scale each instead; True
        stores scales in bfloat16, "float32" so.
      centroid_dtype: what centroids are rounded to and stored in; None for the leaf's dtype.
        float8_e4m3fn and int8 have few values: all centroids of a leaf then share a scale in
        float32, if they are not scaled anyway.
      quantize: False leaves the matching leaves alone.
      min_ndim: leaves of fewer dimensions (biases, normalization) are left alone.
      depth: leaves of a greater number are deeper, whatever their names; those of the same number
        are in natural order of their paths, see `Selection.by_depth`.
      inputs: how many axes a product with the weight sums over, behind those of stacked layers: the
        first ones, as in an attention kernel [features, heads, head size] with 1, or so many of
        the last ones if it is negative, as in [outputs, inputs] with -1. None: all but the last.
        Moments are of these axes, and `pack` takes it for its rows, see `Selection.inputs`.
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
    block: Sequence[int] | None = None
    scaled: bool | str = False
    centroid_dtype: Any = None
    inputs: int | None = None

    def __post_init__(self):
        """Check what can be checked without parameters; NumPy's integers become Python's."""
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
        for name in ("bits", "k", "group", "axis", "min_ndim", "depth", "block", "inputs"):
            object.__setattr__(self, name, self._whole(name, getattr(self, name)))
        if self.k is not None and self.k < 1:
            raise ValueError(f"rule {self.pattern!r}: expected k to be at least 1, got {self.k!r}")
        if self.inputs == 0:
            raise ValueError(f"rule {self.pattern!r}: expected inputs to be 1, -1 or more, got 0")
        if self.block is not None and self.axis is not None:
            raise ValueError(f"rule {self.pattern!r}: expected axis or block, got both")
        if self.block is not None and not all(size == -1 or size > 0 for size in self.block):
            raise ValueError(
                f"rule {self.pattern!r}: expected block to be sizes from 1, or -1 for a whole "
                f"axis, got {self.block}"
            )
        if self.scaled not in (False, True, *_SCALE_DTYPES):
            raise ValueError(
                f"rule {self.pattern!r}: expected scaled to be a bool or one of {_SCALE_DTYPES}, "
                f"got {self.scaled!r}"
            )
        if self.centroid_dtype is not None:
            object.__setattr__(self, "centroid_dtype", self._centroid_dtype())

    def _centroid_dtype(self) -> str:
        try:
            name = jnp.dtype(self.centroid_dtype).name
        except TypeError:
            name = None
        if name not in CENTROID_DTYPES:
            raise ValueError(
                f"rule {self.pattern!r}: expected centroid_dtype to be one of "
                f"{', '.join(CENTROID_DTYPES)}, got {self.centroid_dtype!r}"
            )
        return name

    def _whole(self, name: str, value: Any) -> int | tuple[int, ...] | None:
        """Return a field's integer, or its integers, as Python's."""
        if value is None and name not in ("min_ndim", "depth"):
            return None
        number = None if name == "block" else whole_number(value)
        several = whole_numbers(value) if number is None and name in _SEVERAL else None
        if number is None and several is None:
            raise ValueError(
                f"rule {self.pattern!r}: expected {name} to be {_SEVERAL.get(name, 'an integer')}, "
                f"got {value!r}"
            )
        return several if number is None else number


CENTROID_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
_SCALE_DTYPES = ("bfloat16", "float32")
_FEW_VALUES = ("float8_e4m3fn", "int8")  # which need a scale
_SEVERAL = {
    "group": "an integer, or one for each slice",
    "block": "an integer for each axis",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """The setting of one leaf; `reason` is None exactly if the leaf is quantized."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    k: int = 0
    numbers: tuple[int, ...] | None = None  # of blocks along each axis; None: one for the leaf
    is_stack: bool = False  # whether the rule takes each entry of axis 0 for itself
    groups: tuple[int, ...] | None = None  # one a slice; None: not yet decided
    depth: int = 0
    scaled: bool = False  # whether blocks share a codebook
    centroid_dtype: str = ""  # of the codebook as it is stored
    scale_dtype: str | None = None  # None: without a scale
    inputs: int | None = None  # how many axes products sum over, see `LayerRule`
    reason: str | None = None

    @property
    def all_numbers(self) -> tuple[int, ...]:
        """Numbers of blocks along each axis, ones for a single codebook."""
        return self.numbers or (1,) * len(self.shape)

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of what shares a codebook, or a scale where the leaf is scaled."""
        pairs = zip(self.shape, self.all_numbers, strict=True)
        return tuple(size // number for size, number in pairs)

    @property
    def stacks(self) -> bool:
        """Whether axis 0 stacks layers that have axes of inputs and outputs of their own."""
        return self.is_stack and len(self.shape) > 2

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes that products with one layer of it sum over, counted behind that of layers."""
        return self.axes_of(self.inputs)

    def axes_of(self, inputs: int | None) -> tuple[int, ...]:
        """Return what `input_axes` would be if its rule said so of the inputs."""
        ndim = len(self.shape) - self.stacks
        inputs = ndim - 1 if inputs is None else inputs
        return tuple(range(ndim)[:inputs] if inputs > 0 else range(ndim)[inputs:])

    @property
    def codebook_numbers(self) -> tuple[int, ...]:
        """Numbers of codebooks along each axis."""
        return self._shared_numbers if self.scaled else self.all_numbers

    @property
    def codebooks(self) -> int:
        """Number of codebooks."""
        return math.prod(self.codebook_numbers)

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        """Shape of all codebooks; of a leaf that is left alone that of a scalar."""
        if self.reason is not None:
            return ()  # no empty arrays: checkpoint libraries refuse them
        return (self.k,) if self.numbers is None else (*self.codebook_numbers, self.k)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of all scales; of a leaf without scales that of a scalar."""
        if self.scale_dtype is None:
            return ()
        return (1,) if self.numbers is None else (*self.scale_numbers, 1)

    @property
    def scale_numbers(self) -> tuple[int, ...]:
        """Numbers of scales along each axis, where there are some."""
        return self.all_numbers if self.scaled else self._shared_numbers

    @property
    def _shared_numbers(self) -> tuple[int, ...]:
        """Numbers of what shares a codebook, or a scale: one for each layer that is stacked."""
        stacked = self.shape[0] if self.stacks else 1
        return (stacked,) + (1,) * (len(self.shape) - 1)

    @property
    def cut(self) -> int:
        """The first axis along which there are several codebooks; 0 if there is none."""
        several = (axis for axis, number in enumerate(self.codebook_numbers) if number > 1)
        return next(several, 0)

    @property
    def slices(self) -> int:
        """Number of codebooks along that axis, each slice of which may have its layer group."""
        return self.codebook_numbers[self.cut] if self.shape else 1


def by_slice(layer: Layer, values: jax.Array) -> jax.Array:
    """Return what is given for each slice of a layer, for each of its codebooks: [*numbers]."""
    each = [1] * len(layer.shape)
    each[layer.cut] = layer.slices
    return jnp.broadcast_to(values.reshape(each), layer.codebook_numbers)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The settings of all leaves, in the order in which the tree flattens; hashable."""

    layers: tuple[Layer, ...]

    @property
    def selected(self) -> tuple[Layer, ...]:
        """The leaves that are quantized."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def inputs(self) -> dict[str, int]:
        """How many axes products sum over, by path, where a rule says so; for `pack`."""
        return {layer.path: layer.inputs for layer in self.selected if layer.inputs is not None}

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


def select(params: Any, rules: Sequence[LayerRule] | None = None, *, k: int = 17) -> Selection:
    """Decide for every leaf whether and how it is quantized.

    The first rule that matches the whole path wins; a leaf that no rule matches is left alone.
    Without rules, every leaf with two dimensions or more is selected but for what looks like a bias
    or a scale of stacked layers: by its name, by that of a normalization it is in, or by a shape
    [layers, features] beside weights [layers, ..., features, ...]. Left alone are also, each with
    its reason, leaves that are not floating point, that have fewer dimensions than the rule's
    `min_ndim`, or that have no more weights (a codebook) than centroids.

    Args:
      params: any pytree of arrays or of shape and dtype structs. Of Flax NNX the model, its state
        with or without variables, or their dictionary; its paths are those of the variables, and
        its parameters are its `nnx.Param`.
      rules: ordered. One written for the array in an NNX variable, "dense/kernel/value", matches.
      k: number of centroids where a rule does not say.

    Raises:
      ValueError: for a rule that decided about no leaf, an axis or groups that a leaf does not
        have, two leaves of one path; the message names rule and path.

    >>> tree = {"dense": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    >>> [(layer.path, layer.reason) for layer in select(tree).layers]
    [('dense/bias', '1 dimension, fewer than 2'), ('dense/kernel', None)]
    """
    pairs = leaves_with_paths(pure(params, only_parameters=True))
    k = integer("k", k, least=1)
    endings = ("", "/value") if is_nnx(params) else ("",)
    guessed = vector_reasons(params) if rules is None else {}
    default = LayerRule(".*")
    used: set[int] = set()
    layers = []
    for path, leaf in pairs:
        position, rule = _first_match(path, endings, rules, default)
        used.add(position)
        layer = _setting(path, jnp.shape(leaf), _dtype(leaf), rule, k)
        layers.append(left_alone(layer, layer.reason or guessed.get(path)))
    unused = [rule.pattern for i, rule in enumerate(rules or ()) if i not in used]
    if unused:
        paths = ", ".join(layer.path for layer in layers[:5])
        raise ValueError(
            f"expected every rule to be the first to match some leaf, but {unused[0]!r} is not; "
            f"the leaves are {paths}{', ...' if len(layers) > 5 else ''}"
        )
    return Selection(tuple(layers))


def fitted(selection: Selection, tree: Any) -> Selection:
    """Return the settings of a tree's leaves, in its order; it may lack some that are left alone.

    So a part of the parameters, as `optax.masked` and `optax.partition` hand it on, fits the plan
    of all. Of a tree that does not fit it is the settings that it should: whoever reads it says so.
    """
    order = {path: i for i, (path, _) in enumerate(leaves_with_paths(tree))}
    layers = [x for x in selection.layers if x.path in order or x.reason is None]
    if len(layers) == len(order) and all(layer.path in order for layer in layers):
        layers.sort(key=lambda layer: order[layer.path])
    return Selection(tuple(layers))


# Vectors of stacked layers -----------------------------------------------------------------------

_MATRICES = re.compile("kernel|embedding")
_VECTORS = re.compile("bias|scale|offset|beta|gamma")
_Stack = tuple[int, frozenset[int]]
_NORMALIZATIONS = re.compile(r".*norm(?!al).*|[lbg]n(_\w+|\d*)", re.IGNORECASE)


def vector_reasons(tree: Any) -> dict[str, str]:
    """Return, by path, why a leaf with several dimensions looks like many vectors, no matrix.

    Layers that are stacked, by `nn.scan` or `nnx.vmap`, give biases and scales a dimension more.
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_with_paths(tree)}
    below: dict[str, list[tuple[int, ...]]] = {}  # of each container, at any depth
    beside: dict[str, list[tuple[int, ...]]] = {}  # directly in it
    for path, shape in shapes.items():
        *containers, _ = path.split("/")
        for end in range(len(containers) + 1):
            below.setdefault("/".join(containers[:end]), []).append(shape)
        beside.setdefault("/".join(containers), []).append(shape)
    whole = {name: _stack(own) for name, own in below.items() if _is_uniform(own)}
    parts = {name: _stack(own) for name, own in beside.items()}
    reasons = {path: _vector_reason(path, shape, whole, parts) for path, shape in shapes.items()}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def _vector_reason(
    path: str, shape: tuple[int, ...], whole: Mapping[str, _Stack], parts: Mapping[str, _Stack]
) -> str | None:
    *containers, name = path.split("/")
    if len(shape) < 2 or _MATRICES.fullmatch(name):
        return None
    if _VECTORS.fullmatch(name):
        return "a bias or a scale, by its name"
    if any(_NORMALIZATIONS.fullmatch(part) for part in (*containers[-1:], name)):
        return "part of a normalization, by its name"
    above = ("/".join(containers[:end]) for end in range(len(containers) + 1))
    stacks = [parts["/".join(containers)], *(whole[part] for part in above if part in whole)]
    if len(shape) == 2 and any(shape[0] == n and shape[1] in sizes for n, sizes in stacks):
        return f"a vector for each of {shape[0]} stacked layers, by its shape"
    return None


def _stack(shapes: Sequence[tuple[int, ...]]) -> _Stack:
    """Return how many layers weights of three dimensions and more stack, and their other sizes."""
    stacked = [shape for shape in shapes if len(shape) > 2]
    is_window = any(len(shape) > 3 and shape[0] == shape[1] for shape in stacked)
    if is_window or len({shape[0] for shape in stacked}) != 1:
        return 0, frozenset()
    return stacked[0][0], frozenset(size for shape in stacked for size in shape[1:])


def _is_uniform(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Return whether all leaves have the same first axis and another."""
    return all(len(shape) > 1 and shape[0] == shapes[0][0] for shape in shapes)


def left_alone(layer: Layer, reason: str | None) -> Layer:
    """Return the setting of a leaf that is left alone, if there is a reason."""
    if reason is None:
        return layer
    return Layer(path=layer.path, shape=layer.shape, dtype=layer.dtype, reason=reason)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _first_match(
    path: str, endings: Sequence[str], rules: Sequence[LayerRule] | None, default: LayerRule
) -> tuple[int, LayerRule | None]:
    if rules is None:
        return -1, default
    for i, rule in enumerate(rules):
        if any(re.fullmatch(rule.pattern, path + ending) for ending in endings):
            return i, rule
    return -1, None


def _setting(path: str, shape: tuple, dtype: Any, rule: LayerRule | None, k: int) -> Layer:
    layer = Layer(path=path, shape=tuple(shape), dtype=str(dtype))
    if rule is None or not rule.quantize:
        reason = "no rule matches it" if rule is None else f"left alone by rule {rule.pattern!r}"
        return left_alone(layer, reason)
    k = rule.k or (num_centroids(rule.bits) if rule.bits else k)
    layer = dataclasses.replace(layer, k=k, depth=rule.depth)
    if not _too_few(layer, dtype, rule):
        layer = dataclasses.replace(layer, numbers=_numbers(layer, rule), **_storage(layer, rule))
        own = rule.block[0] == 1 if rule.block else rule.axis in (0, -len(shape))
        layer = dataclasses.replace(layer, is_stack=own, inputs=rule.inputs)
        _check_inputs(layer, rule)
    reason = _reason(layer, dtype, rule)
    if reason is not None:
        return left_alone(layer, reason)
    return dataclasses.replace(layer, groups=_check_groups(layer, rule))


def _reason(layer: Layer, dtype: Any, rule: LayerRule) -> str | None:
    size = math.prod(layer.block)
    few = f"{size} weights, no more than {layer.k} centroids" if size <= layer.k else None
    return _too_few(layer, dtype, rule) or few


def _too_few(layer: Layer, dtype: Any, rule: LayerRule) -> str | None:
    """Return why a leaf cannot be quantized, however it is cut into blocks."""
    ndim = len(layer.shape)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"dtype {dtype} is not floating point"
    if ndim < rule.min_ndim:
        return f"{ndim} dimension{'s' * (ndim != 1)}, fewer than {rule.min_ndim}"
    return None


def _numbers(layer: Layer, rule: LayerRule) -> tuple[int, ...] | None:
    """Return the numbers of blocks along each axis, or None for a single codebook."""
    where, ndim = f"{layer.path}: rule {rule.pattern!r} expected", len(layer.shape)
    if rule.axis is not None:
        if not -ndim <= rule.axis < ndim:
            raise ValueError(f"{where} an axis {rule.axis}, got {layer.shape}")
        return tuple(n if i == rule.axis % ndim else 1 for i, n in enumerate(layer.shape))
    if rule.block is None:
        return None
    if len(rule.block) != ndim:
        raise ValueError(
            f"{where} {len(rule.block)} axes for block={rule.block}, got {layer.shape}"
        )
    pairs = list(zip(rule.block, layer.shape, strict=True))
    for axis, (own, size) in enumerate(pairs):
        if own != -1 and size % own:
            raise ValueError(
                f"{where} a block that divides axis {axis} of {layer.shape}, got {own}; near it "
                f"are {' and '.join(map(str, _divisors_near(size, own)))}"
            )
    if set(rule.block) == {-1}:
        return None
    return tuple(1 if own == -1 or not size else size // own for own, size in pairs)


def _check_inputs(layer: Layer, rule: LayerRule) -> None:
    own = layer.shape[int(layer.stacks) :]
    if rule.inputs is not None and not 0 < abs(rule.inputs) < len(own):
        raise ValueError(
            f"{layer.path}: rule {rule.pattern!r} expected inputs to leave axes of inputs and of "
            f"outputs of {own}, got {rule.inputs}"
        )


def _storage(layer: Layer, rule: LayerRule) -> dict[str, Any]:
    """Return how centroids are stored."""
    dtype = rule.centroid_dtype or layer.dtype
    if rule.centroid_dtype in ("float32", "bfloat16", "float16"):
        own = jnp.finfo(layer.dtype)
        stored = jnp.finfo(dtype)
        if stored.nmant > own.nmant or stored.maxexp > own.maxexp:
            raise ValueError(
                f"{layer.path}: rule {rule.pattern!r} expected centroids that {layer.dtype} holds, "
                f"got centroid_dtype {dtype}"
            )
    scale = None
    if rule.scaled:
        scale = "bfloat16" if rule.scaled is True else str(rule.scaled)
    elif dtype in _FEW_VALUES and rule.centroid_dtype is not None:
        scale = "float32"
    return {"centroid_dtype": str(dtype), "scale_dtype": scale, "scaled": bool(rule.scaled)}


def _divisors_near(number: int, wanted: int) -> list[int]:
    """Return the divisors of a number next to a wanted one, below and above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = ([d for d in divisors if sign * (d - wanted) > 0] for sign in (-1, 1))
    return [*below[-1:], *above[:1]]


def _check_groups(layer: Layer, rule: LayerRule) -> tuple[int, ...] | None:
    if rule.group is None:
        return None
    group = rule.group
    groups = (group,) * layer.slices if isinstance(group, int) else tuple(group)
    if len(groups) != layer.slices or min(groups, default=0) < 0:
        raise ValueError(
            f"{layer.path}: rule {rule.pattern!r} expected {layer.slices} groups >= 0, got {groups}"
        )
    return groups
