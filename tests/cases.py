"""Which cases every run takes and which only `--run-slow`; tables without the spaces of columns."""

import re
from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark all cases slow but those that are kept: a law that holds alike in many modes."""
    kept_cases = list(kept)
    return [
        case if case in kept_cases else _marked(case if isinstance(case, tuple) else (case,))
        for case in cases
    ]


def _marked(values: tuple[Any, ...]) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def unpadded(table: str) -> str:
    """Return a table with one space beside each cell, which columns of one width have more of."""
    return re.sub(" +", " ", table)


def timeless(path):
    """Return a file's bytes without how long things took."""
    return re.sub(rb'"seconds": [\d.e+-]+', b"", path.read_bytes())
