"""The figure of errors: a coloured table of layers by rounds."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from train.plots.drawing import COLUMN, ORANGE, PAGE, POINTS, in_percent, note, titles, write

_SHADES = ("#fde3cf", ORANGE, "#7a2f00")  # of errors, from small to large
_NO_ERROR, _NOT_FINITE = "#e8e8e8", "?"


def plot_errors(
    path: str | os.PathLike[str],
    *,
    layers: Mapping[str, Sequence[float]],
    rounds: Sequence[int],
) -> Figure:
    """Draw the quantization error of each layer at the start of each round, as a coloured table.

    Layers are rows, the first one on top, and rounds are columns. The darker a cell, the larger the
    error, on a log scale; where cells are wide enough, it is written into them in per cent. A grey
    cell is a layer without an error: all of its weights are on their centroids. In place of what is
    not finite stands a question mark. Nothing covers anything, however close the errors are.

    Args:
      path: .png, .pdf or .svg to write; its folder is made.
      layers: Relative squared error ||w - q||^2 / ||w||^2 of each layer by path, one value per
        round; rows keep this order.
      rounds: Numbers of the rounds.

    Returns:
      The figure, one column wide, a page with more than eight rounds, as high as the layers need.

    Raises:
      ValueError: A layer has more or fewer values than there are rounds.
    """
    for layer, values in layers.items():
        if len(values) != len(rounds):
            raise ValueError(f"{layer}: expected {len(rounds)} errors, got {len(values)}")
    return write(path, lambda: _draw_errors(layers, rounds))


def _draw_errors(layers: Mapping[str, Sequence[float]], rounds: Sequence[int]) -> Figure:
    count, columns = max(len(layers), 1), max(len(rounds), 1)
    spacing = 0.2 if count <= 10 else 0.155 if count <= 30 else 0.125
    size = (COLUMN if columns <= 8 else PAGE, count * spacing + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    percent = np.array([[in_percent(x) for x in values] for values in layers.values()])
    percent = percent.reshape(len(layers), len(rounds))
    shown = np.isfinite(percent) & (percent > 0)
    if not shown.any():
        note(axes, "no errors above zero")
        axes.set_xticks([])
        axes.set_yticks([])
        return figure
    cells = axes.pcolormesh(
        np.ma.masked_where(~shown, percent),
        cmap=LinearSegmentedColormap.from_list("errors", _SHADES, N=48),
        norm=LogNorm(*_error_limits(percent[shown].min(), percent[shown].max())),
        edgecolors="white",
        linewidth=0.8,
    )
    axes.set_facecolor(_NO_ERROR)
    every = -(-columns // 24)
    axes.set_xticks(0.5 + np.arange(columns)[::every], [str(x) for x in rounds[::every]])
    axes.set_yticks(
        0.5 + np.arange(count), titles(layers, length=24), fontsize=7 if count <= 30 else 6
    )
    axes.set_ylim(count, 0)
    axes.set_xlabel("at the start of round")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, location="top", aspect=40, pad=0.01)
    ticks, labels = _error_ticks(*cells.get_clim())
    bar.set_ticks(ticks, labels=labels)
    bar.ax.minorticks_off()
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # no light shows between shades
    bar.outline.set_visible(False)
    bar.set_label("relative squared error (%)")
    if (percent == 0).any():
        patch = Patch(color=_NO_ERROR, label="0: all weights on their centroids")
        figure.legend(handles=[patch], loc="outside lower center")
    _write_errors(axes, percent, cells.norm)
    return figure


def _write_errors(axes: Axes, percent: np.ndarray, norm: Callable[..., Any]) -> None:
    """Write values into their cells; if one does not fit, question marks alone."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # which lays it out
    box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    rows, columns = percent.shape
    width, height = POINTS * box.width / columns, POINTS * box.height / rows
    fontsize = min(6.0, 0.7 * height)
    texts = {at: _error_text(value) for at, value in np.ndenumerate(percent)}
    fit = max(map(len, texts.values())) * 0.62 * fontsize < width
    for (row, column), text in texts.items():
        if fit or text == _NOT_FINITE:
            value = percent[row, column]
            dark = math.isfinite(value) and value > 0 and norm(value) > 0.5
            axes.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center_baseline",
                fontsize=fontsize,
                color="white" if dark else "#303030",
            )


def _error_text(percent: float) -> str:
    """Return two digits of a value in per cent."""
    if not math.isfinite(percent):
        return _NOT_FINITE
    if percent == 0:
        return "0"
    if percent < 0.0095:
        return "<.01"
    digits = 0 if percent >= 9.95 else 1 if percent >= 0.995 else 2 if percent >= 0.0995 else 3
    return f"{percent:.{digits}f}"


def _error_limits(low: float, high: float) -> tuple[float, float]:
    """Return the ends of a scale that covers at least a decade around [low, high]."""
    margin = max(1.0, math.sqrt(10 / (high / low)))
    return low / margin, high * margin


def _error_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return values and labels of ticks: 1, 2, 5 over two decades, else decades."""
    steps = (1, 2, 5) if high < 100 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    every = -(-len(decades) // 7)
    ticks = [(s, d) for d in decades[::every] for s in steps if low <= s * 10.0**d <= high]
    return [s * 10.0**d for s, d in ticks], [_error_label(*tick) for tick in ticks]


def _error_label(step: int, decade: int) -> str:
    if -3 <= decade <= 2:
        return f"{step * 10.0**decade:g}"
    power = str(decade).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if step == 1 else f"{step}·10{power}"
