"""A health report as text for the terminal and as JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from dino_lightning.console import aligned, columns, columns_of, shown
from dino_lightning.data.findings import KINDS, SEVERITIES, Case
from dino_lightning.inspection.report import HealthReport, SplitHealth

CASES_SHOWN = 3
CASE_LENGTH = 170  # columns, on two or three lines
CLASSES_SHOWN = 30
SMALL, LARGE = 32.0**2, 96.0**2  # square pixels, COCO's limits
RELATIVE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the square root of the image's area
WIDTH = 100
SPREAD = "sizes in pixels; three numbers are least / median / most"


def as_text(report: HealthReport) -> str:
    """Tables of at most 100 columns: the splits, the classes, the findings."""
    rows = splits_rows(report)
    return "\n\n".join([aligned(rows) + f"\n({SPREAD})", _class_table(report), _findings_text(report)])


def as_json(report: HealthReport) -> dict[str, Any]:
    """Everything, with all cases."""
    return {
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
        "splits": {name: split_figures(split) for name, split in report.splits.items()},
        "classes": class_rows(report),
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "split": finding.split,
                "title": KINDS[finding.kind].title,
                "advice": KINDS[finding.kind].advice,
                "count": len(finding.cases),
                "cases": [
                    {
                        "image_id": case.image_id,
                        "annotation_id": case.annotation_id,
                        "file_name": case.file_name,
                        "detail": case.detail,
                    }
                    for case in finding.cases
                ],
            }
            for finding in report.findings
        ],
    }


def split_figures(split: SplitHealth) -> dict[str, Any]:
    """The counts and sizes of a split; sizes in pixels."""
    per_image, boxes, sizes = split.boxes_per_image(), split.box_sizes(), split.image_sizes()
    figures: dict[str, Any] = {"annotations": str(split.files.annotations), "image_folder": str(split.files.images)}
    if split.annotations is None:
        return figures
    summary = split.annotations.summary
    areas = boxes.prod(axis=1)
    figures |= {
        "images": summary.images,
        "images_decoded": len(sizes),
        "images_without_boxes": summary.images_without_boxes,
        "boxes": summary.boxes,
        "crowd": summary.crowd,
        "boxes_without_area": summary.degenerate,
        "boxes_clipped": summary.clipped,
        "boxes_per_image": _spread(per_image.tolist()),
        "box_width": _spread(boxes[:, 0].tolist()),
        "box_height": _spread(boxes[:, 1].tolist()),
        "box_aspect_ratio": _spread((boxes[:, 0] / boxes[:, 1]).tolist() if len(boxes) else []),
        "box_relative_size": _spread(split.relative_box_sizes().tolist()),
        "boxes_small": int((areas < SMALL).sum()),
        "boxes_medium": int(((areas >= SMALL) & (areas < LARGE)).sum()),
        "boxes_large": int((areas >= LARGE).sum()),
        "image_width": _spread(sizes[:, 1].tolist()),
        "image_height": _spread(sizes[:, 0].tolist()),
        "image_aspect_ratio": _spread((sizes[:, 1] / sizes[:, 0]).tolist() if len(sizes) else []),
        "boxes_per_image_histogram": boxes_per_image_histogram(split),
        "box_size_histogram": box_size_histogram(split),
        "box_relative_size_histogram": box_relative_size_histogram(split),
    }
    return figures


def boxes_per_image_histogram(split: SplitHealth) -> dict[str, int]:
    """How many images there are with each number of boxes."""
    numbers, counts = np.unique(split.boxes_per_image(), return_counts=True)
    return {str(number): count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}


def box_relative_size_histogram(split: SplitHealth) -> list[dict[str, float]]:
    """How many boxes take which share of their image, as the ratio of the square roots of the areas."""
    counts = np.histogram(split.relative_box_sizes(), RELATIVE)[0]
    return [
        {"from": low, "to": high, "boxes": int(count)}
        for low, high, count in zip(RELATIVE[:-1], RELATIVE[1:], counts, strict=True)
    ]


def box_size_histogram(split: SplitHealth) -> list[dict[str, float]]:
    """How many boxes have a square root of their area between powers of two pixels."""
    sides = np.sqrt(split.box_sizes().prod(axis=1))
    if len(sides) == 0:
        return []
    first, last = int(np.floor(np.log2(max(sides.min(), 1)))), int(np.floor(np.log2(max(sides.max(), 1)))) + 1
    edges = 2.0 ** np.arange(first, last + 1)
    if sides.min() < 1:
        edges = np.concatenate(([0.0], edges))
    counts = np.histogram(sides, edges)[0]
    return [
        {"from": float(low), "to": float(high), "boxes": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def class_rows(report: HealthReport) -> list[dict[str, Any]]:
    """Category id, label, name and boxes in each split of every class."""
    if report.classes is None:
        return []
    return [
        {
            "category_id": category_id,
            "label": label,
            "name": name,
            "boxes": {split.name: split.counts[label] for split in report.splits.values() if split.counts},
        }
        for label, (category_id, name) in enumerate(zip(report.classes.category_ids, report.classes.names, strict=True))
    ]


def describe(case: Case) -> str:
    """Where a case is, and what is particular about it."""
    where = []  # as far as the detail does not begin with it
    if case.annotation_id is not None and not case.detail.startswith(f"annotation {case.annotation_id} "):
        where.append(f"annotation {case.annotation_id}")
    if case.image_id is not None and not case.detail.startswith(f"image {case.image_id} "):
        where.append(f"image {case.image_id}")
    if case.file_name is not None:
        where.append(case.file_name)
    return ": ".join(part for part in (", ".join(where), case.detail) if part)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many columns, broken at spaces where there are any."""
    lines = []
    while columns(text) > width:
        end, used = 0, 0
        while used + columns_of(text[end]) <= width:
            used += columns_of(text[end])
            end += 1
        space = text.rfind(" ", 0, end + 1)
        lines.append(text[: space if space > 0 else end])
        text = text[len(lines[-1]) :].lstrip(" ")
    return [*lines, text]


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": float(min(values)), "median": float(statistics.median(values)), "max": float(max(values))}


