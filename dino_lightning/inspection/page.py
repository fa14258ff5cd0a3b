"""A health report as one self-contained HTML page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from dino_lightning.console import shown
from dino_lightning.data.findings import KINDS, SEVERITIES, Case, Finding
from dino_lightning.inspection.class_samples import ClassSamples, class_samples
from dino_lightning.inspection.pictures import Picture, data_uri, picture_of_case
from dino_lightning.inspection.report import HealthReport, SplitHealth
from dino_lightning.inspection.text import (
    CLASSES_SHOWN,
    MEDIAN_COLUMNS,
    MEDIANS,
    SPREAD,
    class_rows,
    describe,
    medians_of,
    splits_rows,
)

CASES_SHOWN = 200  # of each finding
CASE_LENGTH = 400  # characters
CLASSES_LISTED = 1000
PICTURE_BYTES = 5_000_000  # of the images of all findings as base64; later findings have none
PICTURES_SHOWN = 6  # of each finding
CLASSES_OPEN = 12  # whose samples are seen without a click
NAME_LENGTH = 24  # characters of a class name in a plot
CLASS_SHAPE_KINDS = ("class-slivers", "class-all-the-same")  # said above the samples of the class too
WITHOUT_PICTURES = {"image-missing", "image-undecodable", "not-listed"}


def as_html(report: HealthReport, root: str) -> str:
    """The page as HTML text: samples of each class, findings with images, tables and plots; it loads nothing."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        resources.files("dino_lightning.inspection").joinpath("health.html.jinja").read_text(encoding="utf-8")
    )
    rows = class_rows(report)
    for row in rows:
        row["name"] = shown(row["name"], CASE_LENGTH)
        row["medians"] = medians_of(row)
    samples = class_samples(report)
    page = template.render(
        root=shown(root, CASE_LENGTH),
        spread=SPREAD,
        medians=MEDIANS,
        median_columns=MEDIAN_COLUMNS,
        severities=SEVERITIES,
        counts={severity: report.count_findings(severity) for severity in SEVERITIES},
        cases={severity: report.count(severity) for severity in SEVERITIES},
        findings=_within_budget([_finding(report, finding) for finding in report.findings]),
        split_rows=splits_rows(report),
        classes=rows[:CLASSES_LISTED],
        classes_hidden=max(0, len(rows) - CLASSES_LISTED),
        class_splits=[split.name for split in report.splits.values() if split.counts],
        plots=_plots(report),
        class_samples=[_class_sample(report, rows[sample.label], sample) for sample in samples],
        classes_open=CLASSES_OPEN,
        samples_left_out=sum(sample.left_out for sample in samples),
    )
    return page.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are not UTF-8


