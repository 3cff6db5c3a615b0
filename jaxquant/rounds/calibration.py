"""What calibration tells a round of quantization about the weights."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.meshes import compiled
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import Layer
from jaxquant.trees import pure

_DAMPING = 1.0  # of the mean sensitivity of a layer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("sensitivity", "moments"),
    meta_fields=("guided", "input_axes"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `jaxquant.calibrate` found; a pytree, for `quantize_round` and `incremental`.

    Attributes:
      sensitivity: tree like the parameters, float32, how much a squared change of each weight
        matters; scalar zeros where nothing is quantized. None if it was not asked for.
      moments: of what a weight is multiplied with, by path: [D, D] float32; [G, D, D] where groups
        of outputs have their own; of stacked layers with an axis of layers before.
      guided: whether vectors count in the moments as much as they matter.
      input_axes: how many axes products with a weight sum over, by path, as pairs.
    """

    sensitivity: Any
    moments: dict[str, jax.Array]
    guided: bool = False
    input_axes: tuple[tuple[str, int], ...] = ()

    @property
    def inputs(self) -> dict[str, int]:
        """How many axes products with a weight sum over, by path: for `pack(..., inputs=...)`."""
        return dict(self.input_axes)


def guided_by(
    plan: Plan,
    calibration: Calibration | None,
    sensitivity: Any,
    moments: Mapping[str, jax.Array] | None,
) -> tuple[Plan, Any, dict[str, jax.Array]]:
    """Return a plan whose layers know their inputs, and the sensitivity and the moments of a round.

    The mean of a layer's sensitivities is added to each of them: weights that matter little alone
    still do together, and clusters that go by a few weights of large sensitivity lose the others.

    Raises:
      ValueError: if calibration and one of the others are given, and for a layer whose rule tells
        other inputs than those that calibration has moments of; names it.
    """
    if calibration is None:
        return plan, sensitivity, dict(moments or {})
    if sensitivity is not None or moments is not None:
        raise ValueError("expected calibration, or sensitivity and moments, got both")
    if not isinstance(calibration, Calibration):
        raise ValueError(
            f"expected a Calibration from jq.calibrate, got a {type(calibration).__name__}"
        )
    inputs = calibration.inputs

    def told(layer: Layer) -> Layer:
        found = inputs.get(layer.path)
        if layer.inputs is None:
            return dataclasses.replace(layer, inputs=found)
        is_known = layer.reason is None and found is not None
        if is_known and layer.axes_of(found) != layer.input_axes:
            raise ValueError(
                f"{layer.path}: its rule says inputs={layer.inputs}, and calibration has moments "
                f"of others: expected inputs={found}"
            )
        return layer

    selection = dataclasses.replace(plan.selection, layers=tuple(map(told, plan.selection.layers)))
    selected = {layer.path for layer in selection.selected}
    own = {path: x for path, x in calibration.moments.items() if path in selected}
    plan = dataclasses.replace(plan, selection=selection)
    sensitivity = pure(calibration.sensitivity, only_parameters=True)
    if sensitivity is not None:
        leaves, structure = jax.tree.flatten(sensitivity)
        shapes = tuple(layer.shape if layer.reason is None else () for layer in selection.layers)
        if len(leaves) == len(shapes):  # else it is refused where it is read
            sensitivity = structure.unflatten(compiled(_damped, leaves, shapes=shapes))
    return plan, sensitivity, own if plan.shares_of == "clusters" else {}


def _damped(leaves: list[jax.Array], *, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """Return sensitivities; weights of a layer that calibration has not seen count alike."""

    def damped(own: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if not own.ndim:
            return jnp.ones(shape, jnp.float32)
        mean = jnp.mean(own)
        return jnp.where(mean > 0, own + _DAMPING * mean, 1.0)

    return list(map(damped, leaves, shapes))
