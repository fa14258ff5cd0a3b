"""All numbers of a report as one JSON object: the content of the page, and what another run is compared with."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.metrics import Evaluation, PrecisionRecallCurve
from dino_lightning.metrics.backends import MAX_DETECTIONS
from dino_lightning.report.errors import (
    CORRECTABLE_KINDS,
    ERROR_KINDS,
    FALSE_KINDS,
    REASONS,
    SEVERAL_CLASSES_KINDS,
    ClassifiedImage,
    classify_image,
    f1_of,
    f1_without,
)
from dino_lightning.structures import GroundTruth

SCHEMA = 2  # 1: other names of the error kinds, see `compare.load_report`
KIND = "dino_lightning evaluation"
RECALLS = np.linspace(0, 1, 101)
THRESHOLDS = np.linspace(0, 1, 101)
IOUS = {"0.50": 0, "0.75": 5, "0.90": 8}  # of the precision-recall curves, and their place in COCO's array
AREAS = {"small": 1, "medium": 2, "large": 3}  # and their place in COCO's array
LIMITS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # square pixels, COCO's own
BINS = 10  # of scores


@dataclass(frozen=True)
class Source:
    """What was evaluated.

    Attributes:
        stage: "validate" or "test".
        annotations: the annotations of the evaluated images.
        category_ids: the `category_id` of each label.
        checkpoint: path of the evaluated weights; empty if there were none.
        deformable_attention: which implementation computed it, such as "Triton kernel"; empty if it is not known.
        residual_norm: the same of the sums with their layer norms.
        tta_views: in how many ways each image was seen, see `DINOModule`.
    """

    stage: str
    annotations: CocoAnnotations
    category_ids: Sequence[int]
    checkpoint: str = ""
    deformable_attention: str = ""
    residual_norm: str = ""
    tta_views: int = 1


def summarise(evaluation: Evaluation, source: Source, *, threshold: float) -> dict[str, Any]:
    """All numbers of a report, with None where there is nothing to measure.

    Args:
        evaluation: images, detections and metrics.
        source: what was evaluated.
        threshold: lowest score of the detections that errors, counts and images are about.
    """
    tally = _Tally(len(evaluation.class_names))
    names = {entry.id: entry.file_name for entry in source.annotations.images}
    rows = []
    for image_id, image in zip(evaluation.image_ids, evaluation.images, strict=True):
        classified = classify_image(image, threshold=threshold, iou_threshold=evaluation.iou_threshold)
        tally.add(classified, np.bincount(image.truth.labels[~image.truth.iscrowd], minlength=len(tally.counted_off)))
        rows.append(image_row(image_id, names.get(image_id, ""), classified))
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "stage": source.stage,
        "checkpoint": source.checkpoint,
        "deformable_attention": source.deformable_attention,
        "residual_norm": source.residual_norm,
        "tta_views": source.tta_views,
        "annotations": str(source.annotations.path),
        "num_images": len(rows),
        "num_boxes": int(evaluation.matches.num_boxes.sum()),
        "num_detections": len(evaluation.matches.scores),
        "threshold": threshold,
        "iou_threshold": evaluation.iou_threshold,
        "values": {name: _number(value) for name, value in evaluation.values.items() if "/" not in name},
        "at_threshold": _at_threshold(tally),
        "sizes": _sizes(evaluation),
        "classes": _classes(evaluation, source, tally),
        "curves": _curves(evaluation),
        "errors": tally.errors(),
        "missed_because": {reason: tally.reasons[reason] for reason in REASONS},
        "confusion": [
            {"true": true, "predicted": predicted, "count": count}
            for (true, predicted), count in sorted(tally.confusion.items())
        ],
        "calibration": _calibration(evaluation, threshold),
        "counts": counting_errors(rows),
        "crowded_images": sum(_most_of_a_class(image.truth) > MAX_DETECTIONS for image in evaluation.images),
        "images": rows,
    }


class _Tally:
    """Sums over the images; -1 in `confusion` stands for "no ground truth" and for "not found"."""

    def __init__(self, num_classes: int) -> None:
        self.by_class = {kind: np.zeros(num_classes, np.int64) for kind in ("correct", *ERROR_KINDS)}
        self.counted_off = np.zeros(num_classes, np.int64)  # sum over images of |counted - true|
        self.correctable: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.confusion: Counter[tuple[int, int]] = Counter()

    def add(self, classified: ClassifiedImage, true_by_class: npt.NDArray[np.int64]) -> None:
        counted = np.zeros_like(true_by_class)
        mistaken = set()
        label_of_missed = {one.index: one.label for one in classified.missed}
        for one in classified.detections:
            if one.kind == "ignored":
                continue
            counted[one.label] += 1
            self.by_class[one.kind][one.label] += 1
            self.correctable[one.kind] += one.instead_of >= 0
            true = one.label if one.kind == "correct" else -1
            if one.kind == "classification" and one.instead_of >= 0:
                true = label_of_missed[one.instead_of]
                mistaken.add(one.instead_of)
            self.confusion[true, one.label] += 1
        for missed in classified.missed:
            self.by_class["missed"][missed.label] += 1
            self.reasons[missed.reason] += 1
            if missed.index not in mistaken:
                self.confusion[missed.label, -1] += 1
        self.counted_off += np.abs(counted - true_by_class)

    def counts(self) -> dict[str, int]:
        return {kind: int(values.sum()) for kind, values in self.by_class.items()}

    def errors(self) -> list[dict[str, Any]]:
        """The number of errors of each kind, and what F1 would gain without them."""
        counts = self.counts()
        explained = sum(self.reasons[reason] for reason in CORRECTABLE_KINDS)
        f1 = f1_of(counts["correct"], sum(counts[kind] for kind in FALSE_KINDS), counts["missed"])
        return [
            {
                "kind": kind,
                "count": counts[kind],
                "f1_gained": _number(f1_without(kind, counts, self.correctable, explained) - f1, lowest=-2),
            }
            for kind in ERROR_KINDS
            if kind not in SEVERAL_CLASSES_KINDS or len(self.counted_off) > 1
        ]


def _most_of_a_class(truth: GroundTruth) -> int:
    """Number of ground-truth boxes of the most frequent class of an image."""
    return int(np.bincount(truth.labels[~truth.iscrowd]).max(initial=0))


def image_row(image_id: int, file_name: str, classified: ClassifiedImage) -> dict[str, Any]:
    """The row of one image: its F1 and how many boxes of each kind there are."""
    return {
        "image_id": image_id,
        "file_name": file_name,
        "true": classified.num_boxes,
        "counted": classified.num_counted,
        "f1": round(classified.f1, 6),
        "correct": classified.count("correct"),
        **{kind: classified.count(kind) for kind in ERROR_KINDS},
    }


def counting_errors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well boxes are counted. The mean error is signed: +1 is one box too many in each image."""
    off = np.array([row["counted"] - row["true"] for row in rows], dtype=np.int64)
    if not len(off):
        return dict.fromkeys(("true", "counted"), 0) | dict.fromkeys(
            ("exact", "within_one", "mean_error", "mean_absolute_error", "largest_error")
        )
    return {
        "true": sum(row["true"] for row in rows),
        "counted": sum(row["counted"] for row in rows),
        "exact": _number((off == 0).mean()),
        "within_one": _number((np.abs(off) <= 1).mean()),
        "mean_error": _number(off.mean(), lowest=-np.inf),
        "mean_absolute_error": _number(np.abs(off).mean()),
        "largest_error": int(off[np.argmax(np.abs(off))]),
    }


