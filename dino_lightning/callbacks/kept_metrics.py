"""The figures logged before a run was interrupted stay in metrics.csv when it goes on."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

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

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out what will be done again."""
        self._rows = [row for row in self._rows if int(row["step"]) < checkpoint["global_step"]]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the rows again; also if the run turns out to be finished already."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, CSVLogger):
                for row in self._rows:
                    figures: dict[str, Tensor | float] = {k: float(v) for k, v in row.items() if v and k != "step"}
                    logger.log_metrics(figures, int(row["step"]))
                logger.save()
