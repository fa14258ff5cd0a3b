"""Deformable attention as one Triton kernel, see `triton_parts.py`; imported where Triton is used."""

# The language of the kernels has no annotations but `tl.constexpr`, and Triton has no types.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dino_lightning.kernel_trial import launches_on
from dino_lightning.model.deformable_attention.limits import packed_sizes
from dino_lightning.model.deformable_attention.triton_parts import (
    NUM_WARPS,
    VARYING,
    axis,
    block_size,
    size_of_level,
    softmax_parts,
)


@triton.jit(do_not_specialize=VARYING)
def _forward(
    value,
    reference,
    offsets,
    logits,
    out,
    num_queries,
    num_tokens,
    size0,
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    size7,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    DIM: tl.constexpr,
    COORDINATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The samples of `BLOCK` queries of one head, summed with their weights."""
    COUNT: tl.constexpr = LEVELS * POINTS
    blocks = tl.cdiv(num_queries, BLOCK)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    image = image_head // HEADS
    head = image_head % HEADS
    queries = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = queries < num_queries
    channels = tl.arange(0, DIM)

    value += image_head * num_tokens * DIM
    reference += image * num_queries * (LEVELS * COORDINATES)
    offsets += image * num_queries * (HEADS * COUNT * 2) + head * (COUNT * 2)
    logits += image * num_queries * (HEADS * COUNT) + head * COUNT
    out += image * num_queries * (HEADS * DIM) + head * DIM

    largest, total = softmax_parts(logits + queries * (HEADS * COUNT), there, COUNT)
    result = tl.zeros((BLOCK, DIM), tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = size_of_level(level, size0, size1, size2, size3, size4, size5, size6, size7)
        anchor = reference + queries * (LEVELS * COORDINATES) + level * COORDINATES
        anchor_x = tl.load(anchor, there, 0.0) * width - 0.5
        anchor_y = tl.load(anchor + 1, there, 0.0) * height - 0.5
        if COORDINATES == 4:
            step_x = tl.load(anchor + 2, there, 0.0) * (width * (0.5 / POINTS))
            step_y = tl.load(anchor + 3, there, 0.0) * (height * (0.5 / POINTS))
        for point in range(POINTS):
            number = level * POINTS + point
            logit = tl.load(logits + queries * (HEADS * COUNT) + number, there, 0.0).to(tl.float32)
            weight = tl.exp(logit - largest) / total
            offset = offsets + queries * (HEADS * COUNT * 2) + number * 2
            x = tl.load(offset, there, 0.0).to(tl.float32)
            y = tl.load(offset + 1, there, 0.0).to(tl.float32)
            if COORDINATES == 4:
                x = x * step_x
                y = y * step_y
            column, right = axis(anchor_x + x, width)
            row, below = axis(anchor_y + y, height)
            column_in = (column >= 0) & (column < width)
            next_in = (column >= -1) & (column < width - 1)
            row_in = (row >= 0) & (row < height) & there
            below_in = (row >= -1) & (row < height - 1) & there
            upper = value + (start + row * width + column)[:, None] * DIM + channels[None, :]
            lower = upper + width * DIM
            top = weight * (1.0 - below)
            bottom = weight * below
            result += (top * (1.0 - right))[:, None] * tl.load(upper, (row_in & column_in)[:, None], 0.0).to(tl.float32)
            result += (top * right)[:, None] * tl.load(upper + DIM, (row_in & next_in)[:, None], 0.0).to(tl.float32)
            result += (bottom * (1.0 - right))[:, None] * tl.load(lower, (below_in & column_in)[:, None], 0.0).to(
                tl.float32
            )
            result += (bottom * right)[:, None] * tl.load(lower + DIM, (below_in & next_in)[:, None], 0.0).to(
                tl.float32
            )
        start += height * width
    tl.store(out + queries[:, None] * (HEADS * DIM) + channels[None, :], result, mask=there[:, None])


def forward(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: Sequence[int],
) -> Tensor:
    """Attend; the arguments are those of `fused.deformable_attention`, contiguous.

    Returns:
        (B, Q, H * D), of the dtype of `value`.
    """
    batch, heads, tokens, dim = value.shape
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[4]
    out = value.new_empty(batch, queries, heads * dim)
    block = block_size(dim, bytes_per_thread=16, itemsize=value.element_size())
    if out.numel() > 0:
        with launches_on(value.device):
            _forward[(triton.cdiv(queries, block) * batch * heads,)](
                value,
                reference_points,
                sampling_offsets,
                attention_logits,
                out,
                queries,
                tokens,
                *packed_sizes(spatial_shapes),
                HEADS=heads,
                LEVELS=len(spatial_shapes) // 2,
                POINTS=points,
                DIM=dim,
                COORDINATES=reference_points.shape[-1],
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
    return out
