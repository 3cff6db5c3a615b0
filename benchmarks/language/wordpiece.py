"""Words as BERT splits them, and their pieces."""

import unicodedata
from collections.abc import Sequence

_LONGEST = 100  # letters of a word that is looked up


class Tokenizer:
    """WordPiece: a word is the longest pieces of a vocabulary, one after the other.

    Texts are in lower case and without accents. Case as it is, and Chinese words, would need more.
    """

    def __init__(self, vocabulary: Sequence[str]):
        """Keep the pieces; those inside of a word begin with "##"."""
        self._numbers = {piece: number for number, piece in enumerate(vocabulary)}

    def encode(self, text: str, longest: int) -> list[int]:
        """Return the tokens of a text, at most `longest`, with those of its start and its end."""
        tokens = [token for word in words(text) for token in self._pieces(word)]
        return [self._numbers["[CLS]"], *tokens[: longest - 2], self._numbers["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        tokens, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            pieces = ("##" * (start > 0) + word[start:end] for end in ends)
            found = next((piece for piece in pieces if piece in self._numbers), None)
            if found is None or len(word) > _LONGEST:
                return [self._numbers["[UNK]"]]
            tokens.append(self._numbers[found])
            start += len(found) - 2 * (start > 0)
        return tokens


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, each mark of punctuation a word of its own.

    >>> words("Ça costs $5.")
    ['ca', 'costs', '$', '5', '.']
    """
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(map(_spaced, letters)).split()


def _spaced(letter: str) -> str:
    kind = unicodedata.category(letter)
    if letter.isspace():
        return " "
    if kind == "Mn" or kind in ("Cc", "Cf") or letter == "\N{REPLACEMENT CHARACTER}":
        return ""
    is_mark = kind.startswith("P") or (letter.isascii() and not letter.isalnum())
    return f" {letter} " if is_mark else letter
