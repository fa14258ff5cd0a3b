"""What is measured in evaluation: COCO average precision, and F1 over the score threshold."""

from dino_lightning.metrics.coco_eval import ClassResult, CocoMetric
from dino_lightning.metrics.curves import (
    Matches,
    OperatingPoint,
    PrecisionRecallCurve,
    match_detections,
    match_images,
)

__all__ = [
    "ClassResult",
    "CocoMetric",
    "Matches",
    "OperatingPoint",
    "PrecisionRecallCurve",
    "match_detections",
    "match_images",
]
