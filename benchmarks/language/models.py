"""What the models have in common: pure functions of plain parameters, and what is measured."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model, texts to calibrate on, and texts to measure on, which are others.

    Attributes:
      model: in Flax NNX.
      batches: tokens [texts, positions] to calibrate on.
      columns: names of what is measured.
      measure: returns it for parameters.
      notes: what a reader has to know.
    """

    model: Any
    batches: list[jax.Array]
    columns: tuple[str, ...]
    measure: Callable[[Params], tuple[float, ...]]
    notes: str

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


def loaded(make: Callable[[nnx.Rngs], nnx.Module], weights: Mapping[str, np.ndarray]) -> Any:
    """Return a model whose parameters are weights by paths such as "layers/0/query/kernel".

    Raises:
      ValueError: if the paths or shapes are not those of the model's parameters.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shapes = flax.traverse_util.flatten_dict(nnx.to_pure_dict(state))
    expected = {_path(keys): leaf.shape for keys, leaf in shapes.items()}
    got = {path: array.shape for path, array in weights.items()}
    if expected != got:
        differing = sorted(expected.items() ^ got.items())[:4]
        raise ValueError(f"expected the model's weights, got some that differ: {differing}")
    arrays = {keys: jnp.asarray(weights[_path(keys)]) for keys in shapes}
    return nnx.merge(graph, nnx.State(flax.traverse_util.unflatten_dict(arrays)))


def kernels(params: Params) -> dict[str, jax.Array]:
    """Return the matrices of the blocks by path: all that is quantized."""
    flat = flax.traverse_util.flatten_dict(params)
    return {_path(keys): leaf for keys, leaf in flat.items() if keys[-1] == "kernel"}


def replaced(params: Params, new: Mapping[str, jax.Array]) -> Params:
    """Return parameters with some of them, by path, replaced."""
    flat = flax.traverse_util.flatten_dict(params)
    leaves = {keys: new.get(_path(keys), leaf) for keys, leaf in flat.items()}
    return flax.traverse_util.unflatten_dict(leaves)


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))
