"""The report of an evaluation: one HTML page with plots and images, the numbers as JSON and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_lightning.files import atomic_write
from dino_lightning.metrics import Evaluation
from dino_lightning.report.advice import dominating_error
from dino_lightning.report.compare import JSON_NAME, compare, find_report, load_report
from dino_lightning.report.page import as_html
from dino_lightning.report.pictures import pictures
from dino_lightning.report.summary import Source, summarise
from dino_lightning.report.tables import as_csv, as_json, as_text

__all__ = [
    "JSON_NAME",
    "Source",
    "as_text",
    "dominating_error",
    "find_report",
    "load_report",
    "write_report",
]


def write_report(
    evaluation: Evaluation,
    source: Source,
    folder: Path,
    *,
    threshold: float,
    against: tuple[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write index.html, report.json, per_class.csv and per_image.csv.

    Args:
        evaluation: images, detections and metrics.
        source: what was evaluated.
        folder: where the files are written; those of an earlier report are replaced.
        threshold: lowest score of the detections that errors, counts and images are about.
        against: name and numbers of another run to compare with, see `load_report`.

    Returns:
        The numbers, as in report.json.

    Raises:
        OSError: the files cannot be written.
    """
    summary = summarise(evaluation, source, threshold=threshold)
    comparison = None if against is None else compare(summary, against[1], against[0])
    drawn = pictures(evaluation, source.annotations, summary["images"], threshold)
    contents = {
        JSON_NAME: as_json(summary),
        "per_class.csv": as_csv(summary["classes"]),
        "per_image.csv": as_csv(summary["images"]),
        "index.html": as_html(summary, drawn, comparison, None if against is None else against[1]),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    return summary
