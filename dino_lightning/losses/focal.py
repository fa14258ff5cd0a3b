"""Focal loss (arXiv 1708.02002) of many classes of which few are right, with its gradient worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0  # the formulas below are for this value
SMALLEST = 1e-37  # above float32's subnormal numbers


def focal_loss(logits: Tensor, positive: Tensor, counts: Tensor) -> Tensor:
    """Sigmoid focal loss with alpha 0.25 and gamma 2, summed over everything but the first dimension.

    Nearly all entries are background. So the loss of background is computed for all of them in a few passes over
    memory, and the difference is added where there is a class; automatic differentiation of the usual formula takes
    five times as many passes, each of them a kernel on a GPU.

    Args:
        logits: (L, M, K) float32.
        positive: (L, P) int64, places in M * K that hold a class; each at most once among those that count.
        counts: (L, P) bool, False for places to pass over.

    Returns:
        (L,) float32.
    """
    summed: Tensor = _FocalLoss.apply(logits.flatten(1), positive, counts)
    return summed


class _FocalLoss(torch.autograd.Function):
    """The gradient is ready when the loss is, since both need the same exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positive: Tensor, counts: Tensor) -> Tensor:
        probability = logits.sigmoid()
        # -log(1 - probability), by a sigmoid that does not round to 0; softplus takes twice as long on a CPU
        surprise = torch.neg(logits).sigmoid_().clamp_(min=SMALLEST).log_().neg_()
        torch.maximum(surprise, logits, out=surprise)  # from 85 on, where the sigmoid has no digits left
        squared = probability * probability
        background = (1 - FOCAL_ALPHA) * torch.linalg.vecdot(squared, surprise)
        x = logits.gather(1, positive)
        p, missed, spurious = x.sigmoid(), F.softplus(-x), F.softplus(x)
        difference = FOCAL_ALPHA * (1 - p) ** 2 * missed - (1 - FOCAL_ALPHA) * p**2 * spurious
        if ctx.needs_input_grad[0]:
            # of background: p^2 (2 (1 - p) surprise + p)
            slope = surprise.addcmul_(probability, surprise, value=-1)
            slope = probability.add_(slope, alpha=2).mul_(squared).mul_(1 - FOCAL_ALPHA)
            here = -FOCAL_ALPHA * (1 - p) ** 2 * (2 * p * missed + (1 - p))
            there = (1 - FOCAL_ALPHA) * p**2 * (2 * (1 - p) * spurious + p)
            ctx.save_for_backward(slope.scatter_add_(1, positive, (here - there) * counts))
        summed: Tensor = background + (difference * counts).sum(1)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None], None, None
