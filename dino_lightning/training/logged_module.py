"""The metrics of training steps on their way to loggers and progress bar."""

from __future__ import annotations

from typing import Any

from dino_lightning.structures import Batch
from dino_lightning.training.evaluated_module import EvaluatedModule
from dino_lightning.training.step_metrics import StepMetrics


class LoggedModule(EvaluatedModule):
    """What `DINOModule` logs while it trains. Its training step adds to `step_metrics`.

    Attributes:
        step_metrics: of the steps since the last ones that were logged, and of the epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step_metrics = StepMetrics()
        self._shown: dict[str, float] = {}  # metrics of this step, if they are logged

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Log every N steps, with one copy from the device for all metrics: each copy is a device synchronisation.

        Directly to the loggers: Lightning logs only after the callbacks have saved their checkpoints, and a run killed
        in between would lack the metrics.
        """
        super().optimizer_step(*args, **kwargs)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning, not declared
        self._shown = {}
        if every and (self.global_step + 1) % every == 0:
            self._shown = self.step_metrics.of_step()
            self._send(self._shown, self.global_step)

    def _send(self, metrics: dict[str, float], step: int) -> None:
        for logger in self.loggers if metrics else ():
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Show the logged metrics in the progress bar and to callbacks."""
        for name, value in self._shown.items():
            shown = name == "train/loss_step"
            self.log(name, value, prog_bar=shown, logger=False, on_step=True, on_epoch=False, batch_size=1)
        self._shown = {}

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch."""
        loss = self.epoch_loss
        if loss is not None:
            self._send({"train/loss_epoch": loss}, self.global_step - 1)
            self.log("train/loss_epoch", loss, logger=False, batch_size=1, sync_dist=True)
        self.step_metrics.start_epoch()

    @property
    def epoch_loss(self) -> float | None:
        """The mean training loss of the epoch so far; None before its first step. Synchronises with the device."""
        return self.step_metrics.epoch_loss
