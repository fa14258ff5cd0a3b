"""One-to-one assignment of queries to boxes (DETR, arXiv 2005.12872), for all layers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dino_lightning.boxes import OVERLAP_EPSILON, cxcywh_to_xyxy, paired_generalized_iou
from dino_lightning.errors import NonFiniteError
from dino_lightning.losses.assignment import Solver, solve_on_device, takes_device, to_host_later
from dino_lightning.losses.focal import FOCAL_ALPHA, FOCAL_GAMMA
from dino_lightning.structures import Targets

MatchingCost = Literal["published", "position_modulated"]


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights of a sum that cannot be.

    Args:
        weights: by the name of the option.

    Raises:
        ValueError: one is negative or not finite, or all are 0.
    """
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: a weight must be a number from 0 up.")
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)} are all 0: at least one must count.")


def _nothing_to_check() -> None:
    """For assignments whose costs have been checked."""


@dataclass(frozen=True)
class Matches:
    """Which query each box got, for L layers.

    Attributes:
        queries: (L, B, N) int64, index of the query; 0 where there is none.
        matched: (L, B, N) bool, False for padding and for boxes in excess of the queries.
        check: waits for what the device says of the costs, and raises `NonFiniteError` if some were not finite.
    """

    queries: Tensor
    matched: Tensor
    check: Callable[[], None] = _nothing_to_check


