"""COCO average precision and F1 as a torchmetrics metric that gathers once and evaluates once.

The evaluation itself is pycocotools' or its C++ rewrite faster-coco-eval (same numbers, several times
faster). This module adds the bookkeeping around it: results stay on the host, keyed by image id, so that the
images which a `DistributedSampler` repeats to fill the last batch count once; ranks exchange everything in
one gather; rank 0 evaluates while the others wait.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from dino_lightning.detections import Detections
from dino_lightning.metrics.backends import Backend, EvaluatedImage, average_precision
from dino_lightning.metrics.curves import OperatingPoint, PrecisionRecallCurve, match_images
from dino_lightning.metrics.results import ClassResult, Evaluation
from dino_lightning.structures import GroundTruth

NOTHING_TO_MEASURE = -1.0  # COCO's convention: there is no ground-truth box


class _Result(NamedTuple):
    """The metrics by name, and the row of each class."""

    values: dict[str, float]
    classes: list[ClassResult]


class CocoMetric(Metric):
    """COCO detection metrics over the images given to `update`, the same on every rank.

    `compute` returns Python floats, ready for `LightningModule.log_dict`; do not pass `sync_dist=True`, the
    ranks agree already. Every rank must call `compute`. Its keys:

    - `AP`, `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large`: COCO's average precision, at most 100
      detections for each class and image.
    - `AR`: COCO's average recall at 100 detections.
    - `F1`, `F1_precision`, `F1_recall`, `F1_threshold`: the best F1 over one common score threshold for all
      classes, at `f1_iou_threshold`, classes told apart, from all detections, as `predict` gives them.
    - with more than one class `AP_class/<name>`, `AP50_class/<name>` and `F1_class/<name>`, the last at the
      class's own best threshold.

    A value that cannot be computed is -1.0, as in COCO: AP and AR without a ground-truth box (of that size), and
    the four F1 values without any ground-truth box; so with no boxes at all every value is -1.0. Detections of a
    class without ground-truth boxes still count as false positives in the common F1. With ground-truth boxes and no
    detection F1 is 0.0, and so is its threshold.

    Args:
        class_names: the name of each label. By default the names that the detections carry; if they carry
            none, the labels' numbers, up to the highest label seen.
        backend: which implementation of COCO's evaluation to use; both give the same numbers.
        f1_iou_threshold: the overlap from which a detection is right in F1, precision and recall.

    Raises:
        ValueError: an unknown backend, or a threshold outside 0-1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = True

    def __init__(
        self,
        *,
        class_names: Sequence[str] | None = None,
        backend: Backend = "faster_coco_eval",
        f1_iou_threshold: float = 0.5,
    ) -> None:
        # No torchmetrics state, synchronisation or cache: the images are not tensors, and a cached value on
        # one rank would leave the ranks without one waiting in the gather.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        if backend not in get_args(Backend):
            raise ValueError(f"Unknown backend {backend!r}; choose one of {', '.join(get_args(Backend))}.")
        if not 0 < f1_iou_threshold <= 1:
            raise ValueError(f"f1_iou_threshold is {f1_iou_threshold}; expected more than 0 and at most 1.")
        self.class_names = None if class_names is None else tuple(class_names)
        self.backend = backend
        self.f1_iou_threshold = f1_iou_threshold
        self._images: dict[int, EvaluatedImage] = {}
        self._detections_names: tuple[str, ...] | None = None
        self._result: _Result | None = None
        self._evaluation: Evaluation | None = None

    def update(
        self, detections: Sequence[Detections], ground_truth: Sequence[GroundTruth], image_ids: Sequence[int]
    ) -> None:
        """Add a batch. An image id that was seen before is ignored.

        Detections with a score or a corner that is not finite are left out, with a warning: a diverged model
        should score badly, not stop the run.

        Args:
            detections: of each image, boxes in pixels of the original image, on any device.
            ground_truth: of each image, in the same pixels and labels.
            image_ids: the ids of the images.

        Raises:
            ValueError: arguments of different lengths, or a label that no class name stands for.
        """
        if not len(detections) == len(ground_truth) == len(image_ids):
            raise ValueError(
                f"Got {len(detections)} detections, {len(ground_truth)} ground truths and {len(image_ids)} "
                "image ids; expected one of each per image."
            )
        self._result = self._evaluation = None
        if not len(detections):
            return
        # Concatenated first: three device synchronisations per batch instead of three per image.
        boxes_xyxy = _to_host(torch.cat([one.boxes_xyxy for one in detections]).float())
        scores = _to_host(torch.cat([one.scores for one in detections]).float())
        labels = _to_host(torch.cat([one.labels for one in detections]).long())
        if self._detections_names is None:
            self._detections_names = next((one.class_names for one in detections if one.class_names), None)
        self._check_labels(labels, *(truth.labels for truth in ground_truth))
        keep = np.isfinite(scores) & np.isfinite(boxes_xyxy).all(axis=1)
        if not keep.all():
            warnings.warn(
                f"{np.count_nonzero(~keep)} of {keep.size} detections have a score or a corner that is not "
                "finite; they are left out of the evaluation.",
                stacklevel=2,
            )
        end = 0
        for one, truth, image_id in zip(detections, ground_truth, image_ids, strict=True):
            start, end = end, end + len(one)
            if int(image_id) in self._images:
                continue
            kept = start + np.flatnonzero(keep[start:end])
            self._images[int(image_id)] = EvaluatedImage(boxes_xyxy[kept], scores[kept], labels[kept], truth)

    def compute(self) -> dict[str, float]:
        """Evaluate all images of all ranks.

        Raises:
            RuntimeError: the evaluation failed on rank 0; raised on every rank, so that none waits for it.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._result = self._evaluate_on_rank_zero()
        else:
            self._evaluation = self._evaluate(self._images, self._detections_names)
            self._result = _Result(self._evaluation.values, self._evaluation.classes)
        return dict(self._result.values)

    def per_class(self) -> list[ClassResult]:
        """The classes in the order of their labels, from the last `compute`, on every rank.

        Raises:
            RuntimeError: nothing computed since the last `update` or `reset`.
        """
        if self._result is None:
            raise RuntimeError("There is no result yet; call compute() first.")
        return list(self._result.classes)

    def evaluated(self) -> Evaluation | None:
        """The last `compute` with its images and matches, on rank 0; None on the others, which saw only a part.

        The metric releases it at the next `update` or `reset`.

        Raises:
            RuntimeError: nothing computed since the last `update` or `reset`.
        """
        if self._result is None:
            raise RuntimeError("There is no result yet; call compute() first.")
        return self._evaluation

    def reset(self) -> None:
        """Forget all images and the result."""
        super().reset()
        self._images = {}
        self._detections_names = None
        self._result = self._evaluation = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: torchmetrics would evaluate each batch by itself and drop the images before it."""
        raise TypeError("Call update() for each batch and compute() once at the end.")

    def _check_labels(self, *labels: npt.NDArray[np.int64]) -> None:
        """Fail early, and with the label, where COCO's evaluation would silently leave a class out."""
        names = self.class_names or self._detections_names
        for some in labels:
            if some.size and (some.min() < 0 or (names is not None and some.max() >= len(names))):
                wrong = int(some.min()) if some.min() < 0 else int(some.max())
                known = "" if names is None else f"; there are {len(names)} class names, for labels from 0"
                raise ValueError(f"Label {wrong} is out of range{known}.")

    def _evaluate_on_rank_zero(self) -> _Result:
        """One gather, one evaluation, one broadcast."""
        gathered: list[tuple[dict[int, EvaluatedImage], tuple[str, ...] | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._images, self._detections_names))
        outcome: list[_Result | str | None] = [None]
        cause: Exception | None = None
        if dist.get_rank() == 0:
            try:
                images: dict[int, EvaluatedImage] = {}
                detections_names: tuple[str, ...] | None = None
                for part in gathered:
                    assert part is not None
                    # The first to bring an image keeps it, as within one rank.
                    images = part[0] | images
                    detections_names = detections_names or part[1]
                self._evaluation = self._evaluate(images, detections_names)
                outcome = [_Result(self._evaluation.values, self._evaluation.classes)]
            except Exception as error:
                cause = error
                outcome = ["".join(traceback.format_exception(error))]
        dist.broadcast_object_list(outcome, src=0)
        result = outcome[0]
        if not isinstance(result, _Result):
            raise RuntimeError(f"The evaluation failed on rank 0:\n{result}") from cause
        return result

    def _evaluate(self, images: Mapping[int, EvaluatedImage], detections_names: tuple[str, ...] | None) -> Evaluation:
        """The values and the classes' rows for these images."""
        # By id, since pycocotools lets the order of the images decide between equal scores.
        ordered = [images[image_id] for image_id in sorted(images)]
        names = _unique(self.class_names or detections_names or _numbered(ordered))
        matches = match_images(ordered, len(names), iou_threshold=self.f1_iou_threshold)
        if matches.num_boxes.any():
            precision, recall = average_precision(ordered, len(names), self.backend)
        else:
            precision = np.full((10, 101, len(names), 4), NOTHING_TO_MEASURE)
            recall = np.full((10, len(names), 4), NOTHING_TO_MEASURE)
        best = _best(matches.curve(), int(matches.num_boxes.sum()))
        values = {
            "AP": _mean(precision[..., 0]),
            "AP50": _mean(precision[0, ..., 0]),
            "AP75": _mean(precision[5, ..., 0]),
            "AP_small": _mean(precision[..., 1]),
            "AP_medium": _mean(precision[..., 2]),
            "AP_large": _mean(precision[..., 3]),
            "AR": _mean(recall[..., 0]),
            "F1": best.f1,
            "F1_precision": best.precision,
            "F1_recall": best.recall,
            "F1_threshold": best.threshold,
        }
        classes = []
        for label, (name, count, curve) in enumerate(
            zip(names, matches.num_boxes.tolist(), matches.class_curves(), strict=True)
        ):
            best = _best(curve, count)
            classes.append(
                ClassResult(
                    label=label,
                    name=name,
                    num_boxes=count,
                    ap=_mean(precision[:, :, label, 0]),
                    ap50=_mean(precision[0, :, label, 0]),
                    f1=best.f1,
                    precision=best.precision,
                    recall=best.recall,
                    threshold=best.threshold,
                )
            )
        if len(classes) > 1:
            values |= {f"AP_class/{row.name}": row.ap for row in classes}
            values |= {f"AP50_class/{row.name}": row.ap50 for row in classes}
            values |= {f"F1_class/{row.name}": row.f1 for row in classes}
        return Evaluation(
            image_ids=tuple(sorted(images)),
            images=tuple(ordered),
            class_names=tuple(names),
            values=values,
            classes=classes,
            matches=matches,
            iou_threshold=self.f1_iou_threshold,
            precision=precision,
        )


def _mean(values: npt.NDArray[np.float64]) -> float:
    """The mean of the values that could be computed, or -1 if there are none."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else NOTHING_TO_MEASURE


def _best(curve: PrecisionRecallCurve, num_boxes: int) -> OperatingPoint:
    """The curve's best point, or -1 throughout without a ground-truth box."""
    return curve.best if num_boxes else OperatingPoint(*[NOTHING_TO_MEASURE] * 4)


def _numbered(images: Sequence[EvaluatedImage]) -> tuple[str, ...]:
    """Names for the labels 0 to the highest that occurs."""
    highest = max(
        (labels.max() for one in images for labels in (one.labels, one.truth.labels) if labels.size),
        default=-1,
    )
    return tuple(str(label) for label in range(int(highest) + 1))


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with the label added to those that occur twice: they become keys."""
    return [f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)]


def _to_host(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array on the host."""
    return tensor.numpy(force=True)
