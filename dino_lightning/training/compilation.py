"""Whether a run compiles the layers of encoder and decoder: by itself only where that pays."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dino_lightning import kernel_trial
from dino_lightning.console import say
from dino_lightning.model import DINO
from dino_lightning.model.compiled_layers import CompiledLayers

CompileOption = bool | Literal["auto"]

# On an H200 compiling took 24 s and made a step of 0.122 s one of 0.100 s, which pays after 1,100 steps. Nearly three
# times as many leave room for slower hosts, for smaller gains, and for another compilation for other shapes.
LEAST_BATCHES = 3_000


@dataclass(frozen=True)
class Choice:
    """Whether layers are compiled, and why.

    Attributes:
        compiles: whether they are.
        reason: in a few words.
    """

    compiles: bool
    reason: str

    def __str__(self) -> str:
        return f"{'yes' if self.compiles else 'no'} ({self.reason})"


def choose(
    option: CompileOption,
    *,
    device_type: str,
    batches: float,
    one_size: bool,
    deterministic: bool,
    missing: str | None = None,
) -> Choice:
    """Whether to compile.

    Args:
        option: true and false decide; with "auto" the rest does.
        device_type: of PyTorch, such as `cuda`.
        batches: that are left to train on; infinite where the run has no end of its own.
        one_size: whether all images have one size; others take further graphs, for which the gain was not measured.
        deterministic: whether deterministic algorithms were asked for; compiled code has no such promise.
        missing: what the machine lacks to compile, see `missing_here`; None if nothing.
    """
    if option != "auto":
        return Choice(option, "as chosen")
    if device_type != "cuda":
        return Choice(False, "it pays on CUDA devices only")
    if deterministic:
        return Choice(False, "deterministic algorithms were asked for")
    if not one_size:
        return Choice(False, "it pays for images of one size, as with --data.fixed_size")
    if batches < LEAST_BATCHES:
        return Choice(False, f"{max(batches, 0):,.0f} batches are fewer than the {LEAST_BATCHES:,} after which it pays")
    if missing is not None:
        return Choice(False, missing)
    return Choice(True, f"it pays for {LEAST_BATCHES:,} batches or more")


def missing_here(device: torch.device) -> str | None:
    """What a machine lacks to compile for a device: Triton, a C compiler, headers of Python; None if nothing."""
    trouble = kernel_trial.missing(device.type, device.index or 0)
    if trouble is not None:
        return trouble
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "there is no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of Python are not installed, which its C compiler needs"
    return None


def has_one_size(trainer: Any) -> bool:
    """Whether all training images have one size, by the data's `fixed_size`.

    Args:
        trainer: a Lightning Trainer.
    """
    return getattr(getattr(trainer, "datamodule", None), "pad_to", None) is not None


def batches_left(trainer: Any) -> float:
    """Batches that a run still trains on, at most; infinite where it has no end.

    Args:
        trainer: a Lightning Trainer at the start of training, with its loaders.
    """
    by_epochs = by_steps = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        by_epochs = (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        by_steps = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
    return min(by_epochs, by_steps)


class Compilation:
    """What a run makes of its option `compile`.

    Args:
        option: true, false or "auto".
    """

    def __init__(self, option: CompileOption) -> None:
        self.option = option
        self._choice: Choice | None = None
        self._layers: CompiledLayers | None = None

    def begin(self, model: DINO, trainer: Any) -> None:
        """Decide, say so in one line where there was a choice, and compile the layers at their next use.

        Args:
            model: on its device.
            trainer: a Lightning Trainer at the start of training.
        """
        device = model.level_embedding.device
        self._choice = choose(
            self.option,
            device_type=device.type,
            batches=batches_left(trainer),
            one_size=has_one_size(trainer),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            missing=missing_here(device) if device.type == "cuda" else None,
        )
        if self.option == "auto" and device.type == "cuda":
            say(_sentence(self._choice))
        if self._choice.compiles and self._layers is None:
            self._layers = model.compile_layers()

    def __str__(self) -> str:
        """Whether the layers are compiled and why, on one line; empty before training."""
        if self._layers is not None and self._layers.trouble is not None:
            return f"no (it failed: {self._layers.trouble})"
        return "" if self._choice is None else str(self._choice)


def _sentence(choice: Choice) -> str:
    if choice.compiles:
        return (
            "Compiling the layers of encoder and decoder at the first steps, which takes about half a minute "
            "(--model.compile false leaves it out)."
        )
    return f"The layers of encoder and decoder are not compiled: {choice.reason}."
