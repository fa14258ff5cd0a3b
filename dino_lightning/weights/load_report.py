"""What was loaded from a file into a model, in tensors by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OUTCOMES = ("loaded", "re-mapped", "new", "ignored")
_PARTS = {
    "backbone": "backbone",
    "neck": "neck",
    "encoder": "encoder",
    "level_embedding": "encoder",
    "query_selection": "query selection",
    "group_queries": "query selection",
    "decoder": "decoder",
}
CLASS_PART = "class heads"


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a file into a model.

    Attributes:
        source: the file or name, and the kind of weights.
        counts: number of tensors by (part of the model, outcome); outcomes are `OUTCOMES`.
        classes: a sentence on how the classes were matched; empty for a backbone alone.
        notes: further sentences for the user.
        score_threshold: the threshold of the best F1, if the file has it.
    """

    source: str
    counts: Mapping[tuple[str, str], int]
    classes: str = ""
    notes: tuple[str, ...] = ()
    score_threshold: float | None = None

    def total(self, outcome: str) -> int:
        """Number of tensors with that outcome, over all parts."""
        return sum(count for (_, found), count in self.counts.items() if found == outcome)

    def line(self) -> str:
        """The source and the totals in one line."""
        sums = ", ".join(f"{self.total(outcome)} {outcome}" for outcome in OUTCOMES if self.total(outcome))
        return f"{self.source}: {sums} tensors."

    def __str__(self) -> str:
        present = {part for part, _ in self.counts}
        parts = [part for part in (*dict.fromkeys(_PARTS.values()), CLASS_PART) if part in present]
        rows = [[part, *(self.counts.get((part, outcome), 0) for outcome in OUTCOMES)] for part in parts]
        rows.append(["all tensors", *(self.total(outcome) for outcome in OUTCOMES)])
        lines = ["".join(f"{cell:>11}" if index else f"  {cell:<17}" for index, cell in enumerate(row)) for row in rows]
        header = "  " + " " * 17 + "".join(f"{outcome:>11}" for outcome in OUTCOMES)
        said = [self.classes] if self.classes else []
        return "\n".join([f"{self.source}:", header, *lines, *said, *self.notes])


def part_of(key: str) -> str:
    """The part of the model that an entry of its state dict belongs to, class heads aside."""
    return _PARTS.get(key.partition(".")[0], "backbone")
