"""One-to-one assignment of queries to boxes (DETR, arXiv 2005.12872), for all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dino_lightning.boxes import cxcywh_to_xyxy, paired_generalized_iou
from dino_lightning.structures import Targets

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


class NonFiniteError(RuntimeError):
    """The model's outputs are no longer numbers; `image_ids` are the images concerned."""

    def __init__(self, image_ids: Sequence[int]) -> None:
        super().__init__(
            f"The model's predictions for image ids {list(image_ids)} are not finite numbers. Lower the learning rate, "
            "use float32 or bf16 instead of float16, and check these images and their boxes."
        )
        self.image_ids = list(image_ids)


@dataclass(frozen=True)
class Matches:
    """Which query each box got, for L layers.

    Attributes:
        queries: (L, B, N) int64, index of the query; 0 where there is none.
        matched: (L, B, N) bool, False for padding and for boxes in excess of the queries.
    """

    queries: Tensor
    matched: Tensor


class HungarianMatcher(nn.Module):
    """The assignment of least total cost, solved for every layer and image from one copy to the host.

    Args:
        cost_class: weight of the focal class cost.
        cost_bbox: weight of the L1 distance of boxes_cxcywh.
        cost_giou: weight of the negative generalised IoU.
    """

    def __init__(self, *, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0) -> None:
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Tensor:
        """The cost of every query for every box of its own image.

        Args:
            logits: (L, B, Q, K).
            boxes_cxcywh: (L, B, Q, 4).
            targets: N boxes an image, padded.

        Returns:
            (L, B, N, Q) float32; rows of padding hold numbers without meaning.
        """
        layers, _, queries, _ = logits.shape
        logits, boxes = logits.float(), boxes_cxcywh.float()
        index = targets.labels[None, :, None, :].expand(layers, -1, queries, -1)
        # only the target's own class enters the cost, so the focal terms are computed for those logits alone
        probability = logits.gather(3, index).transpose(2, 3).sigmoid()
        missed = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -torch.log(probability + 1e-8)
        spurious = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -torch.log(1 - probability + 1e-8)
        cost = self.cost_class * (missed - spurious)
        target_boxes = targets.boxes_cxcywh.float()
        for coordinate in range(4):  # one coordinate at a time: no (L, B, N, Q, 4) tensor
            ours = boxes[:, :, None, :, coordinate]
            theirs = target_boxes[None, :, :, None, coordinate]
            cost += self.cost_bbox * (ours - theirs).abs()
        overlap = paired_generalized_iou(
            cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(target_boxes)[None, :, :, None]
        )
        return cost - self.cost_giou * overlap

    @torch.no_grad()
    def forward(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: Sequence[int] | None = None
    ) -> Matches:
        """Assign.

        Args:
            logits: (L, B, Q, K) class logits of L layers.
            boxes_cxcywh: (L, B, Q, 4) their boxes.
            targets: N boxes an image, padded.
            image_ids: for the message when something is not finite; positions in the batch when None.

        Raises:
            NonFiniteError: a cost that is not a number.
        """
        layers, batch = logits.shape[:2]
        boxes_per_image = targets.labels.shape[1]
        assigned = np.full((layers, batch, boxes_per_image), -1, dtype=np.int64)
        if boxes_per_image:
            cost = to_host(self.cost(logits, boxes_cxcywh, targets))
            bad = [image for image, n in enumerate(targets.num_boxes) if not np.isfinite(cost[:, image, :n]).all()]
            if bad:
                raise NonFiniteError(bad if image_ids is None else [image_ids[image] for image in bad])
            for layer in range(layers):
                for image, count in enumerate(targets.num_boxes):
                    rows, columns = linear_sum_assignment(cost[layer, image, :count])
                    assigned[layer, image, rows] = columns
        queries = torch.from_numpy(assigned).to(logits.device, non_blocking=True)
        return Matches(queries=queries.clamp(min=0), matched=queries >= 0)


def to_host(cost: Tensor) -> npt.NDArray[np.float32]:
    """The one wait for the device of a training step."""
    array: npt.NDArray[np.float32] = cost.cpu().numpy()
    return array
