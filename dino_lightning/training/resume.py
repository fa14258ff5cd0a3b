"""Resuming from a checkpoint: what must be the same as before, and which of its weights training resumes from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO

# Arguments of the detector that a resumed run may change: they concern training and not the architecture.
FREE_TO_CHANGE = (
    "num_denoising",
    "label_noise_ratio",
    "box_noise_scale",
    "denoising_multiple",
    "dropout",
    "recompute_encoder",
)
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


def check_same_optimizer(checkpoint: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Compare the sizes of the parameter groups in a checkpoint with those of the run.

    Raises:
        CheckpointError: they differ.
    """
    states = checkpoint.get("optimizer_states")
    if not states:
        return
    stored = [len(group["params"]) for group in states[0]["param_groups"]]
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
    names = [name for name in inspect.signature(DINO).parameters if name not in FREE_TO_CHANGE]
    defaults = {name: parameter.default for name, parameter in inspect.signature(DINO).parameters.items()}
    found = []
    for name in ("class_names", "category_ids", *names):
        old, new = before.get(name, defaults.get(name)), now.get(name, defaults.get(name))
        if name in ("class_names", "category_ids") and (old is None or new is None):
            continue
        old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
        if name in before and old != new:
            found.append(f"{name} {_shortened(old)} in the checkpoint, {_shortened(new)} here")
    return found


def _shortened(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"[{', '.join(map(str, value[:5]))}, ... {len(value)} in all]"
    return str(value)


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options that differ between two starts of a run, one line each: `name: before -> now`."""
    before_flat, now_flat = _flat(before), _flat(now)
    return [
        f"{name}: {_short(before_flat.get(name))} -> {_short(value)}"
        for name, value in now_flat.items()
        if name.split(".")[0] not in ("config", "ckpt_path", "run_dir", "weights_only")
        and before_flat.get(name) != value
    ]


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
