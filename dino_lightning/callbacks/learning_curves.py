"""What a run came to: a table in the terminal and a picture of the learning curves."""

from __future__ import annotations

from pathlib import Path

import lightning
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dino_lightning.files import save_figure

COLUMNS = ("epoch", "train/loss", "val/loss", "val/AP", "val/AP50", "val/AP75", "val/F1")


class LearningCurves(lightning.Callback):
    """Collects the figures of each epoch, keeps the picture of the curves up to date and prints a table at the end.

    Args:
        directory: the folder of the run.
    """

    def __init__(self, *, directory: str) -> None:
        self.directory = Path(directory)
        self.history: list[dict[str, float]] = []
        self._validated = False

    @property
    def state_key(self) -> str:
        """Under which Lightning keeps its state in checkpoints: the class's first name, so that older ones resume."""
        return "RunReport"

    @property
    def curves_path(self) -> Path:
        """Where the picture of the learning curves is."""
        return self.directory / "learning_curves.png"

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        """Saved with the checkpoint, so that a resumed run shows the whole curve."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, list[dict[str, float]]]) -> None:
        """Taken back from the checkpoint."""
        self.history = list(state_dict["history"])

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remember that this epoch has figures of its own: the Trainer repeats old ones where it has none."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the epoch's figures; validation has run by now."""
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if self._validated or not name.startswith("val/")
        }
        self._validated = False
        loss = getattr(pl_module, "epoch_loss", None)  # the module logs it only after this
        if loss is not None:
            metrics["train/loss"] = loss
        self.history.append({"epoch": float(trainer.current_epoch + 1), **metrics})
        if trainer.is_global_zero:
            save_figure(_curves(self.history), self.curves_path)

    def table(self) -> str:
        """The last epochs and the best one, marked with a star."""
        if not self.history:
            return "No epoch was finished."
        best = max(range(len(self.history)), key=lambda index: self.history[index].get("val/AP", -1.0))
        shown = sorted({best, *range(max(0, len(self.history) - 3), len(self.history))})
        lines = ["  " + "".join(f"{name.replace('/', ' '):>11}" for name in COLUMNS)]
        for index in shown:
            row = self.history[index]
            values = [f"{int(row['epoch']):>11}"]
            values += [f"{row[name]:>11.3f}" if name in row else f"{'-':>11}" for name in COLUMNS[1:]]
            lines.append(("* " if index == best else "  ") + "".join(values))
        row = self.history[best]
        if row.get("val/F1", 0) > 0:
            lines.append(
                f"* best epoch: F1 {row['val/F1']:.3f} at IoU 0.5 with precision {row['val/F1_precision']:.3f} and "
                f"recall {row['val/F1_recall']:.3f}, at a score threshold of {row['val/F1_threshold']:.2f}"
            )
        return "\n".join(lines)


def _curves(history: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(1, 2)
    for axes, names, title in (
        (loss_axes, ("train/loss", "val/loss"), "loss"),
        (metric_axes, ("val/AP", "val/AP50", "val/AP75", "val/F1"), "validation"),
    ):
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("val/", "val "), marker=".", linewidth=1.4)
        axes.set_xlabel("epoch")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    loss_axes.set_ylim(bottom=0)
    metric_axes.set_ylim(0, 1)
    return figure
