"""The backward pass of deformable attention in CUDA C++ (`backward.cu`), for devices that cannot add vectors.

Before compute capability 9.0 an atomic addition takes one number a lane. Triton then keeps one layout for the additions
and another for the loads, and carries all that it computes from one to the other through shared memory and barriers.
One warp for each query and head needs neither. Imports no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dino_lightning.kernel_trial import launches_on
from dino_lightning.model.deformable_attention import limits, nvrtc

CAPABILITIES = (80, 86, 87, 89)  # where it is taken of itself: from 9.0 on Triton adds vectors
DIM = 32  # channels of a head: one for each lane
MAX_COUNT = 32  # levels times points: one for each lane
MAX_IMAGES_AND_HEADS = 65535  # blocks along y
WARPS = 8  # of a block
COUNT_OF_SIX_BLOCKS = 16  # levels times points for which 40 registers are enough
SOURCE = Path(__file__).with_name("backward.cu")
NAME = "deformable_attention_backward"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in the source


def macros(
    *,
    heads: int,
    levels: int,
    points: int,
    coordinates: int,
    dtypes: Sequence[torch.dtype],
    reference_gradient: bool,
) -> dict[str, int]:
    """What the source is compiled for.

    Args:
        heads: of the layer.
        levels: of the maps; together with `points` at most 32.
        points: of each level.
        coordinates: 2 for reference points, 4 for boxes.
        dtypes: of values, offsets and logits.
        reference_gradient: whether the reference points get a gradient.
    """
    # 6 blocks leave 40 registers a thread: room for all 48 warps of a multiprocessor of sm_86 and sm_89, and for 48 of
    # the 64 of sm_80 and sm_90. With more points the compiler would spill a few; 5 leave 48.
    blocks = 6 if levels * points <= COUNT_OF_SIX_BLOCKS else 5
    sizes = {"HEADS": heads, "LEVELS": levels, "POINTS": points, "COORDINATES": coordinates}
    types = dict(zip(("VALUE", "OFFSET", "LOGIT"), (TYPES[dtype] for dtype in dtypes), strict=True))
    launch = {"WARPS": WARPS, "MIN_BLOCKS": blocks}
    return {**sizes, "REFERENCE_GRADIENT": int(reference_gradient), **types, **launch}


def source() -> str:
    """The kernel as it is written, without `macros`."""
    return SOURCE.read_text(encoding="utf-8")


def missing(dim: int, count: int) -> str | None:
    """Why there is no such kernel; None if there is.

    Args:
        dim: channels of a head.
        count: levels times points.
    """
    if dim != DIM:
        return f"the CUDA kernel is for {DIM} channels a head, not {dim}"
    if count > MAX_COUNT:
        return f"the CUDA kernel is for {MAX_COUNT} levels times points at most, not {count}"
    return None


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
    """The same as `triton_backward.backward`: gradients of values, reference points, offsets and logits.

    Those of values are sums in no fixed order; the others are the same every time.

    Args:
        grad_out: (B, Q, H * D), contiguous, of the dtype of `value`.
        value: (B, H, S, D), contiguous like the rest; see `fused.deformable_attention`.
        reference_points: (B, Q, L, 2 or 4), float32.
        sampling_offsets: (B, Q, H, L, P, 2).
        attention_logits: (B, Q, H, L * P).
        spatial_shapes: height and width of each level, one after the other.
        reference_gradient: whether the reference points need a gradient; empty if not.
    """
    batch, heads, tokens, dim = value.shape
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[4]
    levels, coordinates = len(spatial_shapes) // 2, reference_points.shape[-1]
    trouble = missing(dim, levels * points)
    if trouble is not None:
        raise ValueError(f"Deformable attention: {trouble}.")
    if batch * heads > MAX_IMAGES_AND_HEADS:
        raise ValueError(f"Deformable attention: {batch} images of {heads} heads are more than {MAX_IMAGES_AND_HEADS}.")
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_offsets, grad_logits = torch.empty_like(sampling_offsets), torch.empty_like(attention_logits)
    shape = (batch, heads, queries, levels, coordinates) if reference_gradient else (0,)
    parts = reference_points.new_empty(shape)
    if grad_out.numel() > 0:
        kernel = _kernel(
            value.device,
            heads,
            levels,
            points,
            coordinates,
            (value.dtype, sampling_offsets.dtype, attention_logits.dtype),
            reference_gradient,
        )
        inputs = [_aligned(one) for one in (grad_out, value, reference_points, sampling_offsets, attention_logits)]
        outputs = [grad_value, parts, grad_offsets, grad_logits]
        numbers = [queries, tokens, *limits.packed_sizes(spatial_shapes)]
        grid = (-(-queries // WARPS), batch * heads)
        with launches_on(value.device):
            kernel.launch(grid, 32 * WARPS, [*inputs, *outputs, *numbers])
    grad_reference = parts.sum(1) if reference_gradient else parts
    return grad_value.to(value.dtype), grad_reference, grad_offsets, grad_logits


def _aligned(tensor: Tensor) -> Tensor:
    """Two numbers are read as one."""
    return tensor if tensor.data_ptr() % 8 == 0 else tensor.clone()


@functools.cache
def _kernel(
    device: torch.device,
    heads: int,
    levels: int,
    points: int,
    coordinates: int,
    dtypes: tuple[torch.dtype, ...],
    reference_gradient: bool,
) -> nvrtc.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    chosen = macros(
        heads=heads,
        levels=levels,
        points=points,
        coordinates=coordinates,
        dtypes=dtypes,
        reference_gradient=reference_gradient,
    )
    code = nvrtc.compiled(source(), chosen, 10 * major + minor)
    return nvrtc.Kernel(code, NAME, device.index if device.index is not None else torch.cuda.current_device())