class HungarianMatcher(nn.Module):
    """The assignment of least total cost for every layer and image, solved from one copy to the host or on the device.

    Args:
        cost_class: weight of the focal class cost.
        cost_bbox: weight of the L1 distance of boxes_cxcywh.
        cost_giou: weight of the negative generalised IoU.
        kind: `published`, or `position_modulated`: the class cost is that of the probability times the square root of
            the generalised IoU, moved to 0-1, so that a query with a high score does not win a box that another one
            fits better (Stable-DINO, arXiv 2304.04742).
        solver: `scipy`, on the host; `device`, a Triton kernel on a CUDA device, which needs no copy of the costs;
            `auto`, the kernel where it passes a trial, scipy elsewhere. The kernel's sums are float32 and scipy's
            float64: total costs are the same up to that rounding, and of assignments that cost the same either may
            take another.

    Raises:
        ValueError: there is no cost of that kind or no such solver, or weights that cannot be, see `check_weights`.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        kind: MatchingCost = "published",
        solver: Solver = "scipy",
    ) -> None:
        super().__init__()
        if kind not in get_args(MatchingCost):
            raise ValueError(f"matching_cost={kind!r}: choose one of {', '.join(get_args(MatchingCost))}.")
        if solver not in get_args(Solver):
            raise ValueError(f"matching_solver={solver!r}: choose one of {', '.join(get_args(Solver))}.")
        check_weights({"cost_class": cost_class, "cost_bbox": cost_bbox, "cost_giou": cost_giou})
        self.cost_class, self.cost_bbox, self.cost_giou, self.kind = cost_class, cost_bbox, cost_giou, kind
        self.solver = solver

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
        ours = boxes_cxcywh.float()[:, :, None]  # (L, B, 1, Q, 4)
        theirs = targets.boxes_cxcywh.float()[:, :, None]  # (B, N, 1, 4)
        fit = None
        if self.kind == "position_modulated":
            giou = paired_generalized_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(theirs))
            fit = ((giou + 1) / 2).clamp(0, 1).sqrt().transpose(2, 3)
        cost = self.cost_class * self._class_cost(logits, targets, fit)
        # In place as far as possible: these tensors are large, and memory traffic takes most of the time.
        one, other = torch.empty_like(cost), torch.empty_like(cost)

        # cost_bbox: the L1 distance depends on the size of a box, and separates boxes that do not overlap at all.
        for coordinate in range(4):  # one at a time: no (L, B, N, Q, 4) tensor
            torch.sub(ours[..., coordinate], theirs[..., coordinate], out=one)
            cost.add_(one.abs_(), alpha=self.cost_bbox)

        # cost_giou: the overlap does not depend on the size, so that small boxes count as much as large ones.
        # Generalised IoU = intersection / union - 1 + union / hull, up to the epsilons.
        x1, y1, x2, y2 = cxcywh_to_xyxy(ours).unbind(-1)
        left, top, right, bottom = cxcywh_to_xyxy(theirs).unbind(-1)
        intersection = torch.minimum(x2, right).sub_(torch.maximum(x1, left, out=one)).clamp_(min=0)
        torch.minimum(y2, bottom, out=other).sub_(torch.maximum(y1, top, out=one)).clamp_(min=0)
        intersection.mul_(other)
        union = torch.add((x2 - x1) * (y2 - y1), (right - left) * (bottom - top)).sub_(intersection)
        cost.sub_(intersection.div_(torch.add(union, OVERLAP_EPSILON, out=one)), alpha=self.cost_giou)
        hull = torch.maximum(x2, right, out=intersection).sub_(torch.minimum(x1, left, out=one)).clamp_(min=0)
        torch.maximum(y2, bottom, out=other).sub_(torch.minimum(y1, top, out=one)).clamp_(min=0)
        hull.mul_(other)
        gap = torch.sub(hull, union, out=one).div_(hull.add_(OVERLAP_EPSILON))
        return cost.add_(gap, alpha=self.cost_giou)

    @staticmethod
    def _class_cost(logits: Tensor, targets: Targets, fit: Tensor | None) -> Tensor:
        """cost_class, (L, B, N, Q): what the focal loss would gain if the query took the box.

        That is the loss of a positive less the loss of a negative, at the class of the box. The other classes cost the
        same whichever box the query takes, so they are left out. `fit`, (L, B, Q, N), is multiplied to the probability.
        """
        classes = targets.labels[None, :, None].expand(len(logits), -1, logits.shape[2], -1)
        box_by_box = fit is not None or classes.shape[-1] < logits.shape[-1]
        logits = logits.float().gather(3, classes) if box_by_box else logits.float()
        probability = logits.sigmoid() if fit is None else logits.sigmoid() * fit
        missed = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -torch.log(probability + 1e-8)
        spurious = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -torch.log(1 - probability + 1e-8)
        cost = missed - spurious
        cost = cost if box_by_box else cost.gather(3, classes)
        return cost.transpose(2, 3).contiguous()

    @torch.no_grad()
    def forward(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: Sequence[int] | None = None
    ) -> Matches:
        """Assign one query to each box: for every layer and image, the assignment of least total cost.

        Args:
            logits: (L, B, Q, K) class logits of L layers.
            boxes_cxcywh: (L, B, Q, 4) their boxes.
            targets: N boxes an image, padded.
            image_ids: for the message when something is not finite; positions in the batch when None.

        Raises:
            NonFiniteError: a cost that is not a number.
            UsageError: the solver is `device`, and its kernel cannot run here.
        """
        matches = self.begin(logits, boxes_cxcywh, targets, image_ids)
        matches.check()
        return matches

    @torch.no_grad()
    def begin(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: Sequence[int] | None = None
    ) -> Matches:
        """The same, but where the device solves nothing has waited for it yet: `Matches.check` does, and raises.

        So whatever needs the assignments can be launched first.
        """
        return self.launch(logits, boxes_cxcywh, targets, image_ids)()

    @torch.no_grad()
    def launch(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: Sequence[int] | None = None
    ) -> Callable[[], Matches]:
        """The first half of `begin`, which waits for nothing: costs, and their copy, or their solution by the device.

        So whatever needs no assignments can be launched before what is returned is called: that is the second half. It
        waits for the copy where scipy solves, and raises what `forward` does.
        """
        layers, batch = logits.shape[:2]
        boxes_per_image = targets.labels.shape[1]
        ids = range(batch) if image_ids is None else image_ids
        arriving: Callable[[], npt.NDArray[np.float32]] | None = None
        if boxes_per_image:
            cost = self.cost(logits, boxes_cxcywh, targets)
            if takes_device(self.solver, cost, targets.num_boxes):
                matches = _matched_on_device(cost, targets.num_boxes, ids)
                return lambda: matches
            arriving = to_host_later(cost)  # for the one device synchronisation of a training step

        def solve() -> Matches:
            assigned = np.full((layers, batch, boxes_per_image), -1, dtype=np.int64)
            if arriving is not None:
                costs = arriving()
                _refuse([not np.isfinite(costs[:, image, :n]).all() for image, n in enumerate(targets.num_boxes)], ids)
                for layer, image in np.ndindex(layers, batch):
                    rows, columns = linear_sum_assignment(costs[layer, image, : targets.num_boxes[image]])
                    assigned[layer, image, rows] = columns
            queries = torch.from_numpy(assigned).to(logits.device, non_blocking=True)
            return Matches(queries=queries.clamp(min=0), matched=queries >= 0)

        return solve


def _matched_on_device(cost: Tensor, num_boxes: Sequence[int], ids: Sequence[int]) -> Matches:
    queries, strange = solve_on_device(cost, num_boxes)
    marks = to_host_later(strange)

    def check() -> None:
        _refuse([bool(of_layers.any()) for of_layers in marks().T], ids)

    return Matches(queries=queries.clamp(min=0), matched=queries >= 0, check=check)


def _refuse(bad: Sequence[bool], ids: Sequence[int]) -> None:
    """Raise `NonFiniteError` if some images, in the order of the batch, are bad."""
    if any(bad):
        raise NonFiniteError([image_id for image_id, is_bad in zip(ids, bad, strict=True) if is_bad])
