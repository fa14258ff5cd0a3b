"""A health report as text for the terminal and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from dino_lightning.data.findings import KINDS, SEVERITIES, Case
from dino_lightning.data.health import HealthReport, SplitHealth

CASES_SHOWN = 3
CLASSES_SHOWN = 30
SMALL, LARGE = 32.0**2, 96.0**2  # square pixels, COCO's limits
WIDTH = 100


def as_text(report: HealthReport) -> str:
    """Tables of at most 100 columns: the splits, the classes, the findings."""
    return "\n\n".join([_aligned(splits_rows(report)), _class_table(report), _findings_text(report)])


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
        "boxes_small": int((areas < SMALL).sum()),
        "boxes_medium": int(((areas >= SMALL) & (areas < LARGE)).sum()),
        "boxes_large": int((areas >= LARGE).sum()),
        "image_width": _spread(sizes[:, 1].tolist()),
        "image_height": _spread(sizes[:, 0].tolist()),
        "image_aspect_ratio": _spread((sizes[:, 1] / sizes[:, 0]).tolist() if len(sizes) else []),
        "box_size_histogram": box_size_histogram(split),
    }
    return figures


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
    where = []
    if case.annotation_id is not None:
        where.append(f"annotation {case.annotation_id}")
    if case.image_id is not None:
        where.append(f"image {case.image_id}")
    if case.file_name is not None:
        where.append(case.file_name)
    return ": ".join(part for part in (", ".join(where), case.detail) if part)


def shown(text: str, width: int) -> str:
    """The text on one line of at most so many characters, with nothing in it that would move the cursor."""
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= width else line[: width - 3] + "..."


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
        "box aspect ratio": "box_aspect_ratio",
        "image width": "image_width",
        "image height": "image_height",
        "image aspect ratio": "image_aspect_ratio",
    }
    for title, key in spreads.items():
        cells = []
        for name in names:
            spread = figures[name].get(key)
            cells.append(
                "-" if spread is None else " / ".join(f"{spread[part]:.4g}" for part in ("min", "median", "max"))
            )
        rows.append([f"{title} (min / median / max)", *cells])
    return rows


def _class_table(report: HealthReport) -> str:
    rows_of_classes = class_rows(report)
    if not rows_of_classes:
        return "No classes: the training annotations cannot be used."
    splits = [split.name for split in report.splits.values() if split.counts]
    rows = [["category_id", "label", "name", *(f"{name} boxes" for name in splits)]]
    rows += [
        [
            str(row["category_id"]),
            str(row["label"]),
            shown(row["name"], 40),
            *(str(row["boxes"][name]) for name in splits),
        ]
        for row in rows_of_classes[:CLASSES_SHOWN]
    ]
    hidden = len(rows_of_classes) - CLASSES_SHOWN
    return _aligned(rows) + (f"\n... and {hidden} more classes (all in the JSON)" if hidden > 0 else "")


def _findings_text(report: HealthReport) -> str:
    counts = ", ".join(f"{report.count(severity)} {severity}s" for severity in SEVERITIES)
    lines = [f"Findings: {counts}"]
    for finding in report.findings:
        kind = KINDS[finding.kind]
        lines.append(f"\n{finding.severity.upper():<8}{finding.split}: {len(finding.cases)} x {kind.title}")
        lines.append(f"        {kind.advice}")
        for case in finding.cases[:CASES_SHOWN]:
            text = describe(case)
            if text:
                lines.append("        - " + shown(text, WIDTH - 10))
        if len(finding.cases) > CASES_SHOWN:
            lines.append(f"        - ... and {len(finding.cases) - CASES_SHOWN} more")
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column == 0 or rows[0][column] == "name" else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
