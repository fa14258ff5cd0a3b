"""The metrics of evaluation: COCO average precision, and F1 over the score threshold."""

from dino_lightning.metrics.backends import EvaluatedImage
from dino_lightning.metrics.coco_eval import CocoMetric
from dino_lightning.metrics.curves import (
    Matches,
    OperatingPoint,
    PrecisionRecallCurve,
    assign_detections,
    coco_overlaps,
    match_detections,
    match_images,
)
from dino_lightning.metrics.results import ClassResult, Evaluation

__all__ = [
    "ClassResult",
    "CocoMetric",
    "EvaluatedImage",
    "Evaluation",
    "Matches",
    "OperatingPoint",
    "PrecisionRecallCurve",
    "assign_detections",
    "coco_overlaps",
    "match_detections",
    "match_images",
]
