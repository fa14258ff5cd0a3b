"""Learning rates over the run, and what becomes of them when a run is resumed with another schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from dino_lightning.training.recipe import Recipe, reached_epochs

NOTICEABLE = 1.01  # a rate that rises by more than this factor where a run is resumed is told


def drop_epochs(max_epochs: int | None, share: float = 11 / 12) -> list[int]:
    """The default epochs of learning-rate drops: one, after 11/12 of the epochs, as in the published 12-epoch runs.

    At least the last of several epochs has the dropped rate.
    """
    if max_epochs is None or max_epochs < 2:
        return []
    return [min(max(1, round(max_epochs * share)), max_epochs - 1)]


class RateSchedule(LRScheduler):
    """Learning rates computed from step and epoch alone: linear warm-up, then drops at milestones or half a cosine.

    It has no state: a resumed run has the learning rates and weight decays that its current options give at its step
    and epoch. `step` is called after every optimizer step, `at` when an epoch begins.

    Args:
        optimizer: its groups have the base rates and weight decays.
        warmup_steps: optimizer steps n of linear warm-up: 1/n of the rate in the first step, all of it in step n.
        milestones: epochs at which the rate is multiplied by `gamma`; not used with `cosine_steps`.
        gamma: the factor of a drop.
        cosine_steps: the step at which half a cosine reaches 0; None for drops.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup_steps: int = 0,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        cosine_steps: int | None = None,
    ) -> None:
        self.warmup_steps, self.milestones, self.gamma = warmup_steps, list(milestones), gamma
        self.cosine_steps = cosine_steps
        self.epoch = 0
        self._decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]  # not all have one
        super().__init__(optimizer)

    def begin(self, trainer: Any, stored: StoredRate | None) -> None:
        """Where training starts: settle the end of a cosine, and say if the rate is higher than in the checkpoint.

        Not earlier: the end makes Lightning create its loaders, which would then ignore their stored state.
        """
        if self.cosine_steps is not None:
            self.cosine_steps = int(trainer.estimated_stepping_batches)
        sentence = None if stored is None else stored.rise(self, next_epoch=trainer.current_epoch)
        if sentence is not None:
            rank_zero_info(sentence)

    def at(self, *, step: int, epoch: int) -> None:
        """Set the learning rates and weight decays for step number `step` (from 0) in `epoch`."""
        self.last_epoch, self.epoch = step, epoch
        rates = self.get_lr()
        for group, rate, base, decay in zip(
            self.optimizer.param_groups, rates, self.base_lrs, self._decays, strict=True
        ):
            group.update(lr=rate, initial_lr=base, weight_decay=decay)
        self._last_lr = rates

    def share_at(self, *, step: int, epoch: int) -> float:
        """What the full rate is multiplied by at a step and epoch; changes nothing."""
        now = self.last_epoch, self.epoch
        self.last_epoch, self.epoch = step, epoch
        share = self._rate(1.0)
        self.last_epoch, self.epoch = now
        return share

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next step, or to step `epoch` (PyTorch's name for it)."""
        self.at(step=self.last_epoch + 1 if epoch is None else epoch, epoch=self.epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group."""
        return [self._rate(float(base)) for base in self.base_lrs]

    def _rate(self, rate: float) -> float:
        step = self.last_epoch
        if self.cosine_steps is not None:
            done = (step - self.warmup_steps) / max(self.cosine_steps - self.warmup_steps, 1)
            rate *= (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
        else:
            for milestone in self.milestones:
                rate *= self.gamma if milestone <= self.epoch else 1.0
        return rate * (step + 1) / self.warmup_steps if step + 1 < self.warmup_steps else rate

    def state_dict(self) -> dict[str, Any]:
        """Empty: see above."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore what an earlier version stored."""


def schedule_of(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], recipe: Recipe, trainer: Any
) -> RateSchedule:
    """The schedule of a `DINOModule` with these options; call its `begin` when training starts.

    Raises:
        ValueError: a cosine without an end.
    """
    cosine = options["lr_schedule"] == "cosine"
    if cosine and trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:
        raise ValueError("lr_schedule=cosine ends with the training: set max_epochs or max_steps.")
    given = options["lr_drop_epochs"]
    return RateSchedule(
        optimizer,
        warmup_steps=recipe.warmup_steps,
        milestones=drop_epochs(reached_epochs(trainer), recipe.lr_drop_share) if given is None else given,
        gamma=options["lr_drop_factor"],
        cosine_steps=1 if cosine else None,  # settled by `begin`
    )


@dataclass(frozen=True)
class StoredRate:
    """The learning rate in a checkpoint.

    Attributes:
        share: the first group's rate, divided by its full rate.
        step: optimizer steps done.
        epoch: the one that the checkpoint was saved in or after, from 0.
    """

    share: float
    step: int
    epoch: int

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> StoredRate | None:
        """None if the checkpoint does not say."""
        group = (checkpoint.get("optimizer_states") or [{}])[0].get("param_groups", [{}])[0]
        if not group.get("initial_lr"):
            return None
        share = float(group["lr"]) / float(group["initial_lr"])
        return cls(share, int(checkpoint["global_step"]), int(checkpoint["epoch"]))

    def rise(self, schedule: RateSchedule, *, next_epoch: int) -> str | None:
        """A sentence if the rate is higher by the schedule of now than it was, at the same step; None if not.

        Args:
            schedule: of the resumed run.
            next_epoch: in which it continues, from 0.
        """
        going_on = schedule.share_at(step=self.step, epoch=next_epoch)
        if min(going_on, schedule.share_at(step=self.step, epoch=self.epoch)) <= self.share * NOTICEABLE:
            return None
        full = float(schedule.base_lrs[0])
        begin = f"The learning rate was {full * self.share:.3g} when the checkpoint was saved and "
        begin += f"continues with {full * going_on:.3g}: "
        if schedule.cosine_steps is not None:
            return f"{begin}its cosine now ends at step {schedule.cosine_steps:,}."
        later = [epoch for epoch in schedule.milestones if epoch > self.epoch]
        now = f"now it drops after epoch {', '.join(map(str, later))}" if later else "now it does not drop"
        drops = round(math.log(self.share) / math.log(schedule.gamma)) if 0 < schedule.gamma < 1 and self.share else 1
        kept = ", ".join([str(max(next_epoch, 1))] * max(drops, 1))
        return f'{begin}{now}. To keep the lower rate, add --model.lr_drop_epochs "[{kept}]".'
