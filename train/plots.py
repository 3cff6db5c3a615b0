"""Figures of a run as PNG, PDF or SVG: accuracy over the rounds, weights and codebooks, errors.

Every function takes plain NumPy arrays and mappings and returns the figure it has written. Values
that are not finite are skipped; a panel with nothing to show says so. Figures are built without
pyplot, so there is no global state, and are put in place by a rename, so that a reader never sees
half a file.
"""

import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

_DPI = 150
_COLUMN = 3.5  # Inches: one column of a two-column paper, and the whole page.
_PAGE = 7.0
_BINS = 50

# Okabe and Ito (2008): told apart with any common colour blindness, and in grey.
_BLUE = "#0072B2"  # What is still free, or has been re-trained.
_ORANGE = "#D55E00"  # What quantization has done.
_GREEN = "#009E73"
_GREY = "#8c8c8c"  # The float network.
_COLORS = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vX"
_POINTS = 72  # of an inch
_VALUE_WIDTH, _VALUE_HEIGHT = 16, 7  # points, of a number written below a panel's foot
_SHADES = ("#fde3cf", _ORANGE, "#7a2f00")  # of errors, from small to large
_NO_ERROR, _NOT_FINITE = "#e8e8e8", "?"
_MOST_LOST = 15.0  # Points below the float network that a comparison shows to scale.

_WEIGHT_LABELS = (
    "float, per bin",
    "free, per bin",
    "frozen, per centroid",
    "centroid, none frozen",
)

# The same figure is the same file.
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#404040",
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 7,
    "figure.dpi": _DPI,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "font.size": 8,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text that programs can edit and search
    "savefig.dpi": _DPI,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxquant",
    "text.parse_math": False,  # A layer's name may hold any character.
    "xtick.labelsize": 7,
    "xtick.major.size": 2,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.size": 2,
    "ytick.major.width": 0.6,
}


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
    return _write(path, lambda: _draw_rounds(float_accuracy, rounds))


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
    return _write(path, lambda: _draw_weights(weights, codebooks, frozen, before))


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
    return _write(path, lambda: _draw_errors(layers, rounds))


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
    return _write(path, lambda: _draw_comparison(families, full))


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
    return _write(path, lambda: _draw_sizes(networks))


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
    return _write(path, lambda: _draw_curves(families))


