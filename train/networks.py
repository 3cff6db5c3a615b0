"""Networks of any make as functions of their variables: Flax Linen and NNX, ours and yours."""

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var

import jaxquant as jq
from jaxquant.trees import leaves_with_paths, pure, replaced
from train import models
from train.gradients import in_parts
from train.named import call, guarded, name_of, resolve

_COLLECTIONS = ("params", "batch_stats")


class Answers(NamedTuple):
    """What a network says of a batch."""

    logits: jax.Array  # [N, ..., num_classes]
    features: list[jax.Array]  # from front to back; may be none


class Network(NamedTuple):
    """A network as functions of {"params": ..., "batch_stats": ...}, nested dictionaries of arrays.

    `batch_stats` holds moving averages that training renews; it may be absent.
    """

    init: Callable[[jax.Array, jax.Array], Any]  # key, inputs -> variables
    # variables, inputs, the key of a training step or None -> the answers, new batch_stats
    apply: Callable[[Any, jax.Array, jax.Array | None], tuple[Answers, Any]]
    rules: tuple[jq.LayerRule, ...] | None = None  # all kernels by depth; None: names sort by it
    unused: str | None = None  # tensors of published files that it does without
    module: nn.Module | None = None  # of Linen, where it is


def build(
    model: str | Callable[..., Any],
    *,
    num_classes: int,
    image: jax.ShapeDtypeStruct,
    classifies: bool = True,
) -> Network:
    """Return the network that a config's `model` names or gives; nothing is put on a device.

    Args:
      model: one of `train.models.NAMES`, a class or a function that returns a module of Flax Linen
        or NNX, or "package.module:name" of one. Of `num_classes`, `image_shape` (height, width,
        channels) and `rngs` (`nnx.Rngs`) it is given those that it takes by name. The module is
        called with images [N, H, W, C] and, if it takes that by name, `train`; it returns logits
        [N, num_classes].
      num_classes: of the dataset; 0, and not offered, where there are none.
      image: shape and dtype of inputs, [N, H, W, C].
      classifies: whether logits of classes are wanted; where they are not, a task of your own says
        what is, and checks it.

    Raises:
      ValueError: for a model that cannot be built, or does not map images to logits.
    """
    if isinstance(model, str) and ":" not in model:
        if model not in models.NAMES:
            raise ValueError(
                f"model: expected one of {', '.join(models.NAMES)}, or package.module:name of your "
                f"own, got {model!r}"
            )
        if not num_classes:
            return _none_of(model)
        network = linen(models.build(model, num_classes=num_classes))
        return network._replace(
            rules=models.depth_rules(model), unused=models.unused_tensors(model)
        )
    network = _own(model, num_classes, image.shape[1:])
    if not classifies:
        return network
    _check(network, name_of(model), num_classes, image)
    return network._replace(rules=by_use(network.init, network.apply, image))


def _none_of(model: str) -> Network:
    """Return a network that cannot be used, for tasks that do without."""

    def refuse(*args: Any) -> Any:
        raise ValueError(
            f"expected model to be package.module:name of your own, {model} names classes, of "
            "which these data have none"
        )

    return Network(refuse, refuse)


def _own(model: str | Callable[..., Any], num_classes: int, image_shape: tuple) -> Network:
    if isinstance(model, nn.Module | nnx.Module):
        raise ValueError(
            f"model: expected a class or a function that returns a module, got a module of "
            f"{name_of(type(model))}"
        )
    make = resolve("model", model)

    def made(key: jax.Array) -> Any:
        offered = {"image_shape": image_shape, "rngs": nnx.Rngs(key)}
        if num_classes:
            offered = {"num_classes": num_classes, **offered}
        return call("model", make, **offered)

    kinds = []
    # Abstract: what a module of NNX makes of its keys are its parameters.
    jax.eval_shape(lambda key: kinds.append(type(made(key))), jax.random.key(0))
    if issubclass(kinds[0], nnx.Module):
        return flax_nnx(made)
    if issubclass(kinds[0], nn.Module):
        return linen(made(jax.random.key(0)))
    raise ValueError(
        f"model: expected {name_of(model)} to give a module of Flax Linen or NNX, got "
        f"{name_of(kinds[0])}"
    )


