"""Which cases every run takes, which `--all` adds and which `--run-slow`; comparable tables."""

import re
from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark all cases slow but those that are kept: a law that holds alike in many modes."""
    return _mostly(pytest.mark.slow, cases, kept)


def mostly_further(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Leave all cases but those that are kept to `--all`: further points of a law."""
    return _mostly(pytest.mark.further, cases, kept)


def _mostly(mark: pytest.MarkDecorator, cases: Iterable[Any], kept: tuple[Any, ...]) -> list[Any]:
    kept_values = list(map(_values, kept))
    return [
        case
        if _values(case) in kept_values
        else pytest.param(*_values(case), marks=[mark, *getattr(case, "marks", ())])
        for case in cases
    ]


def _values(case: Any) -> tuple[Any, ...]:
    if hasattr(case, "marks"):  # of pytest.param
        return case.values
    return case if isinstance(case, tuple) else (case,)


def unpadded(table: str) -> str:
    """Return a table with one space beside each cell, which columns of one width have more of."""
    return re.sub(" +", " ", table)


def timeless(path):
    """Return a file's bytes without how long things took."""
    return re.sub(rb'"seconds": [\d.e+-]+', b"", path.read_bytes())
