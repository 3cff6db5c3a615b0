"""Q-CNN on a Linen network: its layers one after the other, each corrected for those before it."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.ops.layers import zero_padding
from jaxquant.ops.reference import each_axis
from train.config import Quantize

_Path = tuple[str, ...]
_WINDOW = ("window", "window_strides", "padding", "kernel_dilation")


class LayerError(NamedTuple):
    """Squared errors of a layer's responses over their squares, on the calibration images."""

    before: float  # of k-means alone
    after: float  # corrected


class _Seen(NamedTuple):
    """What passes through a layer."""

    inputs: jax.Array
    responses: jax.Array  # before the bias


def quantize(
    model: nn.Module,
    variables: Any,
    batches: Sequence[jax.Array],
    settings: Quantize,
    *,
    key: jax.Array,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Any, dict[str, LayerError]]:
    """Quantize the kernels of a network by product quantization, from front to back.

    Each layer is clustered, then corrected: its inputs come from the front that is already
    quantized, what it should answer from the float network (Wu et al., CVPR 2016, section 3.3).
    Costs two forward passes a layer, and the sums of `jq.product.observe`.

    Args:
      model: of `nn.Dense` and `nn.Conv` layers.
      variables: {"params": ..., "batch_stats": ...} of the float network.
      batches: normalized images, unlabelled.
      settings: words, length, sweeps; its rules say which kernels.
      key: typed key.
      tell: is told a line for each layer.

    Returns:
      The parameters with ProductArrays in place of the kernels, and the errors by path.

    Raises:
      ValueError: as `check`.
    """
    layers = check(model, variables, batches[0], settings)
    run = jax.jit(functools.partial(_responses, model))
    add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
    params = packed = variables["params"]
    errors, shape = {}, None
    for number, (path, options) in enumerate(layers.items()):
        kernel = _kernel(params, path)
        if kernel.shape != shape:  # those of a shape mostly stand together
            shape, (cluster, observe, correct) = kernel.shape, _programs()
        responses = (
            observe(
                run({**variables, "params": params}, images)[path].inputs,
                run(variables, images)[path].responses,
                **options,
            )
            for images in batches
        )
        # One after the other and in place: of a wide layer the sums take gigabytes.
        total = functools.reduce(add, responses)
        array = cluster(
            kernel,
            words=settings.words,
            length=piece(kernel.shape[-2], settings.length),
            key=jax.random.fold_in(key, number),
        )
        array, history = correct(array, total, sweeps=settings.sweeps)
        packed = _with_kernel(packed, path, array)
        params = _with_kernel(params, path, jq.unpack(array))
        name = "/".join((*path, "kernel"))
        errors[name] = LayerError(float(history[0]), float(history[-1]))
        tell(f"{name}: response error {errors[name].before:.2%} -> {errors[name].after:.2%}")
    return packed, errors


def _programs() -> tuple[Callable[..., Any], ...]:
    """Return `cluster`, `observe` and `correct`, compiled, for as long as they are held.

    Programs for all shapes of a deep network at once can take more memory maps than Linux gives a
    process (65,530), which then dies compiling. A partial is a function of its own to `jax.jit`.
    """
    product = jq.product
    return (
        jax.jit(functools.partial(product.cluster), static_argnames=("words", "length")),
        jax.jit(functools.partial(product.observe), static_argnames=_WINDOW),
        jax.jit(functools.partial(product.correct), static_argnames="sweeps"),
    )


def equal_parts(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """Return rows in parts of equal size, at most so many in each; a few at the end may sit out."""
    count = -(-len(rows) // most)
    return list(rows[: len(rows) // count * count].reshape(count, -1))


def piece(channels: int, length: int) -> int:
    """Return the channels of a subspace: the largest divisor of the channels up to a length."""
    return max(n for n in range(1, min(channels, length) + 1) if channels % n == 0)


def check(
    model: nn.Module, variables: Any, images: Any, settings: Quantize
) -> dict[_Path, dict[str, Any]]:
    """Return the layers to quantize, in the order in which they run, and how their windows move.

    Args:
      model, variables, settings: as of `quantize`; shapes serve.
      images: [batch, height, width, channels], or a shape.

    Raises:
      ValueError: for a selected leaf that is not the kernel of a plain `nn.Dense` or `nn.Conv`, or
        of one that runs twice; names it.
    """
    selection = jq.select(variables["params"], settings.rules, k=1)
    wanted = {layer.path for layer in selection.selected}
    found: dict[_Path, dict[str, Any]] = {}

    def note(path: _Path, module: nn.Module, *_: Any) -> None:
        name = "/".join((*path, "kernel"))
        if name in wanted:
            if path in found:
                raise ValueError(f"{name}: expected a layer that runs once in a pass")
            found[path] = _window(name, module)

    jax.eval_shape(functools.partial(_pass, model, note), variables, images)
    missing = sorted(wanted - {"/".join((*path, "kernel")) for path in found})
    if missing:
        raise ValueError(
            f"{missing[0]}: expected the kernel of an nn.Dense or nn.Conv; leave it alone by a rule"
        )
    return found


def _window(name: str, module: nn.Module) -> dict[str, Any]:
    """Return the options of `jq.product.observe`."""
    if isinstance(module, nn.Dense):
        return {}
    assert isinstance(module, nn.Conv)
    if module.feature_group_count != 1:
        raise ValueError(f"{name}: expected no groups of channels")
    window = tuple(cast(Sequence[int], module.kernel_size))
    return {
        "window": window,
        "window_strides": each_axis(module.strides or 1, len(window)),
        "padding": zero_padding(module),
        "kernel_dilation": each_axis(module.kernel_dilation or 1, len(window)),
    }


def _responses(model: nn.Module, variables: Any, images: jax.Array) -> dict[_Path, _Seen]:
    """Return what passes through each layer, from a forward pass."""
    seen: dict[_Path, _Seen] = {}

    def note(path: _Path, module: Any, inputs: jax.Array, outputs: jax.Array) -> None:
        bias = module.variables["params"]["bias"] if module.use_bias else 0.0
        seen[path] = _Seen(inputs, outputs - bias)

    _pass(model, note, variables, images)
    return seen


def _pass(
    model: nn.Module, note: Callable[..., None], variables: Any, images: jax.Array
) -> jax.Array:
    """Run a forward pass; `note` is told of each dense and convolution layer as it runs."""

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Dense | nn.Conv):
            note(tuple(module.path), module, args[0], outputs)
        return outputs

    with nn.intercept_methods(intercept):
        logits: Any = model.apply(variables, images, train=False)
    return logits


def _kernel(params: Any, path: Iterable[str]) -> jax.Array:
    return functools.reduce(lambda node, name: node[name], (*path, "kernel"), params)


def _with_kernel(params: Any, path: Sequence[str], kernel: Any) -> Any:
    """Return the tree with another kernel at the module's path; the old one stays as it is."""
    if not path:
        return {**params, "kernel": kernel}
    return {**params, path[0]: _with_kernel(params[path[0]], path[1:], kernel)}
