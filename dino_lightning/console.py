"""Text for a terminal: printed by the first process only, safe for any encoding, aligned in columns."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

# Set by torchrun, by Lightning's launcher, by Slurm and by LSF for each process they start.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_process() -> bool:
    """Whether this is process 0 of the run, also before the processes have found each other."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


def say(text: str, file: TextIO | None = None) -> None:
    """Print on the first process only; characters that the terminal lacks become question marks.

    Args:
        text: what to print.
        file: where to; standard output when None.
    """
    if not is_first_process():
        return
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)


def shown(text: str, width: int) -> str:
    """The text on one line of at most `width` columns, with no character that would move the cursor."""
    used, fits = 0, 0
    for position, character in enumerate(text):
        used += columns_of(character)
        if used > width or position == 4 * width:  # the latter: accents without end
            return printable(text[:fits]) + "..."
        if used <= width - 3:
            fits = position + 1
    return printable(text)


def columns(text: str) -> int:
    """The width of a text in a terminal, where Chinese characters take two columns and accents none."""
    return len(text) if text.isascii() else sum(map(columns_of, text))


def columns_of(character: str) -> int:
    """The width of one character in a terminal: 0, 1 or 2 columns."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    """The text with a question mark for every control character."""
    return "".join(character if character.isprintable() else "?" for character in text)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its heading. The first column and one called "name" are aligned to the left."""
    widths = [max(columns(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell + " " * (width - columns(cell))
            if column == 0 or rows[0][column] == "name"
            else " " * (width - columns(cell)) + cell
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
