"""The images of a report: which ones are shown, and the boxes drawn on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dino_lightning.console import shown
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.images import read_image
from dino_lightning.errors import DataError
from dino_lightning.metrics import EvaluatedImage, Evaluation
from dino_lightning.report.errors import ERROR_KINDS, ClassifiedImage, classify_image
from dino_lightning.report.tables import REASON_WORDS, WORDS

WORST = BEST = 12
MEDIAN = 6
MORE = 24  # images, with errors of a kind and class that the others do not show
SIDES = (1280, 960, 640)  # pixels of the long side; the first that fits into LARGEST_PICTURE, or the last
LARGEST_PICTURE = 120_000  # bytes
BUDGET = 6_500_000  # characters of all images, boxes and captions together; images beyond it are left out
MOST_BOXES = 300  # drawn of each kind on one image
MOST_LINES = 40  # of errors listed below an image
NAME_LENGTH = 40  # characters
DRAWN_FIRST = ("found", "ignored", "correct", "missed")  # errors are drawn over them
SHARE = 0.4  # where there are few images: the share among the worst, and among the best


@dataclass(frozen=True)
class Box:
    """A rectangle on an image.

    Attributes:
        kind: "found" or "missed" for a ground-truth box, else the kind of the detection.
        labels: of the box, and of the ground-truth box that it is about if that differs.
        corner: x, y in pixels of the image.
        size: width, height.
        caption: class and score, as written beside it in the large view.
        title: its kind in words.
    """

    kind: str
    labels: tuple[int, ...]
    corner: tuple[float, float]
    size: tuple[float, float]
    caption: str
    title: str


@dataclass(frozen=True)
class Picture:
    """An image with boxes drawn on it.

    Attributes:
        group: "worst", "median", "best" or "more".
        row: its numbers, as in the JSON report.
        source: a data URI, or empty if the file cannot be read.
        width: width of the image file in pixels.
        height: height of the image file in pixels.
        boxes: the boxes drawn on it, errors last.
    """

    group: str
    row: dict[str, Any]
    source: str
    width: int
    height: int
    boxes: tuple[Box, ...]

    @property
    def errors(self) -> list[str]:
        """One line for each error, at most `MOST_LINES`."""
        return [box.title for box in self.boxes if box.kind in ERROR_KINDS][:MOST_LINES]

    @property
    def weight(self) -> int:
        """Roughly the number of characters it takes on the page."""
        return len(self.source) + sum(220 + len(box.caption) + 2 * len(box.title) for box in self.boxes)


def pictures(
    evaluation: Evaluation, annotations: CocoAnnotations, rows: Sequence[dict[str, Any]], threshold: float
) -> list[Picture]:
    """The images to show, the worst first, within `BUDGET`."""
    place = {image_id: index for index, image_id in enumerate(evaluation.image_ids)}
    entries = {entry.id: index for index, entry in enumerate(annotations.images)}
    shown_pictures: list[Picture] = []
    left = BUDGET
    seen: set[str] = set()
    chosen, others = choose(rows)
    more = 0
    for group, row in [*chosen, *(("more", row) for row in others)]:
        if left < 0 or more == MORE:
            break
        image = evaluation.images[place[row["image_id"]]]
        classified = classify_image(image, threshold=threshold, iou_threshold=evaluation.iou_threshold)
        tokens = error_tokens(classified)
        if group == "more" and tokens <= seen:
            continue
        picture = _picture(group, row, image, classified, evaluation.class_names, annotations, entries[row["image_id"]])
        left -= picture.weight
        if left >= 0:
            seen |= tokens
            more += group == "more"
            shown_pictures.append(picture)
    return shown_pictures


def choose(rows: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, dict[str, Any]]], list[dict[str, Any]]]:
    """The worst, the median and the best images, in this order, and the others, worst first.

    Images are ranked by F1, then by errors, then by ground-truth boxes; the best group begins with the very best.
    """
    order = sorted(
        rows, key=lambda row: (row["f1"], -sum(row[kind] for kind in ERROR_KINDS), row["true"], row["image_id"])
    )
    worst = min(WORST, int(np.ceil(SHARE * len(order))))
    best = min(BEST, int(SHARE * len(order)))
    first = max(worst, (len(order) - MEDIAN) // 2)
    last = min(len(order) - best, first + MEDIAN)
    chosen = [("worst", row) for row in order[:worst]]
    chosen += [("median", row) for row in order[first:last]]
    chosen += [("best", row) for row in order[len(order) - best :][::-1]]
    return chosen, order[worst:first] + order[last : len(order) - best]


def error_tokens(classified: ClassifiedImage) -> set[str]:
    """The errors of an image as `kind:label`."""
    found = {f"{one.kind}:{one.label}" for one in classified.detections if one.kind in ERROR_KINDS}
    return found | {f"missed:{one.label}" for one in classified.missed}


def _picture(
    group: str,
    row: dict[str, Any],
    image: EvaluatedImage,
    classified: ClassifiedImage,
    class_names: Sequence[str],
    annotations: CocoAnnotations,
    index: int,
) -> Picture:
    height, width = annotations.images[index].size
    try:
        source = encode(read_image(annotations.image_path(index)).permute(1, 2, 0).numpy())
    except (DataError, MemoryError):  # readable a moment ago, or left out of the evaluation as unreadable
        source = ""
    names = [shown(name, NAME_LENGTH) for name in class_names]
    image = image._replace(boxes_xyxy=np.clip(image.boxes_xyxy, 0, [width, height, width, height]))  # to be seen
    return Picture(group, row, source, width, height, tuple(_boxes(image, classified, names)))


def encode(pixels: Any) -> str:
    """(h, w, 3) uint8 -> a JPEG as data URI, scaled down until it is small enough."""
    image = Image.fromarray(pixels)
    content = b""
    for side in SIDES:
        scale = min(1.0, side / max(image.size))
        if scale < 1:
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            image = image.resize(size, Image.Resampling.HAMMING)  # the fastest that keeps thin lines
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=82)
        content = buffer.getvalue()
        if len(content) <= LARGEST_PICTURE:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _boxes(image: EvaluatedImage, classified: ClassifiedImage, names: Sequence[str]) -> list[Box]:
    truth = image.truth
    missed = {one.index: one for one in classified.missed}
    drawn: list[Box] = []
    for index in np.flatnonzero(~truth.iscrowd).tolist():
        label = int(truth.labels[index])
        if index in missed:
            kind, caption = "missed", names[label]
            title = f"missed: {names[label]} ({REASON_WORDS[missed[index].reason]})"
        else:
            kind, caption, title = "found", "", f"ground truth {names[label]}, found"
        drawn.append(_box(kind, (label,), truth.boxes_xyxy[index], caption, title))
    for one in classified.detections:
        caption = f"{names[one.label]} {image.scores[one.index]:.2f}"
        labels: tuple[int, ...] = (one.label,)
        title = f"{WORDS.get(one.kind, 'in a crowd region, not counted')}: {caption}"
        if one.about >= 0:
            of = int(truth.labels[one.about])
            labels = (one.label,) if of == one.label else (one.label, of)
            title += f", IoU {one.overlap:.2f} with ground truth {names[of]}"
        drawn.append(_box(one.kind, labels, image.boxes_xyxy[one.index], caption, title))
    drawn.sort(key=lambda box: DRAWN_FIRST.index(box.kind) if box.kind in DRAWN_FIRST else len(DRAWN_FIRST))
    count: dict[str, int] = {}
    kept = []
    for box in drawn:
        count[box.kind] = count.get(box.kind, 0) + 1
        if count[box.kind] <= MOST_BOXES:
            kept.append(box)
    return kept


def _box(kind: str, labels: tuple[int, ...], corners: Any, caption: str, title: str) -> Box:
    x1, y1, x2, y2 = (round(float(value), 1) for value in corners)
    return Box(
        kind, labels, (min(x1, x2), min(y1, y2)), (round(abs(x2 - x1), 1), round(abs(y2 - y1), 1)), caption, title
    )
