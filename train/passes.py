"""What runs in a forward pass of a Linen network: its dense and convolution layers."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax

from jaxquant.packing.ops.windows import each_axis

Path = tuple[str, ...]  # of a module


def run(
    model: nn.Module, note: Callable[..., None], variables: Any, images: jax.Array
) -> jax.Array:
    """Return the logits; `note` is told of each dense and convolution layer as it runs.

    Args:
      model: the network.
      note: called with the layer's path, the module, its inputs and its outputs.
      variables: of the network.
      images: normalized, [batch, height, width, channels].
    """

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Dense | nn.Conv):
            note(tuple(module.path), module, args[0], outputs)
        return outputs

    with nn.intercept_methods(intercept):
        logits: Any = model.apply(variables, images, train=False)
    return logits


def kernel_name(path: Path) -> str:
    """Return the path of a module's kernel as the plan writes it."""
    return "/".join((*path, "kernel"))


def find(
    model: nn.Module, variables: Any, images: Any, wanted: Iterable[str]
) -> dict[Path, dict[str, Any]]:
    """Return layers in the order in which they run, and how their windows move.

    Args:
      model: the network.
      variables, images: as of `run`; shapes serve.
      wanted: paths of kernels.

    Returns:
      The options of `jq.product.observe` by the path of the module.

    Raises:
      ValueError: for a wanted leaf that is not the kernel of a plain `nn.Dense` or `nn.Conv`, or
        of one that runs twice; names it.
    """
    wanted = set(wanted)
    found: dict[Path, dict[str, Any]] = {}

    def note(path: Path, module: nn.Module, *_: Any) -> None:
        name = kernel_name(path)
        if name in wanted:
            if path in found:
                raise ValueError(f"{name}: expected a layer that runs once in a pass")
            found[path] = _window(name, module)

    jax.eval_shape(functools.partial(run, model, note), variables, images)
    missing = sorted(wanted - {kernel_name(path) for path in found})
    if missing:
        raise ValueError(
            f"{missing[0]}: expected the kernel of an nn.Dense or nn.Conv; leave it alone by a rule"
        )
    return found


def _window(name: str, module: nn.Module) -> dict[str, Any]:
    if isinstance(module, nn.Dense):
        return {}
    assert isinstance(module, nn.Conv)
    if module.feature_group_count != 1:
        raise ValueError(f"{name}: expected no groups of channels")
    window = tuple(cast(Sequence[int], module.kernel_size))
    return {
        "window": window,
        "window_strides": each_axis(module.strides or 1, len(window)),
        "padding": _zero_padding(name, module),
        "kernel_dilation": each_axis(module.kernel_dilation or 1, len(window)),
    }


def _zero_padding(name: str, module: nn.Conv) -> str | tuple[tuple[int, int], ...]:
    """Return the padding of an `nn.Conv` as `jq.conv` takes it."""
    padding = module.padding
    if module.mask is not None or padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
        raise ValueError(f"{name}: expected no mask, and padding of zeros, got {padding}")
    if isinstance(padding, int):
        return ((padding, padding),) * len(tuple(cast(Sequence[int], module.kernel_size)))
    if isinstance(padding, str):
        return padding
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)
