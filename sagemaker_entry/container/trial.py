"""Measures a trial: the real training, ended after a few dozen optimizer steps and one evaluation."""

from __future__ import annotations

import datetime
import os
import resource
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from dino_lightning.files import atomic_write
from sagemaker_entry.protocol.progress import PREFIX
from sagemaker_entry.protocol.trial import STEPS, STEPS_TO_WARM_UP, Measured


class MeasureTrial(lightning.Callback):
    """Ends the training after `STEPS` optimizer steps with an evaluation, and writes what it took to a file.

    Args:
        path: the file, written by the first of all processes.
        job: the name of the training job.
        started: `time.monotonic` at the start of the container's entry.
    """

    def __init__(self, path: Path, job: str, started: float) -> None:
        self.path, self.job, self.started = path, job, started
        self._seconds_to_start = 0.0
        self._last, self._warm = STEPS, STEPS_TO_WARM_UP
        self._ended: float | None = None  # the last training batch; None where no batch of the same epoch was before
        self._begun = 0.0
        self._measured = self._waited = 0.0
        self._batches = self._val_images = 0
        self._val_started = self._val_ended = 0.0
        self._val_seconds = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A run with fewer steps than a trial ends sooner, and warms up for fewer."""
        self._last = int(min(STEPS, trainer.estimated_stepping_batches))
        self._warm = min(STEPS_TO_WARM_UP, self._last // 4)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The time between two epochs is no time of a batch."""
        self._ended = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch as waiting for this one."""
        self._begun = time.monotonic()
        if self._ended is not None and trainer.global_step >= self._warm:
            self._waited += self._begun - self._ended

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and end the training after the last one."""
        if not self._seconds_to_start:
            _finish(trainer)
            self._seconds_to_start = time.monotonic() - self.started
        step = trainer.global_step
        if step >= self._last:
            trainer.should_stop = True
        if step in (self._warm, self._last):
            _finish(trainer)  # the device may be batches behind; not for every one, which would cost speed
        now = time.monotonic()
        if step > self._warm:
            self._measured += now - (self._begun if self._ended is None else self._ended)
            self._batches += 1
        self._ended = now

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock of the evaluation."""
        self._val_started, self._val_images = time.monotonic(), 0

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the images."""
        self._val_images += len(batch)
        self._val_ended = time.monotonic()
        self._val_seconds = self._val_ended - self._val_started

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write what was measured; the checkpoints of the epoch are saved by now."""
        _finish(trainer)
        after = time.monotonic() - self._val_ended if self._val_images else 0.0
        used, total = memory(trainer.strategy.root_device)
        largest = torch.tensor(float(used), dtype=torch.float64, device=trainer.strategy.root_device)
        used = int(float(trainer.strategy.reduce(largest, reduce_op="max")))
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by fit
        device = trainer.strategy.root_device
        found = Measured(
            job=self.job,
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            processes=trainer.world_size,
            batch_size=data.batch_size,
            batches_per_step=trainer.accumulate_grad_batches,
            seconds_per_batch=self._measured / self._batches,
            batches=self._batches,
            waiting=min(1.0, self._waited / self._measured),
            memory_used=used,
            memory_total=total,
            seconds_per_val_image=self._val_seconds / max(1, self._val_images),
            seconds_after_evaluation=after,
            val_images=self._val_images,
            seconds_to_start=self._seconds_to_start,
        )
        with atomic_write(self.path) as temporary:
            temporary.write_text(found.to_json())
        for line in found.lines():
            print(f"{PREFIX} trial: {line}", flush=True)


def memory(device: torch.device) -> tuple[int, int]:
    """(bytes used at the most, bytes there are) of a GPU, or of this process and the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _finish(trainer: lightning.Trainer) -> None:
    """Wait until the device has done what was asked of it."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
