"""Skips and reports steps whose predictions or gradients are not finite, without a device synchronisation."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dino_lightning.errors import NonFiniteError
from dino_lightning.files import atomic_write
from dino_lightning.structures import Batch, ModelOutput

MOST_BATCHES_KEPT = 10


class NonFiniteSteps:
    """Keeps a step that is not finite from changing the weights, and stops after too many in a row.

    The optimizer's fused kernel is told on the device to skip such a step (as a gradient scaler does). The number of
    them in a row is copied to the host asynchronously and read in the next step, where the matcher has synchronised
    with the device and the copy has arrived. All ranks have the same gradients, so they skip the same steps and stop
    together.

    Args:
        limit: how many in a row are skipped; one more stops the training.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._in_a_row: Tensor | None = None  # on the device
        self._copy: Tensor | None = None  # on the host
        self._view: npt.NDArray[np.int32] | None = None  # the same memory, read without a torch operator
        self._seen = 0  # how many of those in a row were reported
        self._noted = False  # whether this step was reported
        self._last: tuple[Batch, int] | None = None

    def note(self, batch: Batch, step: int, error: NonFiniteError, output: ModelOutput, folder: Path) -> Tensor:
        """Report a batch whose predictions are not finite.

        Args:
            batch: the batch.
            step: optimizer steps done.
            error: the matcher's error.
            output: of the model.
            folder: where the batch is saved.

        Returns:
            0-dim, a loss that is not finite and depends on every prediction, so that this rank does the same backward
            pass as the others, and all of them skip the step.

        Raises:
            NonFiniteError: `limit` is 0.
        """
        if self.limit < 1:
            raise error
        self._say(batch, step, f"the predictions for image ids {error.image_ids}", folder)
        self._seen += 1
        self._noted = True
        parts = [output.pred_logits, output.pred_boxes, output.encoder_logits, output.encoder_boxes]
        if output.denoising is not None:
            parts += [output.denoising.pred_logits, output.denoising.pred_boxes]
        return torch.stack([part.float().sum() for part in parts]).sum() * float("nan")

    def check(self, batch: Batch, step: int, folder: Path) -> None:
        """Report the previous step if it was skipped; call it right after a device synchronisation.

        Args:
            batch: of this step.
            step: optimizer steps done.
            folder: where the batch of the previous step is saved if it was not finite.

        Raises:
            NonFiniteError: there were too many in a row.
        """
        in_a_row = 0 if self._view is None else int(self._view)
        if in_a_row > self._seen and self._last is not None:
            before, its_step = self._last
            self._say(before, its_step, f"the gradients of image ids {list(before.image_ids)}", folder)
        if in_a_row > self.limit:
            raise NonFiniteError(
                (self._last or (batch, step))[0].image_ids,
                f" This happened in {in_a_row} steps in a row, which were skipped: the weights are as before them, "
                f"and the last checkpoint is good. The batches are in {folder}.",
            )
        self._seen = in_a_row
        self._last = batch, step

    def leave_out(self, norm: Tensor, optimizer: torch.optim.Optimizer, *, scaled: bool = False) -> None:
        """Make the optimizer skip this step if its gradients are not finite, and count it.

        Args:
            norm: 0-dim, total norm of the gradients.
            optimizer: a fused one does so on the device; any other needs a synchronisation, and its gradients are
                cleared.
            scaled: a gradient scaler skips such steps, and tries scales that are too large; then only predictions that
                are not finite count.
        """
        if scaled:
            norm = torch.tensor(float("nan") if self._noted else 0.0)
        self._noted = False
        bad = ~torch.isfinite(norm)
        if self._in_a_row is None or self._copy is None:
            self._in_a_row = torch.zeros((), dtype=torch.int32, device=norm.device)
            self._copy = torch.zeros((), dtype=torch.int32, pin_memory=norm.is_cuda)
            self._view = self._copy.numpy()
        self._in_a_row = (self._in_a_row + 1) * bad
        self._copy.copy_(self._in_a_row, non_blocking=True)
        if scaled:
            return
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by the fused step
        elif bad:
            optimizer.zero_grad()

    def _say(self, batch: Batch, step: int, what: str, folder: Path) -> None:
        self.total += 1
        kept = ""
        if self.total <= MOST_BATCHES_KEPT:
            path = _keep(batch, step, folder)
            kept = f" The batch is saved in {path}."
        warnings.warn(f"Step {step + 1} is left out: {what} are not finite.{kept}", stacklevel=2)


def _keep(batch: Batch, step: int, folder: Path) -> Path:
    """Save a batch for inspection: tensors and plain values, for `torch.load(..., weights_only=True)`."""
    path = folder / f"step{step + 1:07d}-images{'-'.join(map(str, batch.image_ids[:4]))}.pt"
    content = {
        "step": step + 1,
        "image_ids": list(batch.image_ids),
        "images": batch.images.cpu(),
        "image_sizes": [list(size) for size in batch.image_sizes],
    }
    if batch.targets is not None:
        targets = batch.targets.to("cpu")
        content |= {
            "boxes_cxcywh": targets.boxes_cxcywh,
            "labels": targets.labels,
            "num_boxes": list(targets.num_boxes),
        }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)
    return path
