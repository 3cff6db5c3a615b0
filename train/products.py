"""Q-CNN on a Linen network: its layers one after the other, each corrected for those before it."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from train import passes
from train.config import Quantize
from train.passes import Path

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
        name = passes.kernel_name(path)
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
) -> dict[Path, dict[str, Any]]:
    """Return the layers to quantize, in the order in which they run, and how their windows move.

    Args:
      model, variables, settings: as of `quantize`; shapes serve.
      images: [batch, height, width, channels], or a shape.

    Raises:
      ValueError: as `train.passes.find`.
    """
    selection = jq.select(variables["params"], settings.rules, k=1)
    return passes.find(model, variables, images, [layer.path for layer in selection.selected])


def _responses(model: nn.Module, variables: Any, images: jax.Array) -> dict[Path, _Seen]:
    """Return what passes through each layer, from a forward pass."""
    seen: dict[Path, _Seen] = {}

    def note(path: Path, module: Any, inputs: jax.Array, outputs: jax.Array) -> None:
        bias = module.variables["params"]["bias"] if module.use_bias else 0.0
        seen[path] = _Seen(inputs, outputs - bias)

    passes.run(model, note, variables, images)
    return seen


def _kernel(params: Any, path: Iterable[str]) -> jax.Array:
    return functools.reduce(lambda node, name: node[name], (*path, "kernel"), params)


def _with_kernel(params: Any, path: Sequence[str], kernel: Any) -> Any:
    """Return the tree with another kernel at the module's path; the old one stays as it is."""
    if not path:
        return {**params, "kernel": kernel}
    return {**params, path[0]: _with_kernel(params[path[0]], path[1:], kernel)}
