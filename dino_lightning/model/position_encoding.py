"""Sine position embeddings of image cells and of box queries (DETR, arXiv 2005.12872; DAB-DETR, arXiv 2201.12329)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IMAGE_TEMPERATURE = 20.0
QUERY_TEMPERATURE = 10000.0


def _interleaved_sine(angles: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) angles in radians -> (..., dim): sine and cosine in turn, at falling frequencies."""
    exponents = torch.arange(dim, device=angles.device, dtype=torch.float32).div(2, rounding_mode="floor") * 2 / dim
    phases = angles.unsqueeze(-1) / temperature**exponents
    return torch.stack((phases[..., 0::2].sin(), phases[..., 1::2].cos()), dim=-1).flatten(-2)


def image_position_embedding(
    padding_mask: Tensor, dim: int, temperature: float = IMAGE_TEMPERATURE, offset: float = 0.0
) -> Tensor:
    """The position of each cell of a feature map, counted over the valid cells of its row and column.

    Args:
        padding_mask: (B, H, W) bool, True = padding.
        dim: embedding size D, a multiple of 4; the first half encodes y, the second half x.
        temperature: 20 in DINO (10000 in DETR).
        offset: added to the count of each cell, from 1, before it is divided by the last; 0 in DINO, -0.5 for the
            middle of the cell.

    Returns:
        (B, H, W, D) float32.
    """
    valid = (~padding_mask).float()
    count_y, count_x = valid.cumsum(1), valid.cumsum(2)
    y = (count_y + offset) / (count_y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (count_x + offset) / (count_x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat((_interleaved_sine(y, dim // 2, temperature), _interleaved_sine(x, dim // 2, temperature)), dim=-1)


def query_position_embedding(
    reference_points: Tensor, dim_per_coordinate: int, temperature: float = QUERY_TEMPERATURE
) -> Tensor:
    """The sine embedding of reference points (x, y) or reference boxes (x, y, w, h), in the order y, x, w, h.

    Args:
        reference_points: (..., 2) or (..., 4), 0-1.
        dim_per_coordinate: features for each coordinate, even.
        temperature: 10000, as in DAB-DETR.

    Returns:
        (..., 2 * dim_per_coordinate) or (..., 4 * dim_per_coordinate) float32.
    """
    angles = reference_points.float() * (2 * math.pi)
    order = [1, 0, 2, 3][: reference_points.shape[-1]]
    parts = [_interleaved_sine(angles[..., axis], dim_per_coordinate, temperature) for axis in order]
    return torch.cat(parts, dim=-1)
