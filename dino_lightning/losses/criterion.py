"""DINO's training loss: set prediction for every layer and reconstruction of the denoising queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_lightning.boxes import cxcywh_to_xyxy, paired_generalized_iou, paired_iou
from dino_lightning.losses.class_losses import CLASS_LOSSES, ClassLoss, class_loss
from dino_lightning.losses.matcher import HungarianMatcher, Matches, check_weights
from dino_lightning.structures import DenoisingOutput, ModelOutput, Targets


class Criterion(nn.Module):
    """Focal class loss, L1 and GIoU box loss; one evaluation covers all decoder layers and the encoder's proposals.

    Every term is a sum divided by the number of boxes in the global batch (averaged over processes), at least 1; for
    the denoising terms also by the number of groups. Runs in float32, whatever autocast says. A batch that is one of
    several of an optimizer step is evaluated alone here; see `dino_lightning.training.optim.AccumulatedBoxes`.

    Args:
        matcher: the assignment; the published costs by default.
        weight_class: weight of `loss_class`.
        weight_bbox: weight of `loss_bbox`.
        weight_giou: weight of `loss_giou`.
        class_loss: one of `class_losses.CLASS_LOSSES`; `focal` is the published one.

    Raises:
        ValueError: there is no class loss of that name, or weights that cannot be, see `check_weights`.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher | None = None,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        class_loss: ClassLoss = "focal",
    ) -> None:
        super().__init__()
        if class_loss not in CLASS_LOSSES:
            raise ValueError(f"class_loss={class_loss!r}: choose one of {', '.join(CLASS_LOSSES)}.")
        check_weights(
            {"class_loss_weight": weight_class, "bbox_loss_weight": weight_bbox, "giou_loss_weight": weight_giou}
        )
        self.matcher = matcher or HungarianMatcher()
        self.class_loss = class_loss
        self.weights = {"loss_class": weight_class, "loss_bbox": weight_bbox, "loss_giou": weight_giou}

    def forward(
        self,
        output: ModelOutput,
        targets: Targets,
        image_ids: Sequence[int] | None = None,
        *,
        num_boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            output: what the model said.
            targets: the boxes to find.
            image_ids: named when something is not finite.
            num_boxes: 0-dim float32, what `mean_num_boxes` says of `targets`, if it has been asked already.

        Returns:
            `loss`, the weighted sum to minimise, and the unweighted terms `loss_class`, `loss_bbox`, `loss_giou` of
            the final layer; with suffix `_0`, `_1`, ... of the earlier layers, `_encoder` of the proposals,
            `_denoising` and `_denoising_0`, ... of the denoising queries, `_groups` of further groups of queries (the
            sum over layers, the mean over groups). All 0-dim float32.

        Raises:
            NonFiniteError: predictions that are not finite.
        """
        with torch.autocast(device_type=output.pred_logits.device.type, enabled=False):
            logits = _all_layers(output.pred_logits, output.encoder_logits, output.group_logits)
            boxes = _all_layers(output.pred_boxes, output.encoder_boxes, output.group_boxes)
            num_boxes = (mean_num_boxes(targets, boxes.device) if num_boxes is None else num_boxes).clamp(min=1.0)
            # Every layer is matched and supervised on its own (DETR's auxiliary losses), so that each refines the one
            # before; the encoder's proposals are one more layer (two-stage, arXiv 2010.04159 A.4).
            # Denoising queries need no matching, each knows the box that it was made from: the device computes their
            # losses while the costs travel to the host and scipy solves. Where the device solves, whether costs were
            # finite is asked when all losses have been launched.
            assignments = self._launch_matching(logits, boxes, targets, image_ids)
            of_denoising = output.denoising
            rebuilt = (
                None if of_denoising is None else _denoising_losses(of_denoising, targets, num_boxes, self.class_loss)
            )
            matches = assignments()
            terms = _matched_losses(logits, boxes, targets, matches, num_boxes, self.class_loss)
            names = [*_layer_suffixes(len(output.pred_logits), ""), "_encoder"]
            named = {f"{term}{suffix}": values[i] for term, values in terms.items() for i, suffix in enumerate(names)}
            total = self._weighted({term: values[: len(names)] for term, values in terms.items()})
            # Further groups of queries together weigh as much as the first (hybrid matching, arXiv 2207.13080).
            further = {term: values[len(names) :] for term, values in terms.items()}
            if output.group_logits is not None:
                groups = len(output.group_logits) / len(output.pred_logits)
                named |= {f"{term}_groups": values.sum() / groups for term, values in further.items()}
                total = total + self._weighted(further) / groups
            if rebuilt is not None:
                names = _layer_suffixes(len(output.pred_logits), "_denoising")
                for term, values in rebuilt.items():
                    named.update({f"{term}{suffix}": values[i] for i, suffix in enumerate(names)})
                total = total + self._weighted(rebuilt)
        matches.check()
        return {"loss": total, **named}

    def _launch_matching(
        self, logits: Tensor, boxes: Tensor, targets: Targets, image_ids: Sequence[int] | None
    ) -> Callable[[], Matches]:
        """What gives the assignments when it is called; a matcher with a `forward` of its own starts only then."""
        own = type(self.matcher).forward is not HungarianMatcher.forward
        if own:
            return partial(self.matcher, logits, boxes, targets, image_ids)
        return self.matcher.launch(logits, boxes, targets, image_ids)

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[term] * values.sum() for term, values in terms.items()]).sum()


def _layer_suffixes(num_layers: int, kind: str) -> list[str]:
    return [*(f"{kind}_{layer}" for layer in range(num_layers - 1)), kind]


def _all_layers(layers: Tensor, encoder: Tensor, groups: Tensor | None) -> Tensor:
    """(L, B, Q, X) of the decoder, (B, Q, X) of the encoder, (L * G, B, Q, X) of groups -> all of them."""
    parts = [layers.float(), encoder.float()[None]]
    return torch.cat(parts if groups is None else [*parts, groups.float()])


def mean_num_boxes(targets: Targets, device: torch.device) -> Tensor:
    """Boxes in the batch, averaged over processes, which all have to ask: 0-dim float32."""
    count = torch.tensor(float(sum(targets.num_boxes))).to(device, non_blocking=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count


def _box_losses(boxes: Tensor, wanted: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(L, ..., 4) boxes_cxcywh, their targets, and (L, ...) bool which count -> (L,) L1 and (L,) 1 - GIoU, summed."""
    distance = (boxes - wanted).abs().sum(-1)
    gap = 1 - paired_generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return (distance * counts).flatten(1).sum(1), (gap * counts).flatten(1).sum(1)


@torch.no_grad()
def _quality(boxes: Tensor, wanted: Tensor) -> Tensor:
    """(L, ..., 4) boxes_cxcywh and their targets -> (L, ...) IoU, 0-1, a constant to the gradient."""
    return paired_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted)).expand(boxes.shape[:-1])