def _at_threshold(tally: _Tally) -> dict[str, Any]:
    counts = tally.counts()
    correct, missed, wrong = counts["correct"], counts["missed"], sum(counts[kind] for kind in FALSE_KINDS)
    return {
        "correct": correct,
        "precision": _number(correct / (correct + wrong)) if correct + wrong else None,
        "recall": _number(correct / (correct + missed)) if correct + missed else None,
        "f1": _number(f1_of(correct, wrong, missed)) if correct + missed else None,
    }


def _sizes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Average precision of all boxes, and of small, medium and large ones."""
    areas = [image.truth.area[~image.truth.iscrowd] for image in evaluation.images]
    area = np.concatenate([np.zeros(0), *areas])
    rows = []
    for name, (least, most) in {"all": (-np.inf, np.inf), **LIMITS}.items():
        precision = evaluation.precision[..., AREAS.get(name, 0)]
        rows.append(
            {
                "name": name,
                "num_boxes": int(((area >= least) & (area <= most)).sum()),
                "AP": _mean(precision),
                "AP50": _mean(precision[0]),
                "AP75": _mean(precision[5]),
            }
        )
    return rows


def _classes(evaluation: Evaluation, source: Source, tally: _Tally) -> list[dict[str, Any]]:
    rows = []
    for one in evaluation.classes:
        precision = evaluation.precision[:, :, one.label]
        rows.append(
            {
                "label": one.label,
                "category_id": source.category_ids[one.label],
                "name": one.name,
                "num_boxes": one.num_boxes,
                "AP": _number(one.ap),
                "AP50": _number(one.ap50),
                "AP75": _mean(precision[5, :, 0]),
                **{f"AP_{name}": _mean(precision[:, :, area]) for name, area in AREAS.items()},
                "best_f1": _number(one.f1),
                "best_precision": _number(one.precision),
                "best_recall": _number(one.recall),
                "best_threshold": _number(one.threshold),
                **{kind: int(values[one.label]) for kind, values in tally.by_class.items()},
                "count_mean_absolute_error": _number(tally.counted_off[one.label] / max(1, len(evaluation.images))),
            }
        )
    return rows


def _curves(evaluation: Evaluation) -> dict[str, Any]:
    """Precision at 101 recalls (COCO's, 0 where a recall is not reached), and F1 at 101 thresholds."""
    overall = {}
    for name, index in IOUS.items():
        values = evaluation.precision[index, :, :, 0]
        measured = values[:, (values > -1).all(axis=0)]
        overall[name] = measured.mean(axis=1).round(4).tolist() if measured.size else None
    classes = []
    for one, curve in zip(evaluation.classes, evaluation.matches.class_curves(), strict=True):
        precision = evaluation.precision[0, :, one.label, 0] if one.num_boxes else None
        classes.append(
            {
                "label": one.label,
                "precision_at_recall": None if precision is None else precision.round(4).tolist(),
                "f1_at_threshold": _over_thresholds(curve)["f1"] if one.num_boxes else None,
            }
        )
    over_thresholds = _over_thresholds(evaluation.matches.curve()) if evaluation.matches.num_boxes.any() else None
    return {
        "recalls": RECALLS.round(2).tolist(),
        "thresholds": THRESHOLDS.round(2).tolist(),
        "precision_at_recall": overall,
        "at_threshold": over_thresholds,
        "classes": classes,
    }


def _over_thresholds(curve: PrecisionRecallCurve) -> dict[str, list[float | None]]:
    """Precision, recall and F1 at each of `THRESHOLDS`; the precision is None where no detection is left."""
    last = np.searchsorted(-curve.scores, -THRESHOLDS, side="right") - 1  # the lowest score that is kept
    at: dict[str, list[float | None]] = {}
    for name, values, without in (
        ("precision", curve.precision, None),
        ("recall", curve.recall, 0),
        ("f1", curve.f1, 0),
    ):
        at[name] = [without if index < 0 else round(float(values[index]), 4) for index in last.tolist()]
    return at


def _calibration(evaluation: Evaluation, threshold: float) -> dict[str, Any]:
    """How often detections of a score are correct: of those with a calibrated score of 0.7, seven in ten are.

    `error` is the expected calibration error: the difference of score and share, averaged over all detections.
    `error_kept` is the same for the detections that reach the threshold, since most scores lie far below it.
    """
    counted = ~evaluation.matches.is_ignored
    scores = evaluation.matches.scores[counted].astype(np.float64)
    correct = evaluation.matches.is_true_positive[counted]
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    kept = scores >= threshold
    return {
        "error": _calibration_error(scores, correct, bins),
        "error_kept": _calibration_error(scores[kept], correct[kept], bins[kept]),
        "bins": [
            {
                "from": index / BINS,
                "to": (index + 1) / BINS,
                "count": int((bins == index).sum()),
                "mean_score": _number(scores[bins == index].mean()) if (bins == index).any() else None,
                "correct": _number(correct[bins == index].mean()) if (bins == index).any() else None,
            }
            for index in range(BINS)
        ],
    }


def _calibration_error(
    scores: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], bins: npt.NDArray[np.int64]
) -> float | None:
    if not len(scores):
        return None
    off = np.bincount(bins, weights=scores - correct, minlength=BINS)
    return _number(np.abs(off).sum() / len(scores))


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    measured = values[values > -1]
    return _number(measured.mean()) if measured.size else None


def _number(value: Any, lowest: float = 0.0) -> float | None:
    """Rounded to six decimals; None below `lowest`, as for COCO's -1, "nothing to measure"."""
    return round(float(value), 6) if value >= lowest else None
