"""A checkpoint and the training state in it: checked before use, as Lightning takes them as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dino_lightning.errors import CheckpointError
from dino_lightning.training.optim import is_fused
from dino_lightning.training.resume import check_same_architecture, check_same_optimizer
from dino_lightning.training.schedule import StoredRate
from dino_lightning.weights.stored import WEIGHTS, check_checkpoint, check_hyperparameters, check_state

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, shaped as their parameter
COUNTS = ("ready", "started", "processed", "completed")  # of Lightning's loops
BY_SCHEDULE = ("lr", "weight_decay", "fused")  # what a resumed run sets in every group


def check_whole(checkpoint: dict[str, Any], path: str | Path, module: LightningModule) -> None:
    """Refuse what Lightning would load into a module as it is, or end at in a traceback.

    Args:
        checkpoint: its content.
        path: for the message.
        module: a `DINOModule`.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    check_checkpoint(checkpoint, path)
    check_hyperparameters(checkpoint, path, type(module))
    check_same_architecture(checkpoint["hyper_parameters"], module.hparams)
    for name in WEIGHTS if module.strict_loading else ():
        if name in checkpoint:
            check_state(checkpoint[name], module.state_dict(), path)


def take_over(
    checkpoint: dict[str, Any], groups: Sequence[dict[str, Any]], trainer: Trainer, *, name: str, adamw: bool
) -> StoredRate | None:
    """Check the optimizer and the loops in a checkpoint, and put a run's own settings into the optimizer's groups.

    Args:
        checkpoint: its content; changed in place.
        groups: parameter groups of the run.
        trainer: of the run.
        name: of the run's optimizer.
        adamw: whether that is our AdamW, rather than one that the user has chosen.

    Returns:
        The learning rate that the checkpoint was saved at, if it says.

    Raises:
        CheckpointError: they are damaged, or of another optimizer or other parameters.
    """
    check_same_optimizer(checkpoint, groups, name=name)
    check_training_state(checkpoint, groups if adamw else None, trainer.fit_loop.state_dict())
    rate = StoredRate.of(checkpoint)
    if adamw:
        with_own_settings(checkpoint["optimizer_states"][0]["param_groups"], fused=is_fused(trainer))
    return rate


def check_training_state(
    checkpoint: Mapping[str, Any], groups: Sequence[Mapping[str, Any]] | None, fit_loop: Mapping[str, Any]
) -> None:
    """Check what a run resumes from: AdamW's state, the progress of the loops, the noise seed.

    Args:
        checkpoint: of a run of ours.
        groups: the parameter groups of the run, of the same sizes as those in the checkpoint; None for an optimizer of
            the user's, whose state only it knows.
        fit_loop: the state of the run's own loop.

    Raises:
        CheckpointError: a part is missing, of another kind, or not finite.
    """
    for name, kind in (("loops", Mapping), ("callbacks", Mapping), ("optimizer_states", list), ("lr_schedulers", list)):
        if not isinstance(checkpoint.get(name), kind):
            raise CheckpointError(
                f"The checkpoint's training state cannot be used: its {name} are missing or damaged. To start a new "
                "run from its weights, give it as --model.weights."
            )
    if groups is not None:
        parameters = [parameter for group in groups for parameter in group["params"]]
        _check_optimizer(checkpoint["optimizer_states"][0], parameters)
    _check_progress(checkpoint["loops"].get("fit_loop"), fit_loop, "fit_loop")
    _check_counts(checkpoint["loops"], "loops")
    seed = checkpoint.get("noise_seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise _damaged("noise_seed")
    total, images = _pair(checkpoint.get("epoch_loss", (None, 0)))
    if not isinstance(images, int) or images < 0 or not (total is None or _is_number(total)):
        raise _damaged("epoch_loss")


def with_own_settings(groups: Iterable[dict[str, Any]], *, fused: bool) -> None:
    """Give stored parameter groups AdamW's settings of this run; rates and decays follow from its schedule.

    Args:
        groups: of a checkpoint, changed in place.
        fused: by the current precision.
    """
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    own = {name: value for name, value in defaults.items() if name not in BY_SCHEDULE}
    for group in groups:
        group.update(own, fused=fused, lr=0.0, weight_decay=0.0)


def check_callbacks(checkpoint: Mapping[str, Any], callbacks: Iterable[Any]) -> None:
    """Check what the callbacks of the run find of theirs in a checkpoint, and say which find nothing.

    Raises:
        CheckpointError: a state whose values are of other kinds than the callback's own.
    """
    stored = checkpoint.get("callbacks", {})
    for each in callbacks:
        state = stored.get(each.state_key)
        for name, own in each.state_dict().items() if state is not None else ():
            if not isinstance(state, Mapping) or (name in state and not _alike(name, state[name], own)):
                raise _damaged(f"{name} of {each.state_key.partition('{')[0]}")
    lost = [each.state_key for each in callbacks if each.state_key not in stored and each.state_dict()]
    if any(key.startswith("ModelCheckpoint") for key in stored):  # by another metric, which the callback itself says
        lost = [key for key in lost if not key.startswith("ModelCheckpoint")]
    if lost:
        names = ", ".join(sorted({key.partition("{")[0] for key in lost}))
        rank_zero_warn(f"The checkpoint holds no state of {names}: they start anew in this run.")


def _check_optimizer(stored: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
    places = [place for group in stored["param_groups"] for place in group["params"]]
    states = stored.get("state")
    if places != list(range(len(parameters))) or not isinstance(states, Mapping):
        raise _damaged("optimizer_states")
    if not states.keys() <= set(places):
        raise _damaged("optimizer_states")
    for place, state in states.items():
        if not isinstance(state, Mapping):
            raise _damaged(f"optimizer_states of parameter {place}")
        shape = parameters[place].shape
        for name in MOMENTS:
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise _damaged(f"{name} of parameter {place}")
            if not bool(value.isfinite().all()):
                raise CheckpointError(
                    f"The checkpoint's {name} of parameter {place} is not finite: the training had diverged. Start "
                    "from an earlier checkpoint, or a new run from its weights with --model.weights."
                )
        if not _is_number(state.get("step")) or float(state["step"]) < 0:
            raise _damaged(f"step of parameter {place}")
    if states and len(states) < len(places):
        rank_zero_warn(
            f"The checkpoint's optimizer lacks the state of {len(places) - len(states)} of {len(places)} parameters: "
            "it starts anew for them."
        )
    elif not states and places:
        rank_zero_warn("The checkpoint's optimizer has no state: it starts anew.")


def _check_progress(stored: Any, own: Mapping[str, Any], where: str) -> None:
    """All that the run's own loop counts is stored; Lightning would count what is missing from 0."""
    if not isinstance(stored, Mapping):
        raise _damaged(where)
    for name, value in own.items():
        if isinstance(value, Mapping) and value and not name.endswith("state_dict"):
            _check_progress(stored.get(name), value, f"{where}.{name}")
        elif name in COUNTS and name not in stored:
            raise _damaged(f"{where}.{name}")


def _check_counts(loops: Mapping[str, Any], where: str) -> None:
    """Counts are whole numbers, at any depth."""
    for name, value in loops.items():
        if isinstance(value, Mapping):
            _check_counts(value, f"{where}.{name}")
            continue
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if (name in COUNTS and not count) or (name == "is_last_batch" and not isinstance(value, bool)):
            raise _damaged(f"{where}.{name}")


def _alike(name: str, stored: Any, own: Any) -> bool:
    """Whether a stored value is of the kind of a callback's own, which may be None before anything has happened."""
    if isinstance(own, Tensor) or name.endswith("score"):
        return stored is None or isinstance(stored, int | float) or (isinstance(stored, Tensor) and stored.numel() == 1)
    if isinstance(own, int | float):
        return isinstance(stored, int | float) and isinstance(stored, bool) == isinstance(own, bool)
    for kind in (str, list, Mapping):
        if isinstance(own, kind):
            return stored is None or isinstance(stored, kind)
    return True


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _damaged("epoch_loss")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, or a tensor with one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and bool(value.isfinite().all())
    return isinstance(value, int | float) and not isinstance(value, bool)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint is damaged: its {what} cannot be used to resume a run.")
