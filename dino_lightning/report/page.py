"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from dino_lightning.console import shown
from dino_lightning.report import figures
from dino_lightning.report.pictures import Picture
from dino_lightning.report.tables import REASON_WORDS, WORDS

CLASSES_LISTED = 1500
CONFUSIONS_SHOWN = 20
NAME_LENGTH = 60  # characters
MEANINGS = {
    "missed": "a ground-truth box that no detection matches",
    "duplicate": "a further detection of a ground-truth box that is found already",
    "classification": "on a ground-truth box of another class",
    "localization": "overlaps a ground-truth box of its class, but too little",
    "both": "overlaps a ground-truth box of another class, and too little",
    "background": "overlaps no ground-truth box, or by an IoU below 0.1",
}
HEADERS = {  # of narrow columns, with soft hyphens
    "duplicate": "dupli\xadcate",
    "classification": "classi\xadfication",
    "localization": "locali\xadzation",
    "background": "back\xadground",
}
LABELS = {
    "AR": "AR (100 detections)",
    "F1_precision": "precision at best F1",
    "F1_recall": "recall at best F1",
    "exact": "share of images counted exactly",
    "within_one": "share of images within one box",
    "mean_absolute_error": "boxes miscounted in an image",
}
GROUPS = {
    "worst": "Worst images",
    "median": "Images in the middle",
    "best": "Best images",
    "more": "More images, with errors of kinds and classes not shown above",
}


def as_html(
    summary: dict[str, Any],
    pictures: Sequence[Picture],
    comparison: dict[str, Any] | None = None,
    other: dict[str, Any] | None = None,
) -> str:
    """The page as HTML text.

    Args:
        summary: the numbers of this run.
        pictures: the images to show, in order.
        comparison: with another run, as `compare` returns it, or None.
        other: the numbers of that run.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "signed": signed, "short": lambda text: shown(str(text), NAME_LENGTH)}
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    classes = summary["classes"]
    few = len(classes) <= figures.MATRIX_CLASSES
    page = environment.from_string(_read("report.html.jinja")).render(
        summary=summary,
        title="Validation report" if summary["stage"] == "validate" else "Test report",
        script=script,
        digest=digest,
        style=_read("report.css"),
        words=WORDS,
        headers=WORDS | HEADERS,
        labels=LABELS,
        meanings=MEANINGS,
        reasons=REASON_WORDS,
        kinds=[row["kind"] for row in summary["errors"]],
        classes=classes[:CLASSES_LISTED],
        classes_hidden=max(0, len(classes) - CLASSES_LISTED),
        matrix=figures.confusion_matrix(summary).tolist() if few and len(classes) > 1 else None,
        confusions=_confusions(summary),
        plots=_plots(summary, other),
        groups=[
            (key, title, [picture for picture in pictures if picture.group == key]) for key, title in GROUPS.items()
        ],
        num_pictures=len(pictures),
        comparison=comparison,
    )
    return page.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are not UTF-8


def number(value: float | None, digits: int = 3) -> str:
    """The number as text, or a dash where there is nothing to measure."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """The change as text with its sign, or a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value:+.{digits}f}"


def _plots(summary: dict[str, Any], other: dict[str, Any] | None) -> dict[str, list[figures.Plot]]:
    """The plots of each section of the page, without those that have nothing to show."""
    sections: dict[str, list[figures.Plot | None]] = {
        "curves": [
            figures.precision_recall(summary, other),
            figures.f1_over_threshold(summary, other),
            figures.class_f1(summary),
        ],
        "errors": [figures.errors(summary, other)],
        "confusion": [figures.confusion(summary)],
        "calibration": [figures.calibration(summary)],
        "counts": [figures.counted(summary), figures.count_errors(summary)],
    }
    return {name: [plot for plot in plots if plot is not None] for name, plots in sections.items()}


def _confusions(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The most frequent confusions of one class with another."""
    classes = summary["classes"]
    mistaken = [
        entry
        for entry in summary["confusion"]
        if entry["true"] >= 0 and entry["predicted"] >= 0 and entry["true"] != entry["predicted"]
    ]
    mistaken.sort(key=lambda entry: -entry["count"])
    return [
        {
            "true": classes[entry["true"]]["name"],
            "predicted": classes[entry["predicted"]]["name"],
            "count": entry["count"],
            "share": entry["count"] / classes[entry["true"]]["num_boxes"],
        }
        for entry in mistaken[:CONFUSIONS_SHOWN]
    ]


def _read(name: str) -> str:
    return resources.files("dino_lightning.report").joinpath(name).read_text(encoding="utf-8")
