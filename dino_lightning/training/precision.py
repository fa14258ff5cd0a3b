"""The default precision of a device, and which there are."""

from __future__ import annotations

from typing import Any

import torch

from dino_lightning.console import say
from dino_lightning.errors import UsageError

POSSIBLE = ("32-true", "bf16-mixed", "16-mixed")
# to Lightning also these; a plugin of the user's own may have any other name, and is let through
OTHERS = ("bf16-true", "16-true", "64-true", "64", "transformer-engine", "transformer-engine-float16")


def default_precision(accelerator: Any) -> str:
    """`bf16-mixed` on a GPU that supports bfloat16, `16-mixed` on any other GPU, `32-true` elsewhere."""
    if not uses_cuda(accelerator):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def uses_cuda(accelerator: Any) -> bool:
    """Whether a Trainer with that accelerator computes on a GPU of PyTorch's `cuda`."""
    return accelerator not in ("cpu", "mps") and torch.cuda.is_available()


def settled_precision(given: Any, accelerator: Any) -> Any:
    """The precision of a run: what is given, or the default; says so where the device cannot do what is given.

    Args:
        given: by Lightning's names; None for the default.
        accelerator: that of the Trainer.

    Raises:
        UsageError: see `check_precision`.
    """
    check_precision(given)
    best = default_precision(accelerator)
    if given is None:
        return best
    if given == "bf16-mixed" and best == "16-mixed":
        say("This GPU does not compute in bfloat16: using precision 16-mixed instead of bf16-mixed.")
        return best
    return given


def check_precision(precision: Any) -> None:
    """Refuse the precisions in which all weights are of another type than float32.

    Args:
        precision: that of a Trainer, by Lightning's names.

    Raises:
        UsageError: boxes and scores, which DINO computes in float32 in every precision, would not be that.
    """
    if str(precision) in OTHERS:
        raise UsageError(
            f"precision {precision} is not possible: DINO needs weights, boxes and scores in float32. Use "
            f"{', '.join(POSSIBLE[:-1])} or {POSSIBLE[-1]}."
        )
