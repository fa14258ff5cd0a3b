"""Weights in the precision of autocast, with few operations: at small sizes a GPU waits for launches, not for sums.

Autocast casts each weight by an operation of its own, and each gradient back by another one: several hundred a step.
Here they are cast together, in the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lower_precision(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on that type of device; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class KeptResult:
    """The last result of a function of tensors that seldom change, as those of frozen layers."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] = ((), (), ())

    def of(
        self, inputs: Sequence[Tensor], dtype: torch.dtype, compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `compute` gives for the inputs; asked again when one of them has been replaced, moved or written to.

        Args:
            inputs: all that the result depends on, beside `dtype`.
            dtype: of the result.
            compute: called without gradients.
        """
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in inputs):
            return compute()  # whether such tensors have been written to is not known
        state = (dtype, *((t._version, t.untyped_storage()._cdata, t.device, t.dtype) for t in inputs))
        known, known_state, result = self._kept  # one read and one write: threads may share the module
        if state != known_state or any(one is not other for one, other in zip(inputs, known, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                result = compute()
            self._kept = (tuple(inputs), state, result)
        kept: tuple[Tensor, ...] = result
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """Nothing is kept in copies and files: their tensors are others."""
        return {"_kept": ((), (), ())}


def scaled_to(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight * scale` in `dtype`, by one operation, and one on the way back; the product is rounded once.

    Args:
        weight: any shape, float32 or of `dtype`.
        scale: a shape that broadcasts to that of the weight; gets no gradient.
        dtype: of the product.
    """
    if weight.dtype == dtype or torch.compiler.is_compiling():
        return (weight * scale).to(dtype)
    out: Tensor = _ScaledTo.apply(weight, scale, dtype)
    return out


class _ScaledTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None, None
