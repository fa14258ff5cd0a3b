"""The loggers of a run, on a disk that is full: metrics.csv ends it in one sentence, TensorBoard is given up."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dino_lightning.errors import UserError
from dino_lightning.files import advice_on, reason_of


@contextmanager
def told_if_not_written(path: Path) -> Iterator[None]:
    """What is nice to have and is not worth a training: where it cannot be written, a warning says so."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{path} could not be written ({reason_of(error)}); training continues without it.")


def unwritten(path: Path, error: OSError) -> UserError:
    """The error of a file that a run cannot do without."""
    return UserError(
        f"{path} could not be written ({reason_of(error)}). {advice_on(error)}, then resume with --ckpt_path last."
    )


class MetricsCsv(CSVLogger):
    """Lightning's logger; metrics that cannot be written end the training in one sentence."""

    def save(self) -> None:
        """Write what was logged.

        Raises:
            UserError: it cannot be written.
        """
        try:
            super().save()
        except OSError as error:
            self._experiment = None  # or it would be tried again on the way out
            raise unwritten(Path(self.log_dir) / "metrics.csv", error) from error


class TensorBoardIfPossible(TensorBoardLogger):
    """Lightning's logger, which is given up with a warning where its files cannot be written.

    Its events are written by a thread, whose error comes up with a later event.
    """

    _given_up = False

    def _attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._given_up:
            return
        try:
            action(*args, **kwargs)
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning's is a ValueError
            if not isinstance(cause, OSError):
                raise
            self._give_up(cause)

    def _give_up(self, error: OSError) -> None:
        if not self._given_up:
            self._given_up = True
            rank_zero_warn(
                f"{self.log_dir} could not be written ({reason_of(error)}); training continues without TensorBoard, "
                "metrics.csv has the same."
            )

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; one that does nothing where it was given up."""
        if not self._given_up:
            try:
                return super().experiment
            except OSError as error:  # of its first event
                self._give_up(error)
        return _DummyExperiment()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As in the base class."""
        self._attempt(super().log_metrics, metrics, step)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """As in the base class."""
        self._attempt(super().log_hyperparams, params, metrics, step)

    def log_graph(self, model: Any, input_array: Tensor | None = None) -> None:
        """As in the base class."""
        self._attempt(super().log_graph, model, input_array)

    def log_picture(self, name: str, pixels: Any, step: int) -> None:
        """Add an image (height, width, 3) uint8."""
        self._attempt(lambda: self.experiment.add_image(name, pixels, step, dataformats="HWC"))

    def save(self) -> None:
        """As in the base class."""
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        """As in the base class."""
        self._attempt(super().finalize, status)
