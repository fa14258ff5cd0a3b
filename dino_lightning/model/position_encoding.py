"""Sine position embeddings of image cells and of box queries (DETR, arXiv 2005.12872; DAB-DETR, arXiv 2201.12329)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IMAGE_TEMPERATURE = 20.0
QUERY_TEMPERATURE = 10000.0


def sine_divisors(dim: int, temperature: float = QUERY_TEMPERATURE, device: torch.device | str = "cpu") -> Tensor:
    """(dim / 2,) float32: what angles are divided by, from 1 up to almost the temperature."""
    return temperature ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def _interleaved_sine(angles: Tensor, divisors: Tensor) -> Tensor:
    """(..., N) angles in radians, (F,) divisors -> (..., N * 2 F): sine and cosine in turn, at falling frequencies."""
    phases = angles.unsqueeze(-1) / divisors
    return torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(-3)


def image_position_embedding(
    cells: Tensor,
    extent: Tensor,
    inside: Tensor | None,
    dim: int,
    temperature: float = IMAGE_TEMPERATURE,
    offset: float = 0.0,
) -> Tensor:
    """The position of each cell of a feature map, counted over the valid cells of its column and row.

    Args:
        cells: (1, S, 2) float32, row and column of each cell, from 0.
        extent: (B, S, 2) float32, the valid rows and columns of its map.
        inside: (B, S, 2) bool, whether row and column are valid; None where all are.
        dim: embedding size D, a multiple of 4; the first half encodes y, the second half x.
        temperature: 20 in DINO (10000 in DETR).
        offset: added to the count of each cell, from 1, before it is divided by the last; 0 in DINO, -0.5 for the
            middle of the cell.

    Returns:
        (B, S, D) float32.
    """
    counts = cells + 1
    if inside is not None:
        # Past the last valid row the count stays; in a column without valid cells nothing was ever counted.
        counted = inside.flip(-1)
        counts, extent = torch.minimum(counts, extent) * counted, extent * counted
    angles = (counts + offset) / (extent + 1e-6) * (2 * math.pi)
    return _interleaved_sine(angles, sine_divisors(dim // 2, temperature, cells.device))


def query_position_embedding(reference_points: Tensor, divisors: Tensor) -> Tensor:
    """The sine embedding of reference points (x, y) or reference boxes (x, y, w, h), in the order y, x, w, h.

    Args:
        reference_points: (..., 2) or (..., 4), 0-1.
        divisors: (F,) float32 from `sine_divisors`, with its temperature of 10000 as in DAB-DETR.

    Returns:
        (..., 4 * F) or (..., 8 * F) float32.
    """
    points = reference_points.float()
    ordered = torch.cat((points[..., 1:2], points[..., :1], points[..., 2:]), dim=-1)
    return _interleaved_sine(ordered * (2 * math.pi), divisors)