def _matched_losses(
    logits: Tensor, boxes: Tensor, targets: Targets, matches: Matches, num_boxes: Tensor, kind: ClassLoss
) -> dict[str, Tensor]:
    """The three terms of L layers, each (L,)."""
    layers, batch, queries, num_classes = logits.shape
    image = torch.arange(batch, device=logits.device)[:, None] * queries
    slot = (image + matches.queries) * num_classes + targets.labels
    found = boxes.gather(2, matches.queries[..., None].expand(-1, -1, -1, 4))
    wanted = targets.boxes_cxcywh.expand(layers, -1, -1, -1)
    l1, giou = _box_losses(found, wanted, matches.matched)
    quality = None if kind == "focal" else _quality(found, wanted).flatten(1)
    surprise = class_loss(
        kind, logits.flatten(1, 2), slot.flatten(1), matches.matched.flatten(1), quality, images=batch
    )
    return {
        "loss_class": surprise / num_boxes,
        "loss_bbox": l1 / num_boxes,
        "loss_giou": giou / num_boxes,
    }


def _denoising_losses(
    output: DenoisingOutput, targets: Targets, num_boxes: Tensor, kind: ClassLoss
) -> dict[str, Tensor]:
    """The three terms of L layers, each (L,): positives rebuild their box, everything else is background."""
    logits, boxes = output.pred_logits.float(), output.pred_boxes.float()
    layers, batch, slots, num_classes = logits.shape
    grouped = (layers, batch, output.num_groups, 2, output.max_boxes)
    positive = torch.arange(batch * slots, device=logits.device).view(grouped[1:])[:, :, 0]  # (B, G, N)
    place = (positive * num_classes + targets.labels[:, None]).flatten().expand(layers, -1)
    counts = targets.valid[:, None].expand_as(positive).flatten().expand(layers, -1)
    found, wanted = boxes.view(*grouped, 4)[:, :, :, 0], targets.boxes_cxcywh[None, :, None]
    l1, giou = _box_losses(found, wanted, targets.valid[None, :, None])
    quality = None if kind == "focal" else _quality(found, wanted).flatten(1)
    # Each group rebuilds all boxes, so the sum over groups is divided by their number.
    divisor = num_boxes * output.num_groups
    return {
        "loss_class": class_loss(kind, logits.flatten(1, 2), place, counts, quality, images=batch) / divisor,
        "loss_bbox": l1 / divisor,
        "loss_giou": giou / divisor,
    }
