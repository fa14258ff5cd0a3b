"""An exponential moving average of the weights, which is evaluated in their place."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dino_lightning.training.recipe import LONGEST_AVERAGE, average_decay, planned_steps
from dino_lightning.training.resume import AVERAGED_WEIGHTS, RAW_WEIGHTS


class EMA(lightning.Callback):
    """Averages the weights after every optimizer step: average += (1 - d) * (weights - average).

    The decay d = decay * (1 - exp(-updates / tau)) rises from nearly 0, so that the first weights are soon forgotten.
    The average is on the same device as the weights. A tensor with several names is averaged once; integer tensors and
    frozen parameters are not averaged: evaluation uses them as they are. Works with any LightningModule of which every
    process has all weights (one device, ddp); the processes then have the same average without communication.

    A checkpoint's `state_dict` holds what was evaluated, so that everything that reads checkpoints gets that; the other
    version is beside it, as `raw_state_dict` or `averaged_state_dict`. A resumed run continues both, bit for bit. After
    training the module holds what was evaluated.

    Args:
        decay: the final decay, between 0 and 1; 0.9997 in the published DINO recipes with an average. None: chosen at
            the start, with `tau`, so that the average reaches back over a fifth of the run's steps.
        tau: the number of updates after which the decay is 63 % of `decay`; 0 for a constant decay.
        evaluate: evaluate the average, during training and in `validate` and `test` of such a checkpoint; if False,
            evaluate the raw weights and only keep the average.

    Raises:
        ValueError: a decay outside 0-1, or a negative tau.
    """

    def __init__(self, *, decay: float | None = 0.9997, tau: float = 2000.0, evaluate: bool = True) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay} must be between 0 and 1, e.g. 0.9997.")
        if not tau >= 0:
            raise ValueError(f"ema_tau={tau} must be at least 0; 0 makes the decay constant.")
        self.decay, self.tau, self.evaluate = decay, tau, evaluate
        self._decay, self._tau = LONGEST_AVERAGE if decay is None else decay, tau
        self.updates = 0
        self._live: list[Tensor] = []  # the module's own tensors
        self._other: list[Tensor] = []  # their averages, or the raw weights while the averages are in the module
        self._place: dict[str, int] = {}  # where each name, aliases too, is in these lists
        self._averages_live = False
        self._loaded: Mapping[str, Tensor] | None = None
        self._hook: RemovableHandle | None = None

    # ------------------------------------------------------------------ averaging

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the average, now that the module is on its device and has its weights.

        Raises:
            MisconfigurationException: a strategy, a precision or a ModelCheckpoint that does not work with averages.
        """
        if trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                "EMA needs the whole weights on every process, which this strategy does not keep; use strategy ddp."
            )
        if self.evaluate and any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
            raise MisconfigurationException(
                "ModelCheckpoint(save_weights_only=True) leaves callbacks out, so its files would hold other weights "
                "than those that were evaluated; save whole checkpoints with EMA."
            )
        if any(p.requires_grad and p.dtype in (torch.float16, torch.bfloat16) for p in pl_module.parameters()):
            raise MisconfigurationException(
                "EMA does not work with half-precision weights: each update would be rounded away; use precision "
                "bf16-mixed or 16-mixed."
            )
        if self.decay is None:
            steps = planned_steps(trainer, getattr(trainer, "datamodule", None))
            self._decay, self._tau = average_decay(steps)
        else:
            self._decay, self._tau = self.decay, self.tau
        if self._loaded is None:
            self.updates = 0
        self._averages_live = False
        self._follow(pl_module, self._loaded or {})
        self._loaded = None
        # right after each step, so that any checkpoint saved then holds the new average, whatever the callbacks' order
        self._hook = trainer.optimizers[0].register_step_post_hook(self._update)

    def _follow(self, pl_module: lightning.LightningModule, known: Mapping[str, Tensor]) -> None:
        """List the averaged tensors; an average that is not in `known` starts at its tensor's value."""
        live: list[Tensor] = []
        other: list[Tensor] = []
        place: dict[str, int] = {}
        seen: dict[int, int] = {}
        for name, tensor in pl_module.state_dict(keep_vars=True).items():
            frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if frozen or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if id(tensor) not in seen:
                seen[id(tensor)] = len(live)
                average = known.get(name, tensor).detach()
                alike = (average.device, average.dtype, average.stride()) == (
                    tensor.device,
                    tensor.dtype,
                    tensor.stride(),
                )
                if name not in known or not alike:
                    # with the tensor's strides; otherwise the update needs one kernel for each tensor
                    average = torch.empty_like(tensor, requires_grad=False).copy_(average)
                live.append(tensor)
                other.append(average)
            place[name] = seen[id(tensor)]
        self._live, self._other, self._place = live, other, place

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Also average what has been unfrozen since."""
        self._follow(pl_module, {name: self._other[place] for name, place in self._place.items()})

    def _update(self, *_: Any) -> None:
        self.updates += 1
        rise = 1 - math.exp(-self.updates / self._tau) if self._tau else 1.0
        with torch.no_grad():
            torch._foreach_lerp_(self._other, self._live, 1 - self._decay * rise)

    # ------------------------------------------------------------------ evaluating

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the averages into the module."""
        if self.evaluate and trainer.state.fn == TrainerFn.FITTING and not self._averages_live:
            self._swap()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the raw weights back."""
        if trainer.state.fn == TrainerFn.FITTING and self._averages_live:
            self._swap()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the evaluated weights in the module."""
        if self.evaluate and not self._averages_live:
            self._swap()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Free the device's memory; a checkpoint can still be written."""
        if stage == "fit":
            if self._hook is not None:
                self._hook.remove()
            self._other = [tensor.cpu() for tensor in self._other]
            self._live = []

    def _swap(self) -> None:
        """Exchange averages and raw weights without a copy: the tensors of the module stay, their memory changes."""
        with torch.inference_mode(False):  # tensors of inference mode could not be trained again
            for index, tensor in enumerate(self._live):
                tensor.data, self._other[index] = self._other[index], tensor.data
        self._averages_live = not self._averages_live

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The number of updates; the averaged weights are stored beside the module's."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates, from which the decay follows."""
        self.updates = operator.index(state_dict["updates"])

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what is evaluated as `state_dict`, and the other version beside it."""
        if not self._place:
            return
        current = checkpoint["state_dict"]
        other = {
            name: self._other[self._place[name]] if name in self._place else value for name, value in current.items()
        }
        averaged, raw = (current, other) if self._averages_live else (other, current)
        if self.evaluate:
            checkpoint["state_dict"], checkpoint[RAW_WEIGHTS] = averaged, raw
        else:
            checkpoint["state_dict"], checkpoint[AVERAGED_WEIGHTS] = raw, averaged

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the raw weights for training, and for evaluation the version that `evaluate` asks for."""
        stored = checkpoint["state_dict"]
        raw = checkpoint.get(RAW_WEIGHTS, stored)
        averaged = checkpoint.get(AVERAGED_WEIGHTS, stored if RAW_WEIGHTS in checkpoint else None)
        if trainer.state.fn == TrainerFn.FITTING:
            wanted = raw
            self._loaded = averaged
            if averaged is None:
                rank_zero_info("The checkpoint holds no averaged weights: the average starts from its weights.")
        else:
            wanted = averaged if self.evaluate and averaged is not None else raw
            self._live, self._other, self._place = [], [], {}  # of an earlier training; the module has others now
        if wanted is not stored:
            pl_module.load_state_dict(wanted, strict=pl_module.strict_loading)
