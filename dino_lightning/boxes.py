"""Box conversions and overlaps, thin over `torchvision.ops`.

`boxes_xyxy` are corners, usually in pixels; `boxes_cxcywh` are centre, width and height, 0-1 of the image before
padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERLAP_EPSILON = 1e-6  # the published code adds it to both denominators of GIoU; kept for parity


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> (..., 4) x1, y1, x2, y2, in the same unit."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) x1, y1, x2, y2 -> (..., 4) centre x, centre y, width, height, in the same unit."""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def xyxy_to_normalized_cxcywh(boxes_xyxy: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., 4) pixels x1, y1, x2, y2 -> (..., 4) centre, width, height as 0-1 of an image of (height, width)."""
    height, width = size
    return xyxy_to_cxcywh(boxes_xyxy) / boxes_xyxy.new_tensor([width, height, width, height])


def normalized_cxcywh_to_xyxy(boxes_cxcywh: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., 4) centre, width, height as 0-1 -> (..., 4) pixels x1, y1, x2, y2 of an image of (height, width)."""
    height, width = size
    return cxcywh_to_xyxy(boxes_cxcywh) * boxes_cxcywh.new_tensor([width, height, width, height])


def paired_generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes taken pairwise by broadcasting, with the published epsilons.

    Args:
        boxes1_xyxy: (..., 4) corners in any one unit.
        boxes2_xyxy: (..., 4) corners in the same unit, of a shape that broadcasts against the first.

    Returns:
        (...) values in [-1, 1]; identical boxes give a little less than 1, and 0 where they have no area.
    """
    intersection, union = _intersection_and_union(boxes1_xyxy, boxes2_xyxy)
    x11, y11, x12, y12 = boxes1_xyxy.unbind(-1)
    x21, y21, x22, y22 = boxes2_xyxy.unbind(-1)
    hull_width = (torch.maximum(x12, x22) - torch.minimum(x11, x21)).clamp(min=0)
    hull_height = (torch.maximum(y12, y22) - torch.minimum(y11, y21)).clamp(min=0)
    hull = hull_width * hull_height
    iou = intersection / (union + OVERLAP_EPSILON)
    return iou - (hull - union) / (hull + OVERLAP_EPSILON)


def _intersection_and_union(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    x11, y11, x12, y12 = boxes1_xyxy.unbind(-1)
    x21, y21, x22, y22 = boxes2_xyxy.unbind(-1)
    inter_width = (torch.minimum(x12, x22) - torch.maximum(x11, x21)).clamp(min=0)
    inter_height = (torch.minimum(y12, y22) - torch.maximum(y11, y21)).clamp(min=0)
    intersection = inter_width * inter_height
    return intersection, (x12 - x11) * (y12 - y11) + (x22 - x21) * (y22 - y21) - intersection


def paired_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """IoU of boxes taken pairwise by broadcasting.

    Args:
        boxes1_xyxy: (..., 4) corners in any one unit.
        boxes2_xyxy: (..., 4) corners in the same unit, of a shape that broadcasts against the first.

    Returns:
        (...) values in [0, 1]; 0 where neither has an area.
    """
    intersection, union = _intersection_and_union(boxes1_xyxy, boxes2_xyxy)
    return intersection / (union + OVERLAP_EPSILON)


def inverse_sigmoid(values: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Logit of values in [0, 1], numerator and denominator clamped separately at `epsilon` (the published 1e-3)."""
    values = values.clamp(min=0, max=1)
    return torch.log(values.clamp(min=epsilon) / (1 - values).clamp(min=epsilon))
