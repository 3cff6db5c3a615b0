"""The options of clustering, under one name."""

import dataclasses
from typing import Any

from jaxquant import checks
from jaxquant.clustering.histogram import BINS

STARTS = ("optimal", "quantile", "linear", "power_of_two", "inq", "ternary")
IN_INDEX_ORDER = ("power_of_two", "inq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """How weights are clustered: the options of `kmeans` and of plans, under the same names.

    Raises:
      ValueError: for options that do not fit.

    >>> Clustering(zero=True, iterations=10).iterations
    10
    """

    init: str = "optimal"
    """Where the centroids start, if none is given or frozen; one of `STARTS`, see `kmeans`."""
    iterations: int | None = None
    """Exactly this many Lloyd passes, 0 to keep the start; None for as many as needed."""
    zero: bool = False
    """Whether one centroid is exactly zero: the one that starts nearest to it."""
    powers_of_two: bool = False
    """Whether each centroid is moved to the nearest of 0 and +-2**n in the end."""
    bins: int = BINS
    """Bins of the histogram of a large array."""
    cells: int | None = None
    """Cells of the dynamic program of the optimal start; None for as many as the array needs."""

    def __post_init__(self) -> None:
        """Check the options, and make them Python's."""
        check_start(self.init)
        cells = None if self.cells is None else checks.integer("cells", self.cells, least=1)
        checked = {
            "iterations": check_iterations(self.iterations),
            "zero": bool(self.zero),
            "powers_of_two": bool(self.powers_of_two),
            "bins": checks.integer("bins", self.bins, least=1),
            "cells": cells,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check(self, k: int) -> None:
        """Raise a ValueError if `k` centroids cannot be clustered so."""
        check_start(self.init, k)
        checks.integer("bins", self.bins, least=k)
        if self.cells is not None:
            checks.integer("cells", self.cells, least=k)


def check_start(name: object, k: int | None = None) -> None:
    """Raise a ValueError for a name of no start, or of one that `k` centroids cannot have."""
    if name not in STARTS:
        raise ValueError(f"expected init to be one of {', '.join(STARTS)}, got {name!r}")
    if k is not None and name in IN_INDEX_ORDER and k % 2 == 0:
        raise ValueError(f"expected an odd k for init={name!r}, got {k}")
    if k not in (None, 3) and name == "ternary":
        raise ValueError(f"expected k = 3 for init='ternary', got {k}")


def check_iterations(iterations: Any) -> int | None:
    """Return the number of Lloyd passes, or None, or raise a ValueError."""
    return None if iterations is None else checks.integer("iterations", iterations, least=0)