def splits_rows(report: HealthReport) -> list[list[str]]:
    """The figures of all splits, with a heading."""
    names = list(report.splits)
    figures = {name: split_figures(split) for name, split in report.splits.items()}
    rows = [["", *names]]
    plain = {
        "images": "images",
        "without boxes": "images_without_boxes",
        "cannot be read": "",
        "boxes": "boxes",
        "crowd regions": "crowd",
        "boxes without area": "boxes_without_area",
        "boxes that stick out": "boxes_clipped",
        "small, < 32 px": "boxes_small",
        "medium": "boxes_medium",
        "large, > 96 px": "boxes_large",
    }
    for title, key in plain.items():
        cells = []
        for name in names:
            of_split = figures[name]
            value = of_split.get("images", 0) - of_split.get("images_decoded", 0) if key == "" else of_split.get(key)
            cells.append("-" if value is None or "images" not in of_split else str(value))
        rows.append([title, *cells])
    spreads = {
        "boxes per image": "boxes_per_image",
        "box width": "box_width",
        "box height": "box_height",
        "box / image size": "box_relative_size",
        "box width / height": "box_aspect_ratio",
        "image width": "image_width",
        "image height": "image_height",
        "image width / height": "image_aspect_ratio",
    }
    for title, key in spreads.items():
        cells = []
        for name in names:
            spread = figures[name].get(key)
            cells.append(
                "-"
                if spread is None
                else " / ".join(
                    f"{spread[part]:.3g}" if spread[part] < 100 else f"{spread[part]:.0f}"
                    for part in ("min", "median", "max")
                )
            )
        rows.append([title, *cells])
    return rows


def _class_table(report: HealthReport) -> str:
    rows_of_classes = class_rows(report)
    if not rows_of_classes:
        return "No classes: the training annotations cannot be used."
    splits = [split.name for split in report.splits.values() if split.counts]
    rows = [["category_id", "label", "name", *(f"{name} boxes" for name in splits)]]
    rows += [
        [
            shown(str(row["category_id"]), 20),
            str(row["label"]),
            shown(row["name"], 30),
            *(str(row["boxes"][name]) for name in splits),
        ]
        for row in rows_of_classes[:CLASSES_SHOWN]
    ]
    hidden = len(rows_of_classes) - CLASSES_SHOWN
    return aligned(rows) + (f"\n... and {hidden} more classes (all in the JSON)" if hidden > 0 else "")


def _findings_text(report: HealthReport) -> str:
    counts = ", ".join(f"{report.count(severity)} {severity}s" for severity in SEVERITIES)
    lines = [f"Findings: {counts}"]
    for finding in report.findings:
        kind = KINDS[finding.kind]
        lines.append(f"\n{finding.severity.upper():<8}{finding.split}: {len(finding.cases)} x {kind.title}")
        lines += textwrap.wrap(kind.advice, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
        for case in finding.cases[:CASES_SHOWN]:
            text = describe(case)
            if text:
                first, *rest = _wrapped(shown(text, CASE_LENGTH), WIDTH - 10)
                lines += ["        - " + first, *(" " * 10 + line for line in rest)]
        if len(finding.cases) > CASES_SHOWN:
            lines.append(f"        - ... and {len(finding.cases) - CASES_SHOWN} more")
    return "\n".join(lines)
