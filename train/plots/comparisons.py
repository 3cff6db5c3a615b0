"""Figures of many networks: accuracy against size, and over the rounds."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from train.plots.drawing import GREY, PAGE, POINTS, in_percent, styles, write

_VALUE_WIDTH, _VALUE_HEIGHT = 16, 7  # points, of a number written below a panel's foot
_MOST_LOST = 15.0  # Points below the float network that a comparison shows to scale.


def plot_comparison(
    path: str | os.PathLike[str],
    *,
    families: Mapping[str, Sequence[tuple[float, float]]],
    full: tuple[float, float],
) -> Figure:
    """Draw accuracy against size, a curve for each family of methods.

    Sizes are on a log scale. Networks that have lost more than 15 points would squeeze the others:
    they are drawn at the foot, hollow, with their accuracy beside them.

    Args:
      path: .png, .pdf or .svg to write; its folder is made.
      families: points (bytes, accuracy in [0, 1]) by label.
      full: bytes and accuracy of the float network.

    Returns:
      The figure, a page wide.
    """
    return write(path, lambda: _draw_comparison(families, full))


def _draw_comparison(
    families: Mapping[str, Sequence[tuple[float, float]]], full: tuple[float, float]
) -> Figure:
    figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
    axes = figure.subplots()
    reference = in_percent(full[1])
    axes.axhline(reference, color=GREY, linewidth=1, dashes=(4, 2))
    axes.plot([full[0]], [reference], "*", color=GREY, label="float", markersize=8)
    fallen: list[_Fallen] = []
    foot = reference - _MOST_LOST
    for (label, points), style in zip(families.items(), styles(len(families)), strict=True):
        ordered = sorted((size, in_percent(accuracy)) for size, accuracy in points)
        sizes, accuracies = map(np.array, zip(*ordered, strict=True))
        fallen += _draw_down_to(axes, foot, sizes, accuracies, label, *style)
    axes.set_xscale("log")
    _label_kilobytes(axes)
    axes.set_xlabel("kilobytes, entropy-coded")
    axes.set_ylabel("test accuracy (%)")
    _write_fallen(axes, foot, fallen)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


class Sized(NamedTuple):
    """A network in `plot_sizes`, or several that differ in their seed."""

    label: str
    size: float  # bytes
    accuracies: Sequence[float]  # in [0, 1], of each seed


def plot_sizes(path: str | os.PathLike[str], *, networks: Mapping[str, Sequence[Sized]]) -> Figure:
    """Draw accuracy against size, a curve for each network, with what every point is.

    A point is the mean over its seeds, amid a bar from the lowest to the highest accuracy. A dashed
    line goes on from the first point of each network, which is the one of floats.

    Args:
      path: .png, .pdf or .svg to write; its folder is made.
      networks: points of each network by its name.

    Returns:
      The figure, a page wide.
    """
    return write(path, lambda: _draw_sizes(networks))


def _draw_sizes(networks: Mapping[str, Sequence[Sized]]) -> Figure:
    figure = Figure(figsize=(PAGE, 1.2 + 1.1 * len(networks)), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(networks.items(), styles(len(networks)), strict=True):
        color, marker = style
        axes.axhline(in_percent(points[0].accuracies[0]), color=color, linewidth=0.8, dashes=(4, 2))
        ordered = sorted(points, key=lambda point: point.size)
        sizes = [point.size for point in ordered]
        percent = [100 * np.asarray(point.accuracies) for point in ordered]
        means = [float(np.mean(values)) for values in percent]
        axes.plot(sizes, means, f"{marker}-", color=color, label=name, linewidth=0.9, markersize=5)
        axes.vlines(sizes, [x.min() for x in percent], [x.max() for x in percent], color=color)
        for point, mean in zip(ordered, means, strict=True):
            last = point is ordered[-1]  # the others have the curve on their right
            axes.annotate(
                point.label,
                (point.size, mean),
                xytext=(0, 7) if last else (-6, 3),
                textcoords="offset points",
                ha="center" if last else "right",
                va="bottom",
                fontsize=7,
                color=color,
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.8},
            )
    axes.set_xscale("log")
    axes.margins(y=0.15)
    every = [point.size for points in networks.values() for point in points]
    span = max(max(every) / min(every), 10)
    axes.set_xlim(min(every) / span**0.35, max(every) * span**0.1)  # a label on the left
    _label_kilobytes(axes)
    axes.set_xlabel("kilobytes of the network in memory, packed")
    axes.set_ylabel("test accuracy (%)")
    handles, names = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color=GREY, linewidth=0.8, dashes=(4, 2)))
    figure.legend(handles, [*names, "float"], loc="outside upper center", ncols=len(handles))
    return figure


def _label_kilobytes(axes: Axes) -> None:
    # The decades alone may be none within the limits: label halves and fifths of them too.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1000:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot_curves(
    path: str | os.PathLike[str], *, families: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """Draw the change of accuracy from the float network after each round, a curve a family.

    A family is one experiment with several seeds: its curve is their mean, amid a band from the
    lowest to the highest. What has lost more than 15 points is drawn as in `plot_comparison`.

    Args:
      path: .png, .pdf or .svg to write; its folder is made.
      families: of each label the runs, a share in [-1, 1] of each of their rounds, as many in all.

    Returns:
      The figure, a page wide.

    Raises:
      ValueError: if runs of a family differ in their number of rounds.
    """
    for label, runs in families.items():
        if len({len(run) for run in runs}) != 1:
            raise ValueError(f"{label}: expected runs of equally many rounds")
    return write(path, lambda: _draw_curves(families))


def _draw_curves(families: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    figure = Figure(figsize=(PAGE, max(3.0, 0.6 + 0.16 * len(families))), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=1, dashes=(4, 2), label="float")
    fallen: list[_Fallen] = []
    for (label, runs), style in zip(families.items(), styles(len(families)), strict=True):
        points = 100 * np.array([[0.0, *run] for run in runs])
        rounds = np.arange(points.shape[1])
        fallen += _draw_down_to(axes, -_MOST_LOST, rounds, points.mean(axis=0), label, *style)
        if len(runs) > 1:
            low, high = np.maximum([points.min(axis=0), points.max(axis=0)], -_MOST_LOST)
            axes.fill_between(rounds, low, high, color=style[0], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=12))
    axes.set_xlabel("round")
    axes.set_ylabel("change of accuracy (points)")
    _write_fallen(axes, -_MOST_LOST, fallen)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


class _Fallen(NamedTuple):
    """A point below the foot of a panel."""

    position: float
    value: float
    color: str


def _draw_down_to(
    axes: Axes, foot: float, x: np.ndarray, y: np.ndarray, label: str, color: str, marker: str
) -> list[_Fallen]:
    """Draw a curve; what lies below the foot is drawn there, hollow, and returned."""
    shown = np.maximum(y, foot)
    axes.plot(x, shown, f"{marker}-", color=color, label=label, linewidth=0.9, markersize=4)
    fallen = [_Fallen(*point, color) for point in zip(x, y, strict=True) if point[1] < foot]
    for point in fallen:
        axes.plot([point.position], [foot], marker, color="white", markeredgecolor=color, zorder=3)
    return fallen


def _write_fallen(axes: Axes, foot: float, fallen: Sequence[_Fallen]) -> None:
    """Write values below the foot, where no curve comes, in as many rows as they need."""
    if not fallen:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = (POINTS * inches for inches in figure.get_size_inches())
    low, high = axes.get_xlim()
    log = axes.get_xscale() == "log"
    scale = math.log10 if log else float
    points = 0.6 * width / (scale(high) - scale(low))  # a legend stands beside the panel
    rows: list[float] = []  # where the last value in each ends
    for point in sorted(fallen):
        at = points * scale(point.position)
        row = next((i for i, end in enumerate(rows) if at > end), len(rows))
        rows[row : row + 1] = [at + _VALUE_WIDTH]
        axes.annotate(
            f"{point.value:.0f}",
            (point.position, foot),
            xytext=(0, -5 - _VALUE_HEIGHT * row),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=6,
            color=point.color,
        )
    top = axes.get_ylim()[1]
    axes.set_yticks([tick for tick in axes.get_yticks() if foot <= tick <= top])
    taken = (8 + _VALUE_HEIGHT * len(rows)) / (0.75 * height)
    axes.set_ylim(foot - (top - foot) * taken / (1 - min(taken, 0.6)), top)
