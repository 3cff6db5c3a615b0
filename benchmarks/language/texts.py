"""English from packages, and which of it calibrates and which is held out.

`pydoc_data.topics` is in Python; Lee's news, the similarities that people saw in 50 documents of
the same kind, and articles of Wikipedia are among gensim's test data (`pip install --no-deps
gensim==4.4.0`).
"""

import bz2
import html
import importlib.util
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import generation

SIZE = 512  # tokens of a window
_COMMON = 16  # tokens in a row by which a text is told to repeat another
_ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_PARAGRAPH = 400  # characters at least of one, which are more than its tokens
_NOT_TEXT = r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|<math>.*?</math>"
_TEMPLATE, _LINK = r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"


def texts() -> dict[str, str]:
    """Return the texts by name."""
    return {"topics": generation.documentation(), "news": "\n".join(news())}


def news() -> list[str]:
    """Return the documents of Lee's background corpus."""
    return _lines("lee_background.cor")


def paragraphs() -> list[str]:
    """Return the longer paragraphs of Wikipedia's articles that are free of markup."""
    packed = (_folder() / _ARTICLES).read_bytes()
    text = html.unescape(bz2.decompress(packed).decode())
    text = re.sub(_NOT_TEXT, "", text, flags=re.DOTALL)
    for _ in range(4):  # one in another
        text = re.sub(_TEMPLATE, "", text)
    text = re.sub(r"'{2,}|<[^>]*>", "", re.sub(_LINK, r"\1", text))
    lines = [line for line in text.split("\n") if len(line) > _PARAGRAPH and line[0].isalpha()]
    return [line for line in lines if not set("{}|[]<>=") & set(line)]


def rated() -> tuple[list[str], np.ndarray]:
    """Return Lee's 50 documents and their similarities [50, 50], the means of people's ratings."""
    return _lines("lee.cor"), np.loadtxt(_folder() / "similarities0-1.txt")


def _lines(name: str) -> list[str]:
    lines = (_folder() / name).read_text("latin-1").split("\n")
    return [line for line in lines if line.strip()]


def _folder() -> Path:
    """Return gensim's test data; the package is not imported."""
    return installed("gensim", "gensim==4.4.0") / "test" / "test_data"


def installed(package: str, requirement: str) -> Path:
    """Return the folder of a package, which is not imported.

    Raises:
      ModuleNotFoundError: if it is not there.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"pip install --no-deps {requirement}")
    return Path(found.origin).parent


def windows(
    tokens: Sequence[int], held_out: int, calibrating: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into windows to measure on [held_out, SIZE], and others [<= calibrating, SIZE].

    The first begin at equal distances. The others are spread over what lies between them; those
    that have 16 tokens in a row in common with a held-out window are left out.
    """
    step = len(tokens) // held_out
    starts = range(0, step * held_out, step)
    measured = [tokens[start : start + SIZE] for start in starts]
    between = [
        tokens[first : first + SIZE]
        for start in starts
        for first in range(start + SIZE, start + step - SIZE + 1, SIZE)
    ]
    others = apart(between, measured)
    chosen = np.linspace(0, len(others) - 1, min(calibrating, len(others))).astype(int)
    return np.array(measured), np.array([others[i] for i in chosen])


def apart(texts: Iterable[Sequence[int]], others: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """Return the texts that have no 16 tokens in a row in common with any of the others."""
    seen = set(itertools.chain.from_iterable(map(_runs, others)))
    return [text for text in texts if seen.isdisjoint(_runs(text))]


def _runs(text: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(text[i:] for i in range(_COMMON)), strict=False))
