"""Contrastive denoising: noised ground-truth boxes as extra queries (DN-DETR, 2203.01305; DINO, 2203.03605, 3.2).

Early in training the assignment of queries to boxes changes from step to step, and a query is pulled now to one box,
now to another. A denoising query knows which box it belongs to, since it was made from it; so the decoder learns to
refine boxes without waiting for a stable assignment. DINO adds negatives: the same box moved further, to be rejected.
They teach the decoder to keep one box of several near an object, which suppresses duplicates without NMS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from dino_lightning.structures import Targets

DenoisingRule = Literal["boxes", "published"]
LEAST_COUNTED_AS_BOXES = 50  # by the published rule; fewer are numbers of groups


@dataclass(frozen=True)
class Noise:
    """Random draws for every slot, positive and negative parts in turn: R = 2 * num_groups repetitions.

    Attributes:
        flip: (R, B, N) float32, U(0, 1); below label_noise_ratio / 2 the label is replaced.
        label: (R, B, N) int64, the label that replaces it.
        sign: (R, B, N, 4) float32, -1 or +1.
        magnitude: (R, B, N, 4) float32, U(0, 1).
    """

    flip: Tensor
    label: Tensor
    sign: Tensor
    magnitude: Tensor


@dataclass(frozen=True)
class DenoisingQueries:
    """Queries made from the noised targets; slot (2 g + s) * N + j holds box j of group g, part s (0 positive).

    Attributes:
        content: (B, R * N + num_unused, D) embedding of the noised label, zero in unfilled slots.
        reference_logits: (B, R * N + num_unused, 4) float32, logits of the noised boxes, zero in unfilled slots.
        num_groups: number of groups, R / 2.
        max_boxes: N, the largest count in the batch.
        num_unused: queries after the slots that stand for nothing.
    """

    content: Tensor
    reference_logits: Tensor
    num_groups: int
    max_boxes: int
    num_unused: int = 0


def num_denoising_groups(num_denoising: int, max_boxes: int, rule: DenoisingRule = "boxes") -> int:
    """How many groups of denoising queries `num_denoising` gives, at least one.

    A group has each box of an image twice, once to be rebuilt and once to be rejected.

    Args:
        num_denoising: boxes to aim for.
        max_boxes: boxes in the fullest image of the batch.
        rule: `boxes`: as many whole groups as have no more than so many boxes. `published`: the same from 50 up, as
            with the published 100; below, twice `num_denoising` groups however many boxes there are.
    """
    if max_boxes == 0:
        return 1
    if rule == "published" and num_denoising < LEAST_COUNTED_AS_BOXES:
        return max(2 * num_denoising, 1)
    return max(num_denoising // max_boxes, 1)


def draw_noise(targets: Targets, *, num_groups: int, num_classes: int) -> Noise:
    """Fresh draws from the global random state of the targets' device."""
    boxes = targets.boxes_cxcywh
    shape = (2 * num_groups, *targets.labels.shape)
    return Noise(
        flip=torch.rand(shape, device=boxes.device),
        label=torch.randint(num_classes, shape, device=boxes.device),
        sign=torch.randint(2, (*shape, 4), device=boxes.device).float() * 2 - 1,
        magnitude=torch.rand((*shape, 4), device=boxes.device),
    )


def noised_targets(
    targets: Targets, noise: Noise, *, label_noise_ratio: float, box_noise_scale: float
) -> tuple[Tensor, Tensor]:
    """Labels and boxes after noise, for every repetition.

    Each corner moves on its own by up to half the box size (positive part) or between half and the whole box size
    (negative part), times `box_noise_scale`; so a strongly noised box can turn inside out. The published code keeps
    such boxes and so do we.

    Returns:
        labels (R, B, N) int64 and boxes_cxcywh (R, B, N, 4) float32.
    """
    # Half of the ratio, as in the published code: of the labels drawn anew some are the old ones.
    labels = torch.where(noise.flip < label_noise_ratio * 0.5, noise.label, targets.labels)
    boxes = targets.boxes_cxcywh
    negative = torch.arange(noise.flip.shape[0], device=boxes.device).remainder(2).float()
    magnitude = noise.magnitude + negative[:, None, None, None]  # U(0, 1) for positives, U(1, 2) for negatives
    half_size = boxes[..., 2:].repeat(1, 1, 2) / 2
    corners = cxcywh_to_xyxy(boxes) + noise.sign * magnitude * half_size * box_noise_scale
    return labels, xyxy_to_cxcywh(corners.clamp(0.0, 1.0))


def denoising_queries(
    targets: Targets,
    noise: Noise,
    label_embedding: nn.Embedding,
    *,
    label_noise_ratio: float,
    box_noise_scale: float,
    multiple: int = 1,
) -> DenoisingQueries:
    """Lay the noised targets out as queries; see `DenoisingQueries` for the order of slots.

    Their number is rounded up to a multiple by unused ones, which changes no result but the number of shapes: fewer
    of them to compile for, and to keep memory for.
    """
    labels, boxes = noised_targets(targets, noise, label_noise_ratio=label_noise_ratio, box_noise_scale=box_noise_scale)
    repetitions, batch, max_boxes = labels.shape
    filled = targets.valid[None, ..., None]
    content = label_embedding(labels) * filled
    reference_logits = inverse_sigmoid(boxes) * filled
    slots = repetitions * max_boxes
    unused = (0, 0, 0, -slots % multiple)
    return DenoisingQueries(
        content=F.pad(content.transpose(0, 1).reshape(batch, slots, -1), unused),
        reference_logits=F.pad(reference_logits.transpose(0, 1).reshape(batch, slots, 4), unused),
        num_groups=repetitions // 2,
        max_boxes=max_boxes,
        num_unused=-slots % multiple,
    )


def denoising_attention_mask(
    *,
    num_groups: int,
    max_boxes: int,
    num_queries: int,
    device: torch.device | str,
    num_unused: int = 0,
    num_query_groups: int = 1,
) -> Tensor:
    """Who may not see whom: (T, T) bool, True = blocked.

    The T queries are slots, unused ones, and the groups of matching queries, of `num_queries` each, in this order.

    Matching queries never see denoising ones: those hold the ground truth, and the answer would leak. A denoising group
    sees itself and the matching queries but no other group, so that each has to rebuild its boxes from its own noise.
    Unused queries are seen by themselves alone, and so are the matching queries of each group after the first.
    """
    slots = 2 * num_groups * max_boxes
    first = slots + num_unused
    index = torch.arange(first + num_queries * num_query_groups, device=device)
    group = index.div(max(2 * max_boxes, 1), rounding_mode="floor")
    group = group.masked_fill(index >= slots, num_groups).masked_fill(index >= first, -1)
    # more groups of matching queries have the numbers after those of the denoising groups and of the unused ones
    further = num_groups + (index - first).div(max(num_queries, 1), rounding_mode="floor")
    group = torch.where(index >= first + num_queries, further, group)
    blocked = (group[None, :] >= 0) & (group[None, :] != group[:, None])
    if num_query_groups > 1:
        blocked |= (index[:, None] >= first + num_queries) & (group[None, :] != group[:, None])
    return blocked
