"""The default precision of a device."""

from __future__ import annotations

from typing import Any

import torch


def default_precision(accelerator: Any) -> str:
    """`bf16-mixed` on a GPU that supports bfloat16, `16-mixed` on any other GPU, `32-true` elsewhere."""
    if accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
