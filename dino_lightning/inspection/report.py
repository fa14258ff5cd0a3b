"""The result of an inspection: the numbers of each split, and the findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dino_lightning.data.classes import Classes
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.findings import Finding, Severity
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.inspection.image_facts import ImageFacts


@dataclass(frozen=True)
class SplitHealth:
    """What was found in one split.

    Attributes:
        name: "train", "val" or "test".
        files: the annotation file and the image folder.
        annotations: the part of the annotations that could be read, or None.
        facts: one for each image in `annotations`.
        counts: boxes to learn from, by label of the training classes.
    """

    name: str
    files: SplitFiles
    annotations: CocoAnnotations | None
    facts: Sequence[ImageFacts]
    counts: Sequence[int]

    def boxes_per_image(self) -> npt.NDArray[np.int64]:
        """(images,) boxes to learn from in each image."""
        if self.annotations is None:
            return np.zeros(0, np.int64)
        return learnable_boxes_per_image(self.annotations)

    def box_sizes(self) -> npt.NDArray[np.float64]:
        """(boxes, 2) width and height in pixels of the boxes to learn from, as clipped to their images."""
        if self.annotations is None:
            return np.zeros((0, 2))
        source = self.annotations
        boxes = clipped_boxes(source)[learnable_boxes(source)]
        return boxes[:, 2:] - boxes[:, :2]

    def box_areas(self) -> npt.NDArray[np.float64]:
        """(boxes,) square pixels of the boxes to learn from: the `area` by which evaluation counts them."""
        if self.annotations is None:
            return np.zeros(0)
        return self.annotations.area[learnable_boxes(self.annotations)]

    def relative_box_sizes(self) -> npt.NDArray[np.float64]:
        """(boxes,) square root of the area of each box to learn from, divided by that of its image; 0-1."""
        if self.annotations is None:
            return np.zeros(0)
        areas = np.array([image.size[0] * image.size[1] for image in self.annotations.images], dtype=np.float64)
        ratios: npt.NDArray[np.float64] = np.sqrt(
            self.box_sizes().prod(axis=1) / np.repeat(areas, self.boxes_per_image())
        )
        return ratios

    def image_sizes(self) -> npt.NDArray[np.int64]:
        """(images, 2) height and width in pixels of the images that could be decoded."""
        return np.array([fact.size for fact in self.facts if not fact.error], dtype=np.int64).reshape(-1, 2)


@dataclass
class HealthReport:
    """What `inspect_dataset` found.

    Attributes:
        splits: by name.
        classes: the training classes, or None if the training file cannot be used.
        findings: most severe first.
    """

    splits: dict[str, SplitHealth]
    classes: Classes | None
    findings: list[Finding] = field(default_factory=list)

    def count(self, severity: Severity) -> int:
        """Number of cases of a severity, over all findings."""
        return sum(len(finding.cases) for finding in self.findings if finding.severity == severity)

    def count_findings(self, severity: Severity) -> int:
        """Number of findings of a severity, each of one kind in one split."""
        return sum(finding.severity == severity for finding in self.findings)


def learnable_boxes(source: CocoAnnotations) -> npt.NDArray[np.bool_]:
    """(A,) the boxes to learn from: with an area, and no crowd regions."""
    return source.learnable


def learnable_boxes_per_image(source: CocoAnnotations) -> npt.NDArray[np.int64]:
    """(images,) number of boxes to learn from in each image."""
    return source.learnable_per_image()


def clipped_boxes(source: CocoAnnotations) -> npt.NDArray[np.float64]:
    """(A, 4) boxes clipped to their images, corners in pixels."""
    owners = np.repeat(np.arange(len(source.images)), np.diff(source.offsets))
    sizes = np.array([image.size for image in source.images], dtype=np.float64)[owners]
    return np.clip(source.boxes_xyxy, 0, sizes[:, [1, 0, 1, 0]])
