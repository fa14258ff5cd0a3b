"""Class losses for the criterion: the published focal loss, and losses whose targets know how well a box fits.

The published focal loss (arXiv 1708.02002) weights what is right by alpha = 0.25 and background by 0.75. That balance
is made for 900 queries of 91 classes, of which a handful are right. With few queries and one class, a tenth of all
entries is right; alpha then holds their scores down until duplicates of a box score as high as the box itself. The
other losses weight positives no less than background. The target of a matched query is a function of q, the IoU of its
box with the ground-truth box, taken as a constant; so the score of a box comes to say how well it fits, and the best of
several boxes on one object wins.

With p the probability that a query gives to the class, t its target and bce(p, t) = -t log p - (1 - t) log(1 - p):

| name | matched query | everything else |
|---|---|---|
| `focal` | 0.25 (1 - p)^2 bce(p, 1) | 0.75 p^2 bce(p, 0) |
| `quality_focal` (GFL, arXiv 2006.04388) | (t - p)^2 bce(p, t), t = q | p^2 bce(p, 0) |
| `varifocal` (VarifocalNet, arXiv 2008.13367) | t bce(p, t), t = q | 0.75 p^2 bce(p, 0) |
| `ia_bce` (Align-DETR, arXiv 2304.07527) | bce(p, t), t = p^0.25 q^0.75 | p^2 bce(p, 0) |
| `position_supervised` (Stable-DINO, arXiv 2304.04742) | (t - p)^2 bce(p, t), t = q^2 / best q | p^2 bce(p, 0) |
| `matchability` (DEIM, arXiv 2412.04234) | bce(p, t), t = q^1.5 | p^1.5 bce(p, 0) |

The best q is that of the image, so that its best box keeps its IoU as target and worse ones fall off quickly.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_lightning.losses.focal import SMALLEST, focal_loss

ClassLoss = Literal["focal", "quality_focal", "varifocal", "ia_bce", "position_supervised", "matchability"]
CLASS_LOSSES: tuple[str, ...] = get_args(ClassLoss)
BACKGROUND_GAMMA = {"matchability": 1.5}  # power of the probability in the loss of background; 2 for the others
BACKGROUND_WEIGHT = {"varifocal": 0.75}  # 1 for the others
SMALLEST_TARGET = 0.01  # a matched query whose box misses is still the one that shall find it


def class_loss(
    name: str, logits: Tensor, positive: Tensor, counts: Tensor, quality: Tensor | None = None, *, images: int = 1
) -> Tensor:
    """One of `CLASS_LOSSES`, summed over everything but the first dimension.

    Args:
        name: which.
        logits: (L, M, K) float32.
        positive: (L, P) int64, places in M * K of matched queries at their class; each at most once among those that
            count.
        counts: (L, P) bool, False for places to pass over.
        quality: (L, P) float32, IoU of the predicted box with its ground truth, 0-1; `focal` needs none.
        images: how many images the P places come from, in equal shares and in their order.

    Returns:
        (L,) float32.

    Raises:
        ValueError: there is no loss of that name, or it needs `quality`.
    """
    if name == "focal":
        return focal_loss(logits, positive, counts)
    if name not in CLASS_LOSSES:
        raise ValueError(f"class_loss={name!r}: choose one of {', '.join(CLASS_LOSSES)}.")
    if quality is None:
        raise ValueError(f"class_loss={name!r} needs the quality of the matched boxes.")
    flat, gamma, weight = logits.flatten(1), BACKGROUND_GAMMA.get(name, 2.0), BACKGROUND_WEIGHT.get(name, 1.0)
    background: Tensor = _Background.apply(flat, gamma)
    x = flat.gather(1, positive)
    p, wrong, right = x.sigmoid(), F.softplus(x), F.softplus(-x)  # bce(p, 0) and bce(p, 1)
    target = _target(name, p.detach(), quality.detach(), counts, images)
    entropy = target * right + (1 - target) * wrong
    # The weight of a sample is a constant to the gradient in VFL, IA-BCE and MAL; in the others it is part of the loss.
    scale = {
        "quality_focal": (target - p) ** 2,
        "position_supervised": (target - p) ** 2,
        "varifocal": target,
        "ia_bce": torch.ones_like(p),
        "matchability": torch.ones_like(p),
    }[name]
    difference = scale * entropy - weight * p**gamma * wrong
    summed: Tensor = weight * background + (difference * counts).sum(1)
    return summed


def _target(name: str, p: Tensor, quality: Tensor, counts: Tensor, images: int) -> Tensor:
    """What the probability of a matched query shall be: (L, P), 0-1."""
    q = quality.clamp(min=0, max=1)
    if name == "matchability":
        q = q**1.5
    elif name == "ia_bce":
        q = p**0.25 * q**0.75
    elif name == "position_supervised":
        by_image = (q * counts).view(len(q), images, -1)
        best = by_image.amax(2, keepdim=True).clamp(min=SMALLEST_TARGET) if by_image.shape[2] else by_image
        q = (q.view_as(by_image) ** 2 / best).view_as(q)
    target: Tensor = q.clamp(min=SMALLEST_TARGET, max=1)
    return target


class _Background(torch.autograd.Function):
    """Sum of p^gamma * -log(1 - p) over the second dimension, with its gradient worked out in the same pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float) -> Tensor:
        probability = logits.sigmoid()
        # -log(1 - p), by a sigmoid that does not round to 0
        surprise = torch.neg(logits).sigmoid_().clamp_(min=SMALLEST).log_().neg_()
        torch.maximum(surprise, logits, out=surprise)  # from 85 on, where the sigmoid has no digits left
        power = probability * probability if gamma == 2 else probability**gamma
        summed: Tensor = torch.linalg.vecdot(power, surprise)
        if ctx.needs_input_grad[0]:
            # p^gamma (gamma (1 - p) surprise + p)
            slope = surprise.addcmul_(probability, surprise, value=-1)
            ctx.save_for_backward(probability.add_(slope, alpha=gamma).mul_(power))
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None], None
