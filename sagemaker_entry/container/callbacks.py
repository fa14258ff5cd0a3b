"""Lightning callbacks of a training process: the same checkpoint on all hosts, and progress lines in the log."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from dino_lightning.structures import Batch
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import PREFIX

SECONDS_BETWEEN_LINES = 20.0
BEST = {"val/AP": "best_AP", "val/F1": "best_F1"}


class SameStart(lightning.Callback):
    """Stops the job unless all hosts resume from the same checkpoint, or all start without one.

    Args:
        checkpoint: the one to resume from, if it exists.
        met: a file to make once all processes have found each other.
    """

    def __init__(self, checkpoint: Path, met: Path) -> None:
        self.checkpoint, self.met = checkpoint, met

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare the checkpoint's size between the processes, before anything is loaded.

        Raises:
            Problem: this host has no checkpoint, or a smaller one than another host.
        """
        size = float(self.checkpoint.stat().st_size) if self.checkpoint.is_file() else 0.0
        own = torch.tensor(size, dtype=torch.float64, device=trainer.strategy.root_device)
        largest = float(trainer.strategy.reduce(own.clone(), reduce_op="max"))
        self.met.touch()
        if size != largest:
            raise Problem(
                f"This host has {'a smaller' if size else 'no'} checkpoint in {self.checkpoint.parent}, unlike others; "
                "resume the job, so that SageMaker copies the same one to all hosts."
            )


class ProgressLines(lightning.Callback):
    """Prints a progress line every 20 seconds and one with the metrics of each epoch, on global rank 0.

    Args:
        resumed: the metrics.csv of the run that is resumed, whose best metrics count on; None for a new run.
    """

    def __init__(self, resumed: Path | None = None) -> None:
        self._best = best_metrics(resumed) if resumed is not None and resumed.is_file() else {}
        self._last = 0.0
        self._images = 0
        self._validated = False

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Print the batch number, the training loss and the images per second, at most every 20 seconds."""
        if not trainer.is_global_zero:
            return
        self._images += len(batch) * trainer.world_size
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        pace = f", {self._images / (now - self._last):.1f} images/s" if self._last else ""
        self._last, self._images = now, 0
        self._print(
            trainer,
            f"batch {batch_idx + 1} of {trainer.num_training_batches} train_loss={float(outputs['loss']):.4f}{pace}",
        )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that this epoch was validated: `callback_metrics` keeps the values of earlier epochs."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the metrics of the epoch; those of validation only if it was validated."""
        if not trainer.is_global_zero:
            return
        names = {"train/loss_epoch": "train_loss", "val/loss": "val_loss", "val/AP": "val_AP", "val/AP50": "val_AP50",
                 "val/F1": "val_F1"}  # fmt: skip
        metrics = [
            f"{word}={float(trainer.callback_metrics[name]):.4f}"
            for name, word in names.items()
            if name in trainer.callback_metrics and (self._validated or not name.startswith("val/"))
        ]
        for name, word in BEST.items():
            if self._validated and name in trainer.callback_metrics:
                value = float(trainer.callback_metrics[name])
                self._best[name] = max(value, self._best.get(name, value))
                metrics.append(f"{word}={self._best[name]:.4f}")
        self._validated = False
        self._print(trainer, " ".join(["finished", *metrics]))

    def _print(self, trainer: lightning.Trainer, text: str) -> None:
        print(f"{PREFIX} epoch={trainer.current_epoch + 1} epochs={trainer.max_epochs} {text}", flush=True)


def best_metrics(file: Path) -> dict[str, float]:
    """The best AP and F1 in a metrics.csv, by their names; a row that was cut off is left out."""
    best: dict[str, float] = {}
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            for name in BEST:
                try:
                    value = float(row.get(name) or "nan")
                except ValueError:
                    continue
                if value >= best.get(name, value):  # never true for nan
                    best[name] = value
    return best
