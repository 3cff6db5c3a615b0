"""Rules for each weight that lose least within a budget of stored bytes: `allocate`."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration.answers import OUTPUTS, lost_alone
from jaxquant.clustering.codebooks import num_centroids
from jaxquant.meshes import compiled
from jaxquant.packing.arrays import PackedArray, is_packed
from jaxquant.packing.storage.writing import stored_bytes
from jaxquant.packing.trees import pack
from jaxquant.rounds.calibration import Calibration
from jaxquant.rounds.least_squares import answers
from jaxquant.rounds.quantize import init, quantize_round
from jaxquant.rounds.schedules import slq
from jaxquant.rounds.selection import LayerRule, natural_key, select
from jaxquant.tables import markdown
from jaxquant.trees import check_leaves, leaves_with_paths, pure

_KS = (2, 3, 4, 5, 8, 16, 32, 64, 256)  # centroids that are tried if nothing is said
_UNITS = 100_000  # of a budget: what the bytes of a choice are rounded up to
_ENTRY_BYTES = 40  # of a leaf in a file's manifest, which is compressed, and some to spare
_HEADER_BYTES = 800  # of a file's header


class Choice(NamedTuple):
    """What one rule makes of one weight."""

    path: str
    rule: LayerRule
    loss: float  # (weighted) sum of squares, or what the function's answers lose
    bytes: int  # stored


class Allocation(list[LayerRule]):
    """Rules, one for each weight; for `slq`, `mlq` and others. Prints as a table in Markdown.

    Attributes:
      choices: what the rules make of the weights, in natural order.
      table: all that was measured.
      size: number of weights that are quantized.
      other_bytes: of a file beside those of the choices, about.
    """

    def __init__(
        self, choices: Sequence[Choice], table: Sequence[Choice], size: int, other_bytes: int
    ):
        """Keep the choices and what they were chosen from."""
        super().__init__(choice.rule for choice in choices)
        self.choices, self.table = tuple(choices), tuple(table)
        self.size, self.other_bytes = size, other_bytes

    def within(self, *, bytes: int | None = None, bits: float | None = None) -> "Allocation":
        """Return the rules for another budget, as of `allocate`, from the same table.

        Raises:
          ValueError: for no budget or two, and for one that no combination keeps.
        """
        _check_budget(bytes, bits)
        of_weights: dict[str, list[Choice]] = {}
        for choice in self.table:
            of_weights.setdefault(choice.path, []).append(choice)
        least = sum(min(choice.bytes for choice in own) for own in of_weights.values())
        if bits is not None:
            budget, possible = math.floor(bits * self.size / 8), f"bits {8 * least / self.size:.6g}"
        else:
            assert bytes is not None
            budget, possible = int(bytes) - self.other_bytes, f"bytes {least + self.other_bytes}"
        if least > budget:
            raise ValueError(
                f"expected a budget that the smallest choices keep, of {possible}, "
                f"got {bytes if bits is None else bits}"
            )
        chosen = _best(list(of_weights.values()), budget)
        return Allocation(chosen, self.table, self.size, self.other_bytes)

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
            [c.path, c.rule.k, _block(c.rule), f"{c.loss:.3e}", f"{c.bytes:,}"]
            for c in self.choices
        ]
        sizes = [f"{self.bits:.3f} bits a weight", f"{self.loss:.3e}", f"{self.bytes:,}"]
        rows.append(["**total**", "", *sizes])
        return markdown(["weight", "k", "block", "loss", "bytes"], rows, "<><>>")


def allocate(
    params: Any,
    *,
    bytes: int | None = None,
    bits: float | None = None,
    choices: Sequence[LayerRule] | None = None,
    calibration: Calibration | None = None,
    sensitivity: Any = None,
    function: Callable[[Any, Any], Any] | None = None,
    batches: Iterable[Any] = (),
    outputs: str = "normal",
) -> Allocation:
    """Return the rule for each weight, out of some choices, that lose least within a budget.

    Every weight is quantized by every choice whose pattern it matches, in one round, and what that
    loses and stores is measured: the (weighted) sum of squares, and the bytes of its codes as
    `save` codes them, by their entropy, with codebooks and scales. Among all combinations within
    the budget one of least loss is found by dynamic programming (Kellerer, Pferschy and Pisinger,
    "Knapsack Problems", 2004, section 11: the multiple-choice knapsack).

    With calibration the round is the calibrated one, and with moments its loss is the squared
    change of what a weight answers. Those of different weights add up as far as they matter alike,
    which is what guided moments and sensitivities are for. They take vectors as if they were
    apart, though: where changes of many tokens or pixels meet in one result, more is lost, of some
    weights many times more. So give the function as well: it runs with each weight quantized alone,
    by one of its choices, which tells what one loss is beside another.

    Args:
      params: tree of weights.
      bytes: of a file with everything: weights that no choice matches count as they are.
      bits: stored bits for each weight that is quantized; one of both.
      choices: rules, of which a weight may match several; each says k or bits. None: those that
        `select` selects by default, with one codebook of 2 to 256 centroids, alone and with a
        scale for each output.
      calibration: from `calibrate`, that of the round the rules are for; or
      sensitivity: tree like `params`, as of `quantize_round`.
      function: of the parameters and a batch, as for `calibrate`. None: losses are not measured by
        what it answers.
      batches: as for `calibrate`, for the function; a few will do.
      outputs: as for `calibrate`: losses are the mean over examples of the squared change of
        outputs ("normal"), or of twice the divergence of predictions ("categorical").

    Returns:
      Allocation: a list of rules, with what was measured. Costs a round for each choice that a
      weight has, and a run of the function on all batches for each weight; outside of jit only.

    Raises:
      ValueError: for no budget or two, for one that no combination keeps, for choices without k,
        for a function without batches, and as `slq` does; names what was wrong.

    >>> params = {"large": jnp.sin(jnp.arange(4096.0)).reshape(64, 64), "small": jnp.eye(32)}
    >>> rules = allocate(params, bits=3, choices=[LayerRule(".*", k=k) for k in (2, 4, 8, 16)])
    >>> [(rule.pattern, rule.k) for rule in rules]
    [('large', 8), ('small', 2)]
    """
    _check_budget(bytes, bits)
    if calibration is not None:
        if sensitivity is not None:
            raise ValueError("expected calibration or sensitivity, got both")
        if calibration.sensitivity is None and not calibration.guided and function is None:
            raise ValueError("calibration: expected sensitivities or guided moments, got none")
    batches = list(batches)
    if (function is None) != (not batches):
        raise ValueError(f"expected a function with batches, got {function} and {len(batches)}")
    if outputs not in OUTPUTS:
        raise ValueError(f"expected outputs to be one of {OUTPUTS}, got {outputs!r}")
    given = params
    params, sensitivity = (pure(x, only_parameters=True) for x in (params, sensitivity))
    rules = _default_choices(params, calibration) if choices is None else list(choices)
    if not rules:
        raise ValueError("choices: expected at least one, got none")
    matches = [(rule, _matched(params, rule)) for rule in rules]
    guide = {"sensitivity": sensitivity} if calibration is None else {"calibration": calibration}
    of_path: dict[str, list[_Measured]] = {}
    for part in _apart(matches):
        for own in _measured(params, part, guide):
            of_path.setdefault(own.choice.path, []).append(own)
    of_path = dict(sorted(of_path.items(), key=lambda pair: natural_key(pair[0])))
    if not of_path:
        raise ValueError("choices: expected some that can quantize a weight, got none")
    of_weights = [[own.choice for own in owns] for owns in of_path.values()]
    if function is not None:
        lost = functools.partial(lost_alone, function, given, batches, outputs=outputs)
        of_weights = _compared(list(of_path.values()), lost)
    table = [choice for own in of_weights for choice in own]
    size = sum(leaf.size for path, leaf in leaves_with_paths(params) if path in of_path)
    found = Allocation((), table, size, _other_bytes(params, of_path))
    return found.within(bytes=bytes, bits=bits)


def _check_budget(bytes: int | None, bits: float | None) -> None:
    given = [budget for budget in (bytes, bits) if budget is not None]
    if len(given) != 1:
        raise ValueError(f"expected a budget of bytes or bits, got bytes={bytes} and bits={bits}")
    if not math.isfinite(given[0]):
        raise ValueError(f"expected a budget that is a finite number, got {given[0]}")


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


class _Measured(NamedTuple):
    """A choice, and the weight that it makes."""

    choice: Choice
    packed: PackedArray


def _measured(
    params: Any, rules: dict[str, LayerRule], guide: dict[str, Any]
) -> Iterator[_Measured]:
    """Yield what each weight loses and stores by its rule.

    Args:
      params: tree of weights.
      rules: by path.
      guide: what the round goes by, and losses do.
    """
    plan = slq(params, rounds=(1,), rules=list(rules.values()))
    new, state, _ = quantize_round(plan, params, init(plan, params), **guide)
    packed = dict(leaves_with_paths(pack(new, state), is_leaf=is_packed))
    told = guide.get("calibration") or Calibration(moments={}, **guide)
    kept = [(layer.path, None) for layer in plan.selection.layers]
    before, after = (check_leaves("params", tree, kept) for tree in (params, new))
    weighed = [None] * len(kept)
    if told.sensitivity is not None:
        sensitivity = pure(told.sensitivity, only_parameters=True)
        weighed = check_leaves("sensitivity", sensitivity, kept)
    for layer, *leaves, weights in zip(plan.selection.layers, before, after, weighed, strict=True):
        if layer.reason is None:
            own = told.moments.get(layer.path)
            if weights is not None and not weights.ndim:
                weights = None  # of what calibration did not look at
            if weights is not None and not told.guided:
                own = None
            axes = dataclasses.replace(
                layer, inputs=layer.inputs or told.inputs.get(layer.path)
            ).input_axes
            told_of = None if own is not None else weights, own
            loss = compiled(_loss, *leaves, *told_of, axes=axes, stacks=layer.stacks)
            size = stored_bytes(packed[layer.path])
            choice = Choice(layer.path, rules[layer.path], float(loss), size)
            yield _Measured(choice, packed[layer.path])


def _loss(
    before: jax.Array,
    after: jax.Array,
    sensitivity: jax.Array | None,
    moments: jax.Array | None,
    *,
    axes: tuple[int, ...],
    stacks: bool,
) -> jax.Array:
    """Return the (weighted) sum of squares; with moments, of what the layer answers.

    `axes` are those of inputs, counted behind that of stacked layers, if it `stacks` some.
    """
    change = after.astype(jnp.float32) - before.astype(jnp.float32)
    if moments is None:
        weights = jnp.float32(1.0) if sensitivity is None else sensitivity.astype(jnp.float32)
        return jnp.sum(weights * jnp.square(change))
    if not stacks:
        moments, change = moments[None], change[None]
    inputs = [1 + axis for axis in axes]
    outputs = [axis for axis in range(1, change.ndim) if axis not in inputs]
    size = moments.shape[-1]
    change = change.transpose((0, *inputs, *outputs)).reshape(len(change), size, -1)
    moments = moments.reshape(len(moments), -1, size, size)
    return jnp.sum(change * jax.vmap(answers)(moments, change))


def _compared(
    of_weights: list[list[_Measured]], lost: Callable[[dict[str, PackedArray]], dict[str, float]]
) -> list[list[Choice]]:
    """Return choices of weights, with losses such that one of each is what the answers lose by it.

    Those of a weight are all times one factor: how much a weight matters hardly depends on the
    choice, and how a loss grows from choice to choice they tell themselves.

    Args:
      of_weights: the choices of each.
      lost: returns what answers lose by weights, by path, each alone.
    """
    losing = [
        sorted((own for own in owns if own.choice.loss > 0), key=lambda own: own.choice.loss)
        for owns in of_weights
    ]
    middle = {own[0].choice.path: own[len(own) // 2] for own in losing if own}
    found = lost({path: own.packed for path, own in middle.items()})
    factors = {path: found[path] / own.choice.loss for path, own in middle.items()}
    return [
        [
            own.choice._replace(loss=factors.get(own.choice.path, 1.0) * own.choice.loss)
            for own in owns
        ]
        for owns in of_weights
    ]


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
