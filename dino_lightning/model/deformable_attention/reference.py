"""The sampling core of deformable attention in plain PyTorch; runs on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_attention(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of several feature maps; points outside a map read zero.

    The levels are accumulated one by one, so that no tensor of all samples is ever held.

    Args:
        value: (B, S, H, D), the maps of all levels flattened and concatenated, S = sum of their areas.
        spatial_shapes: (height, width) of each of the L levels, on the host.
        sampling_locations: (B, Q, H, L, P, 2) x and y, 0-1 of the padded map; cell i is centred at (i + 0.5) / size.
        attention_weights: (B, Q, H, L, P), of the same dtype as `value`.

    Returns:
        (B, Q, H * D), of the dtype of `value`.
    """
    batch, _, heads, dim = value.shape
    queries = sampling_locations.shape[1]
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1).to(value.dtype)  # (B*H, Q, L, P, 2), -1..1
    weights = attention_weights.transpose(1, 2).flatten(0, 1)  # (B*H, Q, L, P)
    out: Tensor | None = None
    maps = torch.split(value, [height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        samples = F.grid_sample(image, grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        part = (samples * weights[:, None, :, level]).sum(-1)
        out = part if out is None else out + part
    assert out is not None
    return out.view(batch, heads * dim, queries).transpose(1, 2)


def sampling_locations(
    reference_points: Tensor, sampling_offsets: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
) -> Tensor:
    """Where each query looks.

    Args:
        reference_points: (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh, 0-1 of the padded map.
        sampling_offsets: (B, Q, H, L, P, 2), in cells for points, in half box sizes over P for boxes.
        spatial_shapes: (height, width) of each level.

    Returns:
        (B, Q, H, L, P, 2) float32, 0-1 of the padded map.
    """
    reference_points, sampling_offsets = reference_points.float(), sampling_offsets.float()
    points = sampling_offsets.shape[-2]

    def by_sample(of_levels: Tensor) -> Tensor:
        """(..., L, 2) -> (..., 1, L * P * 2): long rows are quicker than broadcasting over the points."""
        return of_levels.unsqueeze(-2).expand(*of_levels.shape[:-1], points, 2).flatten(-3).unsqueeze(-2)

    offsets = sampling_offsets.flatten(3)
    if reference_points.shape[-1] == 2:
        sizes = torch.tensor([[width, height] for height, width in spatial_shapes], dtype=torch.float32)
        moved = offsets / by_sample(sizes.to(offsets.device, non_blocking=True))
    else:
        moved = offsets / points * by_sample(reference_points[..., 2:]) * 0.5
    return (by_sample(reference_points[..., :2]) + moved).view(sampling_offsets.shape)