def _draw_curves(families: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    figure = Figure(figsize=(_PAGE, max(3.0, 0.6 + 0.16 * len(families))), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=_GREY, linewidth=1, dashes=(4, 2), label="float")
    fallen: list[_Fallen] = []
    for (label, runs), style in zip(families.items(), _styles(len(families)), strict=True):
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


def _draw_comparison(
    families: Mapping[str, Sequence[tuple[float, float]]], full: tuple[float, float]
) -> Figure:
    figure = Figure(figsize=(_PAGE, 3.6), layout="constrained")
    axes = figure.subplots()
    reference = _percent(full[1])
    axes.axhline(reference, color=_GREY, linewidth=1, dashes=(4, 2))
    axes.plot([full[0]], [reference], "*", color=_GREY, label="float", markersize=8)
    fallen: list[_Fallen] = []
    foot = reference - _MOST_LOST
    for (label, points), style in zip(families.items(), _styles(len(families)), strict=True):
        ordered = sorted((size, _percent(accuracy)) for size, accuracy in points)
        sizes, accuracies = map(np.array, zip(*ordered, strict=True))
        fallen += _draw_down_to(axes, foot, sizes, accuracies, label, *style)
    axes.set_xscale("log")
    _label_kilobytes(axes)
    axes.set_xlabel("kilobytes, entropy-coded")
    axes.set_ylabel("test accuracy (%)")
    _write_fallen(axes, foot, fallen)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_sizes(networks: Mapping[str, Sequence[Sized]]) -> Figure:
    figure = Figure(figsize=(_PAGE, 1.2 + 1.1 * len(networks)), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(networks.items(), _styles(len(networks)), strict=True):
        color, marker = style
        axes.axhline(_percent(points[0].accuracies[0]), color=color, linewidth=0.8, dashes=(4, 2))
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
    handles.append(Line2D([], [], color=_GREY, linewidth=0.8, dashes=(4, 2)))
    figure.legend(handles, [*names, "float"], loc="outside upper center", ncols=len(handles))
    return figure


def _label_kilobytes(axes: Axes) -> None:
    # The decades alone may be none within the limits: label halves and fifths of them too.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1000:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _styles(count: int) -> list[tuple[str, str]]:
    """Return colours and markers of curves; no pair of them twice among the first 36."""
    colors, markers = len(_COLORS), len(_MARKERS)
    return [(_COLORS[i % colors], _MARKERS[(i + i // colors) % markers]) for i in range(count)]


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
    width, height = (_POINTS * inches for inches in figure.get_size_inches())
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


def _write(path: str | os.PathLike[str], draw: Callable[[], Figure]) -> Figure:
    """Draw and save in our style, whatever the user's own matplotlib settings are."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with matplotlib.style.context(["default", _STYLE]):
        figure = draw()
        FigureCanvasAgg(figure)
        try:
            form = path.suffix.removeprefix(".")
            figure.savefig(temporary, format=form, dpi=_DPI, metadata=_UNDATED.get(form))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return figure


def _draw_rounds(float_accuracy: float, rounds: Sequence[Mapping]) -> Figure:
    figure = Figure(figsize=(_COLUMN, 2.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    number = np.array([r["round"] for r in rounds], np.float64)
    quantized, trained, share = (
        np.array([_percent(r.get(name)) for r in rounds])
        for name in ("accuracy_quantized", "accuracy", "weights_frozen")
    )
    reference = _percent(float_accuracy)

    # A round spans [r - 1/4, r + 1/4]: quantized where it begins, re-trained where it ends.
    x = np.stack([number - 0.25, number + 0.25], axis=1).ravel()
    y = np.stack([quantized, trained], axis=1).ravel()
    if math.isfinite(reference):
        upper.axhline(reference, color=_GREY, linewidth=1, dashes=(4, 2), label="float")
        x, y = np.append(number.min(initial=1) - 0.75, x), np.append(reference, y)
    drawn = np.isfinite(y)
    upper.plot(x[drawn], y[drawn], color="#b0b0b0", linewidth=0.8)
    size = 4 if len(number) <= 12 else 2.5
    marker = {"linestyle": "none", "markersize": size, "zorder": 3}
    upper.plot(number - 0.25, quantized, "v", color=_ORANGE, label="quantized", **marker)
    upper.plot(number + 0.25, trained, "o", color=_BLUE, label="re-trained", **marker)
    if drawn.any():
        low = _accuracy_limits(upper, np.append(trained, reference), quantized)
        _mark_cut(upper, number - 0.25, quantized, low)
        handles, names = upper.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper center", ncols=3, columnspacing=1.2, handlelength=1.8
        )
    if not (np.isfinite(quantized) | np.isfinite(trained)).any():
        _note(upper, "no accuracies")
    upper.set_ylabel("accuracy (%)")

    lower.bar(number, share, width=0.5, color=_ORANGE, linewidth=0)
    if not np.isfinite(share).any():
        _note(lower, "no frozen shares")
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
                color=_ORANGE,
                fontsize=6,
                ha="center",
                va="bottom",
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.8},
            )


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
        figsize=(_PAGE if count > 1 else _COLUMN, rows * height + 0.5), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    tops = [
        _draw_layer(axes, *(mapping[layer] for mapping in (weights, codebooks, frozen, before)))
        for axes, layer in zip(panels, weights, strict=False)
    ]
    for axes, title in zip(
        panels, _titles(weights, length=(50 if count == 1 else 108 // columns)), strict=False
    ):
        axes.set_title(title, pad=2)
    for axes in panels[count:]:
        axes.set_axis_off()
    top = max(tops, default=0.0) or 1.0
    for axes in panels:
        axes.set_yscale("function", functions=(_signed_sqrt, _signed_square))
        axes.set_yticks(_share_ticks(top, points=72 * (height - 0.4)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.15 * top)
        axes.tick_params(**small)
        axes.grid(False, axis="x")
    if not weights:
        _note(panels[0], "no layers")
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
        _note(axes, "no weights" if not size else "no finite weights")
        axes.set_xticks([])
        return 0.0

    low, high = _view(before if before.size else drawn, codebook)
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_xticks(*_weight_ticks(low, high))
    edges = _edges(low, high, float(drawn.min()), float(drawn.max()))
    top = 0.0
    for label, values, total, fill, color in (
        (_WEIGHT_LABELS[0], before, before.size, "#d4d4d4", _GREY),
        (_WEIGHT_LABELS[1], free, size, to_rgba(_BLUE, 0.4), _BLUE),
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
        axes.vlines(tips, 0, ends, color=_ORANGE, linewidth=0.9, zorder=3)
        if held.any():
            axes.plot(
                tips, ends, "o", color=_ORANGE, markersize=2.2, zorder=3, label=_WEIGHT_LABELS[2]
            )
        if not held.all():
            waiting = codebook[~held]
            axes.plot(
                waiting,
                np.zeros(waiting.size),
                "|",
                color=_BLUE,
                markersize=5,
                clip_on=False,
                zorder=3,
                label=_WEIGHT_LABELS[3],
            )
        top = max(top, float(percent.max()))
    if lost:
        _note(axes, f"{lost} not finite", corner=True)
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


def _draw_errors(layers: Mapping[str, Sequence[float]], rounds: Sequence[int]) -> Figure:
    count, columns = max(len(layers), 1), max(len(rounds), 1)
    spacing = 0.2 if count <= 10 else 0.155 if count <= 30 else 0.125
    size = (_COLUMN if columns <= 8 else _PAGE, count * spacing + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    percent = np.array([[_percent(x) for x in values] for values in layers.values()])
    percent = percent.reshape(len(layers), len(rounds))
    shown = np.isfinite(percent) & (percent > 0)
    if not shown.any():
        _note(axes, "no errors above zero")
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
        0.5 + np.arange(count), _titles(layers, length=24), fontsize=7 if count <= 30 else 6
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
    width, height = _POINTS * box.width / columns, _POINTS * box.height / rows
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


def _titles(layers: Mapping[str, object], *, length: int) -> list[str]:
    """Paths without a final "kernel" and without the parents that all share, cut in the middle."""
    parts = [layer.removesuffix("/kernel").split("/") for layer in layers]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    titles = ["/".join(p) for p in parts]
    tail = length // 2
    return [t if len(t) <= length else f"{t[: length - tail - 1]}…{t[-tail:]}" for t in titles]


def _note(axes: Axes, text: str, *, corner: bool = False) -> None:
    x, y, ha, va = (0.02, 0.98, "left", "top") if corner else (0.5, 0.5, "center", "center")
    axes.text(x, y, text, transform=axes.transAxes, ha=ha, va=va, color="#606060", fontsize=6)


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * float(share)


def _signed_sqrt(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)
