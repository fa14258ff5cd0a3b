"""A health report as text for the terminal and as JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dino_lightning.console import aligned, columns, columns_of, shown
from dino_lightning.data.findings import KINDS, SEVERITIES, Case, Severity
from dino_lightning.inspection.class_shapes import class_shapes
from dino_lightning.inspection.report import HealthReport, SplitHealth

CASES_SHOWN = 3
CASE_LENGTH = 170  # columns, on two or three lines
CLASSES_SHOWN = 30
SMALL, LARGE = 32.0**2, 96.0**2  # square pixels, COCO's limits; a box of just that area is on both sides
RELATIVE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the square root of the image's area
WIDTH, PROSE = 100, 80  # of tables, of sentences
SPREAD = (
    "sizes in pixels; three numbers are minimum / median / maximum; small, medium and large are by the area of the "
    "annotation, as evaluation counts them"
)
MEDIAN_KEYS = (
    "median_width",
    "median_height",
    "median_aspect_ratio",
    "median_elongation",
    "median_percent_of_image",
)
MEDIAN_COLUMNS = ("width", "height", "w/h", "long/short", "% area")
MEDIANS = (
    "boxes of each class in each split; medians over all of them: width and height in pixels, width / height, "
    "the longer by the shorter side, and percent of the image's area"
)


def as_text(report: HealthReport) -> str:
    """Splits, classes and findings: tables of at most 100 columns, sentences of 80."""
    rows = splits_rows(report)
    return "\n\n".join([aligned(rows) + f"\n{_remark(SPREAD)}", _class_table(report), _findings_text(report)])


def _remark(text: str) -> str:
    return textwrap.fill(f"({text})", PROSE)


def as_json(report: HealthReport) -> dict[str, Any]:
    """The whole report, with all cases of all findings."""
    return {
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
        "findings_by_severity": {severity: report.count_findings(severity) for severity in SEVERITIES},
        "splits": {name: split_numbers(split) for name, split in report.splits.items()},
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


def split_numbers(split: SplitHealth) -> dict[str, Any]:
    """The counts and sizes of a split; sizes in pixels, and small, medium and large as COCO's evaluation has them."""
    per_image, boxes, sizes = split.boxes_per_image(), split.box_sizes(), split.image_sizes()
    numbers: dict[str, Any] = {"annotations": str(split.files.annotations), "image_folder": str(split.files.images)}
    if split.annotations is None:
        return numbers
    summary = split.annotations.summary
    areas = split.box_areas()
    numbers |= {
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
        "boxes_small": int((areas <= SMALL).sum()),
        "boxes_medium": int(((areas >= SMALL) & (areas <= LARGE)).sum()),
        "boxes_large": int((areas >= LARGE).sum()),
        "image_width": _spread(sizes[:, 1].tolist()),
        "image_height": _spread(sizes[:, 0].tolist()),
        "image_aspect_ratio": _spread((sizes[:, 1] / sizes[:, 0]).tolist() if len(sizes) else []),
        "boxes_per_image_histogram": boxes_per_image_histogram(split),
        "box_size_histogram": box_size_histogram(split),
        "box_relative_size_histogram": box_relative_size_histogram(split),
    }
    return numbers


def boxes_per_image_histogram(split: SplitHealth) -> dict[str, int]:
    """Number of images by number of boxes in an image."""
    numbers, counts = np.unique(split.boxes_per_image(), return_counts=True)
    return {str(number): count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}


def box_relative_size_histogram(split: SplitHealth) -> list[dict[str, float]]:
    """Number of boxes by size relative to their image: the ratio of the square roots of the areas."""
    return _histogram(split.relative_box_sizes(), RELATIVE)


def box_size_histogram(split: SplitHealth) -> list[dict[str, float]]:
    """Number of boxes by size, the square root of the area, between powers of two pixels."""
    sides = np.sqrt(split.box_sizes().prod(axis=1))
    if len(sides) == 0:
        return []
    first, last = int(np.floor(np.log2(max(sides.min(), 1)))), int(np.floor(np.log2(max(sides.max(), 1)))) + 1
    edges = (2.0 ** np.arange(first, last + 1)).tolist()
    return _histogram(sides, [0.0, *edges] if sides.min() < 1 else edges)


