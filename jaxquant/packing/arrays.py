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

from jaxquant.clustering.blocks import (
    assigned,
    centroids_of,
    elementwise,
    numbers_of,
    reconstructed,
)
from jaxquant.meshes import compiled
from jaxquant.packing.codes import pack_codes, symbol, unpack_codes
from jaxquant.rounds.state import QuantState, check_state, stored_tables
from jaxquant.trees import check_structure, leaves_with_paths, pure, replaced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "codebook", "scale"),
    meta_fields=("rows", "columns", "dtype"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedArray:
    """A weight as packed codes and codebooks; made by `pack`, read by `unpack` and products.

    The weight is cut into equal blocks, `numbers` of them along its axes, and each weight is the
    centroid of its code: `centroids[*block, code]`, with
    `centroids = (codebook * scale).astype(dtype)`, the product in float32.

    Invariants: `shape == codes.shape[:-2] + rows + columns`;
    `codes.shape[-2] == packed_rows(prod(rows), k)`, `codes.shape[-1] == prod(columns)`; codebook
    and scale are as long along axis 0 as the codes of stacked layers. These are the leading axes of
    `codes`: `vmap` and `scan` take a packed array apart into those of its layers, as they would the
    weight.

    Attributes:
      codes: [..., packed rows, columns] uint8, see `jaxquant.packing.codes`.
      codebook: [k] of the whole weight, or [*numbers, k] of its blocks, of any floating dtype, or
        of int8 with a scale. With a scale, ones stand in place of numbers along axes of which all
        blocks share a codebook.
      scale: [*numbers, 1] float32 or bfloat16, what the codebooks are times, ones in place of
        numbers likewise, [1] beside [k]; or None.
      rows: sizes of the axes that make the rows.
      columns: size of the last axis; () for a weight with a single axis.
      dtype: of the weight, floating point; None stands for that of the codebook.
    """

    codes: jax.Array
    codebook: jax.Array
    scale: jax.Array | None = None
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    dtype: Any = None

    def __post_init__(self) -> None:
        """Take the codebook's dtype where the weight's is None."""
        dtype = getattr(self.codebook, "dtype", None) if self.dtype is None else self.dtype
        object.__setattr__(self, "dtype", None if dtype is None else jnp.dtype(dtype))

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
    def k(self) -> int:
        """Number of centroids of a codebook."""
        return self.codebook.shape[-1]

    @property
    def numbers(self) -> tuple[int, ...]:
        """How many blocks there are along each axis of the weight."""
        return numbers_of((*block_numbers(self.codebook, self.scale), self.k), self.shape)

    @property
    def centroids(self) -> jax.Array:
        """The centroids of every block, [k] or [*numbers, k], of the weight's dtype."""
        return centroids_of(self.codebook, self.scale, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, of the codebook and of the scale."""
        return self.codes.size + table_bytes(self.codebook, self.scale)


def table_bytes(*tables: jax.Array | None) -> int:
    """Return the bytes of codebooks and scales."""
    return sum(table.size * table.dtype.itemsize for table in tables if table is not None)


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
# from elsewhere: JSON, and nothing but sizes and the name of a dtype.

_EXPORT_VERSION = 2  # packed arrays of the first had neither scales nor dtypes of their own


def _write_static(static: tuple[Any, ...]) -> bytes:
    return json.dumps([_EXPORT_VERSION, *static], default=str).encode()


def _read_static(data: bytes | bytearray, *, kind: type) -> tuple[Any, ...]:
    """Return the static fields of a PackedArray, or the none of a ProductArray.

    Raises:
      ValueError: if `_write_static` wrote other data, or an earlier one did.
    """
    try:
        version, *static = json.loads(bytes(data))
        if kind is PackedArray:
            rows, columns, name = static
            static = [tuple(rows), tuple(columns), jnp.dtype(name)]
            fits = all(type(n) is int and n >= 0 for n in (*rows, *columns))
            fits = fits and jnp.issubdtype(static[-1], jnp.floating)
        else:
            fits = not static
    except (ValueError, TypeError, RecursionError):
        version, static, fits = None, [], False
    if version != _EXPORT_VERSION or not fits:
        raise ValueError(
            f"expected version {_EXPORT_VERSION} of a {kind.__name__}: sizes, a dtype; got other "
            "data: export again"
        )
    return tuple(static)


with contextlib.suppress(ValueError):  # where this module is loaded again
    for kind in (PackedArray, ProductArray):
        jax.export.register_pytree_node_serialization(
            kind,
            serialized_name=f"jaxquant.{kind.__name__}",
            serialize_auxdata=_write_static,
            deserialize_auxdata=functools.partial(_read_static, kind=kind),
        )


# Arrays and trees --------------------------------------------------------------------------------


def block_numbers(codebook: Any, scale: Any) -> tuple[int, ...]:
    """Return how many blocks a codebook and a scale, or None, tell apart; () of a [k] alone."""
    own = codebook.shape[:-1]
    return own if scale is None else tuple(map(max, own, scale.shape[:-1]))


def split_shape(
    shape: tuple[int, ...], numbers: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the axes of a weight that are stacked layers, rows and columns.

    Layers are stacked along axis 0 of three or more if there is a block, or more, for each. Where
    axis 0 has a single entry, that is so if there are no other blocks: else it may as well be the
    window of a convolution.

    Args:
      shape: of the weight.
      numbers: see `block_numbers`.
    """
    apart = numbers[:1] == shape[:1] and (shape[0] != 1 or math.prod(numbers) == 1)
    stacked = 1 if len(shape) > 2 and apart else 0
    columns = 1 if len(shape) > 1 else 0
    end = len(shape) - columns
    return shape[:stacked], shape[stacked:end], shape[end:]


def check_tables(shape: tuple[int, ...], codebook: jax.Array, scale: jax.Array | None) -> None:
    """Refuse codebooks and scales that do not fit a weight, or are of other dtypes.

    Raises:
      ValueError: says what it expected.
    """
    floating = jnp.issubdtype(codebook.dtype, jnp.floating)
    if not (floating or (scale is not None and codebook.dtype == jnp.int8)):
        raise ValueError(
            f"expected a codebook of floating point, or of int8 with a scale, got {codebook.dtype}"
        )
    numbers_of(codebook.shape, shape)
    if scale is None:
        return
    numbers_of(scale.shape, shape)
    fits = scale.shape[-1] == 1 and codebook.ndim == scale.ndim
    pairs = zip(codebook.shape[:-1], scale.shape[:-1], strict=False)
    if not fits or any(own != other and 1 not in (own, other) for own, other in pairs):
        raise ValueError(
            f"expected a scale [*numbers, 1] and codebooks [*numbers, k], ones in place of some, "
            f"for weights of shape {shape}, got shapes {scale.shape} and {codebook.shape}"
        )
    if scale.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"expected a scale of float32 or bfloat16, got {scale.dtype}")


def for_each_layer(
    shape: tuple[int, ...], codebook: jax.Array, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return codebook and scale once for each of stacked layers, where one serves several."""
    if scale is None:
        return codebook, None
    layers = split_shape(shape, block_numbers(codebook, scale))[0]
    codebook, scale = (
        jnp.broadcast_to(table, (*layers, *table.shape[len(layers) :]))
        for table in (codebook, scale)
    )
    return codebook, scale


def pack_array(
    weights: jax.Array, codebook: jax.Array, scale: jax.Array | None = None
) -> PackedArray:
    """Pack one weight, each entry as the code of its nearest centroid.

    Args:
      weights: [...] floating point, at least one axis.
      codebook: as in `QuantState.codebooks`: [k], or [*numbers, k] of blocks. Of three axes or more
        with a block, or more, for each entry of axis 0, these entries are stacked layers, which
        stay apart.
      scale: [*numbers, 1] float32 or bfloat16, as in `QuantState.scales`, ones in place of some
        numbers of it or of the codebook; or None.

    Returns:
      PackedArray of the weights' dtype. Pure, under jit too. On a mesh of explicit axes codes
      are sharded as the weight's stacked layers and columns are, not along the rows.

    Raises:
      ValueError: for more than 256 centroids, and a codebook or a scale that does not fit.
    """
    symbol(codebook.shape[-1])
    if not weights.ndim or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            "expected a weight with at least one axis, of floating point, got "
            f"{weights.dtype} {weights.shape}"
        )
    check_tables(weights.shape, codebook, scale)
    codebook, scale = for_each_layer(weights.shape, codebook, scale)
    stacked, rows, columns = split_shape(weights.shape, block_numbers(codebook, scale))
    spec = jax.typeof(weights).sharding.spec
    by_column = PartitionSpec(*spec[: len(stacked)], None, spec[-1] if columns else None)
    matrix = (*stacked, math.prod(rows), math.prod(columns))
    return PackedArray(
        codes=compiled(_pack, weights, codebook, scale, like=by_column, shape=matrix),
        codebook=codebook,
        scale=scale,
        rows=rows,
        columns=columns,
        dtype=weights.dtype,
    )


def _pack(
    weights: jax.Array, codebook: jax.Array, scale: jax.Array | None, *, shape: tuple[int, ...]
) -> jax.Array:
    codes = assigned(weights, centroids_of(codebook, scale, weights.dtype))
    return pack_codes(codes.reshape(shape), codebook.shape[-1])


def unpack_array(packed: PackedArray) -> jax.Array:
    """Return the weight. Pure, under jit too; costs a pass over the codes."""
    *stacked, _, columns = jax.typeof(packed.codes).sharding.spec
    rows = (None,) * len(packed.rows)
    by_column = PartitionSpec(*stacked, *rows, *(columns for _ in packed.columns))
    return compiled(_unpack, packed, like=by_column)


def _unpack(packed: PackedArray) -> jax.Array:
    codes = unpack_codes(packed.codes, math.prod(packed.rows), packed.k).reshape(packed.shape)
    if packed.scale is None:
        return reconstructed(codes, packed.centroids)
    # As `centroids_of`, bit for bit, without its table: of small blocks that is as large as these.
    plain = reconstructed(codes, packed.codebook.astype(jnp.float32))
    scale = packed.scale.astype(jnp.float32)
    return elementwise(_times, (plain,), (scale,)).astype(packed.dtype)


def _times(weights: jax.Array, scale: jax.Array) -> jax.Array:
    return weights * scale[0]


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
        _pack_leaf(path, jnp.asarray(leaf), codebook, scale) if codebook.ndim else leaf
        for (path, leaf), codebook, scale in zip(
            leaves_with_paths(params), *stored_tables(state), strict=True
        )
    ]
    packed = jax.tree.unflatten(jax.tree.structure(params), packed)
    return replaced(given, packed, only_parameters=True)


def _pack_leaf(
    path: str, weights: jax.Array, codebook: jax.Array, scale: jax.Array | None
) -> PackedArray:
    codebook = codebook + jnp.zeros((), codebook.dtype)  # -0.0, which comes and goes, becomes 0.0
    try:
        packed = pack_array(weights, codebook, scale)
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
