"""Explains an out-of-memory error: at which batch it happened, and what helps."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from dino_lightning.callbacks.auto_batch_size import AutoBatchSize
from dino_lightning.errors import OutOfMemory
from dino_lightning.structures import Batch
from dino_lightning.training.memory import GIGABYTE, StepSize
from dino_lightning.training.module import DINOModule


class OutOfMemoryReporter(lightning.Callback):
    """Notes the size of each batch; `explained` turns an out-of-memory error into a sentence with it."""

    def __init__(self) -> None:
        self._trainer: lightning.Trainer | None = None
        self._place = "before the first batch"
        self._size: StepSize | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Note the Trainer."""
        self._trainer = trainer

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the sizes of the batch (a reference to its tensors would keep them on the device)."""
        self._note(pl_module, batch, f"in batch {batch_idx + 1} of training epoch {trainer.current_epoch + 1}")

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the sizes of the batch, as in training."""
        self._note(pl_module, batch, f"in batch {batch_idx + 1} of the validation")

    def on_test_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the sizes of the batch, as in training."""
        self._note(pl_module, batch, f"in batch {batch_idx + 1} of the test")

    def _note(self, module: lightning.LightningModule, batch: Any, place: str) -> None:
        if isinstance(batch, Batch) and isinstance(module, DINOModule):
            self._place, self._size = place, StepSize.of(batch, module.model)

    def explained(self, error: BaseException) -> OutOfMemory:
        """The error to show: where memory ran out, how large the batch was, and what helps."""
        if "DataLoader worker" in str(error):
            return OutOfMemory(
                "A loader process ran out of memory: lower data.num_workers, or set data.cache_dir to cache very large "
                "images scaled down."
            )
        size = "" if self._size is None else f", which has {self._size}"
        remedies = self._remedies()
        helps = f"{', or '.join([', '.join(remedies[:-1]), remedies[-1]]) if len(remedies) > 1 else remedies[0]}"
        return OutOfMemory(f"Out of memory{self._where()} {self._place}{size}. What helps: {helps}.")

    def _where(self) -> str:
        device = None if self._trainer is None else self._trainer.strategy.root_device
        if device is None or device.type != "cuda":
            return ""
        return f" ({torch.cuda.get_device_properties(device).total_memory / GIGABYTE:.1f} GB of {device})"

    def _remedies(self) -> list[str]:
        """What helps and is not in use yet, the mildest first."""
        trainer = self._trainer
        found = []
        if trainer is not None:
            training = "training" in self._place
            if training and self._size is not None and self._size.images > 1:
                found.append(self._smaller_batches(trainer, self._size.images))
            elif self._size is not None and self._size.images > 1:
                found.append("--data.val_batch_size 1")
            hparams = trainer.lightning_module.hparams
            if training and trainer.strategy.root_device.type == "cuda" and trainer.precision == "32-true":
                found.append("--trainer.precision bf16-mixed")
            if training and not hparams.get("recompute_encoder", False):
                found.append("--model.recompute_encoder true")
        return [*found, "smaller images by --data.max_size and --data.image_size", "a smaller --model.backbone"]

    def _smaller_batches(self, trainer: lightning.Trainer, images: int) -> str:
        accumulated = trainer.accumulate_grad_batches
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, not declared
        if any(isinstance(callback, AutoBatchSize) for callback in callbacks):
            return (
                f"--data.batch_size {images // 2} with --trainer.accumulate_grad_batches {accumulated * 2} in place of "
                "--auto_batch_size"
            )
        return f"--auto_batch_size {images * accumulated * trainer.world_size} to choose batches that fit"
