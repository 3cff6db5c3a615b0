"""The figure of weights and codebooks, a panel for each layer."""

import math
import os
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from train.plots.drawing import BLUE, COLUMN, GREY, ORANGE, PAGE, POINTS, note, titles, write

_BINS = 50

_WEIGHT_LABELS = (
    "float, per bin",
    "free, per bin",
    "frozen, per centroid",
    "centroid, none frozen",
)


def plot_weights(
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, np.ndarray],
    codebooks: Mapping[str, np.ndarray],
    frozen: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
) -> Figure:
    """Draw the weights of each layer before and after, with the centroids.

    In a layer's panel the grey histogram holds its float weights and the blue one those still free,
    with equal bins, 50 to a panel. A stem at each centroid is as high as the share of the weights
    frozen there; a blue tick on the axis is a centroid that holds none. All three are shares of the
    layer's weights, so stems and blue bins add up to 100 %; about one weight in a thousand, far
    out, may lie outside the panel. The height is the square root of the share: a ternary layer's
    stems of 60 % and the tails of a histogram can both be read, and zero stays zero, which a
    logarithm would not allow.

    Args:
      path: .png, .pdf or .svg to write; its folder is made.
      weights: Current weights of each layer by path, any shape; panels keep this order.
      codebooks: Centroids of each layer, [k] (or [..., k], all of which are drawn).
      frozen: True where a weight is frozen, shaped like the weights or a scalar.
      before: Float weights of each layer before quantization.

    Returns:
      The figure, one page wide (half as wide for a single layer).

    Raises:
      ValueError: A layer is missing from one of the mappings, or its mask has another shape.
    """
    for name, mapping in (("codebooks", codebooks), ("frozen", frozen), ("before", before)):
        if missing := [layer for layer in weights if layer not in mapping]:
            raise ValueError(f"{missing[0]}: expected an entry in {name}, got none")
    for layer, array in weights.items():
        shape, mask = np.shape(array), np.shape(frozen[layer])
        if mask not in (shape, ()):
            raise ValueError(f"{layer}: expected a mask of shape {shape}, got {mask}")
    return write(path, lambda: _draw_weights(weights, codebooks, frozen, before))


