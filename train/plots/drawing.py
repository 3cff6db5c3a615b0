"""What all figures share: sizes, colours, texts, and how they come into a file."""

import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMN = 3.5  # inches: one column of a two-column paper, and the whole page
PAGE = 7.0
POINTS = 72  # of an inch
_DPI = 150

# Okabe and Ito (2008): told apart with any common colour blindness, and in grey.
BLUE = "#0072B2"  # What is still free, or has been re-trained.
ORANGE = "#D55E00"  # What quantization has done.
_GREEN = "#009E73"
GREY = "#8c8c8c"  # The float network.
_COLORS = (BLUE, ORANGE, _GREEN, "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vX"

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


def write(path: str | os.PathLike[str], draw: Callable[[], Figure]) -> Figure:
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


def styles(count: int) -> list[tuple[str, str]]:
    """Return colours and markers of curves; no pair of them twice among the first 36."""
    colors, markers = len(_COLORS), len(_MARKERS)
    return [(_COLORS[i % colors], _MARKERS[(i + i // colors) % markers]) for i in range(count)]


def titles(layers: Mapping[str, object], *, length: int) -> list[str]:
    """Paths without a final "kernel" and without the parents that all share, cut in the middle."""
    parts = [layer.removesuffix("/kernel").split("/") for layer in layers]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    titles = ["/".join(p) for p in parts]
    tail = length // 2
    return [t if len(t) <= length else f"{t[: length - tail - 1]}…{t[-tail:]}" for t in titles]


def note(axes: Axes, text: str, *, corner: bool = False) -> None:
    """Write a note into a panel, in its middle or its upper left corner."""
    x, y, ha, va = (0.02, 0.98, "left", "top") if corner else (0.5, 0.5, "center", "center")
    axes.text(x, y, text, transform=axes.transAxes, ha=ha, va=va, color="#606060", fontsize=6)


def in_percent(share: float | None) -> float:
    """Return a share in per cent, NaN for none."""
    return math.nan if share is None else 100 * float(share)
