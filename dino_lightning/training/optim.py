"""Parameter groups, frozen parts and accumulated gradients; groups by default as in the published recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dino_lightning.errors import UsageError
from dino_lightning.model.timm_backbone import TimmBackbone
from dino_lightning.training.initial_weights import rate_factor

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


def groups_of(model: nn.Module, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a `DINOModule` with these options."""
    factor = rate_factor(options)
    return parameter_groups(
        model,
        lr=options["lr"] * factor,
        backbone_lr=options["backbone_lr"] * factor,
        weight_decay=options["weight_decay"],
        rule=options["group_rule"],
        backbone_layer_decay=options["backbone_layer_decay"],
    )


def is_fused(trainer: Any) -> bool:
    """Whether a run's AdamW is fused; not with a gradient scaler, as it would unscale only after gradient clipping."""
    device = trainer.strategy.root_device  # where the module will be, when its checkpoint is read
    return device.type in ("cpu", "cuda") and trainer.precision != "16-mixed"


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, *, by_value: bool = False) -> Tensor:
    """Clip gradients in place to a total norm, or each value by itself; 0 is no limit.

    Returns:
        The total norm before, 0-dim float32.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if by_value and limit > 0:
        torch.nn.utils.clip_grad_value_(parameters, limit)
    elif limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


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


@dataclass(frozen=True)
class OwnOptimizer:
    """An optimizer of the user's for the parameter groups of a `DINOModule`.

    Attributes:
        name: of its class.
        build: makes it from parameter groups.
    """

    name: str
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

    def on_groups(self, groups: Sequence[Mapping[str, Any]], *, lr: float) -> torch.optim.Optimizer:
        """The optimizer, with its own learning rate for groups that have `lr` and the same ratio for the others.

        Its own weight decay is for the groups that have one. The rates are said.

        Args:
            groups: of `parameter_groups`.
            lr: the learning rate that the optimizer's own stands for.

        Raises:
            UsageError: the optimizer refuses groups or its own settings, or has no learning rate.
        """
        if lr == 0:
            raise UsageError(f"optimizer {self.name}: model.lr is 0, so the ratios of the learning rates are unknown.")
        try:
            optimizer = self.build([{"params": group["params"]} for group in groups])
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"optimizer {self.name} cannot be used with the model's parameter groups: {error}"
            ) from error
        if not isinstance(optimizer.defaults.get("lr"), float | int):
            raise UsageError(f"optimizer {self.name} has no learning rate, so the backbone cannot have one of its own.")
        for made, wanted in zip(optimizer.param_groups, groups, strict=True):
            made["lr"] = optimizer.defaults["lr"] * wanted["lr"] / lr
            if "weight_decay" in made and wanted["weight_decay"] == 0:
                made["weight_decay"] = 0.0
        rates = ", ".join(dict.fromkeys(f"{group['lr']:.3g}" for group in optimizer.param_groups))
        rank_zero_info(
            f"Optimizer {self.name}; learning rates of the parameter groups, in the ratios of the model's: {rates}."
        )
        return optimizer


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

    def normalise(self, parameters: Iterable[nn.Parameter], *, batches: int) -> None:
        """Normalise accumulated gradients in place by all boxes, if there are any; resets the counts.

        Args:
            parameters: with the gradients of a whole step, summed over ranks.
            batches: what Lightning has divided each loss by.
        """
        if self.batches:
            factor = self.correction() * batches
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def correction(self) -> Tensor:
        """The factor for the sum of the gradients, 0-dim float32; resets the counts."""
        assert self._first is not None and self._total is not None
        factor = self._first / self._total.clamp(min=1.0)
        self.batches, self._total, self._first = 0, None, None
        return factor
