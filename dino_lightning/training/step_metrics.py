"""The metrics of training steps, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StepMetrics:
    """The metrics of the last step, and the sum of the losses of an epoch.

    Only `of_step` and `epoch_loss` synchronise with the device.

    Attributes:
        grad_norm: () the total gradient norm of the last step before clipping; None before the first step.
        of_epoch: () the sum of the losses of this epoch's images so far (None before the first), and their number.
    """

    def __init__(self) -> None:
        self.grad_norm: Tensor | None = None
        self.of_epoch: tuple[Tensor | None, int] = (None, 0)
        self._terms: dict[str, Tensor] = {}

    def take(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Keep the losses of a batch: the total, and the terms of final layer, encoder and denoising queries.

        Args:
            losses: the criterion's result, each ().
            images: in the batch.
        """
        self._terms = {"train/loss_step": losses["loss"].detach()} | {
            f"train/{name}": value.detach()
            for name, value in losses.items()
            if name != "loss" and not name.rpartition("_")[2].isdigit()
        }
        total = (losses["loss"].detach() * images).nan_to_num(nan=0.0, posinf=0.0)
        before, count = self.of_epoch
        self.of_epoch = (total if before is None else before + total, count + images)

    def of_step(self) -> dict[str, float]:
        """The metrics of the last step by name, with one copy from the device; empty before the first step."""
        if not self._terms:
            return {}
        terms = self._terms if self.grad_norm is None else {**self._terms, "train/grad_norm": self.grad_norm}
        values = torch.stack([value.float() for value in terms.values()]).cpu()
        return dict(zip(terms, values.tolist(), strict=True))

    @property
    def epoch_loss(self) -> float | None:
        """The mean loss of this epoch's images so far; None before the first."""
        total, images = self.of_epoch
        return None if total is None else float(total) / images

    def start_epoch(self) -> None:
        """Reset the sum."""
        self.of_epoch = (None, 0)

    def resume_from(self, stored: tuple[Tensor | None, int], device: torch.device) -> None:
        """Restore `of_epoch` from a checkpoint."""
        total, images = stored
        self.of_epoch = (None if total is None else total.to(device), images)
