"""What a quantized network weighs, layer by layer, and what was left alone and why."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.clustering.blocks import assigned, centroids_of, numbers_of
from jaxquant.meshes import compiled
from jaxquant.packing.arrays import (
    ProductArray,
    block_numbers,
    for_each_layer,
    is_product,
    product_codes,
    split_shape,
    table_bytes,
    unpack_product,
)
from jaxquant.packing.codes import packed_rows
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import natural_key, vector_reasons
from jaxquant.rounds.state import QuantState, check_state, stored_tables
from jaxquant.tables import markdown
from jaxquant.trees import check_leaves, check_structure, leaves_with_paths, pure


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One leaf; for a leaf that was left alone `reason` says why, and its numbers are None."""

    path: str  # such as "block_1/dense/kernel"
    shape: tuple[int, ...]  # of the leaf
    size: int  # weights
    float_bytes: int  # of the leaf's own dtype
    k: int | None = None  # centroids, or words of a subspace
    code_bytes: int = 0  # of the packed codes, see `pack`
    distinct: int | None = None  # distinct weights (words) now; the most of any block (subspace)
    frozen: float | None = None  # share of the weights
    error: float | None = None  # squared error / squared norm of the reference; None without one
    entropy: float | None = None  # of the codes, bits a weight: the mean of the blocks' own
    codebook_bytes: int = 0  # with those of scales
    lost_zeros: float = 0.0  # share of the weights that pruning made zero, and that are not now
    reason: str | None = None  # why it was left alone; None for a leaf that was not

    @property
    def bytes(self) -> int:
        """Bytes of the packed codes and the codebook; a leaf left alone stays as it is."""
        return self.float_bytes if self.k is None else self.code_bytes + self.codebook_bytes

    @property
    def entropy_bytes(self) -> int:
        """Bytes if codes took their entropy: about what `save` leaves of them.

        Of blocks of few weights it leaves more: they share the shares that it codes by.
        """
        if self.entropy is None:
            return self.float_bytes
        return math.ceil(self.entropy * self.size / 8) + self.codebook_bytes

    @property
    def bits(self) -> float | None:
        """Bits a weight that the packed codes take."""
        return None if self.k is None else 8 * self.code_bytes / max(self.size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All leaves in natural order, and totals; `str()` is a Markdown table."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The leaves that have a codebook."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def bytes(self) -> int:
        """Bytes of the whole tree: packed codes, codebooks, leaves left alone."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of the whole tree in its own dtypes."""
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def entropy_bytes(self) -> int:
        """Bytes of the whole tree if codes took their entropy: what an ideal coder leaves."""
        return sum(layer.entropy_bytes for layer in self.layers)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of all codebooks and scales."""
        return sum(layer.codebook_bytes for layer in self.layers)

    @property
    def left_alone_bytes(self) -> int:
        """Bytes of the leaves that were left alone."""
        return sum(layer.float_bytes for layer in self.layers if layer.k is None)

    @property
    def compression(self) -> float:
        """Float bytes over bytes."""
        return self.float_bytes / max(self.bytes, 1)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the quantized leaves, codebooks included."""
        size = sum(layer.size for layer in self.quantized)
        return 8 * sum(layer.bytes for layer in self.quantized) / max(size, 1)

    @property
    def frozen(self) -> float:
        """Share of the weights of the quantized leaves that are frozen."""
        size = sum(layer.size for layer in self.quantized)
        return sum((layer.frozen or 0.0) * layer.size for layer in self.quantized) / max(size, 1)

    def __str__(self) -> str:
        """Return a Markdown table with a row a leaf and one of totals."""
        words = ("layer", "shape", "k", "distinct", "frozen", "error", "bits", "entropy")
        total = ["**total**", "", "", "", f"{self.frozen:.1%}", "", f"{self.bits_per_weight:.2f}"]
        note = (
            f"{self.compression:.1f}x smaller than {self.float_bytes:,}; "
            f"codebooks {self.codebook_bytes:,}, left alone {self.left_alone_bytes:,}"
        )
        total += ["", f"{self.bytes:,}", f"{self.entropy_bytes:,}", note]
        rows = [*map(_row, self.layers), total]
        return markdown([*words, "bytes", "ideal", ""], rows, "<<>>>>>>>><")


def report(
    params: Any, state: QuantState | None = None, *, reference: Any = None, plan: Plan | None = None
) -> Report:
    """Describe every leaf: codebook, bits, what is frozen, how far off, how many bytes.

    The error of a leaf is `sum (w - r)**2 / sum r**2`, with r the leaf in `reference`: the float
    network, say. Bytes are those of `pack`; `entropy_bytes` ("ideal" in the table) what an ideal
    entropy coder would leave, and `save` nearly does. Weights that were exactly zero and are not
    now, as happens to pruned layers where no centroid is pinned to zero, are noted in the table;
    without a reference, where three quarters of a layer lie next to zero. Runs outside of jit;
    O(n log n) on the host.

    Args:
      params: tree of weights; of ProductArrays (`jaxquant.product`) too.
      state: of the same structure; None for a network of which no leaf has a codebook.
      reference: tree like `params`, such as the weights before the first round; or None.
      plan: gives the reasons why leaves were left alone in the rules' words, and tells which axes
        of inputs `pack` is told of.

    Raises:
      ValueError: if the trees differ, or the shapes of params and reference.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8), "bias": jnp.zeros(8)}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> [(layer.path, layer.distinct) for layer in report(params, state).layers]
    [('bias', None), ('kernel', 3)]
    """
    params, state = pure(params, only_parameters=True), pure(state)
    reference = pure(reference, only_parameters=True)
    pairs = _leaves(params)
    structure = jax.tree.structure(params, is_leaf=is_product)
    nothing = jax.tree.unflatten(structure, [jnp.zeros(())] * len(pairs))
    if state is None:
        state = QuantState(nothing, nothing, nothing, jnp.int32(0))
    check_state(state)
    for tree in (state.codebooks, state.frozen):
        check_structure(nothing, tree, "state to have the params' structure")
    columns = [[leaf for _, leaf in pairs], *stored_tables(state), jax.tree.leaves(state.frozen)]
    if reference is not None:
        check_structure(nothing, reference, "reference to have the params' structure")
        check_leaves("reference", reference, [(path, jnp.shape(leaf)) for path, leaf in pairs])
        columns.append(jax.tree.leaves(reference))
    reasons: dict[str, str | None] = dict(vector_reasons(params))
    inputs: dict[str, int] = {}
    if plan is not None:
        reasons = {x.path: x.reason for x in plan.selection.layers}
        inputs = plan.selection.inputs
    layers = [
        _layer(path, *leaves, reason=reasons.get(path), inputs=inputs.get(path))
        for (path, _), *leaves in zip(pairs, *columns, strict=True)
    ]
    return Report(layers=tuple(sorted(layers, key=lambda layer: natural_key(layer.path))))


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return leaves_with_paths(params, is_leaf=is_product)


def _layer(
    path: str,
    leaf: Any,
    codebook: jax.Array,
    scale: jax.Array | None,
    frozen: jax.Array,
    reference: jax.Array | None = None,
    *,
    reason: str | None,
    inputs: int | None,
) -> LayerReport:
    if isinstance(leaf, ProductArray):
        return _product(path, leaf, reference)
    leaf = jnp.asarray(leaf)
    shape, size, float_bytes = leaf.shape, leaf.size, leaf.size * leaf.dtype.itemsize
    if not codebook.ndim:
        return LayerReport(
            path=path,
            shape=shape,
            size=size,
            float_bytes=float_bytes,
            reason=reason or _usual_reason(leaf),
        )
    k = codebook.shape[-1]
    codebook, scale = for_each_layer(shape, codebook, scale)
    apart = block_numbers(codebook, scale)
    numbers = numbers_of((*apart, k), shape)
    weights = _by_block(np.asarray(leaf), numbers)
    codes = compiled(_codes, leaf, codebook, scale)
    return LayerReport(
        path=path,
        shape=shape,
        size=size,
        float_bytes=float_bytes,
        k=k,
        code_bytes=_code_bytes(shape, apart, k, inputs),
        distinct=_most_distinct(weights),
        frozen=float(np.mean(np.asarray(frozen), dtype=np.float64)),
        error=None if reference is None else _error(leaf, reference),
        entropy=float(np.mean(_entropies(_counts(_by_block(np.asarray(codes), numbers), k)))),
        codebook_bytes=table_bytes(codebook, scale),
        lost_zeros=_lost_zeros(leaf, reference),
    )


def _codes(leaf: jax.Array, codebook: jax.Array, scale: jax.Array | None) -> jax.Array:
    return assigned(leaf, centroids_of(codebook, scale, leaf.dtype))


def _by_block(x: np.ndarray, numbers: tuple[int, ...]) -> np.ndarray:
    """Return [blocks, entries of one]."""
    sizes = [(n, size // n) for n, size in zip(numbers, x.shape, strict=True)]
    view = x.reshape(*itertools.chain(*sizes))
    order = (*range(0, view.ndim, 2), *range(1, view.ndim, 2))
    return view.transpose(order).reshape(math.prod(numbers), -1)


def _most_distinct(rows: np.ndarray) -> int:
    """Return the most distinct numbers of any row; all that are none count as one."""
    wide = rows.astype(np.promote_types(rows.dtype, np.float32))  # NumPy sorts others slowly
    ascending = np.sort(wide, axis=1)
    before, after = ascending[:, :-1], ascending[:, 1:]
    changes = np.count_nonzero((before != after) & (before == before), axis=1)
    return int(np.max(changes, initial=0)) + min(rows.shape[1], 1)


def _counts(codes: np.ndarray, k: int) -> np.ndarray:
    """Return how often each row has each code, [rows, k]."""
    first = k * np.arange(len(codes))[:, None]
    return np.bincount((first + codes).ravel(), minlength=k * len(codes)).reshape(-1, k)


def _product(path: str, array: ProductArray, reference: jax.Array | None) -> LayerReport:
    kernel, codes = unpack_product(array), np.asarray(product_codes(array))
    subspaces, k, length = array.words.shape
    used = _counts(np.moveaxis(codes, -2, 0).reshape(subspaces, -1), k)
    return LayerReport(
        path=path,
        shape=array.shape,
        size=array.size,
        float_bytes=array.size * array.dtype.itemsize,
        k=k,
        code_bytes=array.codes.codes.size,
        distinct=int(np.max(np.count_nonzero(used, axis=1))),
        frozen=1.0,
        error=None if reference is None else _error(kernel, reference),
        # As `save` codes them: all alike.
        entropy=float(_entropies(np.sum(used, axis=0)[None])[0]) / length,
        codebook_bytes=array.words.size * array.dtype.itemsize,
    )


def _code_bytes(
    shape: tuple[int, ...], numbers: tuple[int, ...], k: int, inputs: int | None
) -> int:
    stacked, rows, columns = split_shape(shape, numbers, inputs)
    matrices = math.prod(stacked) * math.prod(columns)
    return matrices * packed_rows(math.prod(rows), k)


def _usual_reason(leaf: jax.Array) -> str:
    """Guess, without the plan, why a leaf has no codebook."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"dtype {leaf.dtype} is not floating point"
    if leaf.ndim < 2:
        return f"{leaf.ndim} dimension{'s' * (leaf.ndim != 1)}, fewer than 2"
    return "left alone by the rules, or no more weights than centroids"


def _error(leaf: jax.Array, reference: jax.Array) -> float:
    leaf64, reference64 = (np.asarray(x).astype(np.float64) for x in (leaf, reference))
    norm = np.sum(reference64**2)
    return float(np.sum((leaf64 - reference64) ** 2) / norm) if norm else 0.0


def _lost_zeros(leaf: jax.Array, reference: jax.Array | None) -> float:
    """Return the share of the weights that were zero and are not; see `report`."""
    weights = np.abs(np.asarray(leaf).astype(np.float64))
    if reference is not None:
        return float(np.mean((np.asarray(reference) == 0) & (weights > 0)))
    share = float(np.mean((weights > 0) & (weights <= np.max(weights) / 100)))
    return share if share >= 0.75 else 0.0


def _entropies(counts: np.ndarray) -> np.ndarray:
    """Return the entropy of each row of counts, in bits."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    logarithms = np.log2(shares, out=np.zeros_like(shares), where=counts > 0)
    return np.maximum(0.0, -np.sum(shares * logarithms, axis=1))


def _row(layer: LayerReport) -> list[object]:
    shape = "x".join(map(str, layer.shape)) or "scalar"
    if layer.reason is not None:
        size = f"{layer.bytes:,}"
        return [layer.path, shape, *[""] * 6, size, size, f"float: {layer.reason}"]
    error = "" if layer.error is None else f"{layer.error:.2e}"
    note = ""
    if layer.lost_zeros >= 0.01:
        note = f"{layer.lost_zeros:.0%} pruned to zero, now not: zero=True keeps them"
    own = [layer.path, shape, layer.k, layer.distinct, f"{layer.frozen:.1%}", error]
    sizes = [f"{layer.bytes:,}", f"{layer.entropy_bytes:,}"]
    return [*own, f"{layer.bits:.2f}", f"{layer.entropy:.2f}", *sizes, note]
