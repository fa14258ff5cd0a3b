"""A report as files for other programs (JSON, CSV) and as a few lines for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

WORDS = {
    "correct": "true positive",
    "missed": "missed",
    "duplicate": "duplicate",
    "classification": "classification",
    "localization": "localization",
    "both": "both",
    "background": "background",
}
REASON_WORDS = {
    "classification": "detected as another class",
    "localization": "with a detection that overlaps too little",
    "low_score": "detected with a score below the threshold",
    "unseen": "not detected",
}


def as_json(summary: dict[str, Any]) -> str:
    """Strict JSON, without NaN."""
    return json.dumps(summary, allow_nan=False)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A header and one line for each row; cells are empty where there is nothing to measure."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_text(summary: dict[str, Any]) -> str:
    """True positives, errors and counted boxes at the threshold, in two lines."""
    at, counts = summary["at_threshold"], summary["counts"]
    shown = ", ".join(f"{row['count']} {WORDS[row['kind']]}" for row in summary["errors"])
    lines = [f"at a score of {summary['threshold']:.2f}: {at['correct']} true positives, {shown}"]
    if counts["exact"] is not None:
        lines.append(
            f"boxes counted: {counts['counted']}, ground truth {counts['true']}; the number is exact in "
            f"{counts['exact']:.0%} of the images and off by {counts['mean_absolute_error']:.2f} on average"
        )
    return "\n".join(lines)
