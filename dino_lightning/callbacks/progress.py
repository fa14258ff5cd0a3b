"""The progress bar: epochs counted from 1, F1 and the time left first; plain lines where there is no terminal."""

from __future__ import annotations

import datetime
import math
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar

SECONDS_BETWEEN_LINES = 30.0  # in a file or a pipe, where a bar would leave thousands
BAR_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt}{postfix} [{rate_noinv_fmt}]"
LEFT_OUT = ("v_num", "val/AP")  # runs have folders, not numbers; AP, which is in the final table, has no room


class Progress(TQDMProgressBar):
    """Lightning's bar with F1, `left` (hours, minutes and seconds until the last epoch ends) and the loss.

    The time left follows from the mean pace so far, validations included. Where standard output is not a terminal,
    there is one line an epoch and at most two a minute instead of a bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since: tuple[float, int] | None = None
        self._lines = not sys.stdout.isatty()
        self._last_line = time.monotonic()
        if self._lines:
            self.disable()

    def init_train_tqdm(self) -> Any:
        """A bar that shows the metrics before the pace, so that a narrow terminal cuts off the pace."""
        bar = super().init_train_tqdm()
        bar.bar_format = BAR_FORMAT
        return bar

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock; a resumed run counts from the step at which it resumes."""
        super().on_train_start(trainer, pl_module)
        self._since = time.monotonic(), trainer.global_step

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Name the epoch as the table does: the first one is 1."""
        total = self.total_train_batches
        self.train_progress_bar.set_description(_epoch(trainer), refresh=False)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.reset(total=None if math.isinf(total) else total)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update the bar, or print a line when one is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_due(trainer):
            self._print(f"{_epoch(trainer)}, batch {batch_idx + 1}/{self.total_train_batches}", trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the metrics of the epoch; validation has run by now."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._lines and trainer.is_global_zero:
            self._print(f"{_epoch(trainer)} done", trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the bar, or print a line when one is due."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._is_due(trainer):
            self._print(f"Validation, batch {batch_idx + 1}", trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the bar, or print a line when one is due."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._is_due(trainer):
            self._print(f"Test, batch {batch_idx + 1}", trainer, pl_module)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """The metrics in the bar: F1, the time left, the loss, then what else was logged with `prog_bar`."""
        others = super().get_metrics(trainer, pl_module)
        for name in LEFT_OUT:
            others.pop(name, None)
        f1, loss = others.pop("val/F1", None), others.pop("train/loss_step", None)
        left = self._seconds_left(trainer)
        shown = {
            "F1": None if f1 is None else f"{f1:.3f}",
            "left": None if left is None else str(datetime.timedelta(seconds=round(left))),
            "loss": None if loss is None else f"{loss:.2f}",
        }
        return {name: value for name, value in shown.items() if value is not None} | others

    def _seconds_left(self, trainer: lightning.Trainer) -> float | None:
        if self._since is None or not trainer.training:
            return None
        start, step = self._since
        steps, done = trainer.estimated_stepping_batches, trainer.global_step - step
        if done < 1 or not math.isfinite(steps):
            return None
        return (time.monotonic() - start) / done * max(0, steps - trainer.global_step)

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        return self._lines and trainer.is_global_zero and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def _print(self, place: str, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._last_line = time.monotonic()
        metrics = [
            f"{name} {value if isinstance(value, str) else f'{float(value):.3g}'}"
            for name, value in self.get_metrics(trainer, pl_module).items()
        ]
        print(f"{place}: {', '.join(metrics)}" if metrics else place, flush=True)


def _epoch(trainer: lightning.Trainer) -> str:
    """Such as "Epoch 3/14"; without a number of epochs to come to, "Epoch 3"."""
    known = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"Epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if known else "")
