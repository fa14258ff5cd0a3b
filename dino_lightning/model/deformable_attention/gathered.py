"""The sampling core on a CPU: the four cells around every sample are gathered, weighted and summed in one pass.

Each corner of each sample is one entry of a sparse matrix of queries by cells, with its share in the sample as its
value: forward that matrix is multiplied by the maps, backward its transpose by the gradient. No sample is ever held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SAMPLES_AT_A_TIME = 32_768  # of which the corners are computed: more do not fit into the cache of a core


def can_gather(value: Tensor, queries: int) -> bool:
    """Whether `gathered` is for such values and so many queries: those on a CPU, where there are any."""
    return value.device.type == "cpu" and value.numel() * queries > 0


def gathered(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same as `reference.deformable_attention` in float32 or float64, where `can_gather` says so."""
    batch, queries = sampling_locations.shape[:2]
    x, y, shares = (
        part.to(value.dtype).transpose(1, 2).reshape(-1, queries, part.shape[3] * part.shape[4])
        for part in (sampling_locations[..., 0], sampling_locations[..., 1], attention_weights)
    )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (value, x, y, shares)):
        out: Tensor = _Gathered.apply(value, x, y, shares, spatial_shapes)
    else:
        maps = value.transpose(1, 2).flatten(0, 1)
        pieces = [torch.split(tensor, _heads_at_a_time(x)) for tensor in (maps, x, y, shares)]
        bags = []
        for some, columns, rows, weight in zip(*pieces, strict=True):
            corners = _corners(columns, rows, spatial_shapes)
            bags.append(_bags(some, corners[0], corners[1], weight))
        out = torch.cat(bags)
    return out.view(batch, -1, queries, value.shape[3]).transpose(1, 2).flatten(2)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; PyTorch's own is slow on a CPU where rows do not fill its vectors."""
    if logits.shape[-1] % 16 == 0 or logits.device.type != "cpu" or torch.compiler.is_compiling():
        return logits.softmax(-1)
    out: Tensor = _Softmax.apply(logits)
    return out


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()
        weights /= weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weights: Tensor = ctx.saved_tensors[0]
        by_weight = grad * weights
        return by_weight.sub_(weights * by_weight.sum(-1, keepdim=True))


class _Gathered(torch.autograd.Function):
    """(B, S, H, D) values, (N, Q, K) x, y 0-1 and weights of K = L * P samples, N = B * H -> (N, Q, D)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, x: Tensor, y: Tensor, weights: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        maps = value.transpose(1, 2).flatten(0, 1)
        corners = _corners(x, y, spatial_shapes)
        ctx.save_for_backward(maps, weights, *corners)
        ctx.num_heads, ctx.spatial_shapes = value.shape[2], spatial_shapes
        cells, shares = corners[:2]
        pieces = [torch.split(tensor, _heads_at_a_time(x)) for tensor in (maps, cells, shares, weights)]
        return torch.cat([_bags(*piece) for piece in zip(*pieces, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weights, cells, shares, inside, right, below = ctx.saved_tensors
        grad = grad.contiguous()
        rows = _rows(cells, maps)
        # What each corner would add to the loss, were its share 1: all other gradients follow from it.
        products = _row_products(grad, maps, rows).view(cells.shape).mul_(inside)
        by_weight = (products * shares).sum(2)
        upper_left, upper_right, lower_left, lower_right = products.unbind(2)
        height, width = _sizes(weights, ctx.spatial_shapes)
        by_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, below).mul_(weights).mul_(width)
        by_y = torch.lerp(lower_left - upper_left, lower_right - upper_right, right).mul_(weights).mul_(height)
        counts = torch.mul(shares, weights[:, :, None]).flatten(2)
        by_value = torch.ops.dino_lightning.scatter_rows(grad, rows, counts, maps.shape[1])
        by_value = by_value.view(-1, ctx.num_heads, *maps.shape[1:]).transpose(1, 2)
        return by_value, by_x, by_y, by_weight, None


def _corners(
    x: Tensor, y: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four cells around each place: upper left, upper right, lower left, lower right.

    Some heads at a time, so that what is computed on the way stays in the cache. A corner outside its map, or of a
    place that is not finite, is cell 0; outside, with a share of 0.

    Args:
        x: (N, Q, K) places of the samples, 0-1 of the width of their level.
        y: (N, Q, K), 0-1 of its height.
        spatial_shapes: (height, width) of the levels, each with the same number of samples.

    Returns:
        (N, Q, 4, K) int32 cells of all levels laid end to end, their shares in the sample, and whether they are inside
        of their map; (N, Q, K) distances from the left column and from the upper row, 0-1.
    """
    points = x.shape[2] // len(spatial_shapes)
    height, width = _sizes(x, spatial_shapes)
    areas = torch.tensor([0, *(rows * columns for rows, columns in spatial_shapes[:-1])], dtype=torch.int32)
    start = areas.cumsum(0, dtype=torch.int32).repeat_interleave(points)
    shape = (*x.shape[:2], 4, x.shape[2])
    cells, shares = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=x.dtype)
    inside = torch.empty(shape, dtype=torch.bool)
    right, below = torch.empty_like(x), torch.empty_like(x)
    heads = _heads_at_a_time(x)
    for first in range(0, len(x), heads):
        some = slice(first, first + heads)
        column, row = _in_cells(x[some], width), _in_cells(y[some], height)
        to_right, down = right[some].copy_(column), below[some].copy_(row)
        to_right -= column.floor_()
        down -= row.floor_()
        corner = 0
        for line, upright in ((row, 1 - down), (row + 1, down)):
            within = (line >= 0) & (line < height)
            before = torch.where(within, line * width, 0.0)
            for place, share in ((column, 1 - to_right), (column + 1, to_right)):
                seen = torch.logical_and((place >= 0) & (place < width), within, out=inside[some, :, corner])
                cells[some, :, corner] = torch.where(seen, before + place, 0.0).to(torch.int32) + start
                torch.mul(share * seen, upright, out=shares[some, :, corner])
                corner += 1
    return cells, shares, inside, right, below


