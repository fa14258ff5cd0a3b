"""A health report as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from dino_lightning.console import shown
from dino_lightning.data.findings import KINDS, SEVERITIES, Case, Finding
from dino_lightning.data.images import read_image
from dino_lightning.errors import DataError
from dino_lightning.inspection.report import HealthReport, SplitHealth
from dino_lightning.inspection.text import CLASSES_SHOWN, SPREAD, class_rows, describe, splits_rows

CASES_SHOWN = 200  # of each finding
CASE_LENGTH = 400  # characters
CLASSES_LISTED = 1000
PICTURE_BYTES = 5_000_000  # of the images of all findings as base64; later findings have none
PICTURES_SHOWN = 6  # of each finding
SAMPLES_SHOWN = 12  # of each split
PICTURE_SIDE = 300  # pixels
LARGEST_SCALE = 4.0
SURROUNDINGS = 10  # times the longer side of a box
NAME_LENGTH = 24  # characters of a class name in a plot
MOST_BOXES = 300  # drawn on one image
BOX_COLOUR, CASE_COLOUR = "#00798c", "#d1495b"
WITHOUT_PICTURES = {"image-missing", "image-undecodable", "not-listed", "no-boxes"}


@dataclass(frozen=True)
class Picture:
    """An image with boxes drawn on it.

    Attributes:
        source: a data URI.
        caption: its file, size and case.
    """

    source: str
    caption: str


def as_html(report: HealthReport, root: str) -> str:
    """The page as HTML text: findings with images, tables, plots and samples; it loads nothing."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        resources.files("dino_lightning.inspection").joinpath("health.html.jinja").read_text(encoding="utf-8")
    )
    rows = class_rows(report)
    for row in rows:
        row["name"] = shown(row["name"], CASE_LENGTH)
    page = template.render(
        root=shown(root, CASE_LENGTH),
        spread=SPREAD,
        severities=SEVERITIES,
        counts={severity: report.count(severity) for severity in SEVERITIES},
        findings=_within_budget([_finding(report, finding) for finding in report.findings]),
        split_rows=splits_rows(report),
        classes=rows[:CLASSES_LISTED],
        classes_hidden=max(0, len(rows) - CLASSES_LISTED),
        class_splits=[split.name for split in report.splits.values() if split.counts],
        plots=_plots(report),
        samples={name: _samples(split) for name, split in report.splits.items() if split.annotations is not None},
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


def _one_for_each_image(cases: Sequence[Case]) -> list[Case]:
    chosen: dict[int, Case] = {}
    for case in cases:
        if case.image_id is not None and case.image_id not in chosen:
            chosen[case.image_id] = case
            if len(chosen) == PICTURES_SHOWN:
                break
    return list(chosen.values())


def _samples(split: SplitHealth) -> list[Picture]:
    """Some images drawn at random, the same ones each time."""
    assert split.annotations is not None
    readable = [index for index, fact in enumerate(split.facts) if not fact.error]
    chosen = np.random.default_rng(0).permutation(len(readable))[:SAMPLES_SHOWN]
    pictures = [_draw(split, readable[number], None) for number in sorted(chosen.tolist())]
    return [picture for picture in pictures if picture is not None]


def _picture_of(split: SplitHealth, case: Case) -> Picture | None:
    if split.annotations is None:
        return None
    for index, entry in enumerate(split.annotations.images):
        if entry.id == case.image_id:
            return None if split.facts[index].error else _draw(split, index, case)
    return None


def _draw(split: SplitHealth, index: int, case: Case | None) -> Picture | None:
    """The image with its boxes, that of the case highlighted, and enlarged if it is small."""
    source = split.annotations
    assert source is not None
    entry = source.images[index]
    try:
        pixels = read_image(source.image_path(index)).permute(1, 2, 0).numpy()
    except (DataError, MemoryError):  # readable a moment ago
        return None
    image = Image.fromarray(pixels)
    rows = range(int(source.offsets[index]), int(source.offsets[index + 1]))
    marked = [row for row in rows if case is not None and source.annotation_ids[row] == case.annotation_id]
    left, top, right, bottom = _view(image.size, source.boxes_xyxy[marked])
    scale = min(1.0 if not marked else LARGEST_SCALE, PICTURE_SIDE / max(right - left, bottom - top))
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    image = image.resize(size, box=(left, top, right, bottom))
    canvas = ImageDraw.Draw(image)
    for row in [row for row in rows if row not in marked][:MOST_BOXES] + marked:
        corners = (source.boxes_xyxy[row] - [left, top, left, top]) * scale
        x1, y1, x2, y2 = corners.clip(-10, 10 + max(size)).tolist()
        box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        canvas.rectangle(box, outline=CASE_COLOUR if row in marked else BOX_COLOUR, width=3 if row in marked else 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    caption = f"image {entry.id}: {entry.file_name}, {entry.size[1]} x {entry.size[0]}"
    detail = case.detail if case is not None else f"{len(rows)} boxes"
    return Picture(
        _data_uri("jpeg", buffer.getvalue()), shown(f"{caption}. {detail}" if detail else caption, CASE_LENGTH)
    )


def _view(size: tuple[int, int], boxes_xyxy: npt.NDArray[np.float64]) -> tuple[int, int, int, int]:
    """The part of a (width, height) image to show: around the first box if that is small, else all of it."""
    width, height = size
    if len(boxes_xyxy) == 0:
        return 0, 0, width, height
    x1, y1, x2, y2 = boxes_xyxy[0].clip(0, [width, height, width, height]).tolist()
    side = round(max(abs(x2 - x1), abs(y2 - y1), 8.0)) * SURROUNDINGS
    if side >= max(width, height):
        return 0, 0, width, height
    window_width, window_height = min(side, width), min(side, height)
    left = min(max(0, round((x1 + x2 - window_width) / 2)), width - window_width)
    top = min(max(0, round((y1 + y2 - window_height) / 2)), height - window_height)
    return left, top, left + window_width, top + window_height


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
        plots.append({"source": _data_uri("png", buffer.getvalue()), "title": title})

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


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
