"""Tables in Markdown whose columns stand below each other in a terminal, too."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], sides: str) -> str:
    """Return a table, each column as wide as its longest cell.

    Args:
      header: a name for each column.
      rows: cells, of which those of words and numbers are written as `str` does.
      sides: "<" or ">" for each column, where its cells stand.

    >>> print(markdown(["layer", "k"], [["dense", 16], ["a|b", 3]], "<>"))
    | layer |  k |
    |:------|---:|
    | dense | 16 |
    | a\\|b  |  3 |
    """
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rules = (
        f"{'-' * (w + 1)}:" if side == ">" else f":{'-' * (w + 1)}"
        for side, w in zip(sides, widths, strict=True)
    )
    return "\n".join([line(cells[0]), f"|{'|'.join(rules)}|", *map(line, cells[1:])])
