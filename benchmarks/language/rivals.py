"""Rows of qwix (`pip install qwix==0.1.8`): int3, int4, NF4 and GPTQ, with its own calls.

What it makes is packed as this library packs: its values are a codebook, times its scales, which
are rounded to bfloat16 as this library's are. So bits and bytes are counted alike, and the same
float function is measured.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from benchmarks.bits import NF4, WHOLE, fitting
from benchmarks.language import models
from benchmarks.language.settings import Quantize

VALUES = {"int3": np.arange(-4, 4), "int4": np.arange(-8, 8), "nf4": NF4}
_TYPES = {"int4": jnp.int4}  # others by their names
_SIZES = {"a scale a channel": WHOLE} | {f"groups of {size}": size for size in (128, 64, 32)}


def rivals() -> dict[str, Quantize]:
    """Return the rows of qwix by name; none where it is not installed."""
    if not _is_installed():
        return {}
    rows = {}
    for kind in ("int4", "nf4", "int3"):
        for name, size in _SIZES.items():
            rows[f"qwix {kind}, {name}"] = functools.partial(rounded, kind=kind, size=size)
    for name, size in _SIZES.items():  # its GPTQ takes types of JAX only
        rows[f"qwix GPTQ int4, {name}"] = functools.partial(compensated, kind="int4", size=size)
    return rows


def runs(task: models.Task) -> dict[str, Callable[[], tuple[Any, Any, int]]]:
    """Return by name what makes qwix's model: a function of its state and a batch, and the state.

    The third result is the bytes of its kernels. None where qwix is not installed.
    """

    def made(kind: str, size: int) -> tuple[Any, Any, int]:
        graph, state = nnx.split(_post_training(task, kind, size))
        leaves = models.by_path(nnx.to_pure_dict(state))
        own = sum(leaf.nbytes for path, leaf in leaves.items() if "/kernel/" in path)
        return lambda state, batch: nnx.merge(graph, state)(batch), state, own

    return {
        f"qwix {kind}, {name}": functools.partial(made, kind, size)
        for kind in ("int4", "nf4")
        for name, size in _SIZES.items()
        if _is_installed() and size in (WHOLE, 64)
    }


def rounded(task: models.Task, kind: str, size: int) -> dict[str, jq.PackedArray]:
    """Return kernels rounded to the nearest value by `PtqProvider`."""
    return packed(nnx.to_pure_dict(nnx.state(_post_training(task, kind, size))), kind)


def compensated(task: models.Task, kind: str, size: int) -> dict[str, jq.PackedArray]:
    """Return kernels rounded by GPTQ, calibrated on the task's batches."""
    from qwix.contrib import gptq  # pyright: ignore[reportMissingImports]

    plain = _post_training(task, kind, size)
    rules = _rules(gptq.GptqRule, task, kind, size)
    model = _prepared(task, gptq.GptqCalibrationProvider(rules))

    @nnx.jit
    def observe(model: Any, batch: Any) -> None:
        model(batch)  # which adds to its statistics

    for batch in task.batches:
        observe(model, batch)
    variable = nnx.variable_type_from_name("quant_stats")
    statistics = nnx.to_pure_dict(nnx.state(model, variable))
    return packed(gptq.quantize_params(task.params, plain, statistics), kind)


def _is_installed() -> bool:
    return importlib.util.find_spec("qwix") is not None


def _post_training(task: models.Task, kind: str, size: int) -> Any:
    import qwix  # pyright: ignore[reportMissingImports]

    return _prepared(task, qwix.PtqProvider(_rules(qwix.QuantizationRule, task, kind, size)))


def _prepared(task: models.Task, provider: Any) -> Any:
    import qwix  # pyright: ignore[reportMissingImports]

    return qwix.quantize_model(task.model, provider, task.batches[0][:1, :8])


def _rules(make: Any, task: models.Task, kind: str, size: int) -> list[Any]:
    """Return a rule for each kernel, whose groups have a size that divides it."""
    rules = []
    for path, kernel in models.kernels(task.params).items():
        tile = None if size == WHOLE else fitting(kernel.shape[0], size)
        module = path.removesuffix("/kernel")
        rules.append(make(module_path=module, weight_qtype=_TYPES.get(kind, kind), tile_size=tile))
    return rules


def packed(tree: models.Params, kind: str) -> dict[str, jq.PackedArray]:
    """Return kernels as this library packs them.

    Args:
      tree: parameters as qwix quantizes them, in nested dictionaries.
      kind: a key of `VALUES`, of which the codes are places (nf4) or which they are themselves.
    """
    flat = models.by_path(tree)
    values = jnp.asarray(VALUES[kind], jnp.float32)
    kernels = {}
    for path, codes in flat.items():
        if path.endswith("/array/qvalue"):
            scale = flat[path.replace("qvalue", "scale")].astype(jnp.bfloat16)
            own = codes.astype(jnp.float32) if kind != "nf4" else values[codes.astype(jnp.int32)]
            groups = own.reshape(len(scale), -1, own.shape[1])
            weights = (groups * scale[:, None].astype(jnp.float32)).reshape(own.shape)
            name = path.removesuffix("/array/qvalue")
            kernels[name] = jq.pack_array(weights, values[None, None], scale[..., None])
    return kernels
