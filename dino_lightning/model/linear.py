"""Products with weights, at inference on a CPU by oneDNN: MKL, PyTorch's own choice, is slow on some processors.

On an AMD EPYC with AVX-512, MKL computes with half the width of its vectors: 100 GFLOP/s on a core, oneDNN 240.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """(..., I) -> (..., O) by weights (O, I) and a bias (O,), with ReLU after it if wanted.

    Sums are rounded in another order than by `torch.nn.functional.linear` where oneDNN computes them.
    """
    if takes_onednn(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
        return out
    product = F.linear(x, weight, bias)
    return F.relu(product) if relu else product


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is computed by oneDNN: at inference, in float32 on a CPU for which PyTorch would take MKL."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor  # fake ones are counted, by who does not know this operation
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and _has_both()
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def _has_both() -> bool:
    """Whether PyTorch was built with MKL, and with the operation of oneDNN that its compiler calls."""
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch has no types here
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # as above
    return bool(onednn and mkl and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
