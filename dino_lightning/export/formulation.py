"""Deformable attention and sines as runtimes on a CPU compute them fastest; for exported graphs.

The numbers are those of the model, but for the order of sums. Each part was chosen by measurement, see
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.model import position_encoding
from dino_lightning.model.decoder import Decoder
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.deformable_attention.reference import sampling_locations


@torch.library.custom_op("dino_lightning::grid_sample", mutates_args=())
def grid_sample(image: Tensor, grid: Tensor) -> Tensor:
    """`F.grid_sample` with zeros outside of the image, as an operation whose shape is known at once.

    PyTorch works out the shape of its own by some sixty operations on symbols, and a detector has up to 200 of them.

    Args:
        image: (N, C, h, w).
        grid: (N, height, width, 2), x and y from -1 to 1 over the image.

    Returns:
        (N, C, height, width).
    """
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@grid_sample.register_fake
def _(image: Tensor, grid: Tensor) -> Tensor:
    return image.new_empty((*image.shape[:2], *grid.shape[1:3]))


def sample(
    maps: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """As `deformable_attention.dispatch.sample`, with channels first and queries last.

    Each point of each level is sampled by itself: what is left are products and sums of whole tensors, which OpenVINO
    computes a level at a time, where sums over the points of a level would be passes of their own.

    Args:
        maps: (B, H * D, S), where `dispatch.sample` takes (B, S, H, D).
        spatial_shapes: as there, as are the others.
        reference_points: (B, Q, L, 2) or (B, Q, L, 4).
        sampling_offsets: (B, Q, H, L, P, 2).
        attention_logits: (B, Q, H, L * P).

    Returns:
        (B, Q, H * D).
    """
    batch, queries, heads, levels, points = sampling_offsets.shape[:5]
    dim = maps.shape[1] // heads
    locations = sampling_locations(reference_points, sampling_offsets, spatial_shapes)
    grids = (2 * locations - 1).permute(0, 2, 3, 4, 1, 5).reshape(batch * heads, levels * points, queries, 2)
    weights = attention_logits.softmax(-1).permute(0, 2, 3, 1).reshape(batch * heads, 1, levels * points, queries)
    maps = maps.reshape(batch * heads, dim, maps.shape[2])
    out, start = None, 0
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[:, :, start : start + height * width].reshape(batch * heads, dim, height, width)
        for place in range(level * points, (level + 1) * points):
            grid = grids[:, place : place + 1]
            found: Tensor = grid_sample(image, grid)
            part = found * weights[:, :, place : place + 1]
            out = part if out is None else out + part
        start += height * width
    assert out is not None
    return out.view(batch, heads * dim, queries).transpose(1, 2)


def _projected(value: Tensor, weight: Tensor, bias: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, S, D) -> (B, X, S), zero where there is padding: written by the product as `sample` wants it."""
    maps = weight @ value.transpose(1, 2) + bias[:, None]
    return maps if padding_mask is None else maps.masked_fill(padding_mask[:, None], 0.0)


def _attend(
    layer: MultiScaleDeformableAttention,
    query: Tensor,
    reference_points: Tensor,
    projected: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
) -> Tensor:
    """As `MultiScaleDeformableAttention.attend`, for what `_projected` gives."""
    offsets, logits = layer.offsets_and_logits(query, layer.sampling_offsets, layer.attention_weights)
    out: Tensor = layer.output_proj(sample(projected, spatial_shapes, reference_points, offsets, logits))
    return out


def _forward(
    layer: MultiScaleDeformableAttention,
    query: Tensor,
    reference_points: Tensor,
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    padding_mask: Tensor | None = None,
) -> Tensor:
    projected = _projected(value, layer.value_proj.weight, layer.value_proj.bias, padding_mask)
    return _attend(layer, query, reference_points, projected, spatial_shapes)


def _values(decoder: Decoder, memory: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, ...]:
    """As `Decoder.values`, (B, D, S) for each layer."""
    projections = [layer.get_submodule("cross_attention.value_proj") for layer in decoder.layers]
    weight, bias = (torch.cat([getattr(one, name) for one in projections]) for name in ("weight", "bias"))
    return _projected(memory, weight, bias, padding_mask).chunk(len(projections), dim=1)


def _interleaved_sine(angles: Tensor, divisors: Tensor) -> Tensor:
    """Sine and cosine in turn without a stack of both: a cosine is a sine a quarter of a turn on."""
    quarters = torch.tensor([0.0, math.pi / 2], device=divisors.device).repeat(divisors.shape[0])
    return (angles.unsqueeze(-1) / divisors.repeat_interleave(2) + quarters).sin().flatten(-2)


@contextmanager
def exported_formulation(model: nn.Module) -> Iterator[None]:
    """With the formulations of this file in all parts of a model, while it is traced."""
    attention = [layer for layer in model.modules() if isinstance(layer, MultiScaleDeformableAttention)]
    decoders = [part for part in model.modules() if isinstance(part, Decoder)]
    try:
        for layer in attention:
            layer.__dict__.update(forward=partial(_forward, layer), attend=partial(_attend, layer))
        for decoder in decoders:
            decoder.__dict__["values"] = partial(_values, decoder)
        with patch.object(position_encoding, "_interleaved_sine", _interleaved_sine):
            yield
    finally:
        for layer in attention:
            del layer.__dict__["forward"], layer.__dict__["attend"]
        for decoder in decoders:
            del decoder.__dict__["values"]
