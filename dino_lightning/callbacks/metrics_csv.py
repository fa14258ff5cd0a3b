"""Keeps the metrics that were logged before an interruption in metrics.csv when the run is resumed."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from dino_lightning.callbacks.run_loggers import unwritten
from dino_lightning.errors import UserError
from dino_lightning.files import atomic_write, unreadable, why_unreadable


class MetricsCsvResume(lightning.Callback):
    """Logs the rows of a resumed run's metrics.csv again, since Lightning's logger starts a new file.

    Rows from steps after the checkpoint are left out: these steps are repeated. Lightning rewrites the file whenever a
    new metric appears, and removes it when a run is resumed; in case the run is killed at that moment, there is a copy.

    Args:
        path: the file, read at once if `resuming`.
        copy: where the copy is kept.
        resuming: whether the run is resumed from a checkpoint.

    Raises:
        UserError: the file or its copy cannot be read, or the copy not written.
    """

    def __init__(self, *, path: Path, copy: Path, resuming: bool) -> None:
        self.path, self.copy = path, copy
        self._rows: list[dict[str, str]] = []
        if resuming:
            (kept, _), (logged, broken) = _rows(copy), _rows(path)
            self._rows = max(kept, logged, key=lambda rows: (_last_step(rows), len(rows)))
            if broken:
                rank_zero_warn(
                    f"{path}: {len(broken)} of its {len(broken) + len(logged)} rows cannot be read (first: line "
                    f"{broken[0]})" + (f"; they are taken from {copy}." if self._rows is kept else " and are left out.")
                )
            if self._rows and self._rows == logged:
                self._keep()
        elif getattr(rank_zero_only, "rank", 0) == 0:  # set by Lightning, not declared
            copy.unlink(missing_ok=True)

    @rank_zero_only
    def _keep(self) -> None:
        try:
            with atomic_write(self.copy) as temporary:
                shutil.copyfile(self.path, temporary)
        except OSError as error:
            if (problem := why_unreadable(self.path)) is not None:
                raise _unread(self.path, problem) from error
            raise unwritten(self.copy, error) from error

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out the rows of steps that will be repeated."""
        self._rows = [row for row in self._rows if int(row["step"]) < checkpoint["global_step"]]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the rows again; also if the run turns out to be finished."""
        for logger in trainer.loggers if trainer.is_global_zero and self._rows else []:
            if isinstance(logger, CSVLogger):
                for row in self._rows:
                    metrics: dict[str, Tensor | float] = {k: float(v) for k, v in row.items() if v and k != "step"}
                    logger.experiment.log_metrics(metrics, int(row["step"]))
                logger.save()
                self._keep()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Update the copy."""
        if trainer.is_global_zero and self.path.is_file():
            self._keep()


def _unread(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} {unreadable(error)}, or move it away to resume without its rows.")


def _rows(path: Path) -> tuple[list[dict[str, str]], list[int]]:
    """The whole rows of a metrics file, and the line numbers of those that are not."""
    if not path.is_file():
        return [], []
    rows, broken = [], []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = [line.replace("\0", "\N{REPLACEMENT CHARACTER}") for line in file]
    except OSError as error:
        raise _unread(path, error) from error
    reader = csv.DictReader(lines)
    for row in reader:
        cut = reader.line_num == len(lines) and not lines[-1].endswith("\n")  # a number may have lost its last digits
        if cut or not _is_whole(row):
            broken.append(reader.line_num)
        else:
            rows.append(row)
    return rows, broken


def _is_whole(row: dict[str, str]) -> bool:
    """Whether a row has a value or nothing in each column, and a step."""
    if None in row or None in row.values():  # too many cells, too few
        return False
    try:
        int(row["step"])
        for value in row.values():
            float(value or 0)
    except (KeyError, ValueError):
        return False
    return True


def _last_step(rows: list[dict[str, str]]) -> int:
    return int(rows[-1]["step"]) if rows else -1
