"""Deformable attention in float16 by plain PyTorch, for CUDA devices that are too old for the kernels (T4, V100).

Places, shares and softmax are float32; the maps are read and summed as they are, in float16: each query is a bag of
weighted rows, whose sum PyTorch computes in one kernel that adds up in float32, so that no samples are held, and a
float32 copy of the maps is not either. A few heads of an image at a time, and again on the way back, bound what is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_lightning.kernel_trial import OLDEST_CAPABILITY
from dino_lightning.model.deformable_attention.gathered import places_and_weights

# Some 200 bytes are held of each on a CPU; a CUDA device sorts the rows as well, by estimate 130 more: a third of a GB.
SAMPLES_AT_A_TIME = 2**20


def takes_halves(value: Tensor) -> bool:
    """Whether `in_halves` is for such values: there are any, and they are of a kind that `halves_on` says yes to."""
    return not torch.compiler.is_compiling() and value.numel() > 0 and halves_on(value.device, value.dtype)


def halves_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `in_halves` is for values in float16 there: on CUDA devices of before compute capability 8.0.

    Not in bfloat16, which those devices emulate: differences of neighbours would be lost in its eight digits.
    """
    if device.type != "cuda" or dtype != torch.float16:
        return False
    return torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY


def in_halves(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """As `dispatch.sample`, with the same arguments, for values of float16.

    On a CPU, against float32 on the same values: output and gradients of offsets, logits and reference points within
    0.1 % of the largest, the gradient of the values, which a CPU adds up in float16, within 0.5 % (a test has these).
    """
    out: Tensor = _InPieces.apply(value, reference_points, sampling_offsets, attention_logits, spatial_shapes)
    return out


class _InPieces(torch.autograd.Function):
    """Keeps what went in, and computes the rest again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        reference_points: Tensor,
        offsets: Tensor,
        logits: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        ctx.save_for_backward(value, reference_points, offsets, logits)
        ctx.spatial_shapes = spatial_shapes
        out = value.new_empty(*offsets.shape[:3], value.shape[3])
        for image, heads in _pieces(offsets):
            out[image, :, heads] = _attend(
                value[image, :, heads],
                reference_points[image],
                offsets[image, :, heads],
                logits[image, :, heads],
                spatial_shapes,
            )
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, reference, offsets, logits = ctx.saved_tensors
        grad = grad.view(*offsets.shape[:3], value.shape[3])
        by_value, by_offsets, by_logits = (torch.empty_like(one) for one in (value, offsets, logits))
        by_reference = torch.zeros_like(reference) if ctx.needs_input_grad[1] else None
        for image, heads in _pieces(offsets):
            of_heads = (value[image, :, heads], offsets[image, :, heads], logits[image, :, heads])
            given = [one.detach().requires_grad_() for one in of_heads]
            anchors = reference[image].detach().requires_grad_(by_reference is not None)
            with torch.enable_grad():
                out = _attend(given[0], anchors, given[1], given[2], ctx.spatial_shapes)
            wanted = given if by_reference is None else [*given, anchors]
            found = torch.autograd.grad(out, wanted, grad[image, :, heads])
            for whole, part in zip((by_value, by_offsets, by_logits), found, strict=False):
                whole[image, :, heads] = part
            if by_reference is not None:
                by_reference[image] += found[3]
        return by_value, by_reference, by_offsets, by_logits, None


def _pieces(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """An image and a few of its heads at a time, by (B, Q, H, L, P, 2) offsets."""
    batch, queries, heads, levels, points, _ = offsets.shape
    some = max(SAMPLES_AT_A_TIME // (queries * levels * points), 1)
    return (
        (image, slice(first, min(first + some, heads))) for image in range(batch) for first in range(0, heads, some)
    )


def _attend(
    value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
) -> Tensor:
    """(S, h, D) values, (Q, L, 2 or 4) references, (Q, h, L, P, 2) offsets, (Q, h, L * P) logits -> (Q, h, D)."""
    tokens, heads, dim = value.shape
    queries, points = len(offsets), offsets.shape[3]
    with torch.autocast(device_type=value.device.type, enabled=False):
        places, weights = (
            one[0].flatten(2, 3)
            for one in places_and_weights(reference[None], offsets[None], logits[None], spatial_shapes)
        )
        level_of = [level for level in range(len(spatial_shapes)) for _ in range(points)]
        areas = [height * width for height, width in spatial_shapes]
        numbers = [(*spatial_shapes[level], sum(areas[:level])) for level in level_of]
        height, width, start = torch.tensor(numbers).to(value.device, non_blocking=True).unbind(1)
        lines = _two_cells(places[..., 1], height)
        columns = _two_cells(places[..., 0], width)
        start = start + torch.arange(heads, device=value.device)[:, None] * tokens
        rows = torch.stack([start + line * width + column for line, _ in lines for column, _ in columns], dim=2)
        shares = torch.stack([weights * line * column for _, line in lines for _, column in columns], dim=2)
        maps = value.transpose(0, 1).reshape(heads * tokens, dim)
        bags = F.embedding_bag(
            rows.view(queries * heads, -1),
            maps,
            mode="sum",
            per_sample_weights=shares.to(value.dtype).view(queries * heads, -1),
        )
    return bags.view(queries, heads, dim)


def _two_cells(place: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(Q, h, K) places 0-1, (K,) numbers of cells -> the cells before and after each place, and their shares.

    A cell outside the map becomes one within it, with the share 0; what is not finite stays so in the share.
    """
    cells = place * size - 0.5
    before = cells.detach().floor()
    after = cells - before
    first = before.long()
    found = []
    for cell, share in ((first, 1 - after), (first + 1, after)):
        within = torch.minimum(cell.clamp(min=0), size - 1)
        found.append((within, share * (within == cell)))
    return found
