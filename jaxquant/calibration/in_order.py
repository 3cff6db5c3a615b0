"""Layers that are quantized one after the other, each calibrated behind its quantized front."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxquant import checks
from jaxquant.calibration.calibrate import calibrate
from jaxquant.packing.function import PackedFunction
from jaxquant.rounds.quantize import init, quantize_round
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import Layer, LayerRule, Selection, left_alone
from jaxquant.rounds.state import QuantState
from jaxquant.trees import is_module


def quantize_in_order(
    plan: Plan,
    function: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    parts: int,
    **options: Any,
) -> tuple[Any, QuantState]:
    """Quantize a network in one round, part by part, each calibrated behind those before it.

    The weights are put into parts in the order in which the function uses them. Each part is
    calibrated on the network as it is then, and quantized by that: so it makes up for what its
    inputs have become ("GPTQ", Frantar et al., ICLR 2023, goes so layer by layer). Only the moments
    of a part are in memory at a time.

    Args:
      plan: of a single round, as `slq(params, rounds=(1,), ...)`.
      function: of the parameters and a batch, see `calibrate`.
      params: tree of weights; of NNX the state of a model that is split, which the function merges.
      batches: see `calibrate`; all of them are kept.
      parts: how many; at most as many as weights that are quantized, and then each is alone.
        Weights that the function uses in no product are in the last part.
      **options: of `calibrate`: outputs, sensitivity, guided, key.

    Returns:
      Params and state, as after the plan's round. Costs a calibration and a compile for each part;
      outside of jit only.

    Raises:
      ValueError: for a plan of several rounds, parts that are no such number, and as `calibrate`
        and `quantize_round` do.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> params = {name: jnp.sin(jnp.arange(64.0)).reshape(8, 8) for name in ("first", "second")}
    >>> plan = jq.slq(params, rounds=(1,), rules=[LayerRule(".*", k=4)])
    >>> function = lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"]
    >>> new, state = quantize_in_order(plan, function, params, [jnp.eye(8)], parts=2)
    >>> int(jnp.unique(new["second"]).size)
    4
    """
    if plan.num_rounds != 1 or plan.shares_of != "clusters":
        raise ValueError(f"expected a plan of one round of clusters, got {plan.num_rounds} rounds")
    selected, batches = plan.selection.selected, list(batches)
    parts = checks.integer("parts", parts, least=1, most=len(selected))
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    if is_module(params):
        raise ValueError("expected the state of a model that is split, got a module of NNX")
    state = init(plan, params)
    for layers in _parts(plan, function, params, batches[0], parts):
        paths = {layer.path for layer in layers}
        seen = calibrate(function, params, batches, rules=list(map(_rule, layers)), **options)
        own = _limited(plan, paths)
        params, new, _ = quantize_round(
            own, params, init(own, params), calibration=seen, key=options.get("key")
        )
        state = _joined(plan, state, new, paths)
    return params, state


def _parts(
    plan: Plan, function: Callable[..., Any], params: Any, batch: Any, parts: int
) -> list[list[Layer]]:
    """Return the layers in the order of their use, in parts of about equal number.

    Those that no product uses go with the last: alone they may have nothing to observe.
    """
    selected = plan.selection.by_depth()
    stacks = [layer.path for layer in selected if layer.stacks]
    used = list(PackedFunction(function).roles(params, batch, stacks=stacks))
    places = {path: place for place, path in enumerate(used)}
    seen = sorted(
        (layer for layer in selected if layer.path in places), key=lambda own: places[own.path]
    )
    parts = max(1, min(parts, len(seen)))
    bounds = [len(seen) * part // parts for part in range(parts + 1)]
    found = [seen[start:end] for start, end in itertools.pairwise(bounds)]
    found[-1].extend(layer for layer in selected if layer.path not in places)
    return found


def _rule(layer: Layer) -> LayerRule:
    """Return a rule that selects one layer, for calibration."""
    axis = 0 if layer.stacks else None
    return LayerRule(re.escape(layer.path), axis=axis, inputs=layer.inputs, min_ndim=0)


def _limited(plan: Plan, paths: set[str]) -> Plan:
    """Return a plan that leaves all other layers alone."""
    layers = tuple(
        layer if layer.path in paths else left_alone(layer, layer.reason or "in another part")
        for layer in plan.selection.layers
    )
    return dataclasses.replace(plan, selection=Selection(layers))


def _joined(plan: Plan, state: QuantState, new: QuantState, paths: set[str]) -> QuantState:
    """Return the state with that of some layers in its place."""
    chosen = [layer.path in paths for layer in plan.selection.layers]

    def join(old: Any, own: Any) -> Any:
        if own is None or old is None:
            return old
        leaves, structure = jax.tree.flatten(old)
        rows = zip(chosen, leaves, jax.tree.leaves(own), strict=True)
        return structure.unflatten([new if is_new else old for is_new, old, new in rows])

    return QuantState(
        codebooks=join(state.codebooks, new.codebooks),
        frozen=join(state.frozen, new.frozen),
        frozen_centroids=join(state.frozen_centroids, new.frozen_centroids),
        round=new.round,
        scales=join(state.scales, new.scales),
    )
