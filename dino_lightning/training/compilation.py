"""Whether a run compiles the layers of encoder and decoder: by itself only where that pays; and with CUDA graphs."""

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
from dino_lightning.errors import UsageError
from dino_lightning.model import DINO
from dino_lightning.model.compiled_layers import CompiledLayers
from dino_lightning.structures import Batch
from dino_lightning.training.graph_trial import trouble_with_graphs

CompileOption = bool | Literal["auto"]

# On an H200 compiling took 24 s and made a step of 0.122 s one of 0.100 s, which pays after 1,100 steps. Nearly three
# times as many leave room for slower hosts, for smaller gains, and for another compilation for other shapes.
LEAST_BATCHES = 3_000
LEAST_MULTIPLE = 16  # of denoising queries: with fewer, hardly a step has the shapes of an earlier one


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


def check_graphs(
    compile: CompileOption, *, device_type: str, one_size: bool, deterministic: bool, recomputes: bool
) -> None:
    """Refuse CUDA graphs where they cannot be.

    Args:
        compile: the option.
        device_type: of PyTorch, such as `cuda`.
        one_size: whether all images have one size.
        deterministic: whether deterministic algorithms were asked for.
        recomputes: whether layers are computed again on the way back.

    Raises:
        UsageError: says what is in the way.
    """
    for is_so, why in (
        (device_type != "cuda", "they need a CUDA device"),
        (not one_size, "they need images of one size, as with --data.fixed_size"),
        (compile is False, "the compiler records them, which --model.compile false turns off"),
        (deterministic, "deterministic algorithms copy from the host on the way"),
        (recomputes, "--model.recompute_encoder runs layers on the way back, where nothing says that a step begins"),
    ):
        if is_so:
            raise UsageError(f"CUDA graphs are not possible here: {why}; leave out --model.cuda_graphs.")


def check_graphs_of(options: Any, device_type: str) -> None:
    """Refuse CUDA graphs before anything starts, as far as options can say that they cannot be.

    Args:
        options: of `fit`, as parsed.
        device_type: of PyTorch, such as `cuda`.

    Raises:
        UsageError: as of `check_graphs`.
    """
    if options.get("model.cuda_graphs"):
        check_graphs(
            options.get("model.compile"),
            device_type=device_type,
            one_size=options.get("data.fixed_size") is not None,
            deterministic=bool(options.get("trainer.deterministic")),
            recomputes=bool(options.get("model.recompute_encoder")),
        )


class Compilation:
    """What a run makes of its options `compile` and `cuda_graphs`.

    Args:
        option: true, false or "auto".
        cuda_graphs: whether CUDA graphs are to be recorded, which means to compile as well.
    """

    def __init__(self, option: CompileOption, *, cuda_graphs: bool = False) -> None:
        self.option, self.cuda_graphs = option, cuda_graphs
        self._choice: Choice | None = None
        self._layers: CompiledLayers | None = None
        self._tried = False  # the graphs

    def begin(self, model: DINO, trainer: Any) -> None:
        """Decide, say so in one line where there was a choice, and compile the layers at their next use.

        Args:
            model: on its device.
            trainer: a Lightning Trainer at the start of training.

        Raises:
            UsageError: CUDA graphs were asked for, and cannot be.
        """
        device = model.level_embedding.device
        deterministic = torch.are_deterministic_algorithms_enabled()
        if self.cuda_graphs:
            check_graphs(
                self.option,
                device_type=device.type,
                one_size=has_one_size(trainer),
                deterministic=deterministic,
                recomputes=model.encoder.recompute,
            )
        missing = missing_here(device) if device.type == "cuda" else None
        self._choice = choose(
            True if self.cuda_graphs and missing is None else self.option,
            device_type=device.type,
            batches=batches_left(trainer),
            one_size=has_one_size(trainer),
            deterministic=deterministic,
            missing=missing,
        )
        if self.cuda_graphs:
            say(_sentence_of_graphs(self._choice, model))
        elif self.option == "auto" and device.type == "cuda":
            say(_sentence(self._choice))
        if self._choice.compiles and self._layers is None:
            self._layers = model.compile_layers(cuda_graphs=self.cuda_graphs)

    def begin_step(self, model: DINO, batch: Batch) -> None:
        """To be called before each forward pass of training; tries CUDA graphs before the first one.

        Args:
            model: of the run, in training mode.
            batch: of the step.
        """
        layers = self._layers
        if layers is None or not layers.cuda_graphs:
            return
        if not self._tried:
            self._tried = True
            trouble = trouble_with_graphs(model, layers, batch)
            if trouble is not None:
                layers.give_up_graphs(trouble)
        layers.begin_step()

    def end_backward(self) -> None:
        """To be called after each backward pass: gradients outlive the step in which they were computed."""
        if self._layers is not None:
            self._layers.keep_gradients()

    def __str__(self) -> str:
        """Whether the layers are compiled and why, on one line; empty before training."""
        if self._layers is not None and self._layers.trouble is not None:
            return f"no (it failed: {self._layers.trouble})"
        return "" if self._choice is None else str(self._choice)

    @property
    def of_graphs(self) -> str:
        """Whether CUDA graphs are in use and why, on one line; empty before training."""
        if self._choice is None:
            return ""
        if not self.cuda_graphs:
            return "no (not asked for)"
        if self._layers is None:
            return f"no (nothing is compiled: {self._choice.reason})"
        trouble = self._layers.trouble_with_graphs
        return "yes (as chosen)" if trouble is None else f"no (it failed: {trouble})"


def _sentence(choice: Choice) -> str:
    if choice.compiles:
        return (
            "Compiling the layers of encoder and decoder at the first steps, which takes about half a minute "
            "(--model.compile false leaves it out)."
        )
    return f"The layers of encoder and decoder are not compiled: {choice.reason}."


def _sentence_of_graphs(choice: Choice, model: DINO) -> str:
    if not choice.compiles:
        return f"No CUDA graphs are recorded, since the layers cannot be compiled: {choice.reason}."
    shapes = ""
    if model.num_denoising and model.denoising_multiple < LEAST_MULTIPLE:
        shapes = (
            " Every number of denoising queries takes graphs of its own: --model.denoising_multiple 64 makes fewer."
        )
    return (
        "Compiling the layers of encoder and decoder and recording them as CUDA graphs at the first steps, which takes "
        f"about a minute.{shapes}"
    )
