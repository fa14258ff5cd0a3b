"""Weights in the precision of autocast, with few operations: at small sizes a GPU waits for launches, not for sums.

Autocast casts each weight by an operation of its own, and each gradient back by another one: several hundred a step.
Here they are cast together, in the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention

from dino_lightning.model.linear import linear


def lower_precision(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on that type of device; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


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


def as_made(*layers: nn.Module) -> bool:
    """Whether all of them are linear layers of torch without hooks, so that their weights may be used without a call.

    False for layers that adapters, pruning or quantization have replaced, or that somebody watches.
    """
    return all(
        type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear) and not is_watched(layer) for layer in layers
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, which only a call runs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def products(*layers: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """What each of the linear layers computes; their weights are cast to autocast's precision by one operation."""
    if not as_made(*layers):
        return list(layers)
    weights = lowered(*(weight for layer in layers for weight in layer.parameters()))
    return [partial(linear, weight=weights[i], bias=weights[i + 1]) for i in range(0, len(weights), 2)]


def lowered(*weights: Tensor) -> tuple[Tensor, ...]:
    """The weights in autocast's precision, cast by one operation, and their gradients by one.

    Where autocast is off, they are what they are.

    Args:
        weights: float32, on one device.
    """
    dtype = lower_precision(weights[0].device.type)
    if dtype is None or torch.compiler.is_compiling() or any(weight.dtype != torch.float32 for weight in weights):
        return weights  # autocast itself casts what is left
    out: tuple[Tensor, ...] = _Lowered.apply(dtype, *weights)
    return out


class _Lowered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _copies(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_copies([grad for grad in grads if grad is not None], torch.float32))
        return (None, *(None if grad is None else next(copies) for grad in grads))


def _copies(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies
