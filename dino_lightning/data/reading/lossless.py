"""Numbers and ids that a program wrote as another type: read where nothing is lost, and counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dino_lightning.data.reading.json_file import shown_value

MAX_COORDINATE = 1e12  # larger than any image; NaN and infinity fail the comparison with it
LONGEST_NUMBER = 40  # characters


class Conversions:
    """The values read as another type than the file has, counted by what they are; one for each file."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def integer(self, value: Any, what: str) -> int | None:
        """The integer that a value stands for (3, 3.0, "3", "3.0", "003"), or None.

        Args:
            value: as it stands in the file.
            what: what the value is, for the sentence.
        """
        if type(value) is int:
            return value
        number = self._number(value)
        if number is None or number != int(number):
            return None
        self._count(what, value)
        # a long run of digits is not rounded on its way
        return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(number)

    def number(self, value: Any, what: str) -> float | None:
        """The finite number that a value stands for (3, 3.5, "3.5"), or None; as above."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value) if abs(value) < MAX_COORDINATE else None
        number = self._number(value)
        if number is not None:
            self._count(what, value)
        return number

    def flag(self, value: Any, what: str) -> int | None:
        """0 or 1 (false, true, "0", 1.0), or None; as above."""
        if isinstance(value, bool):
            self._count(what, value)
            return int(value)
        number = self.integer(value, what)
        return number if number in (0, 1) else None

    def sentence(self) -> str:
        """What was converted, in one sentence; empty if nothing was."""
        parts = [
            f"{count} {what}{'' if count == 1 else 's'} (first: {self._first[what]})"
            for what, count in self._counts.items()
        ]
        return f"written as another type and read without loss: {', '.join(parts)}." if parts else ""

    def _count(self, what: str, value: Any) -> None:
        self._counts[what] += 1
        self._first.setdefault(what, shown_value(value))

    @staticmethod
    def _number(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        if isinstance(value, str) and len(value) > LONGEST_NUMBER:
            return None
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if abs(number) < MAX_COORDINATE else None
