"""The gradients of deformable attention as one Triton kernel, see `triton_parts.py`; imported where Triton is used.

- The gradient of the maps is summed by float32 atomics: those of bfloat16 are emulated before sm_90. The compiler lets
  32 lanes add to 32 neighbours; from sm_90, to four each.
- Nothing is autotuned: the kernel adds to its output.
"""

# The language of the kernels has no annotations but `tl.constexpr`, and Triton has no types.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import functools
from collections.abc import Sequence

import torch
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
def _backward(
    grad_out,
    value,
    reference,
    offsets,
    logits,
    grad_value,
    grad_reference,
    grad_offsets,
    grad_weights,
    grad_logits,
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
    REFERENCE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of `BLOCK` queries of one head; see `backward`."""
    COUNT: tl.constexpr = LEVELS * POINTS
    blocks = tl.cdiv(num_queries, BLOCK)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    image = image_head // HEADS
    head = image_head % HEADS
    queries = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = queries < num_queries
    channels = tl.arange(0, DIM)

    value += image_head * num_tokens * DIM
    grad_value += image_head * num_tokens * DIM
    grad_reference += image_head * num_queries * (LEVELS * COORDINATES)
    reference += image * num_queries * (LEVELS * COORDINATES)
    offsets += image * num_queries * (HEADS * COUNT * 2) + head * (COUNT * 2)
    grad_offsets += image * num_queries * (HEADS * COUNT * 2) + head * (COUNT * 2)
    logits += image * num_queries * (HEADS * COUNT) + head * COUNT
    grad_weights += image * num_queries * (HEADS * COUNT) + head * COUNT
    grad_logits += image * num_queries * (HEADS * COUNT) + head * COUNT
    grad_out += image * num_queries * (HEADS * DIM) + head * DIM

    largest, total = softmax_parts(logits + queries * (HEADS * COUNT), there, COUNT)
    grad = tl.load(grad_out + queries[:, None] * (HEADS * DIM) + channels[None, :], there[:, None], 0.0).to(tl.float32)
    expected = tl.zeros_like(largest)  # sum over all points of weight times its gradient
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = size_of_level(level, size0, size1, size2, size3, size4, size5, size6, size7)
        anchor = reference + queries * (LEVELS * COORDINATES) + level * COORDINATES
        anchor_x = tl.load(anchor, there, 0.0) * width - 0.5
        anchor_y = tl.load(anchor + 1, there, 0.0) * height - 0.5
        if COORDINATES == 4:
            step_x = tl.load(anchor + 2, there, 0.0) * (width * (0.5 / POINTS))
            step_y = tl.load(anchor + 3, there, 0.0) * (height * (0.5 / POINTS))
        sum_x = tl.zeros_like(largest)
        sum_y = tl.zeros_like(largest)
        sum_width = tl.zeros_like(largest)
        sum_height = tl.zeros_like(largest)
        for point in range(POINTS):
            number = level * POINTS + point
            logit = tl.load(logits + queries * (HEADS * COUNT) + number, there, 0.0).to(tl.float32)
            weight = tl.exp(logit - largest) / total
            place = queries * (HEADS * COUNT * 2) + number * 2
            offset_x = tl.load(offsets + place, there, 0.0).to(tl.float32)
            offset_y = tl.load(offsets + place + 1, there, 0.0).to(tl.float32)
            if COORDINATES == 4:
                x = anchor_x + offset_x * step_x
                y = anchor_y + offset_y * step_y
            else:
                x = anchor_x + offset_x
                y = anchor_y + offset_y
            column, right = axis(x, width)
            row, below = axis(y, height)
            column_in = (column >= 0) & (column < width)
            next_in = (column >= -1) & (column < width - 1)
            row_in = (row >= 0) & (row < height) & there
            below_in = (row >= -1) & (row < height - 1) & there
            cell = (start + row * width + column)[:, None] * DIM
            upper = value + cell + channels[None, :]
            lower = upper + width * DIM

            left = 1.0 - right
            above = 1.0 - below
            dot_00 = tl.sum(grad * tl.load(upper, (row_in & column_in)[:, None], 0.0).to(tl.float32), axis=1)
            dot_01 = tl.sum(grad * tl.load(upper + DIM, (row_in & next_in)[:, None], 0.0).to(tl.float32), axis=1)
            dot_10 = tl.sum(grad * tl.load(lower, (below_in & column_in)[:, None], 0.0).to(tl.float32), axis=1)
            dot_11 = tl.sum(grad * tl.load(lower + DIM, (below_in & next_in)[:, None], 0.0).to(tl.float32), axis=1)
            by_weight = above * (left * dot_00 + right * dot_01) + below * (left * dot_10 + right * dot_11)
            by_x = weight * (above * (dot_01 - dot_00) + below * (dot_11 - dot_10))
            by_y = weight * (left * (dot_10 - dot_00) + right * (dot_11 - dot_01))
            expected += weight * by_weight
            tl.store(grad_weights + queries * (HEADS * COUNT) + number, by_weight, there)
            if COORDINATES == 4:
                tl.store(grad_offsets + place, by_x * step_x, there)
                tl.store(grad_offsets + place + 1, by_y * step_y, there)
            else:
                tl.store(grad_offsets + place, by_x, there)
                tl.store(grad_offsets + place + 1, by_y, there)
            if REFERENCE_GRADIENT:
                sum_x += by_x
                sum_y += by_y
                sum_width += by_x * offset_x
                sum_height += by_y * offset_y

            # Nothing to add where a place lies on the line between cells: half of all additions of a new model.
            upper_grad = grad_value + cell + channels[None, :]
            lower_grad = upper_grad + width * DIM
            part = weight * above * left
            mask = (row_in & column_in & (part != 0.0))[:, None]
            tl.atomic_add(upper_grad, grad * part[:, None], mask, sem="relaxed")
            part = weight * above * right
            mask = (row_in & next_in & (part != 0.0))[:, None]
            tl.atomic_add(upper_grad + DIM, grad * part[:, None], mask, sem="relaxed")
            part = weight * below * left
            mask = (below_in & column_in & (part != 0.0))[:, None]
            tl.atomic_add(lower_grad, grad * part[:, None], mask, sem="relaxed")
            part = weight * below * right
            mask = (below_in & next_in & (part != 0.0))[:, None]
            tl.atomic_add(lower_grad + DIM, grad * part[:, None], mask, sem="relaxed")
        if REFERENCE_GRADIENT:
            target = grad_reference + queries * (LEVELS * COORDINATES) + level * COORDINATES
            tl.store(target, sum_x * width, there)
            tl.store(target + 1, sum_y * height, there)
            if COORDINATES == 4:
                tl.store(target + 2, sum_width * (width * (0.5 / POINTS)), there)
                tl.store(target + 3, sum_height * (height * (0.5 / POINTS)), there)
        start += height * width

    # The softmax needs the sum over all points first; the gradients by weight wait in memory meanwhile.
    tl.debug_barrier()
    for number in range(COUNT):
        place = queries * (HEADS * COUNT) + number
        weight = tl.exp(tl.load(logits + place, there, 0.0).to(tl.float32) - largest) / total
        by_weight = tl.load(grad_weights + place, there, 0.0)
        tl.store(grad_logits + place, weight * (by_weight - expected), there)


def backward(
    grad_out: Tensor,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: Sequence[int],
    *,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `value`, `reference_points` (empty if not asked for), `sampling_offsets` and `attention_logits`.

    Those of `value` are sums in no fixed order; the others are the same every time. Reference points are shared by the
    heads, so each head writes its part and the parts are summed afterwards.

    Args:
        grad_out: (B, Q, H * D), contiguous, of the dtype of `value`.
        value: as in `forward`, like the rest.
        reference_points: as in `forward`.
        sampling_offsets: as in `forward`.
        attention_logits: as in `forward`.
        spatial_shapes: as in `forward`.
        reference_gradient: whether the reference points need a gradient.
    """
    batch, heads, tokens, dim = value.shape
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[4]
    levels, coordinates = len(spatial_shapes) // 2, reference_points.shape[-1]
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_offsets, grad_logits = torch.empty_like(sampling_offsets), torch.empty_like(attention_logits)
    single = attention_logits.dtype == torch.float32
    grad_weights = grad_logits if single else torch.empty_like(attention_logits, dtype=torch.float32)
    shape = (batch, heads, queries, levels, coordinates) if reference_gradient else (0,)
    parts = reference_points.new_empty(shape)
    warps = backward_warps(capability(value.device))
    block = block_size(dim, bytes_per_thread=16, itemsize=4, warps=warps)  # the sums are float32
    if grad_out.numel() > 0:
        with launches_on(value.device):
            _backward[(triton.cdiv(queries, block) * batch * heads,)](
                grad_out,
                value,
                reference_points,
                sampling_offsets,
                attention_logits,
                grad_value,
                parts,
                grad_offsets,
                grad_weights,
                grad_logits,
                queries,
                tokens,
                *packed_sizes(spatial_shapes),
                HEADS=heads,
                LEVELS=levels,
                POINTS=points,
                DIM=dim,
                COORDINATES=coordinates,
                REFERENCE_GRADIENT=reference_gradient,
                BLOCK=block,
                num_warps=warps,
            )
    grad_reference = parts.sum(1) if reference_gradient else parts
    return grad_value.to(value.dtype), grad_reference, grad_offsets, grad_logits


def backward_warps(capability: int) -> int:
    """Warps of a program of the backward pass, by what the compiler makes of it (benchmarks/RESULTS.md has the table).

    Before 9.0, where additions have another layout than loads, one warp passes results on without the other warps of
    the program waiting at 129 barriers: 17 are left, each of one warp, with no more registers, nothing spilled and 7 %
    fewer instructions. From 9.0 on one warp has fewer of them too, but four are what was measured on a device.

    Args:
        capability: 86 for sm_86.
    """
    return 1 if capability < 90 else NUM_WARPS


@functools.cache
def capability(device: torch.device) -> int:
    """86 for sm_86; 90 for a CPU, on which Triton interprets."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
