"""Which validation is the best so far: by one metric, and by the validation loss among equals.

Early on, AP and F1 are 0 in every epoch while the loss already falls; without the second rule the first epoch would
stay the best of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

LOSS = "val/loss"
OVERALL = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR", "F1", "F1_precision", "F1_recall")
OF_A_CLASS = ("AP_class", "AP50_class", "F1_class")  # logged where there are several classes
FITTING = "fit"


def check_metric(name: str, class_names: Sequence[str], option: str) -> None:
    """Refuse a metric that no validation will have.

    Args:
        name: such as `val/AP`.
        class_names: of the dataset.
        option: that asks for it, for the message.

    Raises:
        ValueError: there is no such metric.
    """
    names = [LOSS, *(f"val/{metric}" for metric in OVERALL)]
    of_classes = [f"val/{metric}/{of}" for of in class_names for metric in OF_A_CLASS] if len(class_names) > 1 else []
    if name not in (*names, *of_classes):
        more = f", and of single classes such as {of_classes[0]}" if of_classes else ""
        raise ValueError(f"{option} {name}: validation has no such metric; it has {', '.join(names)}{more}.")


def mode_of(metric: str) -> str:
    """`min` for the loss, `max` for every other metric."""
    return "min" if metric == LOSS else "max"


def standing(metrics: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """What to compare validations by: larger is better, and the loss decides between equals.

    Args:
        metrics: numbers by name, those of a validation among them; one that is absent or not a number is the worst.
        metric: the one that decides.
    """
    value, loss = float(metrics.get(metric, math.nan)), float(metrics.get(LOSS, math.nan))
    first = -value if mode_of(metric) == "min" else value
    return (-math.inf if math.isnan(first) else first, -math.inf if math.isnan(loss) else -loss)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` for the one best validation, with the loss as the second criterion.

    Args:
        best_by: the metric that decides, such as `val/AP`.
        **options: of `ModelCheckpoint`.
    """

    def __init__(self, *, best_by: str, **options: Any) -> None:
        super().__init__(monitor=best_by, mode=mode_of(best_by), **options)
        self.best_by = best_by
        self._best: tuple[float, float] | None = None

    @property
    def state_key(self) -> str:
        """As Lightning's own, so that checkpoints of earlier versions resume."""
        return f"ModelCheckpoint{super().state_key.removeprefix(type(self).__qualname__)}"

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: Tensor | None = None) -> bool:
        """Whether this validation is better than the best so far; remembers it if so, for it is saved then."""
        if current is None:
            return False
        now = standing(trainer.callback_metrics, self.best_by)
        better = bool(trainer.strategy.reduce_boolean_decision(self._best is None or now > self._best))
        if better:
            self._best = now
        return better

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so if the metric is another one than before: the best by that one is not known."""
        states = checkpoint.get("callbacks", {}).items()
        before = [state.get("monitor") for key, state in states if key.startswith("ModelCheckpoint")]
        before = [metric for metric in before if metric is not None]
        if trainer.state.fn == FITTING and before and self.best_by not in before:
            rank_zero_info(
                f"{self.filename}.ckpt was the best by {before[0]} so far; from here it is the best by {self.best_by}, "
                "and the next validation replaces it."
            )

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state and the standing of the best."""
        return {**super().state_dict(), "best_standing": None if self._best is None else list(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best, unless the run continues in another folder, where it is not."""
        super().load_state_dict(state_dict)
        if not self.best_k_models or self.best_model_score is None:
            return
        score = float(self.best_model_score)
        # an earlier version did not keep the loss: then the next equal is taken for better
        stored = state_dict.get("best_standing") or standing({self.best_by: score}, self.best_by)
        self._best = (float(stored[0]), float(stored[1]))


class EarlyStop(EarlyStopping):
    """Stops training after so many validations that were not better than the best, with the loss as second criterion.

    Args:
        best_by: the metric that decides, such as `val/AP`.
        patience: validations.
    """

    def __init__(self, *, best_by: str, patience: int) -> None:
        super().__init__(monitor=best_by, mode=mode_of(best_by), patience=patience)
        self.best_by = best_by
        self._best = (-math.inf, -math.inf)

    @property
    def state_key(self) -> str:
        """As Lightning's own, so that checkpoints of earlier versions resume."""
        return f"EarlyStopping{super().state_key.removeprefix(type(self).__qualname__)}"

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing: validations count, not epochs."""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count the validation, and stop if it is one too many."""
        fast = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning, not declared
        if trainer.sanity_checking or trainer.state.fn != FITTING or fast:
            return
        now = standing(trainer.callback_metrics, self.best_by)
        self.wait_count += 1
        if now > self._best:
            self._best, self.wait_count = now, 0
            self.best_score = trainer.callback_metrics[self.best_by].detach().cpu()
        if trainer.strategy.reduce_boolean_decision(self.wait_count >= self.patience, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            rank_zero_info(
                f"Stopped early: for {self.wait_count} validations {self.best_by} has not been better than "
                f"{float(self.best_score):.3f}, nor equal with a lower {LOSS}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state and the standing of the best."""
        return {**super().state_dict(), "best_standing": list(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best and the count, but keep the patience of now."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        stored = state_dict.get("best_standing") or standing({self.best_by: self.best_score}, self.best_by)
        self._best = (float(stored[0]), float(stored[1]))
