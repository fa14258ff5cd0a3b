"""Ranges of options that Lightning, or nobody, checks before the training starts."""

from __future__ import annotations

import math
from argparse import ArgumentError
from typing import Any

LARGEST_SEED = 2**32 - 1


def check_options(options: Any) -> None:
    """Refuse values out of range.

    Args:
        options: of `fit`, `validate` or `test`, as parsed.

    Raises:
        argparse.ArgumentError: names the first one.
    """
    for group in ("data", "model", "trainer"):
        if options.get(group) is None:
            raise ArgumentError(None, f"{group}: has no options in the configuration; give some, or remove the line.")
    seed = options.get("seed_everything")
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise ArgumentError(None, f"--seed_everything is {seed}; it must be from 0 to {LARGEST_SEED}.")
    for name in ("save_every_minutes", "save_every_steps", "ema_tau"):
        value = options.get(name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ArgumentError(None, f"--{name} is {value}; it must be a number from 0 on.")
    trainer = options.trainer
    for name, lowest in (
        ("log_every_n_steps", 0),
        ("check_val_every_n_epoch", 1),
        ("accumulate_grad_batches", 1),
        ("num_nodes", 1),
        ("gradient_clip_val", 0),
        ("max_epochs", -1),
        ("max_steps", -1),
        ("min_epochs", 0),
        ("min_steps", 0),
        ("num_sanity_val_steps", -1),
        ("reload_dataloaders_every_n_epochs", 0),
    ):
        value = trainer.get(name)
        if isinstance(value, int | float) and not (value >= lowest and math.isfinite(value)):
            raise ArgumentError(None, f"--trainer.{name} is {value}; it must be at least {lowest}.")
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"):
        _check_batches(name, trainer.get(name), none_allowed=True)
    _check_batches("val_check_interval", trainer.get("val_check_interval"), none_allowed=False)


def _check_batches(name: str, value: Any, *, none_allowed: bool) -> None:
    """Refuse what is neither a share of the batches nor a number of them."""
    if isinstance(value, int | float) and not (
        (value > 0 or (none_allowed and value == 0)) and (isinstance(value, int) or value <= 1)
    ):
        raise ArgumentError(
            None, f"--trainer.{name} is {value}; it must be a share of the batches, up to 1.0, or a whole number."
        )