def _within_budget(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The findings, without their images from the one on that exceeds `PICTURE_BYTES`."""
    left = PICTURE_BYTES
    for finding in findings:
        left -= sum(len(picture.source) for picture in finding["pictures"])
        if left < 0:
            finding["pictures"] = []
    return findings


def _finding(report: HealthReport, finding: Finding) -> dict[str, Any]:
    kind = KINDS[finding.kind]
    cases = [shown(text, CASE_LENGTH) for text in map(describe, finding.cases[:CASES_SHOWN]) if text]
    pictures = []
    if finding.kind not in WITHOUT_PICTURES:
        for case in _one_for_each_image(finding.cases):
            picture = _picture_of(report.splits[finding.split], case)
            if picture is not None:
                pictures.append(picture)
    return {
        "severity": kind.severity,
        "split": finding.split,
        "count": len(finding.cases),
        "title": kind.title,
        "advice": kind.advice,
        "cases": cases,
        "hidden": max(0, len(finding.cases) - CASES_SHOWN),
        "pictures": pictures,
    }


def _class_sample(report: HealthReport, row: Mapping[str, Any], sample: ClassSamples) -> dict[str, Any]:
    """What the page says of a class above its samples, given its row of the table."""
    assert report.classes is not None
    beginning = f"{report.classes.names[sample.label]} (category {row['category_id']}): "
    return {
        "warnings": [
            shown(f"{finding.split}: {case.detail.removeprefix(beginning)}.", CASE_LENGTH)
            for finding in report.findings
            if finding.kind in CLASS_SHAPE_KINDS
            for case in finding.cases
            if case.detail.startswith(beginning)
        ],
        "name": row["name"],
        "category_id": row["category_id"],
        "boxes": sample.boxes,
        "images": sample.images,
        "pictures": sample.pictures,
        "medians": dict(zip(MEDIAN_COLUMNS, medians_of(row), strict=True)),
    }


def _one_for_each_image(cases: Sequence[Case]) -> list[Case]:
    chosen: dict[int, Case] = {}
    for case in cases:
        if case.image_id is not None and case.image_id not in chosen:
            chosen[case.image_id] = case
            if len(chosen) == PICTURES_SHOWN:
                break
    return list(chosen.values())


def _picture_of(split: SplitHealth, case: Case) -> Picture | None:
    if split.annotations is None:
        return None
    for index, entry in enumerate(split.annotations.images):
        if entry.id == case.image_id:
            return None if split.facts[index].error else picture_of_case(split, index, case)
    return None


def _plots(report: HealthReport) -> list[dict[str, str]]:
    splits = [split for split in report.splits.values() if split.annotations is not None]
    if not splits:
        return []
    names = [split.name for split in splits]
    plots = []

    def add(figure: Figure, title: str) -> None:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks; the name is in the table
            figure.savefig(buffer, format="png", dpi=100)
        plots.append({"source": data_uri("png", buffer.getvalue()), "title": title})

    figure, axes = _figure("Boxes in an image")
    per_image = [split.boxes_per_image() for split in splits]
    highest = max((int(counts.max()) for counts in per_image if len(counts)), default=0)
    step = max(1, -(-highest // 40))
    axes.hist(per_image, bins=np.arange(0, highest + 2 * step, step) - 0.5, label=names)
    axes.set_xlabel("boxes")
    axes.set_ylabel("images")
    _legend(axes)
    add(figure, "Histogram of boxes in an image")

    figure, axes = _figure("Size of boxes")
    sides = [np.maximum(np.sqrt(split.box_sizes().prod(axis=1)), 0.5) for split in splits]
    if any(len(values) for values in sides):
        longest = max(values.max() for values in sides if len(values))
        axes.hist(sides, bins=np.geomspace(0.5, max(1.0, longest) * 1.01, 40).tolist(), label=names)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for limit in (32, 96):
        axes.axvline(limit, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("square root of the area in pixels (dotted: 32, 96)")
    axes.set_ylabel("boxes")
    _legend(axes)
    add(figure, "Histogram of box sizes")

    figure, axes = _figure("Size of images")
    for split in splits:
        sizes = split.image_sizes()
        axes.scatter(sizes[:, 1], sizes[:, 0], s=14, alpha=0.5, label=split.name)
    axes.set_xlabel("width in pixels")
    axes.set_ylabel("height in pixels")
    largest = max((int(split.image_sizes().max(initial=1)) for split in splits), default=1)
    axes.set_xlim(0, largest * 1.08)
    axes.set_ylim(0, largest * 1.08)
    _legend(axes)
    add(figure, "Width and height of images")

    rows = sorted(class_rows(report), key=lambda row: -sum(row["boxes"].values()))[:CLASSES_SHOWN]
    if rows:
        figure, axes = _figure(
            "Boxes of each class" if len(rows) < CLASSES_SHOWN else "Boxes of the most frequent classes", rows=len(rows)
        )
        left = np.zeros(len(rows))
        for name in [split.name for split in splits if split.counts]:
            values = np.array([row["boxes"][name] for row in rows])
            axes.barh(range(len(rows)), values, left=left, label=name)
            left += values
        labels = [shown(row["name"], NAME_LENGTH).replace("$", r"\$") for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("boxes")
        _legend(axes)
        add(figure, "Boxes of each class")
    return plots


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # matplotlib warns where nothing is drawn
        axes.legend()


def _figure(title: str, rows: int = 0) -> tuple[Figure, Any]:
    height = max(3.6, 0.22 * rows + 1)
    figure = Figure(figsize=(5.4, height))
    # margins by hand: matplotlib's own layout draws everything twice
    figure.subplots_adjust(left=0.34 if rows else 0.13, right=0.97, bottom=0.55 / height, top=1 - 0.35 / height)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    return figure, axes
