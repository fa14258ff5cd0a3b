"""The figures logged before a run was interrupted stay in metrics.csv when it goes on."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import lightning
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor


class KeptMetrics(lightning.Callback):
    """For a run that goes on: logs the rows of its metrics.csv again, since Lightning's logger begins a new file.

    Rows from steps after the checkpoint are left out: these steps are done again.

    Args:
        path: the file, read at once.
    """

    def __init__(self, *, path: Path) -> None:
        self._rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self._rows = list(csv.DictReader(file))
            warnings.filterwarnings("ignore", message="Experiment logs directory")  # it says that they will be lost

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the rows again."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, CSVLogger):
                for row in self._rows:
                    figures: dict[str, Tensor | float] = {name: float(value) for name, value in row.items() if value}
                    step = int(row["step"])
                    del figures["step"]
                    if step < trainer.global_step:
                        logger.log_metrics(figures, step)
                logger.save()
