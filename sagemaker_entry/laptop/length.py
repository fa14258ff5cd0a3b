"""How long the options of `fit` let a training be: batches, optimizer steps and evaluations, as Lightning counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Length:
    """The options of `fit` that decide how much is computed, as they are named there; None where they are not set.

    Attributes:
        max_epochs: epochs at most.
        max_steps: optimizer steps at most.
        accumulate_grad_batches: batches for each optimizer step.
        limit_train_batches: a share of the batches of an epoch, or a number of them.
        limit_val_batches: the same of an evaluation.
        check_val_every_n_epoch: epochs between two evaluations; None if `val_check_interval` counts over epochs.
        val_check_interval: evaluations within an epoch: every so many batches, or after this share of them.
        auto_batch_size: images for each optimizer step, over all processes.
        val_batch_size: images in a batch of an evaluation.
        ends_early: what may end it sooner, in words.
    """

    max_epochs: int | None
    max_steps: int | None = None
    accumulate_grad_batches: int = 1
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    check_val_every_n_epoch: int | None = 1
    val_check_interval: int | float = 1.0
    auto_batch_size: int | None = None
    val_batch_size: int = 1
    ends_early: str | None = None

    def batch_size(self, batch_size: int, gpus: int) -> int:
        """Images in a batch of a process; with `auto_batch_size` the most that it may choose."""
        return batch_size if self.auto_batch_size is None else max(1, self.auto_batch_size // gpus)

    def batches(self, images: int, batch_size: int, gpus: int) -> int:
        """Training batches of each process in an epoch."""
        return _limited(max(1, math.ceil(images / gpus) // batch_size), self.limit_train_batches)

    def epochs(self, batches: int) -> int:
        """Epochs that are begun, of so many batches each."""
        steps_per_epoch = math.ceil(batches / self.accumulate_grad_batches)
        by_steps = None if self.max_steps is None else math.ceil(self.max_steps / steps_per_epoch)
        return min(number for number in (self.max_epochs, by_steps) if number is not None)

    def steps(self, batches: int) -> int:
        """Optimizer steps of the whole training; the last one of an epoch may have fewer batches."""
        steps = self.epochs(batches) * math.ceil(batches / self.accumulate_grad_batches)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def all_batches(self, batches: int) -> int:
        """Training batches of each process in the whole training."""
        per_epoch = math.ceil(batches / self.accumulate_grad_batches)
        whole, rest = divmod(self.steps(batches), per_epoch)
        return whole * batches + rest * self.accumulate_grad_batches

    def evaluations(self, batches: int) -> int:
        """Evaluations of the whole training; one that `max_steps` ends within an epoch has none after that."""
        if self.limit_val_batches == 0:
            return 0
        done, every = self.all_batches(batches), self.val_check_interval
        if self.check_val_every_n_epoch is None:
            return done // every if isinstance(every, int) else done // batches
        within = every if isinstance(every, int) else max(1, int(batches * every))
        validated = sum((epoch + 1) % self.check_val_every_n_epoch == 0 for epoch in range(done // batches))
        return validated * (batches // within)

    def val_images(self, images: int, gpus: int) -> int:
        """Images of each evaluation, over all processes."""
        limit = self.limit_val_batches
        if isinstance(limit, int):
            return min(images, limit * self.val_batch_size * gpus)
        return math.ceil(images * limit)


def length_of(options: Mapping[str, Any]) -> Length:
    """The length that options of `fit` set, as parsed."""
    trainer = options["trainer"]
    overfit = trainer["overfit_batches"]
    limits = {
        name: overfit or _default(trainer[name], 1.0) for name in ("limit_train_batches", "limit_val_batches")
    }  # Lightning: overfit_batches sets both
    interval = trainer["val_check_interval"]
    ends_early = []
    if options["early_stopping_patience"] is not None:
        ends_early.append("early stopping")
    if trainer["max_time"] is not None:
        ends_early.append("trainer.max_time")
    most = trainer["max_steps"]
    epochs = trainer["max_epochs"]
    return Length(
        max_epochs=epochs if epochs is not None and epochs >= 0 else None,
        max_steps=most if most is not None and most >= 0 else None,
        accumulate_grad_batches=trainer["accumulate_grad_batches"] or 1,
        check_val_every_n_epoch=trainer["check_val_every_n_epoch"],
        val_check_interval=interval if isinstance(interval, int | float) else 1.0,
        auto_batch_size=options["auto_batch_size"],
        val_batch_size=options["data"]["val_batch_size"] or options["data"]["batch_size"],
        ends_early=" or ".join(ends_early) or None,
        **limits,
    )


def _limited(batches: int, limit: int | float) -> int:
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))


def _default(value: Any, default: float) -> Any:
    return default if value is None else value
