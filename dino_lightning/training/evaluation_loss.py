"""The loss of an evaluation: of all its images, whatever their batches and on whichever processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dino_lightning.errors import NonFiniteError
from dino_lightning.losses import Criterion
from dino_lightning.structures import Batch, ModelOutput


def summed_loss(criterion: Criterion, output: ModelOutput, batch: Batch) -> Tensor:
    """The loss of a batch with targets, not divided by its boxes, as the divisor is the number of boxes of all batches.

    Returns:
        () float32; not a number where predictions are not finite: the score will be bad; only training has to stop.
    """
    assert batch.targets is not None
    device = output.pred_logits.device
    try:
        losses: dict[str, Tensor] = criterion(
            output, batch.targets, batch.image_ids, num_boxes=torch.ones((), device=device)
        )
    except NonFiniteError:
        return torch.full((), float("nan"), device=device)
    return losses["loss"]


class EvaluationLoss:
    """The loss of all evaluated images for each of their boxes: the same in batches of any size, on any processes."""

    def __init__(self) -> None:
        self._batches: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def add(self, image_ids: tuple[int, ...], loss: Tensor, num_boxes: int) -> None:
        """Add a batch; one that another process has too, to fill its share, counts once.

        Args:
            image_ids: of the batch.
            loss: () the sum over its images, not divided by their boxes.
            num_boxes: in all of them.
        """
        self._batches[image_ids] = loss.detach(), num_boxes

    def compute(self) -> float | None:
        """The loss of all batches of all processes, which have to ask together; None without any. Starts afresh."""
        values = torch.stack([loss for loss, _ in self._batches.values()]).tolist() if self._batches else []
        counts = [num_boxes for _, num_boxes in self._batches.values()]
        batches = dict(zip(self._batches, zip(values, counts, strict=True), strict=True))
        self._batches = {}
        if dist.is_available() and dist.is_initialized():
            parts = [batches] * dist.get_world_size()
            dist.all_gather_object(parts, batches)
            batches = {image_ids: value for part in parts for image_ids, value in part.items()}
        if not batches:
            return None
        total: float = sum(loss for loss, _ in batches.values())
        return total / max(1, sum(count for _, count in batches.values()))


def of_loader(number: int) -> str:
    """What the names of a further loader's metrics end in, as Lightning has it; nothing for the first one."""
    return f"/dataloader_idx_{number}" if number else ""
