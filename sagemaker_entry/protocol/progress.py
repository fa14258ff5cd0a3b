"""What a job says while it trains: lines for people, for SageMaker's metric graphs and for `launch` to follow."""

from __future__ import annotations

import re
import time
from typing import Any

import lightning

from dino_lightning.structures import Batch

PREFIX = "[dino]"
SECONDS_BETWEEN_LINES = 20.0

# Name in the SageMaker console -> how it stands in a line.
METRICS = {
    "train:loss": "train_loss",
    "val:loss": "val_loss",
    "val:AP": "val_AP",
    "val:AP50": "val_AP50",
    "val:F1": "val_F1",
    "epoch": "epoch",
}


def metric_regex(word: str) -> str:
    """The pattern that finds a figure in a line; its group is the figure."""
    return rf"\{PREFIX[:-1]}\] .*\b{word}=([0-9.eE+-]+)"


def read_figures(line: str) -> dict[str, float]:
    """The figures of one of our lines; nothing for other lines."""
    if PREFIX not in line:
        return {}
    found = {word: re.search(metric_regex(word), line) for word in (*METRICS.values(), "epochs")}
    return {word: float(match[1]) for word, match in found.items() if match}


class ProgressLines(lightning.Callback):
    """Prints a line every 20 seconds and one with the figures of each epoch, on the first process."""

    def __init__(self) -> None:
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
        """How far training is, and how fast."""
        if not trainer.is_global_zero:
            return
        self._images += len(batch) * trainer.world_size
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        pace = f", {self._images / (now - self._last):.1f} images/s" if self._last else ""
        self._last, self._images = now, 0
        self._say(
            trainer,
            f"batch {batch_idx + 1} of {trainer.num_training_batches} train_loss={float(outputs['loss']):.4f}{pace}",
        )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remember that this epoch has figures of its own: the Trainer repeats old ones where it has none."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The figures of the epoch."""
        if not trainer.is_global_zero:
            return
        words = {"train/loss_epoch": "train_loss", "val/loss": "val_loss", "val/AP": "val_AP", "val/AP50": "val_AP50",
                 "val/F1": "val_F1"}  # fmt: skip
        figures = [
            f"{word}={float(trainer.callback_metrics[name]):.4f}"
            for name, word in words.items()
            if name in trainer.callback_metrics and (self._validated or not name.startswith("val/"))
        ]
        self._validated = False
        self._say(trainer, " ".join(["finished", *figures]))

    def _say(self, trainer: lightning.Trainer, text: str) -> None:
        print(f"{PREFIX} epoch={trainer.current_epoch + 1} epochs={trainer.max_epochs} {text}", flush=True)
