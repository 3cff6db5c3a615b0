"""The figure of a run: accuracy and frozen weights over the rounds."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.plots.drawing import BLUE, COLUMN, GREY, ORANGE, in_percent, note, write


def plot_rounds(
    path: str | os.PathLike[str], *, float_accuracy: float, rounds: Sequence[Mapping]
) -> Figure:
    """Draw accuracy and the share of frozen weights over the rounds.

    The upper panel is a saw-tooth: each round begins with the drop that quantization causes and
    ends where re-training has brought the network back to. Where a few drops are so deep that the
    re-trained accuracies could not be told apart, the axis is cut and the values below it are
    written at its foot. The lower panel shows the frozen share after each round.

    Args:
      path: .png, .pdf or .svg to write; its folder is made.
      float_accuracy: Accuracy of the float network, in [0, 1].
      rounds: One mapping per round: "round" (int, from 1), "accuracy_quantized" (in [0, 1], before
        re-training), "accuracy" (in [0, 1], after it), "weights_frozen" (share of the selected
        weights, in [0, 1]). None, NaN and a missing accuracy or share are skipped.

    Returns:
      The figure, one column wide.
    """
    return write(path, lambda: _draw_rounds(float_accuracy, rounds))


def _draw_rounds(float_accuracy: float, rounds: Sequence[Mapping]) -> Figure:
    figure = Figure(figsize=(COLUMN, 2.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    number = np.array([r["round"] for r in rounds], np.float64)
    quantized, trained, share = (
        np.array([in_percent(r.get(name)) for r in rounds])
        for name in ("accuracy_quantized", "accuracy", "weights_frozen")
    )
    reference = in_percent(float_accuracy)

    # A round spans [r - 1/4, r + 1/4]: quantized where it begins, re-trained where it ends.
    x = np.stack([number - 0.25, number + 0.25], axis=1).ravel()
    y = np.stack([quantized, trained], axis=1).ravel()
    if math.isfinite(reference):
        upper.axhline(reference, color=GREY, linewidth=1, dashes=(4, 2), label="float")
        x, y = np.append(number.min(initial=1) - 0.75, x), np.append(reference, y)
    drawn = np.isfinite(y)
    upper.plot(x[drawn], y[drawn], color="#b0b0b0", linewidth=0.8)
    size = 4 if len(number) <= 12 else 2.5
    marker = {"linestyle": "none", "markersize": size, "zorder": 3}
    upper.plot(number - 0.25, quantized, "v", color=ORANGE, label="quantized", **marker)
    upper.plot(number + 0.25, trained, "o", color=BLUE, label="re-trained", **marker)
    if drawn.any():
        low = _accuracy_limits(upper, np.append(trained, reference), quantized)
        _mark_cut(upper, number - 0.25, quantized, low)
        handles, names = upper.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper center", ncols=3, columnspacing=1.2, handlelength=1.8
        )
    if not (np.isfinite(quantized) | np.isfinite(trained)).any():
        note(upper, "no accuracies")
    upper.set_ylabel("accuracy (%)")

    lower.bar(number, share, width=0.5, color=ORANGE, linewidth=0)
    if not np.isfinite(share).any():
        note(lower, "no frozen shares")
    lower.set_ylabel("frozen (%)")
    lower.set_ylim(0, 105)
    lower.set_yticks([0, 50, 100])
    lower.set_xlabel("round")
    lower.set_xlim(number.min(initial=1) - 0.85, number.max(initial=1) + 0.6)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=12))
    for axes in (upper, lower):
        axes.grid(False, axis="x")
    figure.align_ylabels()
    return figure


def _accuracy_limits(axes: Axes, kept: np.ndarray, quantized: np.ndarray) -> float:
    """Set the y range, in %; return its lower end.

    The values in `kept` always lie within. Those right after quantization do too, unless `kept`
    would then cover less than a tenth of the range.
    """
    kept, quantized = kept[np.isfinite(kept)], quantized[np.isfinite(quantized)]
    every = np.concatenate([kept, quantized])
    low, high = every.min(), every.max()
    spread = max(np.ptp(kept), 0.5) if kept.size > 1 else math.inf
    cut = high - low > 10 * spread
    if cut:
        low = every[every >= high - 5 * spread].min()
    margin = max(0.08 * (high - low), 0.1)
    bottom = low - (2 if cut else 1) * margin  # Room for what is written at the foot.
    while np.any(np.abs(quantized - bottom) < margin / 2):
        bottom -= margin / 2
    axes.set_ylim(bottom, high + margin)
    if bottom < 0 or high + margin > 100:
        axes.set_yticks([t for t in axes.get_yticks() if max(bottom, 0) <= t <= 100])
    return bottom


def _mark_cut(axes: Axes, x: np.ndarray, y: np.ndarray, low: float) -> None:
    """Write the values below the lower end of the axis at its foot, as many as fit."""
    for position, value in zip(x, y, strict=True):
        if value < low and len(x) <= 12:
            axes.annotate(
                f"↓{value:.0f}",
                (position, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                color=ORANGE,
                fontsize=6,
                ha="center",
                va="bottom",
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.8},
            )
