"""What a function answers: its outputs as numbers, and what they lose if a weight changes."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.meshes import compiled
from jaxquant.packing.arrays import PackedArray, unpack_array
from jaxquant.packing.function import Call, call_of, leaves_as_given

OUTPUTS = ("normal", "categorical")


def answers_of(results: Any, outputs: str) -> tuple[list[jax.Array], int]:
    """Return the floating point arrays of what a function returned, and of how many examples.

    Raises:
      ValueError: for none, for scalars, and for arrays of no or of different numbers of examples.
    """
    leaves = [
        x for x in jax.tree.leaves(results) if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]
    if not leaves:
        raise ValueError("expected a function that returns floating point numbers, got none")
    if outputs == "categorical" and not all(map(jnp.ndim, leaves)):
        raise ValueError("expected logits [..., classes] of a categorical, got a scalar")
    if not all(map(jnp.ndim, leaves)):
        raise ValueError("expected outputs with an entry for each example, got a scalar")
    ends = -1 if outputs == "categorical" else 1
    numbers = {math.prod(jnp.shape(x)[:ends]) for x in leaves}
    if len(numbers) > 1 or not min(numbers):
        raise ValueError(
            f"expected outputs of the same number of examples, at least one, got {sorted(numbers)}"
        )
    return [jnp.asarray(x, jnp.float32) for x in leaves], min(numbers)


def lost_alone(
    function: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    weights: Mapping[str, PackedArray],
    outputs: str,
) -> dict[str, float]:
    """Return what the answers lose in the mean if one weight alone is replaced, for each of some.

    Args:
      function: of the parameters and a batch.
      params: tree of weights, in the form that the function takes.
      batches: second arguments of calls.
      weights: by path, what takes their place.
      outputs: "normal" for the squared change of an example, "categorical" for twice the divergence
        in nats of a prediction: what calibration's second order stands for.

    Raises:
      ValueError: for answers that are not finite; names the weight.
    """
    lost, examples = dict.fromkeys(weights, 0.0), 0
    for batch in batches:
        call, arrays = call_of((params, batch))
        static = {"function": function, "call": call, "outputs": outputs}
        expected = compiled(_answers, arrays, **static)
        examples += answers_of(expected, outputs)[1]
        paths = [path for path, x in leaves_as_given((params, batch)) if hasattr(x, "shape")]
        for path, packed in weights.items():
            place, new = paths.index(f"0/{path}"), list(arrays)
            new[place] = unpack_array(packed).astype(arrays[place].dtype)
            lost[path] += float(compiled(_lost, new, expected, **static))
    bad = next((path for path, own in lost.items() if not np.isfinite(own)), None)
    if bad is not None:
        raise ValueError(f"{bad}: expected finite answers if it is quantized, got {lost[bad]}")
    return {path: own / examples for path, own in lost.items()}


def _answers(
    arrays: list[Any], *, function: Callable[..., Any], call: Call, outputs: str
) -> list[jax.Array]:
    return answers_of(function(*call.arguments(arrays)), outputs)[0]


def _lost(arrays: list[Any], expected: list[jax.Array], **static: Any) -> jax.Array:
    """Return the sum over examples."""
    lost = jnp.float32(0)
    for own, wanted in zip(_answers(arrays, **static), expected, strict=True):
        if static["outputs"] == "categorical":
            shares = jax.nn.softmax(wanted)
            change = jax.nn.log_softmax(own) - jax.nn.log_softmax(wanted)
            # The divergence, as a sum of what is never negative: of small ones digits are left.
            lost += 2 * jnp.sum(shares * (jnp.expm1(change) - change))
        else:
            lost += jnp.sum(jnp.square(own - wanted))
    return lost
