"""Tables of figures, printed and put between their marks into docs/performance.md, or another document."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FILE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show(name: str, text: str, write: bool, file: Path = FILE) -> None:
    """Print a table, and `write` it between <!-- name --> and <!-- /name -->. Raises ValueError where no such place is."""
    print(text)
    if not write:
        return
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = file.read_text()
    head, found, rest = whole.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{file} wants a place between {start} and {end}")
    file.write_text(f"{head}{start}\n\n{text}\n\n{end}{tail}")
    print(f"written into {file.name}", file=sys.stderr)
