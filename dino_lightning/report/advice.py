"""The kind of error that costs an evaluation most, and one thing to try against it."""

from __future__ import annotations

from collections import Counter

from dino_lightning.metrics import Evaluation
from dino_lightning.report.errors import CORRECTABLE_KINDS, ERROR_KINDS, classify_image
from dino_lightning.report.tables import REASON_WORDS

_AGAINST = {
    "duplicate": "--model.nms_iou_threshold {nms}, which keeps the best of several boxes, or train longer",
    "classification": "look at the confusion table of the report: two classes may be drawn alike or labelled unevenly",
    "localization": "train longer, or at a larger size, such as --data.{size}",
    "both": "see whether the annotations of such objects are complete and of the right class",
    "background": "look whether objects without an annotation are found; otherwise add images without objects",
}
_AGAINST_MISSED = {
    **{kind: _AGAINST[kind] for kind in CORRECTABLE_KINDS},
    "low_score": "train longer: objects are found, but their scores rise last",
    "unseen": "train at a larger size, such as --data.{size}, and see whether such objects are in the training images",
}


def dominating_error(
    evaluation: Evaluation,
    *,
    threshold: float,
    nms_iou_threshold: float | None = None,
    image_size: int = 800,
    fixed_size: int | None = None,
) -> str:
    """Counts of all kinds of errors at a score threshold and, of the most frequent kind, what to try; two lines.

    Where there are fewer errors than two, nothing follows from them: one line.

    Args:
        evaluation: images and detections.
        threshold: lowest score of the detections that count.
        nms_iou_threshold: of the non-maximum suppression that these detections went through; None for none.
        image_size: of the training images, in pixels, see `CocoDataModule`.
        fixed_size: of their canvas, in pixels; None for none.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    boxes = 0
    for image in evaluation.images:
        classified = classify_image(image, threshold=threshold, iou_threshold=evaluation.iou_threshold)
        counts.update({kind: classified.count(kind) for kind in ERROR_KINDS})
        reasons.update(missed.reason for missed in classified.missed)
        boxes += classified.num_boxes
    most = max(ERROR_KINDS, key=lambda kind: counts[kind])
    if not boxes and not counts.total():
        return "there are no boxes to evaluate against, so that AP and F1 say nothing."
    if not counts[most]:
        return f"no errors at a score of {threshold:.3f}."
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in ERROR_KINDS if counts[kind])
    first = f"errors at a score of {threshold:.3f}, of {boxes} boxes in {len(evaluation.images)} images: {listed}."
    if counts.total() < 2:
        return first
    lower = 0.7 if nms_iou_threshold is None else max(0.1, nms_iou_threshold - 0.1)
    larger = f"image_size {_larger(image_size)}" if fixed_size is None else f"fixed_size {_larger(fixed_size)}"
    values = {"nms": f"{lower:.2g}", "size": larger}
    if most != "missed":
        return f"{first}\nMost are {most}; try this: {_AGAINST[most].format(**values)}."
    reason, count = reasons.most_common(1)[0]
    advice = _AGAINST_MISSED[reason].format(**values)
    return f"{first}\nMost are missed, {count} of them {REASON_WORDS[reason]}; try this: {advice}."


def _larger(size: int) -> int:
    """A size about a third above this one, a multiple of 32."""
    return -(-size * 13 // 320) * 32
