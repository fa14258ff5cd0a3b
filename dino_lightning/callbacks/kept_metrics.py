"""The figures logged before a run was interrupted stay in metrics.csv when it goes on."""

from __future__ import annotations

import csv
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dino_lightning.files import atomic_write


class MetricsCsvResume(lightning.Callback):
    """For a run that goes on: logs the rows of its metrics.csv again, since Lightning's logger begins a new file.

    Rows from steps after the checkpoint are left out: these steps are done again. Lightning writes the file anew when a
    new figure comes up, and removes it when a run goes on; should the run be killed just then, there is a copy.

    Args:
        path: the file, read at once if `resuming`.
        copy: where the copy is kept.
        resuming: whether the run goes on from a checkpoint.
    """

    def __init__(self, *, path: Path, copy: Path, resuming: bool) -> None:
        self.path, self.copy = path, copy
        self._rows: list[dict[str, str]] = []
        if resuming:
            kept, logged = _rows(copy), _rows(path)
            self._rows = max(kept, logged, key=_last_step)
            if self._rows and self._rows == logged:
                self._keep()
            warnings.filterwarnings("ignore", message="Experiment logs directory")  # it says that they will be lost
        elif getattr(rank_zero_only, "rank", 0) == 0:  # set by Lightning, not declared
            copy.unlink(missing_ok=True)

    @rank_zero_only
    def _keep(self) -> None:
        with atomic_write(self.copy) as temporary:
            shutil.copyfile(self.path, temporary)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out what will be done again."""
        self._rows = [row for row in self._rows if int(row["step"]) < checkpoint["global_step"]]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the rows again; also if the run turns out to be finished already."""
        for logger in trainer.loggers if trainer.is_global_zero and self._rows else []:
            if isinstance(logger, CSVLogger):
                for row in self._rows:
                    figures: dict[str, Tensor | float] = {k: float(v) for k, v in row.items() if v and k != "step"}
                    logger.experiment.log_metrics(figures, int(row["step"]))
                logger.save()
                self._keep()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the copy up to date."""
        if trainer.is_global_zero and self.path.is_file():
            self._keep()


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file that are whole."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("step") and None not in row.values() and None not in row]


def _last_step(rows: list[dict[str, str]]) -> int:
    return int(rows[-1]["step"]) if rows else -1
