"""From the last decoder layer to detections in pixels of the original images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops import nms

from dino_lightning.boxes import normalized_cxcywh_to_xyxy
from dino_lightning.detections import Detections
from dino_lightning.structures import ModelOutput


def check_nms_iou_threshold(threshold: float | None) -> None:
    """Refuse what cannot be the threshold of a non-maximum suppression.

    Raises:
        ValueError: it is not above 0 and at most 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"nms_iou_threshold is {threshold}; it must be above 0 and at most 1, or null for none.")


def postprocess(
    output: ModelOutput,
    original_sizes: Sequence[tuple[int, int]],
    *,
    max_detections: int = 300,
    nms_iou_threshold: float | None = None,
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
) -> list[Detections]:
    """The best query-class pairs of each image.

    Args:
        output: what the model said.
        original_sizes: (height, width) in pixels of each image file.
        max_detections: keep so many pairs at the most; one query can appear under several labels.
        nms_iou_threshold: class-agnostic non-maximum suppression after the selection, as the published post-processing
            has it; None for none, which is what the published models use.
        class_names: name of each label, passed on.
        category_ids: original category id of each label, passed on.

    Returns:
        Detections of each image, best first; boxes are not clipped to the image, see `Detections.within`.
    """
    scores = output.pred_logits[-1].float().sigmoid()
    boxes_cxcywh = output.pred_boxes[-1].float()
    num_classes = scores.shape[-1]
    flat = scores.flatten(1)
    top_scores, top_indices = flat.topk(min(max_detections, flat.shape[1]), dim=1)
    labels = top_indices % num_classes
    queries = top_indices.div(num_classes, rounding_mode="floor")
    boxes_cxcywh = boxes_cxcywh.gather(1, queries[..., None].expand(-1, -1, 4))
    detections = []
    for index, size in enumerate(original_sizes):
        boxes_xyxy: Tensor = normalized_cxcywh_to_xyxy(boxes_cxcywh[index], size)
        image_scores, image_labels = top_scores[index], labels[index]
        if nms_iou_threshold is not None:
            keep = nms(boxes_xyxy, image_scores, nms_iou_threshold)
            boxes_xyxy, image_scores, image_labels = boxes_xyxy[keep], image_scores[keep], image_labels[keep]
        detections.append(
            Detections(
                boxes_xyxy=boxes_xyxy,
                scores=image_scores,
                labels=image_labels,
                class_names=tuple(class_names),
                category_ids=tuple(category_ids),
            )
        )
    return detections
