"""The precision that suits a device."""

from __future__ import annotations

from typing import Any

import torch


def default_precision(accelerator: Any) -> str:
    """Mixed precision on a GPU, bfloat16 where the GPU computes in it; float32 elsewhere."""
    if accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
