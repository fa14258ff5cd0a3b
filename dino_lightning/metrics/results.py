"""The results of an evaluation: per class, and with the images and matches behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dino_lightning.metrics.backends import EvaluatedImage
from dino_lightning.metrics.curves import Matches


@dataclass(frozen=True)
class ClassResult:
    """One class in the result of an evaluation; -1 where the class has no ground-truth box.

    Attributes:
        label: contiguous label 0..K-1.
        name: its name.
        num_boxes: ground-truth boxes, crowd regions left out.
        ap: average precision over IoU 0.50:0.95.
        ap50: average precision at IoU 0.50.
        f1: the best F1 over the class's own score thresholds.
        precision: at the threshold of the best F1.
        recall: at the threshold of the best F1.
        threshold: of the best F1, 0-1.
    """

    label: int
    name: str
    num_boxes: int
    ap: float
    ap50: float
    f1: float
    precision: float
    recall: float
    threshold: float


@dataclass(frozen=True)
class Evaluation:
    """An evaluation with its inputs: the images of all ranks, each once, and how their detections were matched.

    Attributes:
        image_ids: ids of the I images, ascending.
        images: their detections and ground truth, in the same order.
        class_names: of the K labels.
        values: what `CocoMetric.compute` returned.
        classes: what `CocoMetric.per_class` returned.
        matches: all detections, matched at `iou_threshold`.
        iou_threshold: the overlap from which a detection is right in F1, precision and recall.
        precision: (10, 101, K, 4) float64, COCO's precision for IoU 0.50:0.95, recall 0:1, classes, areas all / small /
            medium / large; -1 where there is no ground-truth box.
    """

    image_ids: tuple[int, ...]
    images: tuple[EvaluatedImage, ...]
    class_names: tuple[str, ...]
    values: dict[str, float]
    classes: list[ClassResult]
    matches: Matches
    iou_threshold: float
    precision: npt.NDArray[np.float64]
