"""Text for a terminal: printed by the first process only, safe for any encoding, aligned, without secrets."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

# Set by torchrun, by Lightning's launcher, by Slurm and by LSF for each process they start.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
WHOLE_WORDS: Any = {"break_on_hyphens": False, "break_long_words": False}
REDACTED = "***"  # stands where an address had a password or a signature
# scheme, user info (a password may hold @), host and path, query, fragment; one slash where a Path was made of it
_ADDRESS = re.compile(
    r"(?P<scheme>\b(?:[a-zA-Z][\w+.-]*://|(?:https?|s3|hf):/))(?P<user>[^\s/?#]*@)?(?P<place>[^\s?#\"'<>]*)"
    r"(?P<query>\?[^\s#\"<>]*[^\s#\"<>:.,;)'\]}])?(?P<fragment>#[^\s\"'<>]*)?"
)


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


def wrapped(text: str, width: int) -> str:
    """A text of paragraphs, and of tables of names, in lines of at most so many characters.

    A line that begins with an option, or is indented no deeper than the one above, begins anew; what follows a gap of
    two spaces and more is a column. Commands stay on one line, for whoever copies them.
    """
    items: list[str] = []
    above = -1  # the indentation of the item above; -1 after an empty line
    for line in text.strip("\n").splitlines():
        depth = len(line) - len(line.lstrip())
        continues = depth > above > 0 or depth == above == 0
        if line.strip() and continues and not line.startswith("--"):
            items[-1] += " " + line.strip()
        else:
            items.append(line)
            above = depth if line.strip() else -1
    return "\n".join(_wrapped_item(item, width) for item in items)


def _wrapped_item(item: str, width: int) -> str:
    named = re.match(r"( *\S+(?: \S+)* {2,})(\S.*)", item)
    first, rest = (named[1], named[2]) if named else (item[: len(item) - len(item.lstrip())], item.strip())
    if len(first) > width - 20 or "python -m" in rest:
        return item
    below = " " * len(first)
    return textwrap.fill(rest, width, initial_indent=first, subsequent_indent=below, **WHOLE_WORDS)


def bar_seconds() -> float:
    """Seconds between two states of a progress bar: a terminal draws over the last one, a log keeps them all."""
    return 0.1 if sys.stderr.isatty() else 30.0


def without_secrets(value: Any) -> Any:
    """A value without what opens the addresses in it: user and password, query and fragment become `***`.

    For everything that is stored or shown. A checksum (`#sha256=...`) stays.

    Args:
        value: a text with any number of addresses in it, or a mapping, list or tuple of such; other values stay.
    """
    if isinstance(value, str):
        return _ADDRESS.sub(_redacted, value) if ":/" in value else value
    if isinstance(value, dict):
        return {key: without_secrets(content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(content) for content in value)
    return value


def lacks_secrets(value: Any) -> bool:
    """Whether a value holds an address that `without_secrets` has changed, and that opens nothing."""
    return REDACTED in str(value) and any(
        match["user"] == f"{REDACTED}@" or match["query"] == f"?{REDACTED}" or match["fragment"] == f"#{REDACTED}"
        for match in _ADDRESS.finditer(str(value))
    )


def _redacted(match: re.Match[str]) -> str:
    fragment = match["fragment"] or ""
    return "".join(
        (
            match["scheme"],
            f"{REDACTED}@" if match["user"] else "",
            match["place"],
            f"?{REDACTED}" if match["query"] else "",
            fragment if not fragment or fragment.startswith("#sha256=") else f"#{REDACTED}",
        )
    )


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
