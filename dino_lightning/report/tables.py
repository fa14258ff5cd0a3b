"""A report as files for other programs (JSON, CSV) and as a few lines for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from dino_lightning.files import csv_cell

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
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def as_text(summary: dict[str, Any]) -> str:
    """F1, true positives, errors and counted boxes at the model's threshold, and the best F1; a line each."""
    at, counts = summary["at_threshold"], summary["counts"]
    shown = ", ".join(f"{row['count']} {WORDS[row['kind']]}" for row in summary["errors"])
    lines = [
        f"at a score of {summary['threshold']:.3f}, from which predict reports: {at['correct']} true positives, {shown}"
    ]
    if at["f1"] is not None:
        lines[:0] = [
            f"F1 at the threshold of the model, {summary['threshold']:.3f}: {at['f1']:.3f}; best F1 on these images: "
            f"{summary['values']['F1']:.3f}, at {summary['values']['F1_threshold']:.3f}"
        ]
    if counts["exact"] is not None:
        lines.append(
            f"boxes counted: {counts['counted']}, ground truth {counts['true']}; the number is exact in "
            f"{counts['exact']:.0%} of the images and off by {counts['mean_absolute_error']:.2f} on average"
        )
    return "\n".join(lines)
