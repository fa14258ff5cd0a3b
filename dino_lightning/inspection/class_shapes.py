"""How the boxes of each class look, and classes whose boxes look like nothing that a detector should learn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dino_lightning.data.classes import Classes
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.findings import Case
from dino_lightning.inspection.checks import Found
from dino_lightning.inspection.report import HealthReport, clipped_boxes, learnable_boxes

FEWEST_BOXES = 20  # to say something about a class
FEWEST_IMAGES = 5
SLIVER = 8.0  # times as long as wide
NEARLY_ALL = 0.9
SAME = 1.0  # pixels
SMALLEST = 4.0  # pixels; boxes below that are no boxes in pixels, which is another finding


@dataclass(frozen=True)
class ClassShape:
    """The medians of the boxes to learn from of one class.

    Attributes:
        width: in pixels.
        height: in pixels.
        aspect_ratio: of width to height.
        elongation: of the longer to the shorter side; among walls in both directions the width says little.
        percent_of_image: of the area of the image.
    """

    width: float
    height: float
    aspect_ratio: float
    elongation: float
    percent_of_image: float


def class_shapes(report: HealthReport) -> list[ClassShape | None]:
    """For each training class the medians over all splits, or None for a class without boxes."""
    if report.classes is None:
        return []
    labels, sizes, shares = [np.zeros(0, np.int64)], [np.zeros((0, 2))], [np.zeros(0)]
    for split in report.splits.values():
        if split.annotations is not None:
            labels.append(report.classes.labels_of(split.annotations)[learnable_boxes(split.annotations)])
            sizes.append(split.box_sizes())
            shares.append(split.relative_box_sizes() ** 2)
    size, share = np.concatenate(sizes), np.concatenate(shares)
    return [
        _shape(size[rows], share[rows]) if len(rows) else None
        for rows in rows_of_each(np.concatenate(labels), len(report.classes))
    ]


def rows_of_each(labels: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    """For each label from 0 to `count` - 1 the rows, ascending, that have it; those of label -1 are in none."""
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(count + 1))
    return [order[start:end] for start, end in itertools.pairwise(ends.tolist())]


def _shape(sizes: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]) -> ClassShape:
    width, height = np.median(sizes, axis=0).tolist()
    ratios = sizes[:, 0] / sizes[:, 1]
    elongation = np.median(np.maximum(ratios, 1 / ratios))
    return ClassShape(width, height, float(np.median(ratios)), float(elongation), 100 * float(np.median(shares)))


def check_class_shapes(found: Found, split: str, source: CocoAnnotations, classes: Classes | None) -> None:
    """Find classes whose boxes are nearly all slivers, or all alike."""
    if classes is None:
        return
    learnable = np.flatnonzero(learnable_boxes(source))
    owners = np.repeat(np.arange(len(source.images)), np.diff(source.offsets))[learnable]
    boxes = clipped_boxes(source)[learnable]
    image_sizes = np.array([image.size[::-1] for image in source.images], dtype=np.float64)[owners]
    for label, rows in enumerate(rows_of_each(classes.labels_of(source)[learnable], len(classes))):
        if len(rows) < FEWEST_BOXES:
            continue
        what = f"{classes.names[label]} (category {classes.category_ids[label]})"
        for kind, sentence in (
            ("class-slivers", _slivers(boxes[rows])),
            ("class-all-the-same", _all_the_same(boxes[rows], image_sizes[rows], owners[rows])),
        ):
            if sentence:
                found[kind, split].append(Case(f"{what}: {sentence}"))


def _slivers(boxes_xyxy: npt.NDArray[np.float64]) -> str:
    sides = np.sort(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1)  # the shorter one first
    count = int((sides[:, 1] >= SLIVER * sides[:, 0]).sum())
    if count < NEARLY_ALL * len(sides):
        return ""
    shorter, longer = np.median(sides, axis=0).tolist()
    return (
        f"{count} of {len(sides)} boxes are {SLIVER:g} times as long as wide or more; median "
        f"{_number(shorter)} x {_number(longer)} px"
    )


def _all_the_same(
    boxes_xyxy: npt.NDArray[np.float64], image_sizes: npt.NDArray[np.float64], owners: npt.NDArray[np.int64]
) -> str:
    """Boxes (N, 4) in pixels, (N, 2) width and height of their images, and (N,) which images they are."""
    images = len(np.unique(owners))
    if images < FEWEST_IMAGES:
        return ""
    sizes = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    width, height = np.median(sizes, axis=0).tolist()
    if max(width, height) < SMALLEST:
        return ""
    everything = f"all {len(sizes)} boxes in {images} images"
    places = boxes_xyxy / image_sizes[:, [0, 1, 0, 1]]
    tolerance = SAME / image_sizes.min(axis=0)[[0, 1, 0, 1]]
    if (np.ptp(places, axis=0) <= tolerance).all():
        x1, y1, x2, y2 = (100 * np.median(places, axis=0)).tolist()
        return (
            f"{everything} lie at the same place, from {_number(x1)} to {_number(x2)} % of the width and from "
            f"{_number(y1)} to {_number(y2)} % of the height"
        )
    if (np.ptp(sizes, axis=0) <= SAME).all():
        return f"{everything} are {_number(width)} x {_number(height)} px"
    return ""


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
