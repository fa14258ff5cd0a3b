"""The kernels as operators of PyTorch's own kind, so that `torch.compile` and `torch.export` take them as they are.

Importing this file imports no Triton; the kernels are loaded at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def deformable_attention(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: list[int],
    cuda_backward: bool = False,
) -> Tensor:
    """Softmax, places, bilinear samples and their weighted sum in one kernel; points outside a map read zero.

    The inputs are all that the backward pass keeps. Floating point inputs may be float32, bfloat16 or float16, each its
    own; sums and places are float32.

    Args:
        value: (B, H, S, D), the maps of all levels flattened and concatenated, head by head; D a power of two.
        reference_points: (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh, float32, 0-1 of the padded map.
        sampling_offsets: (B, Q, H, L, P, 2), in cells for points, in half box sizes over P for boxes.
        attention_logits: (B, Q, H, L * P).
        spatial_shapes: height and width of each of the L levels, one after the other, on the host.
        cuda_backward: compute the gradients by the kernel of `cuda_kernels.py`, not by that of Triton.

    Returns:
        (B, Q, H * D), of the dtype of `value`.
    """
    out: Tensor = torch.ops.dino_lightning.deformable_attention(
        value, reference_points, sampling_offsets, attention_logits, spatial_shapes, cuda_backward
    )
    return out


def _forward(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: list[int],
    cuda_backward: bool = False,
) -> Tensor:
    from dino_lightning.model.deformable_attention.triton_forward import forward

    return forward(
        value.contiguous(),
        reference_points.contiguous(),
        sampling_offsets.contiguous(),
        attention_logits.contiguous(),
        spatial_shapes,
    )


def _backward(
    grad_out: Tensor,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: list[int],
    reference_gradient: bool,
    cuda: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cuda:
        from dino_lightning.model.deformable_attention.cuda_kernels import backward
    else:
        from dino_lightning.model.deformable_attention.triton_backward import backward

    return backward(
        grad_out.contiguous(),
        value.contiguous(),
        reference_points.contiguous(),
        sampling_offsets.contiguous(),
        attention_logits.contiguous(),
        spatial_shapes,
        reference_gradient=reference_gradient,
    )


def _forward_shapes(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: list[int],
    cuda_backward: bool = False,
) -> Tensor:
    batch, heads, _, dim = value.shape
    return value.new_empty(batch, sampling_offsets.shape[1], heads * dim)


def _backward_shapes(
    grad_out: Tensor,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: list[int],
    reference_gradient: bool,
    cuda: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        reference_points.new_empty(reference_points.shape if reference_gradient else (0,)),
        sampling_offsets.new_empty(sampling_offsets.shape),
        attention_logits.new_empty(attention_logits.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spatial_shapes, ctx.cuda = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[1]
    value, reference, offsets, logits = torch.ops.dino_lightning.deformable_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.spatial_shapes, wanted, ctx.cuda
    )
    return value, reference if wanted else None, offsets, logits, None, None


_INPUTS = (
    "Tensor value, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, SymInt[] spatial_shapes"
)
_op = torch.library.custom_op(
    "dino_lightning::deformable_attention",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool cuda_backward=False) -> Tensor",
)
_op.register_fake(_forward_shapes)
_op.register_autograd(_gradients, setup_context=_keep)
_backward_op = torch.library.custom_op(
    "dino_lightning::deformable_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, {_INPUTS}, bool reference_gradient, bool cuda=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op.register_fake(_backward_shapes)
