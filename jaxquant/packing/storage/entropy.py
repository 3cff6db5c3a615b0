"""Codes at their entropy: range coding by the `constriction` library (Bamler, 2022)."""

from typing import Any

import numpy as np

from jaxquant.packing.storage.entries import InvalidError

_PRECISION = 16  # bits of the frequencies in the file; the coder itself counts in 24
_CHUNK = 2**22  # codes decoded at once, as int32


def compressed(codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of the range coder, and the frequencies [models, k] it needs to decode."""
    tables, _ = best_tables(codes, k)
    codes = codes.reshape(len(tables), -1)
    coder, models = _range_coder().stack.AnsCoder(), _models(tables)
    if k > 1:
        for row, model in zip(codes[::-1], models[::-1], strict=True):
            starts = range(0, row.size, _CHUNK)
            for start in reversed(starts):  # a stack: what goes in last comes out first
                coder.encode_reverse(row[start : start + _CHUNK].astype(np.int32), model)
    return np.asarray(coder.get_compressed(), np.uint32), tables.astype(np.uint16)


def best_tables(codes: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Return the frequencies [models, k] by which codes are coded, and the bits that both take.

    One model for all stacked layers, or one for each, whichever takes less.
    """
    counts = np.stack([np.bincount(row, minlength=k) for row in codes]).reshape(-1, k)
    tables = np.stack([_frequencies(row) for row in counts]).reshape(-1, k)
    shared = _frequencies(counts.sum(axis=0))[None]
    bits, shared_bits = _bits(counts, tables), _bits(counts.sum(axis=0, keepdims=True), shared)
    return (shared, shared_bits) if shared_bits <= bits else (tables, bits)


def decompressed(words: np.ndarray, tables: np.ndarray, size: int) -> np.ndarray:
    """Return the codes, uint8 [size]."""
    codes = np.zeros(size, np.uint8)
    if tables.shape[1] == 1:
        if words.size or tables.any():
            raise InvalidError("expected no code words and a frequency of 0 for one centroid")
        return codes
    wide = tables.astype(np.int64)
    if (wide == 0).any() or (wide.sum(axis=1) != 2**_PRECISION).any():
        raise InvalidError(f"expected frequencies from 1 that add up to {2**_PRECISION}")
    try:
        coder = _range_coder().stack.AnsCoder(words)
    except ValueError:
        raise InvalidError("expected another end of the code words") from None
    for row, model in zip(codes.reshape(len(tables), -1), _models(tables), strict=True):
        for start in range(0, row.size, _CHUNK):
            row[start : start + _CHUNK] = coder.decode(model, min(_CHUNK, row.size - start))
    if not coder.is_empty():
        raise InvalidError("expected the code words to end with the codes")
    return codes


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Return counts scaled to a sum of 2**16, each at least 1 (0 means 2**16: k is 1)."""
    k, total = len(counts), max(int(counts.sum()), 1)
    free = 2**_PRECISION - k
    scaled = 1 + counts.astype(np.int64) * free // total
    scaled[np.argmax(scaled)] += 2**_PRECISION - scaled.sum()
    return scaled % 2**_PRECISION


def _bits(counts: np.ndarray, tables: np.ndarray) -> float:
    """Return the bits that codes and tables take."""
    shares = np.where(tables == 0, 2**_PRECISION, tables) / 2**_PRECISION
    return float(-np.sum(counts * np.log2(shares))) + tables.size * _PRECISION


def _range_coder() -> Any:
    try:
        from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise ImportError("saving and loading need: pip install jaxquant[storage]") from None
    return stream


def _models(tables: np.ndarray) -> list[Any]:
    """Return the coder's model of each row, None for a single centroid."""
    # `perfect` keeps multiples of 2**-24 as they are, so a reader needs no floating point.
    make = _range_coder().model.Categorical
    shares = tables.astype(np.float64) / 2**_PRECISION
    return [make(row, perfect=True) if len(row) > 1 else None for row in shares]
