"""Our own plain formulation of how the published code matches and computes losses: layer by layer, image by image.

Written from the papers' formulas as a baseline for speed and as a second opinion on the numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dino_lightning.boxes import cxcywh_to_xyxy
from dino_lightning.structures import ModelOutput, Targets

ALPHA, GAMMA = 0.25, 2.0
EPSILON = 1e-6
COSTS = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
WEIGHTS = {"class": 1.0, "bbox": 5.0, "giou": 2.0}


def generalized_box_iou(one: Tensor, other: Tensor) -> Tensor:
    """(N, 4) and (M, 4) corners -> (N, M), every box with every other, with the published epsilons."""
    left_top, right_bottom = torch.max(one[:, None, :2], other[:, :2]), torch.min(one[:, None, 2:], other[:, 2:])
    intersection = (right_bottom - left_top).clamp(min=0).prod(-1)
    area, other_area = (one[:, 2:] - one[:, :2]).prod(-1), (other[:, 2:] - other[:, :2]).prod(-1)
    union = area[:, None] + other_area - intersection
    far_left_top = torch.min(one[:, None, :2], other[:, :2])
    far_right_bottom = torch.max(one[:, None, 2:], other[:, 2:])
    hull = (far_right_bottom - far_left_top).clamp(min=0).prod(-1)
    return intersection / (union + EPSILON) - (hull - union) / (hull + EPSILON)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, labels: list[Tensor], truth: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """One layer: (B, Q, K), (B, Q, 4) and the boxes of each image -> query and box indices of each image.

    The costs of every query of the batch for every box of the batch, of which the blocks on the diagonal are used.
    """
    batch, queries = logits.shape[:2]
    probability = logits.flatten(0, 1).sigmoid()
    flat = boxes.flatten(0, 1)
    all_labels, all_boxes = torch.cat(labels), torch.cat(truth)
    negative = (1 - ALPHA) * probability**GAMMA * -(1 - probability + 1e-8).log()
    positive = ALPHA * (1 - probability) ** GAMMA * -(probability + 1e-8).log()
    cost_class = positive[:, all_labels] - negative[:, all_labels]
    cost_bbox = torch.cdist(flat, all_boxes, p=1)
    cost_giou = -generalized_box_iou(cxcywh_to_xyxy(flat), cxcywh_to_xyxy(all_boxes))
    cost = COSTS["bbox"] * cost_bbox + COSTS["class"] * cost_class + COSTS["giou"] * cost_giou
    cost = cost.view(batch, queries, -1).cpu()
    pairs = []
    for image, block in enumerate(cost.split([len(one) for one in truth], -1)):
        rows, columns = linear_sum_assignment(block[image])
        pairs.append((torch.as_tensor(rows), torch.as_tensor(columns)))
    return pairs


def layer_losses(
    logits: Tensor,
    boxes: Tensor,
    labels: list[Tensor],
    truth: list[Tensor],
    pairs: list[tuple[Tensor, Tensor]],
    num_boxes: float,
) -> Tensor:
    """The weighted loss of one layer."""
    image = torch.cat([torch.full_like(rows, index) for index, (rows, _) in enumerate(pairs)])
    query = torch.cat([rows for rows, _ in pairs])
    wanted_labels = torch.cat([one[columns] for one, (_, columns) in zip(labels, pairs, strict=True)])
    wanted_boxes = torch.cat([one[columns] for one, (_, columns) in zip(truth, pairs, strict=True)])
    classes = torch.full(logits.shape[:2], logits.shape[2], dtype=torch.int64)
    classes[image, query] = wanted_labels
    one_hot = F.one_hot(classes, logits.shape[2] + 1)[..., :-1].float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    probability = logits.sigmoid()
    right = probability * one_hot + (1 - probability) * (1 - one_hot)
    focal = cross_entropy * (1 - right) ** GAMMA * (ALPHA * one_hot + (1 - ALPHA) * (1 - one_hot))
    found = boxes[image, query]
    giou = torch.diag(generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted_boxes)))
    return (
        WEIGHTS["class"] * focal.sum()
        + WEIGHTS["bbox"] * F.l1_loss(found, wanted_boxes, reduction="sum")
        + WEIGHTS["giou"] * (1 - giou).sum()
    ) / num_boxes


def total_loss(output: ModelOutput, targets: Targets) -> Tensor:
    """The whole weighted loss of a batch in one process, as `Criterion` computes it: 0-dim."""
    counts = targets.num_boxes
    labels = [targets.labels[image, :count] for image, count in enumerate(counts)]
    truth = [targets.boxes_cxcywh[image, :count] for image, count in enumerate(counts)]
    num_boxes = max(float(sum(counts)), 1.0)
    total = output.pred_logits.new_zeros(())
    layers = [*zip(output.pred_logits, output.pred_boxes, strict=True), (output.encoder_logits, output.encoder_boxes)]
    for logits, boxes in layers:
        pairs = match(logits, boxes, labels, truth)
        total = total + layer_losses(logits, boxes, labels, truth, pairs, num_boxes)
    noised = output.denoising
    if noised is None:
        return total
    fixed = []
    for count in counts:
        groups = torch.arange(noised.num_groups)[:, None] * 2 * noised.max_boxes
        fixed.append(((groups + torch.arange(count)).flatten(), torch.arange(count).repeat(noised.num_groups)))
    for logits, boxes in zip(noised.pred_logits, noised.pred_boxes, strict=True):
        total = total + layer_losses(logits, boxes, labels, truth, fixed, num_boxes * noised.num_groups)
    return total
