"""GGUF files: their metadata, their weights, and the tokenizer in them."""

import itertools
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The file ----------------------------------------------------------------------------------------

_NUMBERS = "BbHhIif?  Qqd"  # by their kind, of which two are no numbers
_TEXT, _ARRAY = 8, 9
_BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}  # weights and bytes: F32 F16 Q4_1 Q8_0


class Reader:
    """A GGUF file: `metadata` by key, `tensors` in float32 by name."""

    def __init__(self, path: Path):
        """Read the whole file."""
        self._bytes, self._place = path.read_bytes(), 4
        if self._bytes[:4] != b"GGUF" or self._number("I") not in (2, 3):
            raise ValueError(f"{path}: expected a GGUF file of version 2 or 3")
        tensors, entries = self._number("Q"), self._number("Q")
        self.metadata = {self._text(): self._value(self._number("I")) for _ in range(entries)}
        headers = [self._header() for _ in range(tensors)]
        start = -(-self._place // self._alignment) * self._alignment
        self.tensors = {
            name: self._tensor(start + at, shape, kind) for name, shape, kind, at in headers
        }

    @property
    def _alignment(self) -> int:
        return self.metadata.get("general.alignment", 32)

    def _number(self, kind: str) -> Any:
        (number,) = struct.unpack_from(f"<{kind}", self._bytes, self._place)
        self._place += struct.calcsize(f"<{kind}")
        return number

    def _text(self) -> str:
        size = self._number("Q")
        self._place += size
        return self._bytes[self._place - size : self._place].decode()

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
            return [self._value(kind) for _ in range(count)]
        return self._number(_NUMBERS[kind])

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, format and place of a tensor."""
        name = self._text()
        shape = [self._number("Q") for _ in range(self._number("I"))]
        return name, tuple(shape[::-1]), self._number("I"), self._number("Q")

    def _tensor(self, start: int, shape: tuple[int, ...], kind: int) -> np.ndarray:
        if kind not in _BLOCKS:
            raise ValueError(f"expected F32, F16, Q4_1 or Q8_0, got tensors of GGUF format {kind}")
        weights, size = _BLOCKS[kind]
        count = int(np.prod(shape)) // weights
        raw = np.frombuffer(self._bytes, np.uint8, count * size, start)
        return decoded(raw.reshape(count, size), kind).reshape(shape)


def decoded(blocks: np.ndarray, kind: int) -> np.ndarray:
    """Return the weights [blocks, weights] in blocks of bytes [blocks, bytes] of a GGUF format."""
    if kind == 0:
        return blocks.view("<f4")
    first = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if kind == 1:
        return first
    if kind == 8:
        return first * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    least = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    codes = blocks[:, 4:]
    return first * np.concatenate([codes & 15, codes >> 4], axis=1) + least


# Tokens ------------------------------------------------------------------------------------------

_WORDS = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+|."
)  # of GPT-2, between digits, which are words of their own
_CONTROL = 3


class Tokenizer:
    """Byte-level byte pair encoding, from the metadata of a GGUF file."""

    def __init__(self, metadata: dict[str, Any]):
        """Keep the words, their numbers, and the order of merges."""
        self._words: list[str] = metadata["tokenizer.ggml.tokens"]
        self._numbers = {word: number for number, word in enumerate(self._words)}
        pairs = (tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"])
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        kinds = zip(self._words, metadata["tokenizer.ggml.token_type"], strict=True)
        control = "|".join(re.escape(word) for word, kind in kinds if kind == _CONTROL)
        self._pieces = re.compile(f"({control})|(\\d)" if control else r"((?!))|(\d)")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, in which control words stand as they are."""
        tokens, place = [], 0
        for match in self._pieces.finditer(text):
            tokens += self._plain(text[place : match.start()])
            tokens += [self._numbers[match[1]]] if match[1] else self._merged(match[0])
            place = match.end()
        return tokens + self._plain(text[place:])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        letters = "".join(self._words[token] for token in tokens)
        return bytes(map(_BYTES.__getitem__, letters)).decode(errors="replace")

    def _plain(self, text: str) -> list[int]:
        return [token for word in _WORDS.findall(text) for token in self._merged(word)]

    def _merged(self, word: str) -> list[int]:
        """Return the tokens of a word: the pair that was merged first is merged, as long as any."""
        parts = [_LETTERS[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in itertools.pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == len(self._ranks):
                break
            parts[best : best + 2] = ["".join(parts[best : best + 2])]
        return [self._numbers[part] for part in parts]


def _letters() -> list[str]:
    """Return the printable letter that stands for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
