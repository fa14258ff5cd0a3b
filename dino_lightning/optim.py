"""Parameter groups and learning-rate schedule of the published recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

GroupRule = Literal["default", "offsets", "no_norm_decay"]


def parameter_groups(
    model: nn.Module, *, lr: float, backbone_lr: float, weight_decay: float, rule: GroupRule = "default"
) -> list[dict[str, Any]]:
    """Trainable parameters in groups, in the order of the published optimizer states.

    Args:
        model: a `DINO`, or any module whose backbone parameters have "backbone" in their names.
        lr: learning rate of everything outside the backbone.
        backbone_lr: learning rate of the backbone.
        weight_decay: decoupled weight decay.
        rule: `default` as published: everything else, then the backbone, biases and norms decayed as well.
            `offsets` (Deformable DETR): also a tenth of the rate for sampling offsets. `no_norm_decay`: no decay for
            names with "norm" or "bias".
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def group(keep: Any, rate: float, decay: float = weight_decay) -> dict[str, Any]:
        return {"params": [p for name, p in named if keep(name)], "lr": rate, "weight_decay": decay}

    def in_backbone(name: str) -> bool:
        return "backbone" in name

    def is_offset(name: str) -> bool:
        return "sampling_offsets" in name

    def undecayed(name: str) -> bool:
        return "norm" in name or "bias" in name

    if rule == "default":
        groups = [group(lambda n: not in_backbone(n), lr), group(in_backbone, backbone_lr)]
    elif rule == "offsets":
        groups = [
            group(lambda n: not in_backbone(n) and not is_offset(n), lr),
            group(in_backbone, backbone_lr),
            group(is_offset, lr * 0.1),
        ]
    else:
        groups = [
            group(lambda n: not in_backbone(n) and not undecayed(n), lr),
            group(lambda n: in_backbone(n) and undecayed(n), backbone_lr, 0.0),
            group(lambda n: in_backbone(n) and not undecayed(n), backbone_lr),
            group(lambda n: not in_backbone(n) and undecayed(n), lr, 0.0),
        ]
    return [entry for entry in groups if entry["params"]]


def drop_epochs(max_epochs: int | None) -> list[int]:
    """Where the learning rate drops by default: once, after 11/12 of the epochs, as in the published 12-epoch runs."""
    if max_epochs is None or max_epochs < 2:
        return []
    return [max(1, round(max_epochs * 11 / 12))]


def update_rates(
    scheduler: MultiStepLR, groups: Sequence[dict[str, Any]], milestones: Sequence[int], gamma: float
) -> None:
    """Give a resumed optimizer and its schedule the rates, decays and drops of `groups`, at the epoch they are in."""
    factor = gamma ** sum(milestone <= scheduler.last_epoch for milestone in milestones)
    for stored, group in zip(scheduler.optimizer.param_groups, groups, strict=True):
        stored.update(initial_lr=group["lr"], lr=group["lr"] * factor, weight_decay=group["weight_decay"])
    scheduler.base_lrs = [group["lr"] for group in groups]
    scheduler.milestones = Counter(milestones)
    scheduler.gamma = gamma
