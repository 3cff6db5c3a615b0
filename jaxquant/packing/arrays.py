"""Weights as packed codes and codebooks: array-like pytrees, and trees of them."""

import contextlib
import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.core
import jax.export
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxquant.clustering.blocks import per_block
from jaxquant.clustering.codebooks import assign, reconstruct
from jaxquant.meshes import compiled
from jaxquant.packing.codes import pack_codes, symbol, unpack_codes
from jaxquant.rounds.state import QuantState, check_state
from jaxquant.trees import check_structure, leaves_with_paths, pure, replaced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "codebook"),
    meta_fields=("rows", "columns"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedArray:
    """A weight as packed codes and codebook; made by `pack`, read by `unpack` and products.

    Invariants: `shape == codes.shape[:-2] + rows + columns`, of the codebook's dtype;
    `codes.shape[-2] == packed_rows(prod(rows), k)`, `codes.shape[-1] == prod(columns)`. Leading
    axes of `codes` are those of stacked layers: `vmap` and `scan` take a packed array apart into
    those of its layers, as they would the weight.

    Attributes:
      codes: [..., packed rows, columns] uint8, see `jaxquant.packing.codes`.
      codebook: [k], or as many axes as the weight and [k], slices along one, ones along the others.
      rows: sizes of the axes that make the rows.
      columns: size of the last axis; () for a weight with a single axis.
    """

    codes: jax.Array
    codebook: jax.Array
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.codes.shape[:-2], *self.rows, *self.columns)

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the weight."""
        return self.codebook.dtype

    @property
    def k(self) -> int:
        """Number of centroids of a codebook."""
        return self.codebook.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the codebook."""
        return self.codes.size + self.codebook.size * self.codebook.dtype.itemsize


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "words"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductArray:
    """A kernel as codes of words, each a piece of its input dimension; made by `jaxquant.product`.

    `kernel[*w, m D + d, t] = words[m, codes[*w, m, t], d]`: the input dimension is cut into M
    subspaces of D channels, each with a codebook of K words, which the window's positions share.

    Invariants: `codes.shape == (*window, M, features)`, its codebook 0, 1, ..., K - 1, so that
    codes are packed as those of any weight; `words.shape == (M, K, D)`.

    Attributes:
      codes: the number of each word.
      words: [M, K, D] floating point.
    """

    codes: PackedArray
    words: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        *window, subspaces, features = self.codes.shape
        return (*window, subspaces * self.words.shape[-1], features)

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel."""
        return self.words.dtype

    @property
    def rows(self) -> tuple[int, ...]:
        """Sizes of the axes that products sum over."""
        return self.shape[:-1]

    @property
    def columns(self) -> tuple[int, ...]:
        """Size of the last axis."""
        return self.shape[-1:]

    @property
    def k(self) -> int:
        """Number of words of a subspace."""
        return self.words.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the words."""
        return self.codes.codes.size + self.words.size * self.words.dtype.itemsize


# So that functions which `jax.export` serializes may take and return both. What is read back comes
# from elsewhere: JSON, and nothing but sizes.


def _write_sizes(sizes: tuple[tuple[int, ...], ...]) -> bytes:
    return json.dumps(sizes).encode()


def _read_sizes(data: bytes | bytearray, *, fields: int) -> tuple[tuple[int, ...], ...]:
    """Return the static fields that `_write_sizes` wrote.

    Raises:
      ValueError: if it wrote other data.
    """
    try:
        sizes = tuple(tuple(axes) for axes in json.loads(bytes(data)))
    except (ValueError, TypeError, RecursionError):
        sizes = ()
    numbers = (n for axes in sizes for n in axes)
    if len(sizes) != fields or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"expected {fields} lists of sizes of a packed array, got other data")
    return sizes


with contextlib.suppress(ValueError):  # where this module is loaded again
    for kind, fields in ((PackedArray, 2), (ProductArray, 0)):
        jax.export.register_pytree_node_serialization(
            kind,
            serialized_name=f"jaxquant.{kind.__name__}",
            serialize_auxdata=_write_sizes,
            deserialize_auxdata=functools.partial(_read_sizes, fields=fields),
        )


