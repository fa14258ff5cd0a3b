"""The sampling core on a CPU: the four cells around every sample are gathered, weighted and summed in one pass.

Each corner of each sample is one entry of a sparse matrix of queries by cells, with its share in the sample as its
value: forward that matrix is multiplied by the maps, backward its transpose by the gradient, and the gradients of the
entries are scalar products of gradients and maps, at those entries alone. No sample is ever held.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_lightning.model.deformable_attention.reference import sampling_locations

SAMPLES_AT_A_TIME = 32_768  # for each thread: what is computed of more does not fit into the cache of a core


def can_gather(value: Tensor, queries: int) -> bool:
    """Whether `gathered` is for such values and so many queries: those on a CPU, where there are any."""
    return value.device.type == "cpu" and value.numel() * queries > 0 and MULTIPLIES_AT_PLACES


def gathered(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same as `reference.deformable_attention` in float32 or float64, where `can_gather` says so."""
    batch, queries = sampling_locations.shape[:2]
    x, y, weights = (
        part.to(value.dtype).transpose(1, 2).reshape(-1, queries, part.shape[3] * part.shape[4])
        for part in (sampling_locations[..., 0], sampling_locations[..., 1], attention_weights)
    )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (value, x, y, weights)):
        out: Tensor = _Gathered.apply(value, x, y, weights, spatial_shapes)
    else:
        maps, levels, sums = value.transpose(1, 2).flatten(0, 1), _Levels.of(value, x, spatial_shapes), []
        for some in _heads_at_a_time(x):
            columns, lines = _Axis.of(x[some], levels.width), _Axis.of(y[some], levels.height)
            sums.append(
                _sums(maps, levels.rows(columns.cells, lines.cells, some), _counts(columns, lines, weights[some]))
            )
        out = torch.cat(sums)
    return out.view(batch, -1, queries, value.shape[3]).transpose(1, 2).flatten(2)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; PyTorch's own is slow on a CPU where rows do not fill its vectors."""
    if logits.shape[-1] % 16 == 0 or logits.device.type != "cpu" or torch.compiler.is_compiling():
        return logits.softmax(-1)
    out: Tensor = _Softmax.apply(logits)
    return out


def places_and_weights(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
) -> tuple[Tensor, Tensor]:
    """Where each query looks, as `sampling_locations`, and the (B, Q, H, L, P) weight of each place; both float32.

    Places in bfloat16 would be off by several pixels on a large image. For callers without autocast.
    """
    weights = softmax(attention_logits.float()).view(sampling_offsets.shape[:-1])
    return sampling_locations(reference_points, sampling_offsets, spatial_shapes), weights


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
        maps, levels = value.transpose(1, 2).flatten(0, 1), _Levels.of(value, x, spatial_shapes)
        rows = torch.empty((4, *x.shape), dtype=levels.start.dtype)
        shares, inside = torch.empty((4, *x.shape), dtype=x.dtype), torch.empty((4, *x.shape), dtype=x.dtype)
        sums = []
        for some in _heads_at_a_time(x):
            columns = _Axis.of(x[some], levels.width, out=(shares[:2, some], inside[:2, some]))
            lines = _Axis.of(y[some], levels.height, out=(shares[2:, some], inside[2:, some]))
            its_rows = levels.rows(columns.cells, lines.cells, some, out=rows[:, some])
            sums.append(_sums(maps, its_rows, _counts(columns, lines, weights[some])))
        ctx.save_for_backward(maps, weights, rows, shares, inside)
        ctx.num_heads, ctx.spatial_shapes = value.shape[2], spatial_shapes
        return torch.cat(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weights, rows, shares, inside = ctx.saved_tensors
        grad, height, width = grad.contiguous(), *_sizes(weights, ctx.spatial_shapes)
        # What each corner would add to the loss, were its share 1: all other gradients follow from it.
        products = torch.ops.dino_lightning.row_products(grad, maps, rows)
        counts, by_x, by_y, by_weight = torch.empty_like(products), *(torch.empty_like(weights) for _ in range(3))
        for some in _heads_at_a_time(weights):
            left, right, above, below = shares[:, some]
            in_left, in_right, in_above, in_below = inside[:, some]
            upper_left, upper_right, lower_left, lower_right = products[:, some]
            its_weights = weights[some]
            _counts_of((left, right), (above, below), its_weights, out=counts[:, some])
            on_left = (upper_left * above).addcmul_(lower_left, below)
            on_right = (upper_right * above).addcmul_(lower_right, below)
            torch.mul(on_left, left, out=by_weight[some]).addcmul_(on_right, right)
            torch.mul(on_right.mul_(in_right).addcmul_(on_left, in_left, value=-1), its_weights, out=by_x[some])
            by_x[some].mul_(width)
            on_upper = upper_left.mul_(left).addcmul_(upper_right, right)
            on_lower = lower_left.mul_(left).addcmul_(lower_right, right)
            torch.mul(on_lower.mul_(in_below).addcmul_(on_upper, in_above, value=-1), its_weights, out=by_y[some])
            by_y[some].mul_(height)
        by_value = torch.ops.dino_lightning.scatter_rows(grad, rows, counts, maps.shape[1])
        by_value = by_value.view(-1, ctx.num_heads, *maps.shape[1:]).transpose(1, 2)
        return by_value, by_x, by_y, by_weight, None


class _Axis(NamedTuple):
    """The two cells beside each place along one axis, and what share of the sample each of them has.

    Attributes:
        cells: two of (N, Q, K) int, columns or lines; the nearest one of the map for what is outside of it.
        shares: two of (N, Q, K), 0 outside; not finite where the place is not.
    """

    cells: tuple[Tensor, Tensor]
    shares: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, places: Tensor, sizes: Tensor, out: tuple[Tensor, Tensor] | None = None) -> _Axis:
        """(N, Q, K) places 0-1, (Q, K) numbers of cells; `out`, each (2, N, Q, K), takes shares, and 1 where inside."""
        # in cells, of which the first is centred at 0; rounded as by `grid_sample`, so that edges are its
        places = (2 * places).sub_(1).add_(1).mul_(sizes).sub_(1).div_(2)
        before = places.floor()
        after_share = places.sub_(before)
        first = before.to(torch.int32)  # some number where it is not finite; then it becomes a cell of the map, too
        last = sizes.to(torch.int32).sub_(1)
        shares, inside = out or (places.new_empty((2, *places.shape)), places.new_empty((2, *places.shape)))
        cells = []
        for corner, cell in enumerate((first, first + 1)):
            clamped = torch.minimum(cell.clamp(min=0), last)
            inside[corner].copy_(clamped == cell)
            cells.append(clamped)
        torch.mul(after_share, inside[1], out=shares[1])
        torch.sub(1, after_share, out=shares[0]).mul_(inside[0])
        return cls((cells[0], cells[1]), (shares[0], shares[1]))