def _sizes(like: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Height and width of the level of each of K samples."""
    sizes = torch.tensor(spatial_shapes, dtype=like.dtype)
    height, width = sizes.repeat_interleave(like.shape[2] // len(spatial_shapes), dim=0).T.contiguous()
    return height, width


def _in_cells(places: Tensor, size: Tensor) -> Tensor:
    """Places 0-1 in cells, of which the first is centred at 0; rounded as by `grid_sample`, so that edges are its."""
    return (2 * places).sub_(1).add_(1).mul_(size).sub_(1).div_(2)


def _heads_at_a_time(x: Tensor) -> int:
    return max(SAMPLES_AT_A_TIME // x[0].numel(), 1)


def _bags(maps: Tensor, cells: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """(N, S, D) maps, (N, Q, 4, K) cells and shares, (N, Q, K) weights -> (N, Q, D) sums."""
    counts = (shares * weights[:, :, None]).flatten(2)
    sums = F.embedding_bag(
        _rows(cells, maps).flatten(0, 1), maps.flatten(0, 1), mode="sum", per_sample_weights=counts.flatten(0, 1)
    )
    return sums.view(*counts.shape[:2], -1)


def _rows(cells: Tensor, maps: Tensor) -> Tensor:
    """(N, Q, 4, K) cells of each of (N, S, D) maps -> (N, Q, 4 * K) int32 rows of all maps laid end to end."""
    rows, cells_per_map = cells.flatten(2), maps.shape[1]
    if len(maps) * cells_per_map > torch.iinfo(torch.int32).max:
        rows = rows.long()
    return rows + torch.arange(len(maps), dtype=rows.dtype)[:, None, None] * cells_per_map


def _row_products(grad: Tensor, maps: Tensor, rows: Tensor) -> Tensor:
    """(N, Q, D) gradients, (N, S, D) maps, (N, Q, C) rows of them -> (N * Q * C,) scalar products."""
    corners, bags = rows.shape[2], rows.shape[0] * rows.shape[1]
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.flatten(0, 1),
        maps.flatten(0, 1),
        rows.flatten(),
        torch.arange(0, bags * corners, corners, dtype=rows.dtype),
        torch.arange(bags, dtype=rows.dtype).repeat_interleave(corners),
        0,
    )
    return products


def _scatter_rows(grad: Tensor, rows: Tensor, counts: Tensor, cells_per_map: int) -> Tensor:
    """(N, Q, D) gradients, (N, Q, C) rows and what goes to each of them -> (N, S, D) sums, in an order that is fixed.

    A product with a sparse matrix, by SciPy: PyTorch's own ways to add to rows take several times as long.
    """
    from scipy import sparse  # here, since only training needs it: a server has no SciPy

    maps, queries, corners = rows.shape
    starts = torch.arange(0, rows.numel() + 1, corners, dtype=rows.dtype)
    matrix = sparse.csr_matrix(
        (counts.flatten().numpy(), rows.flatten().numpy(), starts.numpy()),
        shape=(maps * queries, maps * cells_per_map),
    )
    sums = matrix.T @ grad.flatten(0, 1).numpy()
    return torch.from_numpy(sums).view(maps, cells_per_map, -1)


def _scattered_shapes(grad: Tensor, rows: Tensor, counts: Tensor, cells_per_map: int) -> Tensor:
    return grad.new_empty(rows.shape[0], cells_per_map, grad.shape[2])


torch.library.custom_op(
    "dino_lightning::scatter_rows",
    _scatter_rows,
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor counts, SymInt cells_per_map) -> Tensor",
).register_fake(_scattered_shapes)
