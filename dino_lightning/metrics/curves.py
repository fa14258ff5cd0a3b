"""Precision, recall and F1 over the score threshold, from one matching of detections to ground truth.

The matching is COCO's (the order of pycocotools' `evaluateImg`): within an image and a class, detections in
descending score each take the unmatched ground-truth box they overlap best. A crowd region can be matched
repeatedly, and a detection that matches only a crowd region is neither a true nor a false positive. COCO's average
precision measures the ranking; these curves give precision, recall and F1 at each score threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from dino_lightning.structures import GroundTruth

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


class OperatingPoint(NamedTuple):
    """One point of a curve: keep the detections with a score of at least `threshold`."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """What each score threshold gives; T distinct scores, best first.

    Attributes:
        scores: (T,) float64, the thresholds: every distinct score among the detections that count,
            descending. Equal scores are one threshold, since no threshold can tell them apart.
        precision: (T,) float64, 0-1, right detections among those kept.
        recall: (T,) float64, 0-1, ground-truth boxes found; 0 where there are none.
        f1: (T,) float64, 0-1, harmonic mean of the two.
    """

    scores: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]

    @classmethod
    def from_matches(cls, scores: Floats, is_true_positive: Bools, num_boxes: int) -> Self:
        """The curve of detections that each are right or wrong.

        Args:
            scores: (D,) of the detections that count, in any order.
            is_true_positive: (D,) whether the detection is right.
            num_boxes: the number of ground-truth boxes.
        """
        order = np.argsort(-scores, kind="stable")
        descending = scores[order].astype(np.float64)
        # The last detection of each run of equal scores: a threshold lets the whole run in.
        last = np.flatnonzero(np.append(descending[1:] != descending[:-1], True)[: descending.size])
        found = np.cumsum(is_true_positive[order])[last]
        kept = last + 1
        return cls(
            scores=descending[last],
            precision=found / kept,
            recall=found / num_boxes if num_boxes else np.zeros(last.size),
            f1=2 * found / (kept + num_boxes),
        )

    @property
    def best(self) -> OperatingPoint:
        """The threshold with the highest F1 (the highest such threshold); all zero without detections."""
        if not self.scores.size:
            return OperatingPoint(0.0, 0.0, 0.0, 0.0)
        index = int(np.argmax(self.f1))
        return OperatingPoint(
            float(self.scores[index]),
            float(self.precision[index]),
            float(self.recall[index]),
            float(self.f1[index]),
        )


@dataclass(frozen=True)
class Matches:
    """Detections of many images after matching; D detections, K classes.

    Attributes:
        scores: (D,) float, 0-1.
        labels: (D,) int, contiguous labels 0..K-1.
        is_true_positive: (D,) bool, the detection was matched to a ground-truth box.
        is_ignored: (D,) bool, the detection fits only a crowd region and counts neither way.
        num_boxes: (K,) int, ground-truth boxes of each class, crowd regions left out.
    """

    scores: Floats
    labels: Ints
    is_true_positive: Bools
    is_ignored: Bools
    num_boxes: Ints

    def curve(self) -> PrecisionRecallCurve:
        """One curve for all classes together, at one common threshold; classes stay told apart."""
        counted = ~self.is_ignored
        return PrecisionRecallCurve.from_matches(
            self.scores[counted], self.is_true_positive[counted], int(self.num_boxes.sum())
        )

    def class_curves(self) -> list[PrecisionRecallCurve]:
        """The K curves of the classes, each with thresholds of its own."""
        counted = np.flatnonzero(~self.is_ignored)
        by_label = counted[np.argsort(self.labels[counted], kind="stable")]
        bounds = np.searchsorted(self.labels[by_label], np.arange(len(self.num_boxes) + 1))
        return [
            PrecisionRecallCurve.from_matches(
                self.scores[by_label[start:end]], self.is_true_positive[by_label[start:end]], int(count)
            )
            for start, end, count in zip(bounds[:-1], bounds[1:], self.num_boxes, strict=True)
        ]


def match_images(
    images: Iterable[tuple[Floats, Floats, Ints, GroundTruth]],
    num_classes: int,
    *,
    iou_threshold: float = 0.5,
) -> Matches:
    """Match the detections of many images to their ground truth.

    Args:
        images: per image boxes_xyxy (D, 4) in pixels, scores (D,), labels (D,) and the truth.
        num_classes: K; labels are 0..K-1.
        iou_threshold: lowest IoU at which a detection is a true positive.
    """
    # The first entries give the concatenation a type where there is no image.
    scores: list[Floats] = [np.zeros(0, np.float32)]
    labels: list[Ints] = [np.zeros(0, np.int64)]
    is_true_positive: list[Bools] = [np.zeros(0, np.bool_)]
    is_ignored: list[Bools] = [np.zeros(0, np.bool_)]
    num_boxes = np.zeros(num_classes, np.int64)
    for image_boxes_xyxy, image_scores, image_labels, truth in images:
        right, ignored = match_detections(
            image_boxes_xyxy, image_scores, image_labels, truth, iou_threshold=iou_threshold
        )
        scores.append(image_scores)
        labels.append(image_labels)
        is_true_positive.append(right)
        is_ignored.append(ignored)
        num_boxes += np.bincount(truth.labels[~truth.iscrowd], minlength=num_classes)
    return Matches(
        scores=np.concatenate(scores),
        labels=np.concatenate(labels),
        is_true_positive=np.concatenate(is_true_positive),
        is_ignored=np.concatenate(is_ignored),
        num_boxes=num_boxes,
    )


def match_detections(
    boxes_xyxy: Floats, scores: Floats, labels: Ints, truth: GroundTruth, *, iou_threshold: float = 0.5
) -> tuple[Bools, Bools]:
    """Match the detections of one image to its ground truth, each class by itself.

    Args:
        boxes_xyxy: (D, 4) corners in pixels.
        scores: (D,) in any order; of equal scores the earlier detection chooses first.
        labels: (D,) class of each detection.
        truth: the ground-truth boxes and crowd regions, in the same pixels and labels.
        iou_threshold: lowest IoU at which a detection is a true positive.

    Returns:
        is_true_positive (D,) bool: matched to a ground-truth box. is_ignored (D,) bool: matches only a crowd region.
    """
    taken, is_ignored = assign_detections(boxes_xyxy, scores, labels, truth, iou_threshold=iou_threshold)
    return taken >= 0, is_ignored


def assign_detections(
    boxes_xyxy: Floats, scores: Floats, labels: Ints, truth: GroundTruth, *, iou_threshold: float = 0.5
) -> tuple[npt.NDArray[np.int64], Bools]:
    """As `match_detections`, and which ground-truth box each detection was matched to.

    Returns:
        taken (D,) int64: the index of the box in `truth`, -1 where there is none. is_ignored (D,) bool: fits nothing
        but a crowd region.
    """
    taken = np.full(len(scores), -1, np.int64)
    if not len(scores) or not len(truth.labels):
        return taken, np.zeros(len(scores), np.bool_)
    overlaps = coco_overlaps(boxes_xyxy, truth.boxes_xyxy, truth.iscrowd)
    # COCO's own bound: at a threshold of 1 rounding must not reject a perfect box.
    fits = (overlaps >= min(iou_threshold, 1 - 1e-10)) & (labels[:, None] == truth.labels)
    fits_crowd = (fits & truth.iscrowd).any(axis=1)
    fits &= ~truth.iscrowd
    order = np.argsort(-scores, kind="stable")
    for index in order[fits.any(axis=1)[order]]:
        free = np.flatnonzero(fits[index])
        if free.size:
            # Reversed, because of equal overlaps COCO takes the last box.
            taken[index] = free[::-1][np.argmax(overlaps[index, free[::-1]])]
            fits[:, taken[index]] = False
    return taken, fits_crowd & (taken < 0)


def coco_overlaps(boxes_xyxy: Floats, truth_boxes_xyxy: Floats, truth_iscrowd: Bools) -> npt.NDArray[np.float64]:
    """(D, 4) and (N, 4) corners in pixels -> (D, N) IoU; for a crowd region intersection over detection area.

    In float64 and by way of width and height, as pycocotools computes it, so that a box on the threshold
    falls on the same side.
    """
    top_left, size = _top_left_and_size(boxes_xyxy)
    truth_top_left, truth_size = _top_left_and_size(truth_boxes_xyxy)
    bottom_right = np.minimum((top_left + size)[:, None], (truth_top_left + truth_size)[None])
    width, height = np.moveaxis(bottom_right - np.maximum(top_left[:, None], truth_top_left[None]), -1, 0)
    intersection = np.where((width > 0) & (height > 0), width * height, 0.0)
    area, truth_area = size.prod(axis=1)[:, None], truth_size.prod(axis=1)[None]
    union = np.where(truth_iscrowd, area, area + truth_area - intersection)
    overlaps: npt.NDArray[np.float64] = np.zeros_like(intersection)
    np.divide(intersection, union, out=overlaps, where=intersection > 0)
    return overlaps


def _top_left_and_size(boxes_xyxy: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(N, 4) corners -> (N, 2) x, y of the first corner and (N, 2) width, height, in the same unit."""
    corners: npt.NDArray[np.float64] = boxes_xyxy.astype(np.float64)
    return corners[:, :2], corners[:, 2:] - corners[:, :2]
