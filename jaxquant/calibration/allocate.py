"""Rules for each weight that lose least within a budget of stored bytes: `allocate`."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.clustering.codebooks import num_centroids
from jaxquant.meshes import compiled
from jaxquant.packing.arrays import is_packed
from jaxquant.packing.storage import stored_bytes
from jaxquant.packing.trees import pack
from jaxquant.rounds.calibration import Calibration
from jaxquant.rounds.compensation import own_energies
from jaxquant.rounds.quantize import init, quantize_round
from jaxquant.rounds.schedules import slq
from jaxquant.rounds.selection import LayerRule, natural_key, select
from jaxquant.trees import check_leaves, leaves_with_paths, pure

_KS = (2, 3, 4, 5, 8, 16, 32, 64, 256)  # centroids that are tried if nothing is said
_UNITS = 100_000  # of a budget: what the bytes of a choice are rounded up to
_ENTRY_BYTES = 40  # of a leaf in a file's manifest, which is compressed, and some to spare
_HEADER_BYTES = 800  # of a file's header


class Choice(NamedTuple):
    """What one rule makes of one weight."""

    path: str
    rule: LayerRule
    loss: float  # (weighted) sum of squares
    bytes: int  # stored


class Allocation(list[LayerRule]):
    """Rules, one for each weight; for `slq`, `mlq` and others. Prints as a table in Markdown.

    Attributes:
      choices: what the rules make of the weights, in natural order.
      table: all that was measured.
      size: number of weights that are quantized.
    """

    def __init__(self, choices: Sequence[Choice], table: Sequence[Choice], size: int):
        """Keep the choices and what they were chosen from."""
        super().__init__(choice.rule for choice in choices)
        self.choices, self.table, self.size = tuple(choices), tuple(table), size

    @property
    def loss(self) -> float:
        """The sum of the losses of all choices."""
        return sum(choice.loss for choice in self.choices)

    @property
    def bytes(self) -> int:
        """The stored bytes of all weights that are quantized."""
        return sum(choice.bytes for choice in self.choices)

    @property
    def bits(self) -> float:
        """Stored bits for each weight that is quantized."""
        return 8 * self.bytes / self.size

    def __str__(self) -> str:
        """Return a table with a row for each weight, and one of totals."""
        rows = [
            f"| {choice.path} | {choice.rule.k} | {_block(choice.rule)} | {choice.loss:.3e} | "
            f"{choice.bytes:,} |"
            for choice in self.choices
        ]
        head = ["| weight | k | block | loss | bytes |", "|---|--:|---|--:|--:|"]
        total = (
            f"| **total** | | {self.bits:.3f} bits a weight | {self.loss:.3e} | {self.bytes:,} |"
        )
        return "\n".join([*head, *rows, total])


def allocate(
    params: Any,
    *,
    bytes: int | None = None,
    bits: float | None = None,
    choices: Sequence[LayerRule] | None = None,
    calibration: Calibration | None = None,
    sensitivity: Any = None,
) -> Allocation:
    """Return the rule for each weight, out of some choices, that lose least within a budget.

    Every weight is quantized by every choice whose pattern it matches, in one round, and what that
    loses and stores is measured: the (weighted) sum of squares, and the bytes of its codes as
    `save` codes them, by their entropy, with codebooks and scales. Among all combinations within
    the budget one of least loss is found by dynamic programming (Kellerer, Pferschy and Pisinger,
    "Knapsack Problems", 2004, section 11: the multiple-choice knapsack).

    Losses of different weights add up as far as they are alike, which squares of weights are not:
    give a calibration, or sensitivities. With guided moments what counts is the answers: each
    squared change times what of its input's moment the inputs after it cannot make up for, about
    what a round loses that has the moments.

    Args:
      params: tree of weights.
      bytes: of a file with everything: weights that no choice matches count as they are.
      bits: stored bits for each weight that is quantized; one of both.
      choices: rules, of which a weight may match several; each says k or bits. None: those that
        `select` selects by default, with one codebook of 2 to 256 centroids, alone and with a
        scale for each output.
      calibration: from `calibrate`: its guided moments, or sensitivities, say what is lost; or
      sensitivity: tree like `params`, as of `quantize_round`.

    Returns:
      Allocation: a list of rules, with what was measured. Costs a round for each choice that a
      weight has; outside of jit only.

    Raises:
      ValueError: for no budget or two, for one that no combination keeps, for choices without k,
        and as `slq` does; names what was wrong.

    >>> params = {"large": jnp.sin(jnp.arange(4096.0)).reshape(64, 64), "small": jnp.eye(32)}
    >>> rules = allocate(params, bits=3, choices=[LayerRule(".*", k=k) for k in (2, 4, 8, 16)])
    >>> [(rule.pattern, rule.k) for rule in rules]
    [('large', 8), ('small', 2)]
    """
    if (bytes is None) == (bits is None):
        raise ValueError(f"expected a budget of bytes or bits, got bytes={bytes} and bits={bits}")
    if calibration is not None:
        if sensitivity is not None:
            raise ValueError("expected calibration or sensitivity, got both")
        if calibration.sensitivity is None and not calibration.guided:
            raise ValueError("calibration: expected sensitivities or guided moments, got none")
    params, sensitivity = (pure(x, only_parameters=True) for x in (params, sensitivity))
    rules = _default_choices(params, calibration) if choices is None else list(choices)
    if not rules:
        raise ValueError("choices: expected at least one, got none")
    matches = [(rule, _matched(params, rule)) for rule in rules]
    told = calibration or Calibration(sensitivity=sensitivity, moments={})
    told = dataclasses.replace(told, sensitivity=pure(told.sensitivity, only_parameters=True))
    table = [own for part in _apart(matches) for own in _measured(params, part, told, sensitivity)]
    sizes = {path: leaf.size for path, leaf in leaves_with_paths(params)}
    of_path: dict[str, list[Choice]] = {}
    for choice in sorted(table, key=lambda choice: natural_key(choice.path)):
        of_path.setdefault(choice.path, []).append(choice)
    if not of_path:
        raise ValueError("choices: expected some that can quantize a weight, got none")
    size = sum(sizes[path] for path in of_path)
    if bits is not None:
        budget = math.floor(bits * size / 8)
    else:
        assert bytes is not None
        budget = int(bytes) - _other_bytes(params, of_path)
    least = sum(min(choice.bytes for choice in own) for own in of_path.values())
    if least > budget:
        wanted, got = ("bits", bits) if bits is not None else ("bytes", bytes)
        possible = 8 * least / size if bits is not None else least + _other_bytes(params, of_path)
        raise ValueError(
            f"expected a budget that the smallest choices keep, of {wanted} {possible:.6g}, "
            f"got {got}"
        )
    return Allocation(_best(list(of_path.values()), budget), table, size)


def _default_choices(params: Any, calibration: Calibration | None) -> list[LayerRule]:
    """Return rules for what is selected by default."""
    inputs = {} if calibration is None else calibration.inputs
    patterns: dict[tuple[int, ...] | None, list[str]] = {}
    for layer in select(params, k=1).selected:
        block = [-1] * len(layer.shape)
        block[0 if inputs.get(layer.path, 1) < 0 else -1] = 1
        for own in (None, tuple(block)):
            patterns.setdefault(own, []).append(re.escape(layer.path))
    return [
        LayerRule("|".join(own), k=k, block=block, scaled=block is not None)
        for block, own in patterns.items()
        for k in _KS
    ]


def _matched(params: Any, rule: LayerRule) -> list[str]:
    """Return the paths of the leaves that a choice quantizes."""
    if rule.k is None and rule.bits is None:
        raise ValueError(f"choices: expected k or bits in rule {rule.pattern!r}, got neither")
    return [layer.path for layer in select(params, [rule]).selected]


def _apart(
    matches: Iterable[tuple[LayerRule, list[str]]],
) -> list[dict[str, LayerRule]]:
    """Return rules by path, such that each path has one in a part: what one round can do."""
    parts: list[dict[str, LayerRule]] = []
    for rule, paths in matches:
        for path in paths:
            part = next((part for part in parts if path not in part), None)
            if part is None:
                part = {}
                parts.append(part)
            k = rule.k or num_centroids(rule.bits or 0)
            part[path] = dataclasses.replace(rule, pattern=re.escape(path), k=k, bits=None)
    return parts


def _measured(
    params: Any, rules: dict[str, LayerRule], told: Calibration, sensitivity: Any
) -> list[Choice]:
    """Return what each weight loses and stores by its rule.

    Args:
      params: tree of weights.
      rules: by path.
      told: what losses go by.
      sensitivity: what clusters go by, if that is not told by calibration; or None.
    """
    plan = slq(params, rounds=(1,), rules=list(rules.values()))
    guide: dict[str, Any] = {"sensitivity": sensitivity}
    if sensitivity is None and told.sensitivity is not None:
        guide = {"calibration": dataclasses.replace(told, moments={})}
    new, state, _ = quantize_round(plan, params, init(plan, params), **guide)
    packed = pack(new, state)
    kept = [(layer.path, None) for layer in plan.selection.layers]
    before, after = (check_leaves("params", tree, kept) for tree in (params, new))
    weighed = [None] * len(kept)
    if told.sensitivity is not None:
        weighed = check_leaves("sensitivity", told.sensitivity, kept)
    found = dict(leaves_with_paths(packed, is_leaf=is_packed))
    choices = []
    for layer, *leaves, weights in zip(plan.selection.layers, before, after, weighed, strict=True):
        if layer.reason is None:
            own = told.moments.get(layer.path) if told.guided else None
            axes = dataclasses.replace(
                layer, inputs=layer.inputs or told.inputs.get(layer.path)
            ).input_axes
            loss = compiled(_loss, *leaves, weights if own is None else None, own, axes=axes)
            size = stored_bytes(found[layer.path])
            choices.append(Choice(layer.path, rules[layer.path], float(loss), size))
    return choices


def _loss(
    before: jax.Array,
    after: jax.Array,
    sensitivity: jax.Array | None,
    moments: jax.Array | None,
    *,
    axes: tuple[int, ...],
) -> jax.Array:
    """Return the (weighted) sum of squares; with moments, what the answers lose.

    `axes` are those of inputs, counted behind that of stacked layers.
    """
    change = after.astype(jnp.float32) - before.astype(jnp.float32)
    if moments is None:
        weights = jnp.float32(1.0) if sensitivity is None else sensitivity.astype(jnp.float32)
        return jnp.sum(weights * jnp.square(change))
    stacked = moments.ndim - 2
    inputs = [stacked + axis for axis in axes]
    outputs = [axis for axis in range(stacked, change.ndim) if axis not in inputs]
    change = change.transpose((*range(stacked), *inputs, *outputs))
    change = change.reshape(*moments.shape[:-1], -1)
    energies = jax.vmap(own_energies) if stacked else own_energies
    return jnp.sum(energies(moments)[..., None] * jnp.square(change))


def _other_bytes(params: Any, chosen: Iterable[str]) -> int:
    """Return the bytes in a file beside those of the choices."""
    pairs, chosen = leaves_with_paths(params), set(chosen)
    alone = sum(leaf.size * leaf.dtype.itemsize for path, leaf in pairs if path not in chosen)
    return alone + _ENTRY_BYTES * len(pairs) + _HEADER_BYTES


def _best(of_weights: list[list[Choice]], budget: int) -> list[Choice]:
    """Return a choice for each weight: of all within a budget, which exist, those of least loss.

    Exact for bytes that are rounded up to a unit of the budget; what the rounding leaves of it goes
    to whatever gains most.
    """
    unit = max(1, math.ceil(budget / _UNITS))
    least = np.zeros(budget // unit + 1)  # loss, of the weights so far, within so many units
    taken: list[np.ndarray] = []
    for choices in of_weights:
        losses = np.full((len(choices), least.size), np.inf)
        for row, choice in zip(losses, choices, strict=True):
            units = math.ceil(choice.bytes / unit)
            if units < least.size:
                row[units:] = least[: least.size - units] + choice.loss
        taken.append(np.argmin(losses, axis=0).astype(np.int16))
        least = np.min(losses, axis=0)
    if np.isfinite(least[-1]):
        chosen, rest = [], least.size - 1
        for choices, own in zip(of_weights[::-1], taken[::-1], strict=True):
            chosen.append(choices[own[rest]])
            rest -= math.ceil(chosen[-1].bytes / unit)
        chosen.reverse()
    else:  # the budget is so small that rounding does not fit in it
        chosen = [min(choices, key=lambda choice: choice.bytes) for choices in of_weights]
    return _filled(of_weights, chosen, budget)


def _filled(of_weights: list[list[Choice]], chosen: list[Choice], budget: int) -> list[Choice]:
    """Return the choices after those changes, one by one, that gain most and still fit."""
    chosen = list(chosen)
    while True:
        rest = budget - sum(choice.bytes for choice in chosen)
        gains = [
            (chosen[place].loss - choice.loss, place, choice)
            for place, choices in enumerate(of_weights)
            for choice in choices
            if choice.bytes - chosen[place].bytes <= rest
        ]
        gain, place, choice = max(gains, key=lambda found: found[0])
        if not gain > 0:
            return chosen
        chosen[place] = choice


def _block(rule: LayerRule) -> str:
    size = "leaf" if rule.block is None else "x".join(map(str, rule.block))
    return f"{size}, scaled" if rule.scaled else size