def linen(module: nn.Module) -> Network:
    """Return a module of Flax Linen as a network; its features are sown as "intermediates"."""
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def mode(train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train else {}

    def init(key: jax.Array, inputs: jax.Array) -> Any:
        variables = module.init(key, inputs, **mode(False))
        return {name: x for name, x in variables.items() if name != "intermediates"}

    def apply(variables: Any, inputs: jax.Array, key: jax.Array | None) -> tuple[Answers, Any]:
        train = key is not None
        mutable = ["batch_stats", "intermediates"] if train else ["intermediates"]
        # Not 0 or 1: folding these in gives the keys that augmentation splits off.
        rngs = {"dropout": jax.random.fold_in(key, 2)} if train else None
        with nn.intercept_methods(in_parts) if train else contextlib.nullcontext():
            logits, new = module.apply(variables, inputs, mutable=mutable, rngs=rngs, **mode(train))
        features = jax.tree.leaves(new.get("intermediates", {}))
        return Answers(logits, features), new.get("batch_stats", {})

    return Network(init, apply, module=module)


def flax_nnx(make: Callable[[jax.Array], nnx.Module]) -> Network:
    """Return what gives modules of Flax NNX, by a key, as a network.

    It is trained after `model.train()` and measured after `model.eval()`. Features are sown as
    `nnx.Intermediate`; random streams, as of dropout, start anew from the key of each step.
    """
    abstract = nnx.eval_shape(make, jax.random.key(0))
    graphs = {}
    for train in (True, False):
        abstract.train() if train else abstract.eval()
        graphs[train], params, stats, streams, others = nnx.split(
            abstract, nnx.Param, nnx.BatchStat, nnx.RngState, ...
        )
    if others:
        path, variable = next(iter(nnx.to_flat_state(others)))
        raise ValueError(
            f"model: {'/'.join(map(str, path))}: expected variables of nnx.Param, nnx.BatchStat "
            f"and random streams, got {type(variable).__name__}"
        )

    def init(key: jax.Array, inputs: jax.Array) -> Any:
        del inputs
        _, params, stats, _ = nnx.split(make(key), nnx.Param, nnx.BatchStat, ...)
        return {"params": pure(params), "batch_stats": pure(stats)}

    def apply(variables: Any, inputs: jax.Array, key: jax.Array | None) -> tuple[Answers, Any]:
        train = key is not None
        key = jax.random.fold_in(jax.random.key(0) if key is None else key, 2)
        rest = [_begun(stream, key, i) for i, stream in enumerate(jax.tree.leaves(streams))]
        module = nnx.merge(
            graphs[train],
            replaced(params, variables["params"]),
            replaced(stats, variables.get("batch_stats", {})),
            jax.tree.unflatten(jax.tree.structure(streams), rest),
            copy=True,
        )
        run: Any = nnx.capture(module, nnx.Intermediate)
        logits, sown = run(inputs)
        return Answers(logits, jax.tree.leaves(sown)), pure(nnx.state(module, nnx.BatchStat))

    return Network(init, apply)


def _begun(stream: Any, key: jax.Array, number: int) -> jax.Array:
    """Return a key of its own for each random stream, and 0 for the count beside it."""
    if jnp.issubdtype(stream.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(key, number)
    return jnp.zeros(stream.shape, stream.dtype)


def _check(network: Network, name: str, num_classes: int, image: jax.ShapeDtypeStruct) -> None:
    """Raise a ValueError for a network that the program could not train."""
    images = jax.ShapeDtypeStruct((2, *image.shape[1:]), image.dtype)
    key = jax.random.key(0)
    variables = guarded("model", name, lambda: jax.eval_shape(network.init, key, images))
    check_variables("model", name, variables)
    for of_step in (None, key):
        answers, stats = guarded(
            "model", name, lambda k=of_step: jax.eval_shape(network.apply, variables, images, k)
        )
        shape = getattr(answers.logits, "shape", None)
        if shape != (2, num_classes):
            raise ValueError(
                f"model: {name}: expected logits of shape {(2, num_classes)} for images "
                f"{images.shape}, got {type(answers.logits).__name__ if shape is None else shape}"
            )
    before = variables.get("batch_stats", {})
    if jax.tree.structure(stats) != jax.tree.structure(before):
        raise ValueError(f"model: {name}: expected training to renew the batch_stats of its start")


def check_variables(field: str, name: str, variables: Any) -> None:
    """Raise a ValueError for variables, or their shapes, that the program could not train."""
    there = variables if isinstance(variables, dict) else {}
    others = [collection for collection in there if collection not in _COLLECTIONS]
    if others or not jax.tree.leaves(there.get("params", {})):
        raise ValueError(
            f"{field}: {name}: expected variables in {' and '.join(_COLLECTIONS)}, got "
            f"{', '.join(there) or 'none'}"
        )
    for path, leaf in leaves_with_paths(variables):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{field}: {name}: {path}: expected floating point, got {leaf.dtype}")


def by_use(
    init: Callable[..., Any], apply: Callable[..., Any], inputs: jax.ShapeDtypeStruct
) -> tuple[jq.LayerRule, ...]:
    """Return rules for what is quantized by default, deeper the later a pass comes to it.

    `init` and `apply` are as those of a Network.
    """
    variables = jax.eval_shape(init, jax.random.key(0), inputs)
    params = variables["params"]

    def logits(params: Any, rest: Any, inputs: Any) -> jax.Array:
        return apply({**rest, "params": params}, inputs, None)[0].logits

    jaxpr = jax.make_jaxpr(logits)(params, variables, inputs).jaxpr
    first: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for variable in equation.invars:
            if isinstance(variable, Var):
                first.setdefault(variable, number)
    places = [first.get(variable, len(jaxpr.eqns)) for variable in jaxpr.invars]
    depth = dict(zip((path for path, _ in leaves_with_paths(params)), places, strict=False))
    return tuple(
        jq.LayerRule(re.escape(layer.path), depth=depth[layer.path])
        for layer in jq.select(params).selected
    )
