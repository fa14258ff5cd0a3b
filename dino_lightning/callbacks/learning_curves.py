"""The metrics of each epoch: a picture of the learning curves, and a table in the terminal."""

from __future__ import annotations

from pathlib import Path

import lightning
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino_lightning.callbacks.best import standing
from dino_lightning.callbacks.run_loggers import told_if_not_written
from dino_lightning.files import save_figure

COLUMNS = ("epoch", "train/loss", "val/loss", "val/AP", "val/AP50", "val/AP75", "val/F1")
CURVES = ("val/AP", "val/AP50", "val/AP75", "val/F1")  # all of them between 0 and 1
PANEL = (5.0, 3.8)  # width and height in inches


class LearningCurves(lightning.Callback):
    """Collects the metrics of each epoch and keeps `learning_curves.png` up to date; `table` shows the last epochs.

    Args:
        directory: the folder of the run.
        best_by: the metric of the best epoch, as of `callbacks.BestCheckpoint`.
    """

    def __init__(self, *, directory: str, best_by: str = "val/AP") -> None:
        self.directory, self.best_by = Path(directory), best_by
        self.history: list[dict[str, float]] = []
        self.trained = False  # whether a training began: a run whose epochs are done ends without one
        self._validated = False
        self._denoising = False

    @property
    def state_key(self) -> str:
        """Under which Lightning keeps its state in checkpoints: the class's first name, so that older ones resume."""
        return "RunReport"

    @property
    def curves_path(self) -> Path:
        """The PNG file with the learning curves."""
        return self.directory / "learning_curves.png"

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        """The history, so that the curves of a resumed run are complete."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, list[dict[str, float]]]) -> None:
        """Restore the history."""
        rows = state_dict["history"]
        self.history = [{str(name): float(value) for name, value in row.items()} for row in rows]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that there is something to train."""
        self.trained = True

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that this epoch was validated: the Trainer's metrics repeat old values where it was not."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add the epoch to the history and draw the curves; validation has run by now."""
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if self._validated or not name.startswith("val/")
        }
        self._validated = False
        self._denoising = bool(getattr(getattr(pl_module, "model", None), "num_denoising", 0))
        loss = getattr(pl_module, "epoch_loss", None)  # the module logs it only after this
        if loss is not None:
            metrics["train/loss"] = loss
        self.history.append({"epoch": float(trainer.current_epoch + 1), **metrics})
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            figure = draw_curves(self.history, denoising=self._denoising)
            if figure is not None:
                with told_if_not_written(self.curves_path):
                    save_figure(figure, self.curves_path)

    def table(self) -> str:
        """The last three epochs and the best of those that were validated, which is marked with a star."""
        if not self.history:
            return "No epoch was finished."
        validated = [index for index, row in enumerate(self.history) if "val/AP" in row]
        best = max(validated, key=lambda index: standing(self.history[index], self.best_by), default=None)
        shown = set(range(max(0, len(self.history) - 3), len(self.history)))
        lines = ["  " + "".join(f"{name.replace('/', ' '):>11}" for name in COLUMNS)]
        for index in sorted(shown if best is None else shown | {best}):
            row = self.history[index]
            values = [f"{int(row['epoch']):>11}"]
            values += [f"{row[name]:>11.3f}" if name in row else f"{'-':>11}" for name in COLUMNS[1:]]
            lines.append(("* " if index == best else "  ") + "".join(values))
        if best is not None and self.history[best].get("val/F1", 0) > 0:
            row = self.history[best]
            lines.append(
                f"* best epoch by {self.best_by}: F1 {row['val/F1']:.3f} at IoU 0.5 with precision "
                f"{row['val/F1_precision']:.3f} and recall {row['val/F1_recall']:.3f}, at a score threshold of "
                f"{row['val/F1_threshold']:.3f}"
            )
        if validated and self._denoising:
            lines.append("  (train loss includes the denoising queries, val loss does not)")
        return "\n".join(lines)


def draw_curves(history: list[dict[str, float]], *, denoising: bool) -> Figure | None:
    """A panel with the losses and one with the validation metrics, each only if there is something to show.

    Args:
        history: the metrics of each epoch, and its number as "epoch".
        denoising: whether the training loss includes denoising queries, which validation does not have.
    """
    loss_names = {
        "train/loss": "train, mean of the epoch" + (", with denoising queries" if denoising else ""),
        "val/loss": "validation" + (", without denoising queries" if denoising else ""),
    }
    metric_names = {name: name.removeprefix("val/") for name in CURVES}
    contents = [("loss", loss_names, None), ("validation metrics", metric_names, 1.03)]
    filled = [content for content in contents if any(_points(history, name) for name in content[1])]
    if not filled:
        return None
    figure = Figure(figsize=(PANEL[0] * len(filled), PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(filled), sharex=True, squeeze=False)[0]
    for axes, (title, names, top) in zip(panels, filled, strict=True):
        _draw(axes, history, names)
        axes.legend(fontsize=8, loc="lower left" if title == "loss" else "lower right")  # losses fall, the others rise
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, top)
        axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _draw(axes: Axes, history: list[dict[str, float]], names: dict[str, str]) -> None:
    for number, (name, label) in enumerate(names.items()):
        points = _points(history, name)
        if points:  # each narrower than the one below it, which shows where values are equal
            thinner, label = 0.75**number, f"{label}: {points[-1][1]:.3f}"
            (line,) = axes.plot(*zip(*points, strict=True), label=label, marker="o")
            line.set(linewidth=2.5 * thinner, markersize=5 * thinner)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)


def _points(history: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(epoch, value) wherever there is one; -1 stands for nothing to measure."""
    return [(row["epoch"], row[name]) for row in history if row.get(name, -1.0) >= 0]