def _draw_weights(
    weights: Mapping[str, np.ndarray],
    codebooks: Mapping[str, np.ndarray],
    frozen: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
) -> Figure:
    count = max(len(weights), 1)
    columns = count if count <= 3 else 4 if count <= 8 else 5 if count <= 30 else 6
    rows = -(-count // columns)
    height = {1: 2.0, 2: 1.6}.get(rows, 1.25 if rows <= 6 else 0.92)
    small = {"labelsize": 6} if columns > 4 else {}
    figure = Figure(
        figsize=(PAGE if count > 1 else COLUMN, rows * height + 0.5), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    tops = [
        _draw_layer(axes, *(mapping[layer] for mapping in (weights, codebooks, frozen, before)))
        for axes, layer in zip(panels, weights, strict=False)
    ]
    for axes, title in zip(
        panels, titles(weights, length=(50 if count == 1 else 108 // columns)), strict=False
    ):
        axes.set_title(title, pad=2)
    for axes in panels[count:]:
        axes.set_axis_off()
    top = max(tops, default=0.0) or 1.0
    for axes in panels:
        axes.set_yscale("function", functions=(_signed_sqrt, _signed_square))
        axes.set_yticks(_share_ticks(top, points=POINTS * (height - 0.4)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.15 * top)
        axes.tick_params(**small)
        axes.grid(False, axis="x")
    if not weights:
        note(panels[0], "no layers")
        panels[0].set_xticks([])
    figure.supylabel("share of weights (%), square root", fontsize=8)
    figure.supxlabel("weight", fontsize=8)
    artists = {
        artist.get_label(): artist for axes in panels for artist in (*axes.patches, *axes.lines)
    }
    handles = [artists[label] for label in _WEIGHT_LABELS if label in artists]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _draw_layer(
    axes: Axes, weights: np.ndarray, codebook: np.ndarray, frozen: np.ndarray, before: np.ndarray
) -> float:
    """Draw one panel of `plot_weights`; return its largest share, in %."""
    weights, codebook, before = (
        np.asarray(a, np.float32).ravel() for a in (weights, codebook, before)
    )
    frozen = np.broadcast_to(np.asarray(frozen, bool).ravel(), weights.shape)
    size, lost = weights.size, int(np.count_nonzero(~np.isfinite(weights)))
    finite = np.isfinite(weights)
    free, shared = weights[finite & ~frozen], weights[finite & frozen]
    codebook, before = np.sort(codebook[np.isfinite(codebook)]), before[np.isfinite(before)]
    drawn = np.concatenate([before, weights[finite], codebook])
    if not drawn.size:
        note(axes, "no weights" if not size else "no finite weights")
        axes.set_xticks([])
        return 0.0

    low, high = _view(before if before.size else drawn, codebook)
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_xticks(*_weight_ticks(low, high))
    edges = _edges(low, high, float(drawn.min()), float(drawn.max()))
    top = 0.0
    for label, values, total, fill, color in (
        (_WEIGHT_LABELS[0], before, before.size, "#d4d4d4", GREY),
        (_WEIGHT_LABELS[1], free, size, to_rgba(BLUE, 0.4), BLUE),
    ):
        if values.size:
            percent = 100 / total * np.histogram(values, edges)[0]
            axes.stairs(
                percent, edges, fill=True, facecolor=fill, edgecolor=color, lw=0.6, label=label
            )
            top = max(top, float(percent.max()))

    if codebook.size and size:
        nearest = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, shared)
        percent = 100 / size * np.bincount(nearest, minlength=codebook.size)
        held = percent > 0
        tips, ends = codebook[held], percent[held]
        axes.vlines(tips, 0, ends, color=ORANGE, linewidth=0.9, zorder=3)
        if held.any():
            axes.plot(
                tips, ends, "o", color=ORANGE, markersize=2.2, zorder=3, label=_WEIGHT_LABELS[2]
            )
        if not held.all():
            waiting = codebook[~held]
            axes.plot(
                waiting,
                np.zeros(waiting.size),
                "|",
                color=BLUE,
                markersize=5,
                clip_on=False,
                zorder=3,
                label=_WEIGHT_LABELS[3],
            )
        top = max(top, float(percent.max()))
    if lost:
        note(axes, f"{lost} not finite", corner=True)
    return top


def _view(weights: np.ndarray, codebook: np.ndarray) -> tuple[float, float]:
    """Range that holds the centroids and all but about one in a thousand weights."""
    sample = weights[:: max(1, weights.size // 1_000_000)]
    bulk = np.concatenate([np.quantile(sample, [0.0005, 0.9995]), codebook])
    low, high = float(bulk.min()), float(bulk.max())
    half = 0.0 if low < high else max(0.5, abs(low))
    return low - half, high + half


def _edges(low: float, high: float, least: float, most: float) -> np.ndarray:
    """Edges of equal bins, `_BINS` of them in [low, high], that reach from `least` to `most`."""
    least, most = min(least, low), max(most, high)
    width = max((high - low) / _BINS, (most - least) / 10_000)
    below = math.ceil((low - least) / width)
    above = math.ceil((most - low) / width)
    edges = low + width * np.arange(-below, above + 1)
    edges[0], edges[-1] = min(edges[0], least), max(edges[-1], most)  # Rounding loses nothing.
    return edges


def _weight_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Zero and one round number on each side, or the ends of a range without zero."""
    if not low < 0 < high:
        ticks = [low, high]
        return ticks, [f"{tick:.2g}" for tick in ticks]
    largest = 0.9 * max(-low, high)
    decade = 10.0 ** math.floor(math.log10(largest))
    side = max(step * decade for step in (1, 2, 5) if step * decade <= largest)
    ticks = [tick for tick in (-side, 0.0, side) if low <= tick <= high]
    return ticks, [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]


def _share_ticks(top: float, *, points: float) -> list[float]:
    """Round shares up to `top`, 9 points apart on a square-root axis of that many points."""
    apart = 9 / points * math.sqrt(1.15 * top)
    ticks = [0.0]
    for tick in (1, 5, 10, 25, 50, 100):
        if tick <= 1.05 * top and math.sqrt(tick) - math.sqrt(ticks[-1]) >= apart:
            ticks.append(tick)
    return ticks


def _signed_sqrt(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)
