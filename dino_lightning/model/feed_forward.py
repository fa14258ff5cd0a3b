"""The feed-forward network of a transformer's layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning.model.linear import linear, takes_onednn
from dino_lightning.model.lower_precision import as_made, lower_precision, lowered, products

ROWS_AT_A_TIME = 1024  # at inference on a CPU: what lies between the layers fits into its cache


def feed_forward(x: Tensor, first: nn.Linear, second: nn.Linear, dropout: nn.Dropout) -> Tensor:
    """Two linear layers with ReLU and dropout between them: (..., D) -> (..., D).

    In training, ReLU is part of the first product, where the device's library has one like that: the widest tensor of
    the model is written once, rather than written, read and written again. At inference on a CPU, rows go through both
    layers some at a time.
    """
    dropped = dropout.training and dropout.p > 0
    if takes_onednn(x, first.weight) and as_made(first, second) and not dropped:
        (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (first, second))
        rows = torch.split(x.flatten(0, -2), ROWS_AT_A_TIME)
        return torch.cat([linear(linear(some, w1, b1, relu=True), w2, b2) for some in rows]).view(*x.shape[:-1], -1)
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled() or dropped
    if plain or not as_made(first, second):
        to_hidden, to_output = products(first, second)
        return to_output(dropout(F.relu(to_hidden(x))))
    weights = lowered(first.weight, first.bias, second.weight, second.bias)
    dtype = lower_precision(x.device.type) or x.dtype
    if any(weight.dtype != dtype for weight in weights):
        return second(F.relu(first(x)))  # type: ignore[no-any-return]  # nn.Module's call
    with torch.autocast(device_type=x.device.type, enabled=False):
        out: Tensor = _FeedForward.apply(x.flatten(0, -2).to(dtype), *weights)
    return out.view(*x.shape[:-1], second.out_features)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden = torch._addmm_activation(bias1, x, weight1.t())
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return torch.addmm(bias2, hidden, weight2.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        by_weight2, by_bias2 = grad.t() @ hidden, grad.sum(0)
        by_hidden = grad @ weight2
        torch.ops.aten.threshold_backward.grad_input(by_hidden, hidden, 0, grad_input=by_hidden)
        return by_hidden @ weight1, by_hidden.t() @ x, by_hidden.sum(0), by_weight2, by_bias2
