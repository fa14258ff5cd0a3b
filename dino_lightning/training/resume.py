"""Resuming from a checkpoint: what must be the same as before, and which of its weights training resumes from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.training.option_checks import flat

# Arguments of the detector that a resumed run may change: they concern training and not the architecture.
FREE_TO_CHANGE = (
    "num_denoising",
    "denoising_rule",
    "label_noise_ratio",
    "box_noise_scale",
    "denoising_multiple",
    "dropout",
    "recompute_encoder",
)
ARCHITECTURE = tuple(name for name in inspect.signature(DINO).parameters if name not in FREE_TO_CHANGE)
RAW_WEIGHTS, AVERAGED_WEIGHTS = "raw_state_dict", "averaged_state_dict"  # in checkpoints of runs with `callbacks.EMA`


def check_same_architecture(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the classes and the architecture of a checkpoint with those of the module.

    Args:
        before: the hyperparameters in the checkpoint.
        now: the hyperparameters of the module.

    Raises:
        CheckpointError: they differ.
    """
    differences = _differences(before, now)
    if differences:
        raise CheckpointError(
            f"The checkpoint is of another model: {'; '.join(differences)}. To start a new run from its weights, "
            "give it as --model.weights instead of --ckpt_path."
        )


def check_same_optimizer(checkpoint: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, name: str) -> None:
    """Compare the optimizer in a checkpoint, and the sizes of its parameter groups, with those of the run.

    Args:
        checkpoint: its content; earlier versions did not store the name of the optimizer.
        groups: of the run.
        name: of the run's optimizer.

    Raises:
        CheckpointError: they differ.
    """
    before = checkpoint.get("optimizer_name", name)
    if before != name:
        raise CheckpointError(
            f"The checkpoint's optimizer is {before}, that of this run {name}. Resume with the same one, or start "
            "a new run from its weights with --model.weights."
        )
    try:
        stored = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            "The checkpoint's optimizer_states are missing or damaged: no run can be resumed from it. To start a new "
            "run from its weights, give it as --model.weights."
        ) from error
    if stored != [len(group["params"]) for group in groups]:
        raise CheckpointError(
            "The checkpoint's optimizer has other parameter groups than this run. Resume with the same freeze, "
            "group_rule, backbone_layer_decay and trainable_backbone_layers, or start a new run from its weights with "
            "--model.weights."
        )


def resume_from_raw_weights(checkpoint: dict[str, Any]) -> None:
    """Put the raw weights into `state_dict` where it holds averaged weights, which were evaluated."""
    if RAW_WEIGHTS in checkpoint:
        rank_zero_info(
            "The checkpoint holds averaged weights, which were evaluated, and raw ones: training resumes from the raw "
            "ones. Without the EMA callback (--ema_decay) the average is not continued."
        )
        checkpoint[AVERAGED_WEIGHTS] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint.pop(RAW_WEIGHTS)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences in classes and architecture, in words."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(DINO).parameters.items()}
    found = []
    for name in ("class_names", "category_ids", *ARCHITECTURE):
        old, new = before.get(name, defaults.get(name)), now.get(name, defaults.get(name))
        if name in ("class_names", "category_ids") and (old is None or new is None):
            continue
        old, new = as_lists(old), as_lists(new)
        if name in before and old != new:
            found.append(f"{name} {_shortened(old)} in the checkpoint, {_shortened(new)} here")
    return found


def _shortened(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"[{', '.join(map(str, value[:5]))}, ... {len(value)} in all]"
    return str(value)


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any], *, both: bool = False) -> list[str]:
    """The options that differ between two starts of a run, one line each: `name: before -> now`.

    Args:
        before: options in groups.
        now: the same.
        both: also those that `now` lacks.
    """
    before_flat, now_flat = flat(as_lists(before)), flat(as_lists(now))
    names = before_flat | now_flat if both else now_flat
    return [
        f"{name}: {_short(before_flat.get(name))} -> {_short(now_flat.get(name))}"
        for name in names
        if name.split(".")[0] not in ("config", "ckpt_path", "run_dir", "overwrite", "weights_only")
        and before_flat.get(name) != now_flat.get(name)
    ]


def as_lists(value: Any) -> Any:
    """A value whose tuples are lists, at any depth: files know lists alone."""
    if isinstance(value, list | tuple):
        return [as_lists(each) for each in value]
    return {key: as_lists(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
