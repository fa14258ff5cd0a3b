"""The sampling core of deformable attention in plain PyTorch; runs on every device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    if torch.is_grad_enabled() and value.device.type == "cpu" and not torch.compiler.is_compiling():
        out: Tensor | None = _Accumulate.apply(value, grids, weights, spatial_shapes)
    else:
        out = None
        for image, grid, weight in _levels(value, grids, weights, spatial_shapes):
            part = (_sample(image, grid) * weight).sum(-1)
            out = part if out is None else out + part
    assert out is not None
    return out.view(batch, heads * dim, queries).transpose(1, 2)


def _levels(
    value: Tensor, grids: Tensor, weights: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each level: map (B*H, D, height, width), grid (B*H, Q, P, 2), weights (B*H, 1, Q, P)."""
    batch, _, heads, dim = value.shape
    maps = torch.split(value, [height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        yield image, grids[:, :, level], weights[:, None, :, level]


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    """(B*H, D, height, width) and (B*H, Q, P, 2) -> (B*H, D, Q, P)."""
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Accumulate(torch.autograd.Function):
    """The loop of `deformable_attention`, to the last bit, in less time on a CPU.

    Tensors as large as the samples of a level (73 MB at 800 x 1066) are what this costs: each new one is cleared page
    by page. Here all levels share one for the products of each pass. The gradient arrives with the channels of a query
    side by side, for which PyTorch multiplies slowly and copies the result; where no sum depends on that order, it is
    turned first.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, grids: Tensor, weights: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        out = product = None
        kept = []
        for image, grid, weight in _levels(value, grids, weights, spatial_shapes):
            samples = _sample(image, grid)
            product = torch.mul(samples, weight, out=product)
            part = product.sum(-1)
            out = part if out is None else out.add_(part)
            kept += [image, samples]
        ctx.save_for_backward(grids, weights, *kept)
        ctx.num_heads = value.shape[2]
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grids, weights, *kept = ctx.saved_tensors
        turned = grad.contiguous()[..., None]
        product = by_samples = None
        by_value, by_grid, by_weight = [], [], []
        for level, (image, samples) in enumerate(zip(kept[::2], kept[1::2], strict=True)):
            product = torch.mul(grad[..., None].expand_as(samples), samples, out=product)
            by_weight.append(product.sum(1))
            by_samples = torch.mul(turned, weights[:, None, :, level], out=by_samples)
            by_image, by_place = torch.ops.aten.grid_sampler_2d_backward(
                by_samples, image, grids[:, :, level], 0, 0, False, (True, True)
            )
            by_value.append(by_image.unflatten(0, (-1, ctx.num_heads)).flatten(3))  # (B, H, D, height * width)
            by_grid.append(by_place)
        value = torch.cat(by_value, dim=-1).permute(0, 3, 1, 2)
        return value, torch.stack(by_grid, dim=2), torch.stack(by_weight, dim=2), None


def gathered_deformable_attention(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same sum as `deformable_attention`, gathered by `embedding_bag`: faster forward on a CPU, slower backward.

    Every corner of every sample is one entry of a bag, so that gathering, weighting and summing are one pass over
    memory. One head at a time, whose map then stays in the cache.

    Args:
        value: (B, S, H, D) float32.
        spatial_shapes: (height, width) of each of the L levels.
        sampling_locations: (B, Q, H, L, P, 2), 0-1 of the padded map.
        attention_weights: (B, Q, H, L, P) float32.

    Returns:
        (B, Q, H * D) float32.
    """
    batch, _, heads, dim = value.shape
    queries = sampling_locations.shape[1]
    out = value.new_empty(batch, queries, heads, dim)
    for image in range(batch):
        for head in range(heads):
            cells, shares = [], []
            start = 0
            for level, (height, width) in enumerate(spatial_shapes):
                x = sampling_locations[image, :, head, level, :, 0] * width - 0.5
                y = sampling_locations[image, :, head, level, :, 1] * height - 0.5
                column, row = x.floor(), y.floor()
                right, below = x - column, y - row
                weight = attention_weights[image, :, head, level]
                for down, upright in ((0, 1 - below), (1, below)):
                    for along, share in ((0, 1 - right), (1, right)):
                        there_x, there_y = column + along, row + down
                        inside = (there_x >= 0) & (there_x < width) & (there_y >= 0) & (there_y < height)
                        # what is not finite is never inside, so that no index leaves the map
                        cell = torch.where(inside, there_y * width + there_x, 0.0)
                        cells.append(cell.to(torch.int32) + start)
                        shares.append(weight * upright * share * inside)
                start += height * width
            out[image, :, head] = F.embedding_bag(
                torch.cat(cells, dim=1),
                value[image, :, head],
                mode="sum",
                per_sample_weights=torch.cat(shares, dim=1),
            )
    return out.flatten(2)


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
    if reference_points.shape[-1] == 2:
        sizes = torch.tensor([[width, height] for height, width in spatial_shapes], dtype=torch.float32)
        scale = sizes.to(sampling_offsets.device, non_blocking=True)[None, None, None, :, None]
        return reference_points[:, :, None, :, None] + sampling_offsets / scale
    num_points = sampling_offsets.shape[-2]
    centre, size = reference_points[:, :, None, :, None, :2], reference_points[:, :, None, :, None, 2:]
    return centre + sampling_offsets / num_points * size * 0.5
