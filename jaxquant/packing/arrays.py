"""Weights as packed codes and codebooks: array-like pytrees, and views of them."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxquant.checks import whole_number
from jaxquant.clustering.blocks import (
    assigned,
    centroids_of,
    elementwise,
    numbers_of,
    reconstructed,
)
from jaxquant.meshes import compiled
from jaxquant.packing.axes import PARTS, Axes, in_order, pieces_of, shape_of, whole
from jaxquant.packing.codes import pack_codes, symbol, unpack_codes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "codebook", "scale"),
    meta_fields=("rows", "columns", "dtype"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PackedArray:
    """A weight as packed codes and codebooks; made by `pack`, read by `unpack` and products.

    It is multiplied as it is: `jq.matmul(x, packed)` sums over the rows, `jq.matmul(x, packed.T)`
    over the columns, and `jq.packed` runs any function on it. Two are equal if they are one object.

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
      columns: sizes of the axes behind them; () for a weight with a single axis.
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
        packed = with_block_axes(self)
        return numbers_of((*block_numbers(packed.codebook, packed.scale), self.k), self.shape)

    @property
    def centroids(self) -> jax.Array:
        """The centroids of every block, [k] or [*numbers, k], of the weight's dtype."""
        return centroids_of(self.codebook, self.scale, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, of the codebook and of the scale."""
        return self.codes.size + table_bytes(self.codebook, self.scale)

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the axes of stacked layers; () of a single one."""
        return self.codes.shape[:-2]

    @property
    def T(self) -> "View":  # noqa: N802
        """The weight with its axes in reverse order, for products that sum over the columns."""
        return view_of(self).T

    def __getitem__(self, index: Any) -> "PackedArray":
        """Return one of the stacked layers, or some of them, packed; all of it for `...`.

        Raises:
          IndexError: for a number out of bounds, and a weight without stacked layers.
        """
        if index is Ellipsis:
            return self  # as variables of NNX read their values
        if not self.layers:
            raise IndexError(f"expected stacked layers to take some of, got {self!r}")
        number = whole_number(index)
        if number is not None and not -self.layers[0] <= number < self.layers[0]:
            raise IndexError(f"expected the number of one of {self.layers[0]} layers, got {number}")
        dtype = getattr(index, "dtype", jnp.float32)
        several = isinstance(index, slice) or jnp.issubdtype(dtype, jnp.integer)
        if number is None and not several:
            raise IndexError(f"expected numbers of layers, or a slice of them, got {index!r}")
        return jax.tree.map(lambda leaf: leaf[index], with_block_axes(self))

    def __iter__(self) -> Iterator["PackedArray"]:
        """Yield the stacked layers, packed.

        Raises:
          TypeError: for a weight without stacked layers.
        """
        if not self.layers:
            raise TypeError(f"expected stacked layers to go through, got {self!r}: unpack it")
        return (self[number] for number in range(self.layers[0]))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to become an array without a word.

        Raises:
          TypeError: says how to unpack it.
        """
        raise TypeError(f"expected jq.unpack({self!r}) where an array is wanted")

    def astype(self, dtype: Any) -> "PackedArray":
        """Return the weight in another floating dtype: its centroids are cast, where it is used."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"expected a dtype of floating point, got {jnp.dtype(dtype)}")
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __repr__(self) -> str:
        """Say what it is, not what is in it."""
        if not hasattr(self.codes, "shape"):  # axes or shardings in the place of arrays
            return f"PackedArray({self.codes!r}, {self.codebook!r}, {self.scale!r})"
        return (
            f"PackedArray({_short(self.dtype, self.shape)}, k={self.k}, numbers={self.numbers}, "
            f"{self.nbytes} bytes)"
        )


def table_bytes(*tables: jax.Array | None) -> int:
    """Return the bytes of codebooks and scales."""
    return sum(table.size * table.dtype.itemsize for table in tables if table is not None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "words"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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
    def layers(self) -> tuple[int, ...]:
        """Sizes of the axes of stacked layers: there are none."""
        return ()

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

    @property
    def T(self) -> "View":  # noqa: N802
        """The kernel with its axes in reverse order."""
        return view_of(self).T

    def __repr__(self) -> str:
        """Say what it is, not what is in it."""
        return f"ProductArray({_short(self.dtype, self.shape)}, k={self.k}, {self.nbytes} bytes)"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed",),
    meta_fields=("axes", "dtype", "path"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class View:
    """A packed weight with its axes in another order, split, merged or repeated, and cast.

    Attributes:
      packed: the weight, whose dtype is the narrowest that it was cast to.
      axes: what each axis is of its layers, rows and columns, see `jaxquant.packing.axes`.
      dtype: that it was cast to last.
      path: of the weight in a tree, where uses are listed; else None.
    """

    packed: PackedArray | ProductArray
    axes: Axes
    dtype: Any
    path: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is seen."""
        return shape_of(self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def T(self) -> "View":  # noqa: N802
        """The view with its axes in reverse order."""
        return dataclasses.replace(self, axes=self.axes[::-1])

    def __repr__(self) -> str:
        """Say what it is, not what is in it."""
        return f"View({_short(self.dtype, self.shape)} of {self.packed!r})"


def view_of(packed: PackedArray | ProductArray) -> View:
    """Return a weight as a view of itself."""
    axes = whole(packed.layers, packed.rows, packed.columns)
    if isinstance(packed, PackedArray):
        packed = with_block_axes(packed)
    return View(packed=packed, axes=axes, dtype=packed.dtype)


def with_block_axes(packed: PackedArray) -> PackedArray:
    """Return stacked layers with the tables that they have when they are packed together.

    Of layers that were packed one by one and stacked, or that `vmap` packed, tables are [layers, k]
    where a layer has a codebook.
    """
    axes = len(packed.layers)
    if not axes or packed.codebook.ndim != axes + 1:
        return packed
    ones = (1,) * (packed.ndim - axes)

    def apart(table: jax.Array) -> jax.Array:
        return table.reshape(*packed.layers, *ones, table.shape[-1])

    scale = None if packed.scale is None else apart(packed.scale)
    return dataclasses.replace(packed, codebook=apart(packed.codebook), scale=scale)


def _short(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


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


# Arrays ------------------------------------------------------------------------------------------


def block_numbers(codebook: Any, scale: Any) -> tuple[int, ...]:
    """Return how many blocks a codebook and a scale, or None, tell apart; () of a [k] alone."""
    own = codebook.shape[:-1]
    return own if scale is None else tuple(map(max, own, scale.shape[:-1]))


def split_shape(
    shape: tuple[int, ...], numbers: tuple[int, ...], inputs: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the axes of a weight that are stacked layers, rows and columns.

    Layers are stacked along axis 0 of three or more if there is a block, or more, for each. Where
    axis 0 has a single entry, that is so if there are no other blocks: else it may as well be the
    window of a convolution.

    Args:
      shape: of the weight.
      numbers: see `block_numbers`.
      inputs: how many axes behind those of layers a product sums over, the first ones, or so many
        of the last ones if it is negative. These or the others are the rows, whichever come first.
        None: all but the last.

    Raises:
      ValueError: unless there are an axis of inputs and one of outputs.
    """
    apart = numbers[:1] == shape[:1] and (shape[0] != 1 or math.prod(numbers) == 1)
    stacked = 1 if len(shape) > 2 and apart else 0
    end = len(shape) - (1 if len(shape) > 1 else 0)
    if inputs is not None:
        end = inputs + (stacked if inputs > 0 else len(shape))
        if not stacked < end < len(shape):
            raise ValueError(
                f"expected inputs to leave axes of inputs and of outputs of {shape[stacked:]}, got "
                f"{inputs}"
            )
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
    weights: jax.Array,
    codebook: jax.Array,
    scale: jax.Array | None = None,
    *,
    inputs: int | None = None,
) -> PackedArray:
    """Pack one weight, each entry as the code of its nearest centroid.

    Args:
      weights: [...] floating point, at least one axis.
      codebook: as in `QuantState.codebooks`: [k], or [*numbers, k] of blocks. Of three axes or more
        with a block, or more, for each entry of axis 0, these entries are stacked layers, which
        stay apart.
      scale: [*numbers, 1] float32 or bfloat16, as in `QuantState.scales`, ones in place of some
        numbers of it or of the codebook; or None.
      inputs: how many axes products sum over, as in `LayerRule`; None: all but the last.

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
    numbers = block_numbers(codebook, scale)
    stacked, rows, columns = split_shape(weights.shape, numbers, inputs)
    spec = jax.typeof(weights).sharding.spec
    # The axes of columns are one in the codes, of which the first may be spread over devices.
    first = spec[len(spec) - len(columns)] if columns else None
    by_column = PartitionSpec(*spec[: len(stacked)], None, first)
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
    packed = with_block_axes(packed)
    *stacked, _, columns = jax.typeof(packed.codes).sharding.spec
    rows = (None,) * len(packed.rows)
    by_column = PartitionSpec(*stacked, *rows, *(columns for _ in packed.columns[:1]))
    return compiled(_unpack, packed, like=by_column)


def _unpack(packed: PackedArray) -> jax.Array:
    codes = unpack_codes(packed.codes, math.prod(packed.rows), packed.k).reshape(packed.shape)
    return decoded(codes, packed.codebook, packed.scale, packed.dtype)


def decoded(
    codes: jax.Array, codebook: jax.Array, scale: jax.Array | None, dtype: Any
) -> jax.Array:
    """Return the weights of codes [...], of the codebooks of their blocks and scales or None."""
    if scale is None:
        return reconstructed(codes, centroids_of(codebook, scale, dtype))
    # As `centroids_of`, bit for bit, without its table: of small blocks that is as large as these.
    plain = reconstructed(codes, codebook.astype(jnp.float32))
    return elementwise(_times, (plain,), (scale.astype(jnp.float32),)).astype(dtype)


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


def unpack_view(view: View) -> jax.Array:
    """Return what a view shows. Pure, under jit too; costs a pass over the codes of all of it."""
    packed, weight = view.packed, unpack_node(view.packed)
    if view.axes != whole(packed.layers, packed.rows, packed.columns):
        weight = seen(weight, view.axes)
    return weight.astype(view.dtype)


def seen(weight: jax.Array, axes: Axes) -> jax.Array:
    """Return a weight, its layers, rows and columns in order, as such axes show it."""
    own, pieces = pieces_of(axes, *PARTS), pieces_of(axes)
    stored = in_order(own)
    weight = weight.reshape([piece.size for piece in stored])
    weight = weight.transpose([stored.index(piece) for piece in own])
    weight = weight.reshape([piece.size if piece in own else 1 for piece in pieces])
    return jnp.broadcast_to(weight, [piece.size for piece in pieces]).reshape(shape_of(axes))


def is_packed(node: Any) -> bool:
    """Return whether a node of a tree is a PackedArray; for `is_leaf` of `jax.tree.map`."""
    return isinstance(node, PackedArray)


def is_product(node: Any) -> bool:
    """Return whether a node of a tree is a ProductArray."""
    return isinstance(node, ProductArray)


def is_quantized(node: Any) -> bool:
    """Return whether a node of a tree stands for a weight, packed or of words, or is its view."""
    return isinstance(node, PackedArray | ProductArray | View)


@functools.singledispatch
def unpack_node(node: Any) -> jax.Array:
    """Return the weight that a node stands for; a class of nodes registers its way."""
    raise TypeError(f"expected a packed weight, got {type(node).__name__}")


unpack_node.register(PackedArray, unpack_array)
unpack_node.register(View, unpack_view)
unpack_node.register(ProductArray, functools.partial(compiled, unpack_product))
