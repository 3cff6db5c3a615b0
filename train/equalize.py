"""Equal scales for the channels of a convolution, so that one codebook fits all of them.

Batch normalization takes the scale of a channel out again: multiplying the weights of an output
channel by s, and its statistics with them, leaves the network the function that it is, and costs no
bytes. The idea of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (ICCV 2019), with batch normalization in place of the next layer.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from train.models import BN_EPSILON


def equalize(params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """Give the output channels of every convolution before a batch norm the same RMS weight.

    A convolution `convX` belongs to the batch norm `bnX` beside it, as in all networks of
    `train.models`. The RMS of the layer stays; channels without weights stay as they are.

    Args:
      params: of the network, kernels [..., in, out].
      batch_stats: its running statistics; without any, nothing is done.

    Returns:
      New params and batch_stats: of the same function, up to rounding.
    """
    if not isinstance(params, Mapping):
        return params, batch_stats
    params, batch_stats = dict(params), dict(batch_stats)
    for name in sorted(batch_stats):
        conv = f"conv{name.removeprefix('bn')}"
        if name.startswith("bn") and conv in params:
            params[conv], params[name], batch_stats[name] = _equalize(
                params[conv], params[name], batch_stats[name]
            )
        elif not name.startswith("bn"):
            params[name], batch_stats[name] = equalize(params[name], batch_stats[name])
    return params, batch_stats


def _equalize(conv: Any, norm: Any, stats: Any) -> tuple[Any, Any, Any]:
    kernel, mean, var = conv["kernel"], stats["mean"], stats["var"]
    squares = jnp.square(kernel)
    rms = jnp.sqrt(jnp.mean(squares, axis=tuple(range(kernel.ndim - 1))))
    scale = jnp.where(rms > 0, jnp.sqrt(jnp.mean(squares)) / jnp.where(rms > 0, rms, 1.0), 1.0)
    new_var = var * jnp.square(scale)
    # The constant under the root does not scale along; what it takes, the gain gives back.
    gain = jnp.sqrt((new_var + BN_EPSILON) / (var + BN_EPSILON)) / scale
    return (
        {**conv, "kernel": kernel * scale},
        {**norm, "scale": norm["scale"] * gain},
        {**stats, "mean": mean * scale, "var": new_var},
    )
