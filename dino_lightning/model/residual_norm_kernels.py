"""A residual sum and its layer norm as one Triton kernel in each direction; imported only where Triton is used.

Rows lie in registers from the sum to the normed row, and so do all copies of it that others need: each number is read
once and written once. The backward pass keeps what went in, and computes the sum, its mean and its deviation again.

- One program takes a few rows at a time, so that a warp reduces each of them alone.
- Gradients of scale and shift are summed by each program over its rows, and over the programs by PyTorch: without
  atomics, in the same order each time.
- What is not wanted is masked rather than compiled away: one kernel for all calls, and a masked load reads nothing.
"""

# The language of the kernels has no annotations but `tl.constexpr`, and Triton has no types.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_lightning.kernel_trial import launches_on

NUM_WARPS = 4
VARYING = ("num_rows", "position_rows", "copies", "positions", "programs")


@triton.jit
def _normalized(x, branch, place, mask, dim, eps):
    """The normalized rows of the sum, and one over their deviation."""
    total = tl.load(x + place, mask, 0.0).to(tl.float32) + tl.load(branch + place, mask, 0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / dim
    centred = tl.where(mask, total - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=VARYING)
def _forward(
    x, branch, weight, bias, position, exact, lowered, positioned,
    num_rows, position_rows, copies, positions, eps,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum and norm of `ROWS` rows, a copy in lower precision if `copies`, and one with position if `positions`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = columns < DIM
    mask = (rows < num_rows)[:, None] & inside[None, :]
    place = rows.to(tl.int64)[:, None] * DIM + columns[None, :]
    normalized, _ = _normalized(x, branch, place, mask, DIM, eps)
    out = normalized * tl.load(weight + columns, inside, 0.0)[None, :] + tl.load(bias + columns, inside, 0.0)[None, :]
    tl.store(exact + place, out, mask)
    tl.store(lowered + place, out, mask & (copies != 0))
    mask = mask & (positions != 0)
    place_of_position = (rows % position_rows).to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(positioned + place, out + tl.load(position + place_of_position, mask, 0.0).to(tl.float32), mask)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    grad_exact, grad_lowered, grad_positioned, x, branch, weight, grad_x, grad_branch, parts,
    num_rows, copies, positions, programs, eps,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum, and a program's part of those of scale and shift.

    ALIKE: the branch has the dtype of the residual, so one gradient serves for both.
    """
    columns = tl.arange(0, COLUMNS)
    inside = columns < DIM
    gain = tl.load(weight + columns, inside, 0.0)[None, :]
    by_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0) * ROWS
    while first < num_rows:
        rows = first + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        place = rows.to(tl.int64)[:, None] * DIM + columns[None, :]
        grad = tl.load(grad_exact + place, mask, 0.0)
        grad += tl.load(grad_lowered + place, mask & (copies != 0), 0.0).to(tl.float32)
        grad += tl.load(grad_positioned + place, mask & (positions != 0), 0.0).to(tl.float32)
        normalized, scale = _normalized(x, branch, place, mask, DIM, eps)
        by_weight += grad * normalized
        by_bias += grad
        grad = grad * gain
        along = tl.sum(grad * normalized, axis=1) / DIM
        level = tl.sum(grad, axis=1) / DIM
        grad = scale[:, None] * (grad - normalized * along[:, None] - level[:, None])
        tl.store(grad_x + place, grad, mask)
        if not ALIKE:
            tl.store(grad_branch + place, grad, mask)
        first += programs * ROWS
    part = parts + tl.program_id(0).to(tl.int64) * (2 * DIM) + columns
    tl.store(part, tl.sum(by_weight, axis=0), inside)
    tl.store(part + DIM, tl.sum(by_bias, axis=0), inside)


def forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    low: torch.dtype,
    copies: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, norm and copies; the arguments are those of `residual_norm._fused`, contiguous.

    Returns:
        The normed sum, float32; the same in `low`, empty if not `copies`; the same with position added in `low`, empty
        without a position. Each of the shape of `x`.
    """
    dim, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    exact = torch.empty_like(x)
    lowered = x.new_empty(x.shape if copies else (0,), dtype=low)
    positioned = x.new_empty((0,) if position is None else x.shape, dtype=low)
    position = x.new_empty(0) if position is None else position
    columns, rows = blocks(dim, elements=2048)
    if num_rows > 0:
        with launches_on(x.device):
            _forward[(triton.cdiv(num_rows, rows),)](
                x,
                branch,
                weight,
                bias,
                position,
                exact,
                lowered,
                positioned,
                num_rows,
                max(1, position.numel() // dim),
                int(copies),
                int(positioned.numel() > 0),
                eps,
                DIM=dim,
                COLUMNS=columns,
                ROWS=rows,
                num_warps=NUM_WARPS,
            )
    return exact, lowered, positioned


def backward(
    grad_exact: Tensor,
    grad_lowered: Tensor | None,
    grad_positioned: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    low: torch.dtype,
    eps: float,
    programs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x` and `branch`, and parts of those of scale and shift.

    Args:
        grad_exact: float32, of the shape of `x`, contiguous like all others.
        grad_lowered: of `low`, or None.
        grad_positioned: of `low`, or None.
        x: as in `forward`, like the rest.
        branch: as in `forward`.
        weight: as in `forward`.
        low: as in `forward`.
        eps: as in `forward`.
        programs: N, which share the rows.

    Returns:
        The gradient of `x`, float32; of `branch`, in its dtype, empty where it is float32 and the same as that of `x`;
        and (N, 2, D) float32, whose sums over N are the gradients of scale and shift.
    """
    dim, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    columns, rows = blocks(dim, elements=1024)
    alike = branch.dtype == x.dtype
    grad_x, grad_branch = torch.empty_like(x), branch.new_empty((0,) if alike else branch.shape)
    parts = x.new_empty(programs, 2, dim)
    none = x.new_empty(0, dtype=low)
    if num_rows > 0:
        with launches_on(x.device):
            _backward[(programs,)](
                grad_exact,
                none if grad_lowered is None else grad_lowered,
                none if grad_positioned is None else grad_positioned,
                x,
                branch,
                weight,
                grad_x,
                grad_branch,
                parts,
                num_rows,
                int(grad_lowered is not None),
                int(grad_positioned is not None),
                programs,
                eps,
                DIM=dim,
                COLUMNS=columns,
                ROWS=rows,
                ALIKE=alike,
                num_warps=NUM_WARPS,
            )
    return grad_x, grad_branch, parts


def blocks(dim: int, *, elements: int) -> tuple[int, int]:
    """Columns, a power of two, and rows of a block of about so many elements."""
    columns: int = triton.next_power_of_2(dim)
    return columns, max(1, elements // columns)
