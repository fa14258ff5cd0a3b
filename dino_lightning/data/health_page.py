"""A health report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from dino_lightning.data.coco import DataError
from dino_lightning.data.findings import KINDS, SEVERITIES, Case, Finding
from dino_lightning.data.health import HealthReport, SplitHealth
from dino_lightning.data.health_text import CLASSES_SHOWN, class_rows, describe, splits_rows
from dino_lightning.data.images import read_image

CASES_SHOWN = 200  # of each finding
PICTURES_SHOWN = 6  # of each finding
SAMPLES_SHOWN = 12  # of each split
PICTURE_SIDE = 300  # pixels
MOST_BOXES = 300  # drawn on one picture
BOX_COLOUR, CASE_COLOUR = "#00798c", "#d1495b"
WITHOUT_PICTURES = {"image-missing", "image-undecodable", "not-listed", "no-boxes"}


@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        source: a data URI.
        caption: what it shows.
    """

    source: str
    caption: str


def as_html(report: HealthReport, root: str) -> str:
    """The page: findings with pictures, tables, plots and samples; nothing is loaded from elsewhere."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        resources.files("dino_lightning.data").joinpath("health.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        root=root,
        severities=SEVERITIES,
        counts={severity: report.count(severity) for severity in SEVERITIES},
        findings=[_finding(report, finding) for finding in report.findings],
        split_rows=splits_rows(report),
        classes=class_rows(report),
        class_splits=[split.name for split in report.splits.values() if split.counts],
        plots=_plots(report),
        samples={name: _samples(split) for name, split in report.splits.items() if split.annotations is not None},
    )


def _finding(report: HealthReport, finding: Finding) -> dict[str, Any]:
    kind = KINDS[finding.kind]
    cases = [text for text in map(describe, finding.cases[:CASES_SHOWN]) if text]
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
    """Images at random, the same ones each time."""
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
    """The image with its boxes; that of the case stands out, with its surroundings."""
    source = split.annotations
    assert source is not None
    entry = source.images[index]
    try:
        pixels = read_image(source.image_path(index)).permute(1, 2, 0).numpy()
    except DataError:  # it could be read a moment ago
        return None
    image = Image.fromarray(pixels)
    scale = min(1.0, PICTURE_SIDE / max(image.size))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = ImageDraw.Draw(image)
    rows = range(int(source.offsets[index]), int(source.offsets[index + 1]))
    marked = [row for row in rows if case is not None and source.annotation_ids[row] == case.annotation_id]
    for row in [row for row in rows if row not in marked][:MOST_BOXES] + marked:
        x1, y1, x2, y2 = (source.boxes_xyxy[row] * scale).clip(-10, 10 + max(image.size)).tolist()
        box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        canvas.rectangle(box, outline=CASE_COLOUR if row in marked else BOX_COLOUR, width=3 if row in marked else 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    caption = f"image {entry.id}: {entry.file_name}, {entry.size[1]} x {entry.size[0]}"
    detail = case.detail if case is not None else f"{len(rows)} boxes"
    return Picture(_data_uri("jpeg", buffer.getvalue()), f"{caption}. {detail}" if detail else caption)


def _plots(report: HealthReport) -> list[dict[str, str]]:
    splits = [split for split in report.splits.values() if split.annotations is not None]
    if not splits:
        return []
    names = [split.name for split in splits]
    plots = []

    def add(figure: Figure, title: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        plots.append({"source": _data_uri("png", buffer.getvalue()), "title": title})

    figure, axes = _figure("Boxes in an image")
    per_image = [split.boxes_per_image() for split in splits]
    highest = max((int(counts.max()) for counts in per_image if len(counts)), default=0)
    step = max(1, -(-highest // 40))
    axes.hist(per_image, bins=np.arange(0, highest + 2 * step, step) - 0.5, label=names)
    axes.set_xlabel("boxes")
    axes.set_ylabel("images")
    axes.legend()
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
    axes.legend()
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
    axes.legend()
    add(figure, "Width and height of images")

    rows = sorted(class_rows(report), key=lambda row: -sum(row["boxes"].values()))[:CLASSES_SHOWN]
    if rows:
        figure, axes = _figure(
            "Boxes of each class" if len(rows) < CLASSES_SHOWN else "Boxes of the commonest classes", rows=len(rows)
        )
        left = np.zeros(len(rows))
        for name in [split.name for split in splits if split.counts]:
            values = np.array([row["boxes"][name] for row in rows])
            axes.barh(range(len(rows)), values, left=left, label=name)
            left += values
        labels = [row["name"] if len(row["name"]) <= 24 else row["name"][:21] + "..." for row in rows]
        axes.set_yticks(range(len(rows)), [label.replace("$", r"\$") for label in labels], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("boxes")
        axes.legend()
        add(figure, "Boxes of each class")
    return plots


def _figure(title: str, rows: int = 0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.4, max(3.6, 0.22 * rows + 1)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    return figure, axes


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
