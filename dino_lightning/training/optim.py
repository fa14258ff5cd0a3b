"""Parameter groups, frozen parts and learning rates; by default those of the published recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dino_lightning.model.timm_backbone import TimmBackbone

GroupRule = Literal["default", "offsets", "no_norm_decay"]

_LAST_STAGE = 4  # of a backbone; the stem is stage 0


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    backbone_lr: float,
    weight_decay: float,
    rule: GroupRule = "default",
    backbone_layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups, in the order of the published optimizer states.

    Args:
        model: a `DINO`, or any module whose backbone parameters have "backbone" in their names.
        lr: learning rate of everything outside the backbone.
        backbone_lr: learning rate of the backbone, or of its last stage.
        weight_decay: decoupled weight decay.
        rule: `default` as published: first everything else, then the backbone; biases and norms are decayed too.
            `offsets` (Deformable DETR): also a tenth of the rate for sampling offsets. `no_norm_decay`: no decay for
            names with "norm" or "bias".
        backbone_layer_decay: layer-wise decay: the factor between the learning rates of a backbone stage and the next
            one (ELECTRA, arXiv 2003.10555); 1 for one rate. Stages are the stem and four parts: a ResNet's layers,
            equal shares of the blocks of torchvision's other networks, or what lies before each map of one of timm.
            Each stage is a group, from the stem on.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = max((_block(name) for name, _ in named), default=0)
    body = getattr(model, "backbone", None)
    told = {f"backbone.{name}": stage for name, stage in body.stages.items()} if isinstance(body, TimmBackbone) else {}

    def group(keep: Any, rate: float, decay: float = weight_decay) -> dict[str, Any]:
        return {"params": [p for name, p in named if keep(name)], "lr": rate, "weight_decay": decay}

    def in_backbone(name: str) -> bool:
        return "backbone" in name

    def is_offset(name: str) -> bool:
        return "sampling_offsets" in name

    def undecayed(name: str) -> bool:
        return "norm" in name or "bias" in name

    def backbone_groups(keep: Any, decay: float = weight_decay) -> list[dict[str, Any]]:
        if backbone_layer_decay == 1.0:
            return [group(lambda n: in_backbone(n) and keep(n), backbone_lr, decay)]
        return [
            group(
                lambda n, stage=stage: in_backbone(n) and keep(n) and (told[n] if told else _stage(n, blocks)) == stage,
                backbone_lr * backbone_layer_decay ** (_LAST_STAGE - stage),
                decay,
            )
            for stage in range(_LAST_STAGE + 1)
        ]

    if rule == "default":
        groups = [group(lambda n: not in_backbone(n), lr), *backbone_groups(lambda n: True)]
    elif rule == "offsets":
        groups = [
            group(lambda n: not in_backbone(n) and not is_offset(n), lr),
            *backbone_groups(lambda n: True),
            group(is_offset, lr * 0.1),
        ]
    else:
        groups = [
            group(lambda n: not in_backbone(n) and not undecayed(n), lr),
            *backbone_groups(undecayed, 0.0),
            *backbone_groups(lambda n: not undecayed(n)),
            group(lambda n: not in_backbone(n) and undecayed(n), lr, 0.0),
        ]
    return [entry for entry in groups if entry["params"]]


def _block(name: str) -> int:
    """The number of a backbone parameter's block, in networks whose blocks are one sequence."""
    found = re.search(r"backbone\..*?features\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _stage(name: str, last_block: int) -> int:
    """Stage of a backbone parameter: 0 for the stem to 4; the norms of the maps belong to the last one."""
    layer = re.search(r"\.layer(\d)\.", name)
    if layer:
        return int(layer[1])
    if ".features." in name:
        return math.ceil(_LAST_STAGE * _block(name) / max(last_block, 1))
    return _LAST_STAGE if ".norms." in name else 0


def freeze_parts(model: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """Freeze parts of a model: no gradients, and evaluation mode.

    Args:
        model: changed in place.
        parts: names of submodules, such as `backbone` or `decoder.layers`.

    Returns:
        The frozen parts. Call their `eval()` after each `train()` of the model, so that dropout and stochastic depth
        stay off and batch norms keep their statistics.

    Raises:
        ValueError: no such part, or nothing left to train.
    """
    frozen = []
    for name in parts:
        try:
            part = model.get_submodule(name) if name else None
        except AttributeError:
            part = None
        if part is None:
            valid = ", ".join(
                child for child, module in model.named_children() if any(True for _ in module.parameters())
            )
            raise ValueError(f"freeze: there is no part {name!r}; the parts are {valid}, and their submodules.")
        frozen.append(part.requires_grad_(False).eval())
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={list(parts)} leaves nothing to train.")
    return frozen


def drop_epochs(max_epochs: int | None, share: float = 11 / 12) -> list[int]:
    """The default epochs of learning-rate drops: one, after 11/12 of the epochs, as in the published 12-epoch runs."""
    if max_epochs is None or max_epochs < 2:
        return []
    return [max(1, round(max_epochs * share))]


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
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def at(self, *, step: int, epoch: int) -> None:
        """Set the learning rates and weight decays for step number `step` (from 0) in `epoch`."""
        self.last_epoch, self.epoch = step, epoch
        rates = self.get_lr()
        for group, rate, base, decay in zip(
            self.optimizer.param_groups, rates, self.base_lrs, self._decays, strict=True
        ):
            group.update(lr=rate, initial_lr=base, weight_decay=decay)
        self._last_lr = rates

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


class AccumulatedBoxes:
    """Makes accumulated batches count as one: the sum of all losses divided by the boxes of all batches.

    Each loss is already divided by the boxes of its own batch. `share` normalises it by the boxes of the first batch
    instead, so that gradients add up and keep their usual size; `correction` normalises their sum by all boxes.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._total: Tensor | None = None
        self._first: Tensor | None = None

    def share(self, num_boxes: Tensor) -> Tensor:
        """Count a batch and return the factor for its loss.

        Args:
            num_boxes: 0-dim float32, boxes of the batch averaged over ranks; 0 if there are none.
        """
        own = num_boxes.clamp(min=1.0)
        self._first = own if self._first is None else self._first
        self._total = num_boxes if self._total is None else self._total + num_boxes
        self.batches += 1
        return own / self._first

    def correction(self) -> Tensor:
        """The factor for the sum of the gradients, 0-dim float32; resets the counts."""
        assert self._first is not None and self._total is not None
        factor = self._first / self._total.clamp(min=1.0)
        self.__init__()  # type: ignore[misc]
        return factor
