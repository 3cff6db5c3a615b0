"""What the models have in common: pure functions of plain parameters, and what is measured."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A model, texts to calibrate on, and texts to measure on, which are others.

    Attributes:
      model: in Flax NNX.
      batches: tokens [texts, positions] to calibrate on.
      outputs: what the model's outputs are, as in `jq.calibrate`.
      columns: names of what is measured.
      measure: returns it for parameters.
      notes: what a reader has to know.
      training: tokens [texts, positions] to train on, batch by batch.
      distance: of a student's parameters from a teacher's on a batch, which training lowers.
      alone: batches that tell what each kernel loses alone, before bits are allocated.
    """

    model: Any
    batches: list[jax.Array]
    outputs: str
    columns: tuple[str, ...]
    measure: Callable[[Params], tuple[float, ...]]
    notes: str
    training: list[jax.Array]
    distance: Callable[[Params, Params, jax.Array], jax.Array]
    alone: int = 4

    @property
    def function(self) -> Callable[[Params, jax.Array], jax.Array]:
        """A pure function of parameters and a batch, which calls the model."""
        return function(self.model)

    @property
    def params(self) -> Params:
        """The model's parameters, a nested dictionary."""
        return nnx.to_pure_dict(nnx.state(self.model))


def function(model: Any) -> Callable[[Params, jax.Array], jax.Array]:
    """Return a pure function of parameters and a batch, which calls the model."""
    graph = nnx.graphdef(model)

    def call(params: Params, batch: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params))(batch)

    return call


def divergence(function: Callable[[Params, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Return a `Task.distance`, the mean divergence of predictions."""

    def distance(student: Params, teacher: Params, batch: jax.Array) -> jax.Array:
        ours, theirs = (jax.nn.log_softmax(function(x, batch)) for x in (student, teacher))
        return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))

    return distance


def loaded(make: Callable[[nnx.Rngs], nnx.Module], weights: Mapping[str, np.ndarray]) -> Any:
    """Return a model whose parameters are weights by paths such as "layers/0/query/kernel".

    Raises:
      ValueError: if the paths or shapes are not those of the model's parameters.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    expected = {path: leaf.shape for path, leaf in by_path(shapes).items()}
    got = {path: array.shape for path, array in weights.items()}
    if expected != got:
        differing = sorted(expected.items() ^ got.items())[:4]
        raise ValueError(f"expected the model's weights, got some that differ: {differing}")
    arrays = {path: jnp.asarray(array) for path, array in weights.items()}
    return nnx.merge(graph, nnx.State(replaced(shapes, arrays)))


def by_path(tree: Params) -> dict[str, Any]:
    """Return the leaves of nested dictionaries by paths such as "layers/0/query/kernel"."""
    flat = traverse_util.flatten_dict(tree)
    return {"/".join(map(str, keys)): leaf for keys, leaf in flat.items()}


def kernels(params: Params) -> dict[str, Any]:
    """Return the matrices of the blocks by path: all that is quantized."""
    leaves = by_path(params)
    return {path: leaf for path, leaf in leaves.items() if path.endswith("/kernel")}


def replaced(params: Params, new: Mapping[str, Any]) -> Params:
    """Return parameters with some of them, by path, replaced."""
    flat = traverse_util.flatten_dict(params)
    leaves = [new.get(path, leaf) for path, leaf in by_path(params).items()]
    return traverse_util.unflatten_dict(dict(zip(flat, leaves, strict=True)))
