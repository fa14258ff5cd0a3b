"""The sampling core of deformable attention in plain PyTorch; runs on every device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SAMPLES_AT_A_TIME = 32_768  # of which the corners are computed: more do not fit into the cache of a core


def deformable_attention(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of several feature maps; points outside a map read zero.

    On a CPU rows of channels are gathered; elsewhere the levels are accumulated one by one, so that no tensor of all
    samples is ever held.

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
    if torch.is_grad_enabled() and _can_gather(value, queries) and not torch.compiler.is_compiling():
        return _by_query(_Gathered.apply(value, grids, weights, spatial_shapes), batch)
    out: Tensor | None = None
    maps = torch.split(value, [height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        samples = F.grid_sample(image, grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        part = (samples * weights[:, None, :, level]).sum(-1)
        out = part if out is None else out + part
    assert out is not None
    return out.view(batch, heads * dim, queries).transpose(1, 2)


def _by_query(out: Tensor, batch: int) -> Tensor:
    """(B*H, Q, D) -> (B, Q, H * D)."""
    _, queries, dim = out.shape
    return out.view(batch, -1, queries, dim).transpose(1, 2).flatten(2)


def _can_gather(value: Tensor, queries: int) -> bool:
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64) and value.numel() * queries > 0


class _Gathered(torch.autograd.Function):
    """The sum of `deformable_attention` in less time and memory on a CPU.

    Forward, every corner of every sample is one entry of a bag, so that gathering, weighting and summing are one pass
    over rows of channels; no sample is ever held. Backward, the weights' gradients are products of such rows, formed
    as they are read, too; those of maps and locations are `grid_sample`'s own.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, grids: Tensor, weights: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        maps = value.transpose(1, 2).flatten(0, 1)
        cells, shares = _corners(grids, spatial_shapes)
        ctx.save_for_backward(grids, weights, maps, cells, shares)
        ctx.spatial_shapes, ctx.num_heads = spatial_shapes, value.shape[2]
        pieces = [torch.split(values, _heads_at_a_time(grids)) for values in (maps, cells, shares, weights)]
        return torch.cat([_bags(*piece) for piece in zip(*pieces, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grids, weights, maps, cells, shares = ctx.saved_tensors
        by_weight = _row_products(grad.contiguous(), maps, cells).mul_(shares).sum(-1)
        turned = grad.transpose(1, 2).contiguous()[..., None]
        by_samples = None  # large: one for all levels
        by_value, by_grid = [], []
        start = 0
        for level, (height, width) in enumerate(ctx.spatial_shapes):
            image = maps[:, start : start + height * width].transpose(1, 2).reshape(*turned.shape[:2], height, width)
            start += height * width
            by_samples = torch.mul(turned, weights[:, None, :, level], out=by_samples)
            by_image, by_place = torch.ops.aten.grid_sampler_2d_backward(
                by_samples, image, grids[:, :, level], 0, 0, False, (True, True)
            )
            by_value.append(
                by_image.view(-1, ctx.num_heads, image.shape[1], height * width)
            )  # (B, H, D, height * width)
            by_grid.append(by_place)
        value = torch.cat(by_value, dim=-1).permute(0, 3, 1, 2)
        return value, torch.stack(by_grid, dim=2), by_weight, None


def _corners(grids: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """(N, Q, L, P, 2) places, -1..1 -> (N, Q, L, P, 4) int32 cells around them, and the share of each in the sample.

    Some heads at a time, so that what is computed on the way stays in the cache.

    A corner outside its map, or of a place that is not finite, is cell 0; outside, with a share of 0.
    """
    points = grids.shape[3]
    size = torch.tensor(spatial_shapes, dtype=grids.dtype).repeat_interleave(points, dim=0)
    height, width = size.T.contiguous()  # (L * P,) each: one per sample, as a row is computed faster than columns
    areas = torch.tensor([0, *(rows * columns for rows, columns in spatial_shapes[:-1])], dtype=torch.int32)
    start = areas.cumsum(0, dtype=torch.int32).repeat_interleave(points)
    places = grids.flatten(2, 3)
    cells = torch.empty(*places.shape[:-1], 4, dtype=torch.int32)
    shares = torch.empty(*places.shape[:-1], 4, dtype=grids.dtype)
    heads = _heads_at_a_time(grids)
    for first in range(0, len(grids), heads):
        some = slice(first, first + heads)
        x = (places[some, ..., 0] + 1) * (width / 2) - 0.5
        y = (places[some, ..., 1] + 1) * (height / 2) - 0.5
        column, row = x.floor(), y.floor()
        right, below = x - column, y - row
        corner = 0
        for down, upright in ((0, 1 - below), (1, below)):
            line = row + down
            within = (line >= 0) & (line < height)
            before, upright = torch.where(within, line * width, 0.0), upright * within
            for along, share in ((0, 1 - right), (1, right)):
                place = column + along
                inside = (place >= 0) & (place < width) & within
                cells[some, ..., corner] = torch.where(inside, before + place, 0.0).to(torch.int32) + start
                torch.mul(share * inside, upright, out=shares[some, ..., corner])
                corner += 1
    shape = (*grids.shape[:-1], 4)
    return cells.view(shape), shares.view(shape)


def _heads_at_a_time(grids: Tensor) -> int:
    return max(SAMPLES_AT_A_TIME // grids[0, ..., 0].numel(), 1)


def _bags(maps: Tensor, cells: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """(N, S, D) maps, (N, Q, L, P, 4) cells and shares, (N, Q, L, P) weights -> (N, Q, D) sums."""
    counts = (shares * weights[..., None]).flatten(2)
    sums = F.embedding_bag(
        _rows(cells, maps).flatten(0, 1), maps.flatten(0, 1), mode="sum", per_sample_weights=counts.flatten(0, 1)
    )
    return sums.view(*counts.shape[:2], -1)


def _rows(cells: Tensor, maps: Tensor) -> Tensor:
    """(N, Q, L, P, 4) cells of each of (N, S, D) maps -> (N, Q, L * P * 4) int32 rows of all maps laid end to end."""
    rows, cells_per_map = cells.flatten(2), maps.shape[1]
    if len(maps) * cells_per_map > torch.iinfo(torch.int32).max:
        rows = rows.long()
    return rows + torch.arange(len(maps), dtype=rows.dtype)[:, None, None] * cells_per_map


def _row_products(grad: Tensor, maps: Tensor, cells: Tensor) -> Tensor:
    """(N, Q, D) gradients, (N, S, D) maps, (N, Q, L, P, 4) cells -> their scalar products, shaped as the cells."""
    rows = _rows(cells, maps)
    corners, bags = rows.shape[2], rows.shape[0] * rows.shape[1]
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.flatten(0, 1),
        maps.flatten(0, 1),
        rows.flatten(),
        torch.arange(0, bags * corners, corners, dtype=rows.dtype),
        torch.arange(bags, dtype=rows.dtype).repeat_interleave(corners),
        0,
    )
    return products.view(cells.shape)


def gathered_deformable_attention(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The sum of `deformable_attention` for inference on a CPU.

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
    if not _can_gather(value, queries):
        return value.new_zeros(batch, queries, heads * dim)
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.transpose(1, 2).flatten(0, 1)
    maps = value.transpose(1, 2).flatten(0, 1)
    pieces = [torch.split(values, _heads_at_a_time(grids)) for values in (maps, grids, weights)]
    bags = [
        _bags(some, *_corners(places, spatial_shapes), shares) for some, places, shares in zip(*pieces, strict=True)
    ]
    return _by_query(torch.cat(bags), batch)


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