class _Levels(NamedTuple):
    """Where the levels lie in each of the (N, S, D) maps, repeated for all of (Q, K) samples: broadcasting is slow.

    Attributes:
        height: (Q, K) of the level of each sample, in cells.
        width: (Q, K).
        columns: (Q, K) int, the same as `width`.
        start: (Q, K) int, the first cell of the level in a map.
        cells_per_map: S.
    """

    height: Tensor
    width: Tensor
    columns: Tensor
    start: Tensor
    cells_per_map: int

    @classmethod
    def of(cls, value: Tensor, x: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> _Levels:
        """(B, S, H, D) values, (N, Q, K) samples, (height, width) of each level."""
        cells_per_map, samples = value.shape[1], x.shape[1:]
        dtype = torch.int32 if len(x) * cells_per_map <= torch.iinfo(torch.int32).max else torch.int64
        areas = torch.tensor([0, *(rows * columns for rows, columns in spatial_shapes[:-1])])
        start = areas.cumsum(0).repeat_interleave(samples[1] // len(spatial_shapes))
        height, width = _sizes(x, spatial_shapes)
        return cls(
            height.expand(samples).contiguous(),
            width.expand(samples).contiguous(),
            width.to(dtype).expand(samples).contiguous(),
            start.to(dtype).expand(samples).contiguous(),
            cells_per_map,
        )

    def rows(
        self, columns: tuple[Tensor, Tensor], lines: tuple[Tensor, Tensor], some: slice, out: Tensor | None = None
    ) -> Tensor:
        """The rows of all maps laid end to end that are the four corners of the samples of some maps: (4, N, Q, K)."""
        dtype, (first, last, _) = self.start.dtype, some.indices(some.stop)
        if out is None:
            out = torch.empty((4, *columns[0].shape), dtype=dtype)
        of_map = torch.arange(first, last, dtype=dtype)[:, None, None] * self.cells_per_map
        for corner, line in enumerate(lines):
            before = (line * self.columns).add_(self.start).add_(of_map)
            torch.add(before, columns[0], out=out[2 * corner])
            torch.add(before, columns[1], out=out[2 * corner + 1])
        return out


def _sizes(like: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Height and width of the level of each of K samples."""
    sizes = torch.tensor(spatial_shapes, dtype=like.dtype)
    height, width = sizes.repeat_interleave(like.shape[2] // len(spatial_shapes), dim=0).T.contiguous()
    return height, width


def _heads_at_a_time(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of (N, Q, K) of which what is computed on the way stays in the cache."""
    heads = max(SAMPLES_AT_A_TIME * torch.get_num_threads() // x[0].numel(), 1)
    return (slice(first, min(first + heads, len(x))) for first in range(0, len(x), heads))


def _counts(columns: _Axis, lines: _Axis, weights: Tensor) -> Tensor:
    """What each corner counts in the sum: (4, N, Q, K), upper left, upper right, lower left, lower right."""
    return _counts_of(columns.shares, lines.shares, weights, weights.new_empty((4, *weights.shape)))


def _counts_of(columns: tuple[Tensor, Tensor], lines: tuple[Tensor, Tensor], weights: Tensor, out: Tensor) -> Tensor:
    for corner, line in enumerate(lines):
        for side, column in enumerate(columns):
            torch.mul(column, line, out=out[2 * corner + side]).mul_(weights)
    return out


def _sums(maps: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """(N, S, D) maps, (4, n, Q, K) rows of them and what each of them counts, of n of the maps -> (n, Q, D) sums."""
    bags = F.embedding_bag(rows.flatten(0, 2), maps.flatten(0, 1), mode="sum", per_sample_weights=counts.flatten(0, 2))
    return bags.view(4, *rows.shape[1:3], -1).sum(0)


def _row_products(grad: Tensor, maps: Tensor, rows: Tensor) -> Tensor:
    """(N, Q, D) gradients, (N, S, D) maps, (4, N, Q, K) rows of them -> (4, N, Q, K) scalar products.

    A product of two matrices, at the places of a sparse one.
    """
    _say_nothing_of_sparse_tensors()
    left, right, samples = grad.flatten(0, 1), maps.flatten(0, 1).t(), rows.shape[3]
    starts = torch.arange(0, rows[0].numel() + 1, samples, dtype=rows.dtype)
    nothing, shape = grad.new_zeros(rows[0].numel()), (left.shape[0], right.shape[1])
    products = []
    for corner in rows:
        places = torch.sparse_csr_tensor(starts, corner.flatten(), nothing, shape, check_invariants=False)
        products.append(torch.sparse.sampled_addmm(places, left, right, beta=0.0).values())
    return torch.stack(products).view(rows.shape)


@functools.cache
def _say_nothing_of_sparse_tensors() -> None:
    """PyTorch warns at the first one that support of them may change; it does so once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _scatter_rows(grad: Tensor, rows: Tensor, counts: Tensor, cells_per_map: int) -> Tensor:
    """(N, Q, D) gradients, (4, N, Q, K) rows and what goes to each of them -> (N, S, D) sums, in a fixed order.

    A product with a sparse matrix, by SciPy: PyTorch's own ways to add to rows take several times as long.
    """
    from scipy import sparse  # here, since only training needs it: a server has no SciPy

    corners, maps, queries, samples = rows.shape
    starts = torch.arange(0, rows.numel() + 1, samples, dtype=rows.dtype)
    matrix = sparse.csr_matrix(
        (counts.flatten().numpy(), rows.flatten().numpy(), starts.numpy()),
        shape=(corners * maps * queries, maps * cells_per_map),
    )
    sums = matrix.T @ grad.expand(corners, -1, -1, -1).flatten(0, 2).numpy()
    return torch.from_numpy(sums).view(maps, cells_per_map, -1)


def _scattered_shapes(grad: Tensor, rows: Tensor, counts: Tensor, cells_per_map: int) -> Tensor:
    return grad.new_empty(grad.shape[0], cells_per_map, grad.shape[2])


def _product_shapes(grad: Tensor, maps: Tensor, rows: Tensor) -> Tensor:
    return grad.new_empty(rows.shape)


torch.library.custom_op(
    "dino_lightning::scatter_rows",
    _scatter_rows,
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor counts, SymInt cells_per_map) -> Tensor",
).register_fake(_scattered_shapes)
torch.library.custom_op(
    "dino_lightning::row_products",
    _row_products,
    mutates_args=(),
    schema="(Tensor grad, Tensor maps, Tensor rows) -> Tensor",
).register_fake(_product_shapes)


def _multiplies_at_places() -> bool:
    """Whether this PyTorch has products at the places of a sparse matrix on a CPU; not every build of every version."""
    one = torch.ones(1, 1, 1)
    try:
        _row_products(one, one, torch.zeros(4, 1, 1, 1, dtype=torch.int32))
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


MULTIPLIES_AT_PLACES = _multiplies_at_places()  # now, and not in a pass that somebody traces