# Arrays and trees --------------------------------------------------------------------------------


def slice_axis(codebook: tuple[int, ...], leaf: tuple[int, ...]) -> int | None:
    """Return the axis along which a leaf has a codebook for each slice, or None if it has one.

    Args:
      codebook: shape of the codebook, as in `QuantState.codebooks`.
      leaf: shape of the leaf. Where its codebook says that there is an axis, but not which, since
        there is a single slice, the first axis of one entry will do.

    Raises:
      ValueError: for a codebook that does not fit.
    """
    *slices, _ = codebook
    if not slices:
        return None
    if len(slices) != len(leaf) or any(
        n not in (1, size) for n, size in zip(slices, leaf, strict=True)
    ):
        raise ValueError(f"expected a codebook for weights of shape {leaf}, got shape {codebook}")
    axes = [axis for axis, size in enumerate(leaf) if slices[axis] == size]
    return min(axes, key=lambda axis: slices[axis] == 1, default=None)


def split_shape(
    shape: tuple[int, ...], axis: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the axes of a weight with codebooks along `axis`: stacked layers, rows, columns."""
    stacked = 1 if axis == 0 and len(shape) > 2 else 0
    columns = 1 if len(shape) > 1 else 0
    end = len(shape) - columns
    return shape[:stacked], shape[stacked:end], shape[end:]


def pack_array(weights: jax.Array, codebook: jax.Array) -> PackedArray:
    """Pack one weight, each entry as the code of its nearest centroid.

    Args:
      weights: [...] floating point, at least one axis.
      codebook: as in `QuantState.codebooks`: [k], or with slices along one axis. Along axis 0 of
        three or more they are stacked layers, which stay apart.

    Returns:
      PackedArray of the codebook's dtype. Pure, under jit too. On a mesh of explicit axes codes
      are sharded as the weight's stacked layers and columns are, not along the rows.

    Raises:
      ValueError: for more than 256 centroids, and a codebook that does not fit.
    """
    symbol(codebook.shape[-1])
    if not weights.ndim:
        raise ValueError("expected a weight with at least one axis, got a scalar")
    stacked, rows, columns = split_shape(weights.shape, slice_axis(codebook.shape, weights.shape))
    spec = jax.typeof(weights).sharding.spec
    by_column = PartitionSpec(*spec[: len(stacked)], None, spec[-1] if columns else None)
    matrix = (*stacked, math.prod(rows), math.prod(columns))
    return PackedArray(
        codes=compiled(_pack, weights, codebook, like=by_column, shape=matrix),
        codebook=codebook,
        rows=rows,
        columns=columns,
    )


def _pack(weights: jax.Array, codebook: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    codes = per_block(assign, (weights,), (codebook,))
    return pack_codes(codes.reshape(shape), codebook.shape[-1])


def unpack_array(packed: PackedArray) -> jax.Array:
    """Return the weight. Pure, under jit too; costs a pass over the codes."""
    *stacked, _, columns = jax.typeof(packed.codes).sharding.spec
    rows = (None,) * len(packed.rows)
    by_column = PartitionSpec(*stacked, *rows, *(columns for _ in packed.columns))
    return compiled(_unpack, packed, like=by_column)


def _unpack(packed: PackedArray) -> jax.Array:
    codes = unpack_codes(packed.codes, math.prod(packed.rows), packed.k).reshape(packed.shape)
    return per_block(reconstruct, (codes,), (packed.codebook,))


def pack_product(codes: jax.Array, words: jax.Array) -> ProductArray:
    """Return a kernel of words, see `ProductArray`.

    Args:
      codes: [*window, M, features] integers in [0, K).
      words: [M, K, D] floating point, K at most 256.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if words.ndim != 3 or codes.ndim < 2 or codes.shape[-2] != words.shape[0]:
        raise ValueError(
            f"expected codes [..., M, features] and words [M, K, D], got {codes.shape}, "
            f"{words.shape}"
        )
    numbers = jnp.arange(words.shape[1], dtype=jnp.float32)
    return ProductArray(codes=pack_array(codes.astype(jnp.float32), numbers), words=words)


def product_codes(array: ProductArray) -> jax.Array:
    """Return the codes of a `ProductArray`, int32 [*window, M, features]."""
    packed = array.codes  # without the detour over its codebook, the same numbers as floats
    codes = unpack_codes(packed.codes, math.prod(packed.rows), packed.k)
    return codes.reshape(packed.shape).astype(jnp.int32)


def unpack_product(array: ProductArray) -> jax.Array:
    """Return the kernel. Pure, under jit too; costs a pass over the codes."""
    codes = product_codes(array)
    subspaces = jnp.arange(array.words.shape[0])[:, None]
    return jnp.moveaxis(array.words[subspaces, codes], -1, -2).reshape(array.shape)


def pack(params: Any, state: QuantState) -> Any:
    """Return the tree with every quantized leaf as a `PackedArray`; the others stay as they are.

    Five ternary codes take a byte, three of five centroids seven bits, one of 17 five; see
    `jaxquant.packing.codes`. What is in memory, or on a device, is really that small. For a file,
    which can be smaller still, see `save`.

    Args:
      params: tree of weights, every quantized leaf on its codebook: after the last round.
      state: from `quantize_round`.

    Returns:
      Tree with the structure of `params`, each quantized leaf a PackedArray node.

    Raises:
      ValueError: if the trees differ, or a quantized leaf is not on its codebook; names the leaf.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.arange(32.0).reshape(8, 4) % 3}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> jq.pack(params, state)["kernel"].codes.shape
    (2, 4)
    """
    given, params, state = params, pure(params, only_parameters=True), pure(state)
    check_state(state)
    check_structure(state.codebooks, params, "params to have the state's structure")
    packed = [
        _pack_leaf(path, jnp.asarray(leaf), codebook) if codebook.ndim else leaf
        for (path, leaf), codebook in zip(
            leaves_with_paths(params), jax.tree.leaves(state.codebooks), strict=True
        )
    ]
    packed = jax.tree.unflatten(jax.tree.structure(params), packed)
    return replaced(given, packed, only_parameters=True)


def _pack_leaf(path: str, weights: jax.Array, codebook: jax.Array) -> PackedArray:
    codebook = codebook + jnp.zeros((), codebook.dtype)  # -0.0, which comes and goes, becomes 0.0
    try:
        packed = pack_array(weights, codebook)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    off = compiled(_count_other, packed, weights)
    if not isinstance(off, jax.core.Tracer) and off:
        raise ValueError(
            f"{path}: expected every weight on the codebook, as after the last round, "
            f"got {off} of {weights.size} that are not"
        )
    return packed


def _count_other(packed: PackedArray, weights: jax.Array) -> jax.Array:
    return jnp.sum(unpack_array(packed) != weights)


def is_packed(node: Any) -> bool:
    """Return whether a node of a tree is a PackedArray; for `is_leaf` of `jax.tree.map`."""
    return isinstance(node, PackedArray)


def is_product(node: Any) -> bool:
    """Return whether a node of a tree is a ProductArray."""
    return isinstance(node, ProductArray)


def is_quantized(node: Any) -> bool:
    """Return whether a node of a tree stands for a weight: a PackedArray or a ProductArray."""
    return isinstance(node, PackedArray | ProductArray)


def unpack(packed: Any) -> Any:
    """Return the parameters that `pack` packed, equal bit for bit (a -0.0 comes back as 0.0).

    Args:
      packed: tree with PackedArray nodes, or ProductArrays.

    Returns:
      The tree with arrays in their place. Pure, under jit too.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.arange(32.0).reshape(8, 4) % 3}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> bool(jnp.all(unpack(pack(params, state))["kernel"] == params["kernel"]))
    True
    """

    return jax.tree.map(
        lambda node: unpack_node(node) if is_quantized(node) else node,
        packed,
        is_leaf=is_quantized,
    )


def unpack_node(node: PackedArray | ProductArray) -> jax.Array:
    """Return the weight that a node stands for."""
    if isinstance(node, ProductArray):
        return compiled(unpack_product, node)
    return unpack_array(node)
