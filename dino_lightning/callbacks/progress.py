"""The progress bar, with the time that is left of the whole run."""

from __future__ import annotations

import datetime
import math
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar


class Progress(TQDMProgressBar):
    """Lightning's bar for the epoch, and beside it `left`: hours, minutes and seconds until the last epoch ends.

    From the mean pace so far, evaluations included; written less often where nobody watches (no terminal).
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 10)
        self._since: tuple[float, int] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock; a run that goes on counts from where it goes on."""
        super().on_train_start(trainer, pl_module)
        self._since = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """The figures in the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # runs have folders of their own, not numbers
        left = self._seconds_left(trainer)
        return metrics if left is None else {**metrics, "left": str(datetime.timedelta(seconds=round(left)))}

    def _seconds_left(self, trainer: lightning.Trainer) -> float | None:
        if self._since is None or not trainer.training:
            return None
        start, step = self._since
        steps, done = trainer.estimated_stepping_batches, trainer.global_step - step
        if done < 1 or not math.isfinite(steps):
            return None
        return (time.monotonic() - start) / done * max(0, steps - trainer.global_step)
