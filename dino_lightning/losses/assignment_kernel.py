"""Linear assignments solved on the device, all layers and images at once; imported only where Triton is used.

One program solves one problem by shortest augmenting paths with potentials (Kuhn 1955, Munkres 1957, Jonker and
Volgenant 1987): all that it knows of the columns and rows lies in registers, and each step of a path is a few
reductions over them. Potentials are float32, so that the total cost is the least one up to their rounding; of
assignments that cost the same, any may come out.
"""

# The language of the kernel has no annotations but `tl.constexpr`, and Triton has no types.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_lightning.kernel_trial import launches_on

NUM_WARPS = 4


@triton.jit(do_not_specialize=("num_boxes", "num_queries", "batch"))
def _assign(
    cost, counts, assigned, strange, num_boxes, num_queries, batch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXCESS: tl.constexpr,
):  # fmt: skip
    """The query of each box. The last column of the block is where every path starts, and stands for no query.

    EXCESS: some images have more boxes than there are queries; in those the queries are the rows.
    """
    problem = tl.program_id(0)
    boxes = tl.load(counts + problem % batch)
    height, width, down, across = boxes, num_queries, num_queries, 1
    if EXCESS:
        turned = boxes > num_queries
        height, width = tl.where(turned, num_queries, boxes), tl.where(turned, boxes, num_queries)
        down, across = tl.where(turned, 1, num_queries), tl.where(turned, num_queries, 1)
    cost += problem.to(tl.int64) * num_boxes * num_queries
    columns = tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    there = columns < width
    by_row = tl.zeros((ROWS,), tl.float32)  # the potentials
    by_column = tl.zeros((COLUMNS,), tl.float32)
    row_of = tl.full((COLUMNS,), -1, tl.int32)
    odd = tl.zeros((COLUMNS,), tl.int32)  # where something is not finite
    row = problem * 0
    while row < height:  # not a range, which interpreters up to Triton 3.6 cannot take from a tensor with NumPy 2.4
        row_of = tl.where(columns == COLUMNS - 1, row, row_of)
        least = tl.full((COLUMNS,), float("inf"), tl.float32)
        way = tl.full((COLUMNS,), COLUMNS - 1, tl.int32)
        used = tl.zeros((COLUMNS,), tl.int32)
        tree = tl.zeros((ROWS,), tl.int32)
        column = tl.sum(tl.zeros((COLUMNS,), tl.int32)) + COLUMNS - 1
        current = column * 0 + row
        steps = column * 0
        while (current >= 0) & (steps <= row):  # a path has no more steps, unless costs are not finite
            used = tl.where(columns == column, 1, used)
            tree = tl.where(rows == current, 1, tree)
            own = tl.sum(tl.where(rows == current, by_row, 0.0))
            entries = tl.load(cost + current * down + columns * across, there, 0.0)
            odd = tl.where(tl.abs(entries) < float("inf"), odd, 1)  # every row is read at the start of its own path
            reduced = entries - own - by_column
            better = there & (used == 0) & (reduced < least)
            least = tl.where(better, reduced, least)
            way = tl.where(better, column, way)
            free = tl.where(used == 0, least, float("inf"))
            delta = tl.min(free, axis=0)
            column = tl.argmin(free, axis=0)
            by_row = tl.where(tree == 1, by_row + delta, by_row)
            by_column = tl.where(used == 1, by_column - delta, by_column)
            least = tl.where(used == 1, least, least - delta)
            current = tl.sum(tl.where(columns == column, row_of, 0))
            steps += 1
        odd = tl.where((current >= 0) | (column >= width), 1, odd)  # the path found no free column
        while (column != COLUMNS - 1) & (steps >= 0):  # back along the path, each column takes the row before
            before = tl.sum(tl.where(columns == column, way, 0))
            moved = tl.sum(tl.where(columns == before, row_of, 0))
            row_of = tl.where(columns == column, moved, row_of)
            column = before
            steps -= 1
        row += 1
    box, query = row_of, columns
    if EXCESS:
        box, query = tl.where(turned, columns, row_of), tl.where(turned, row_of, columns)
    tl.store(assigned + problem * num_boxes + box, query, mask=there & (row_of >= 0))
    tl.store(strange + problem, tl.max(odd, axis=0))


def solve(cost: Tensor, counts: Tensor, *, rows: int, columns: int, excess: bool) -> tuple[Tensor, Tensor]:
    """The assignment of least total cost for each layer and image; nothing waits for the device.

    Args:
        cost: (L, B, N, Q) float32.
        counts: (B,) int32, boxes of each image, at most N; the costs of further ones are not read.
        rows: a power of two, at least the most boxes or queries that get one, whichever are fewer in an image.
        columns: a power of two, more than the most of the others.
        excess: whether an image has more than Q boxes.

    Returns:
        (L, B, N) int64, the query of each box, -1 for padding and for boxes in excess; and (L, B) int32, 1 where a cost
        is not finite, and the assignment has no meaning.
    """
    layers, batch, boxes, queries = cost.shape
    assigned = torch.full((layers, batch, boxes), -1, dtype=torch.int64, device=cost.device)
    strange = torch.empty((layers, batch), dtype=torch.int32, device=cost.device)
    with launches_on(cost.device):
        _assign[(layers * batch,)](
            cost.contiguous(),
            counts,
            assigned,
            strange,
            boxes,
            queries,
            batch,
            ROWS=rows,
            COLUMNS=columns,
            EXCESS=excess,
            num_warps=NUM_WARPS,
        )
    return assigned, strange
