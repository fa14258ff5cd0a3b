"""Stopping on request: all processes save the same step, then end.

SageMaker sends SIGTERM to the first process of every host, not to the training processes, and not at the same moment
everywhere. Lightning's own handler deadlocks when that happens across hosts. So the launcher puts down a flag file, and
the training processes agree, at the same step, whether any host has one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
import torch

SECONDS_BETWEEN_POLLS = 5.0
MOST_BATCHES_BETWEEN_POLLS = 10


class StoppedOnRequest(Exception):
    """Training was stopped by the flag; the checkpoint is written."""


class StopOnFlag(lightning.Callback):
    """Saves a checkpoint on all processes and raises `StoppedOnRequest` once any of them sees the flag file.

    The processes ask each other every few batches, about every five seconds, in training and in validation.

    Args:
        flag: the file that asks to stop.
        saved: written by each host's first process when the checkpoint is there; holds the step.
        checkpoint: where to save.
    """

    def __init__(self, *, flag: Path, saved: Path, checkpoint: Path) -> None:
        self.flag, self.saved, self.checkpoint = flag, saved, checkpoint
        self._batches_to_poll = 1
        self._interval = 1
        self._last_poll = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Poll at the first batch: the pace may be another one."""
        self._batches_to_poll = 1

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """As at the start of an epoch."""
        self._batches_to_poll = 1

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Poll; not after the last batch of an epoch, where Lightning would go on with the next epoch."""
        if batch_idx + 1 < trainer.num_training_batches:
            self._poll(trainer)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Poll: a validation may take longer than the two minutes that SageMaker gives."""
        if not trainer.sanity_checking:
            self._poll(trainer)

    def _poll(self, trainer: lightning.Trainer) -> None:
        self._batches_to_poll -= 1
        if self._batches_to_poll > 0:
            return
        now = time.monotonic()
        asked = torch.tensor(
            [float(self.flag.exists()), (now - self._last_poll) / self._interval], device=trainer.strategy.root_device
        )
        # One collective for both: whether to stop, and the pace of the slowest, from which all take the next interval.
        stop, seconds_per_batch = trainer.strategy.reduce(asked, reduce_op="max").tolist()
        if stop:
            self._stop(trainer)
        pace = SECONDS_BETWEEN_POLLS / max(seconds_per_batch, 1e-6)
        self._interval = self._batches_to_poll = int(min(max(pace, 1), MOST_BATCHES_BETWEEN_POLLS))
        self._last_poll = now

    def _stop(self, trainer: lightning.Trainer) -> None:
        if trainer.validating:
            # Lightning would take up the evaluation in its middle and judge the rest of the images alone, or pass over
            # it. In this state it begins anew: started with its first batch, nothing done.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
        trainer.save_checkpoint(self.checkpoint)  # on all processes: it ends with a barrier
        if trainer.local_rank == 0:
            self.saved.write_text(str(trainer.global_step))
        raise StoppedOnRequest(f"stopped at step {trainer.global_step}")
