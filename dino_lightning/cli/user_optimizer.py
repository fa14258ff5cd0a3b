"""An `optimizer` or `lr_scheduler` of the command line or YAML, as LightningCLI offers them, in a `DINOModule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities import rank_zero_info

from dino_lightning.errors import UsageError
from dino_lightning.training.module import DINOModule
from dino_lightning.training.optim import OwnOptimizer


def use_own_optimizer(module: DINOModule, optimizer: Any, lr_scheduler: Any, combine: Callable[..., Any]) -> None:
    """Let a module train with them; says what they take the place of.

    The optimizer gets the module's parameter groups, see `OwnOptimizer`, and keeps its schedule of learning rates
    unless there is an `lr_scheduler` too.

    Args:
        module: changed in place.
        optimizer: `class_path` and `init_args`, or None for the module's.
        lr_scheduler: the same.
        combine: LightningCLI's `configure_optimizers`.
    """
    if optimizer:
        name = str(optimizer["class_path"]).rpartition(".")[2]
        module.own_optimizer = OwnOptimizer(name, lambda groups: instantiate_class(groups, _plain(optimizer)))
    if lr_scheduler:
        name = str(lr_scheduler["class_path"]).rpartition(".")[2]
        rank_zero_info(
            f"The lr_scheduler {name} takes the place of the model's own schedule: warmup_steps, lr_schedule, "
            "lr_drop_epochs and lr_drop_factor are not used."
        )
        module.own_schedule = lambda made: combine(module, made, _schedule(made, name, _plain(lr_scheduler)))


def _schedule(optimizer: torch.optim.Optimizer, name: str, init: dict[str, Any]) -> Any:
    """The schedule.

    Raises:
        UsageError: its class refuses the arguments.
    """
    try:
        return instantiate_class(optimizer, init)
    except (TypeError, ValueError) as error:
        raise UsageError(f"lr_scheduler {name} cannot be made of these arguments: {error}") from error


def _plain(init: Any) -> dict[str, Any]:
    """`init_args` may be left out."""
    return {"class_path": init["class_path"], "init_args": init.get("init_args") or {}}
