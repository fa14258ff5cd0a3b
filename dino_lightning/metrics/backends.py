"""COCO's own box evaluation by pycocotools or by its C++ rewrite faster-coco-eval; the same numbers from both."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dino_lightning.structures import GroundTruth

Backend = Literal["faster_coco_eval", "pycocotools"]

MAX_DETECTIONS = 100  # COCO's own: the best 100 of each class in each image


class EvaluatedImage(NamedTuple):
    """Everything known about one image, on the host: its D detections and N ground-truth boxes."""

    boxes_xyxy: npt.NDArray[np.float32]  # (D, 4) pixels
    scores: npt.NDArray[np.float32]  # (D,)
    labels: npt.NDArray[np.int64]  # (D,)
    truth: GroundTruth


def average_precision(
    images: Sequence[EvaluatedImage], num_classes: int, backend: Backend
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """COCO's own evaluation of the images, without its printed output.

    Returns:
        precision (10, 101, K, 4) for IoU 0.50:0.95, recall 0:1, classes, areas all / small / medium / large;
        recall (10, K, 4) likewise. Both at 100 detections, and -1 where there is no ground-truth box.
    """
    coco_class, eval_class = _load_backend(backend)
    with _without_garbage_collection(), contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truths = [image.truth for image in images]
        counted = [_best_of_each_class(image.scores, image.labels) for image in images]
        truth = _annotations(
            [one.boxes_xyxy for one in truths],
            [one.labels for one in truths],
            area=np.concatenate([one.area for one in truths]),
            iscrowd=np.concatenate([one.iscrowd for one in truths]).astype(np.int64),
        )
        detected = _annotations(
            [image.boxes_xyxy[kept] for image, kept in zip(images, counted, strict=True)],
            [image.labels[kept] for image, kept in zip(images, counted, strict=True)],
            score=np.concatenate([image.scores[kept] for image, kept in zip(images, counted, strict=True)]).astype(
                np.float64
            ),
        )
        coco = [coco_class(), coco_class()]
        for one, annotations in zip(coco, (truth, detected), strict=True):
            # Placed directly: `loadRes` copies, gives each detection a polygon, and fails without detections.
            one.dataset = {
                "images": [{"id": index + 1} for index in range(len(images))],
                "categories": [{"id": label + 1, "name": str(label)} for label in range(num_classes)],
                "annotations": annotations,
            }
            one.createIndex()
        # At its default parameters, whose maxDets end with MAX_DETECTIONS.
        evaluation = eval_class(*coco, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]


def _best_of_each_class(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(D,) True for the detections of one image that COCO's average precision counts: the best 100 of each class."""
    if len(scores) <= MAX_DETECTIONS:
        return np.ones(len(scores), np.bool_)
    order = np.lexsort((-scores, labels))
    sorted_labels = labels[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels)
    keep = np.zeros(len(scores), np.bool_)
    keep[order[rank < MAX_DETECTIONS]] = True
    return keep


def _load_backend(backend: Backend) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The COCO and COCOeval classes of a backend; imported only here, where one of the two is used."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    return FasterCOCO, partial(COCOeval_faster, print_function=lambda *_: None)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: a million small dictionaries trigger it repeatedly, and it frees nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _annotations(
    boxes_xyxy: Sequence[npt.NDArray[Any]],
    labels: Sequence[npt.NDArray[np.int64]],
    **columns: npt.NDArray[Any],
) -> list[dict[str, Any]]:
    """COCO annotations of many images; images, categories and annotations are all numbered from 1.

    From 1 because an annotation with id 0 counts as unmatched in pycocotools; images by their place, because
    faster-coco-eval takes ids as floating point numbers, which are exact only up to 2**53.

    Args:
        boxes_xyxy: per image (N, 4) corners in pixels.
        labels: per image (N,).
        columns: (sum of N,) further keys; `area` defaults to that of the box, `iscrowd` to 0.
    """
    corners = np.concatenate(boxes_xyxy).astype(np.float64)
    boxes_xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
    columns = {
        "id": np.arange(len(corners)) + 1,
        "image_id": np.repeat(np.arange(len(labels)) + 1, [len(one) for one in labels]),
        "category_id": np.concatenate(labels) + 1,
        "area": boxes_xywh[:, 2] * boxes_xywh[:, 3],
        "iscrowd": np.zeros(len(corners), np.int64),
        **columns,
        "bbox": boxes_xywh,
    }
    keys = tuple(columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(keys, row, strict=True)) for row in rows]
