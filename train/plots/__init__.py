"""Figures of a run as PNG, PDF or SVG: accuracy over the rounds, weights and codebooks, errors.

Every function takes plain NumPy arrays and mappings and returns the figure it has written. Values
that are not finite are skipped; a panel with nothing to show says so. Figures are built without
pyplot, so there is no global state, and are put in place by a rename, so that a reader never sees
half a file.
"""

from train.plots.comparisons import Sized, plot_comparison, plot_curves, plot_sizes
from train.plots.errors import plot_errors
from train.plots.rounds import plot_rounds
from train.plots.weights import plot_weights

__all__ = [
    "Sized",
    "plot_comparison",
    "plot_curves",
    "plot_errors",
    "plot_rounds",
    "plot_sizes",
    "plot_weights",
]