def _histogram(values: npt.NDArray[np.float64], edges: Sequence[float]) -> list[dict[str, float]]:
    counts = np.histogram(values, edges)[0].tolist()
    return [
        {"from": low, "to": high, "boxes": count}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def class_rows(report: HealthReport) -> list[dict[str, Any]]:
    """For every class its category id, label, name, number of boxes in each split, and medians of all of them."""
    if report.classes is None:
        return []
    return [
        {
            "category_id": category_id,
            "label": label,
            "name": name,
            "boxes": {split.name: split.counts[label] for split in report.splits.values() if split.counts},
            "median_width": shape and shape.width,
            "median_height": shape and shape.height,
            "median_aspect_ratio": shape and shape.aspect_ratio,
            "median_elongation": shape and shape.elongation,
            "median_percent_of_image": shape and shape.percent_of_image,
        }
        for label, (category_id, name, shape) in enumerate(
            zip(report.classes.category_ids, report.classes.names, class_shapes(report), strict=True)
        )
    ]


def describe(case: Case) -> str:
    """A case as text: its annotation, image and file, then its detail."""
    where = []  # without what the detail begins with
    if case.annotation_id is not None and not case.detail.startswith(f"annotation {case.annotation_id} "):
        where.append(f"annotation {case.annotation_id}")
    if case.image_id is not None and not case.detail.startswith(f"image {case.image_id} "):
        where.append(f"image {case.image_id}")
    if case.file_name is not None:
        where.append(case.file_name)
    return ": ".join(part for part in (", ".join(where), case.detail) if part)


def _wrapped(text: str, width: int) -> list[str]:
    """The text as lines of at most `width` columns, broken at spaces where possible."""
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
    """The numbers of all splits as table rows, header first."""
    numbers = {name: split_numbers(split) for name, split in report.splits.items()}

    def count(of_split: dict[str, Any], key: str) -> str:
        value = of_split.get("images", 0) - of_split.get("images_decoded", 0) if key == "" else of_split.get(key)
        return "-" if value is None or "images" not in of_split else str(value)

    def spread(of_split: dict[str, Any], key: str) -> str:
        values = of_split.get(key)
        if values is None:
            return "-"
        parts = [values[part] for part in ("min", "median", "max")]
        return " / ".join(map(short_number, parts))

    counts = {
        "images": "images",
        "without boxes": "images_without_boxes",
        "cannot be read": "",
        "boxes": "boxes",
        "crowd regions": "crowd",
        "boxes without area": "boxes_without_area",
        "boxes that stick out": "boxes_clipped",
        "small, to 32 x 32 px": "boxes_small",
        "medium": "boxes_medium",
        "large, from 96 x 96 px": "boxes_large",
    }
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
    return [
        ["", *numbers],
        *([title, *(count(of_split, key) for of_split in numbers.values())] for title, key in counts.items()),
        *([title, *(spread(of_split, key) for of_split in numbers.values())] for title, key in spreads.items()),
    ]


def _class_table(report: HealthReport) -> str:
    rows_of_classes = class_rows(report)
    if not rows_of_classes:
        return "No classes: the training annotations cannot be used."
    splits = [split.name for split in report.splits.values() if split.counts]
    rows = [["category_id", "label", "name", *splits, *MEDIAN_COLUMNS]]
    rows += [
        [
            shown(str(row["category_id"]), 11),
            str(row["label"]),
            shown(row["name"], 30),
            *(str(row["boxes"][name]) for name in splits),
            *medians_of(row),
        ]
        for row in rows_of_classes[:CLASSES_SHOWN]
    ]
    excess = max(map(columns, aligned(rows).splitlines())) - WIDTH
    if excess > 0:  # three splits of a large dataset
        widest = max(columns(cells[2]) for cells in rows)
        for cells in rows[1:]:
            cells[2] = shown(cells[2], max(columns("name"), widest - excess))
    hidden = len(rows_of_classes) - CLASSES_SHOWN
    more = f"\n... and {hidden} more classes (all in the JSON)" if hidden > 0 else ""
    return f"{aligned(rows)}{more}\n{_remark(MEDIANS)}"


def medians_of(row: Mapping[str, Any]) -> list[str]:
    """The cells below `MEDIAN_COLUMNS` for one of `class_rows`."""
    values = [row[key] for key in MEDIAN_KEYS]
    return ["-" if value is None else short_number(value) for value in values]


def short_number(value: float) -> str:
    """A number of at least 0 with three digits, or as many as it has before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def counted(count: int, word: str) -> str:
    """Such as "1 note" and "2 notes"."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def finding_counts(report: HealthReport) -> dict[Severity, str]:
    """The number of findings of each severity, and of their cases where these are more: "1 note (8 cases)"."""
    texts = {}
    for severity in SEVERITIES:
        findings, cases = report.count_findings(severity), report.count(severity)
        texts[severity] = counted(findings, severity) + (f" ({counted(cases, 'case')})" if cases > findings else "")
    return texts


def _findings_text(report: HealthReport) -> str:
    lines = [f"Findings: {', '.join(finding_counts(report).values())}"]
    for finding in report.findings:
        kind = KINDS[finding.kind]
        lines.append(f"\n{finding.severity.upper():<8}{finding.split}: {len(finding.cases)} x {kind.title}")
        lines += textwrap.wrap(kind.advice, PROSE, initial_indent=" " * 8, subsequent_indent=" " * 8)
        for case in finding.cases[:CASES_SHOWN]:
            text = describe(case)
            if text:
                first, *rest = _wrapped(shown(text, CASE_LENGTH), PROSE - 10)
                lines += ["        - " + first, *(" " * 10 + line for line in rest)]
        if len(finding.cases) > CASES_SHOWN:
            lines.append(f"        - ... and {len(finding.cases) - CASES_SHOWN} more")
    return "\n".join(lines)
