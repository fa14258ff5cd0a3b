"""Which solver of linear assignments runs: decided here, and nowhere else.

| solver | what runs |
|---|---|
| `scipy` | scipy on the host, after a copy of all costs |
| `auto` | the Triton kernel on a CUDA device of capability 8.0 or newer, if it passes a trial; else scipy |
| `device` | the Triton kernel, or an error that says why it cannot run |

The kernel is compiled for blocks of rows and columns, powers of two, and tried once for each of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dino_lightning import kernel_trial
from dino_lightning.errors import UsageError

Solver = Literal["scipy", "device", "auto"]
MIN_ROWS, MAX_ROWS, MAX_COLUMNS = 16, 1024, 2048  # of a problem in registers
TOLERANCE = 1e-5  # of the total cost, relative: potentials are float32


class Blocks(NamedTuple):
    """What the kernel is compiled for; a trial speaks for all calls that are alike in this."""

    device_type: str
    device_index: int
    rows: int
    columns: int
    excess: bool


def takes_device(solver: Solver, cost: Tensor, num_boxes: Sequence[int]) -> bool:
    """Whether the device solves these assignments.

    Args:
        solver: as chosen.
        cost: (L, B, N, Q).
        num_boxes: of each image.

    Raises:
        UsageError: `device` was asked for, and it cannot be had; says why.
    """
    if solver == "scipy":
        return False
    blocks = _blocks(cost, num_boxes)
    if solver == "auto" and blocks.device_type != "cuda":
        return False
    trouble = _trouble(blocks)
    if trouble is None:
        return True
    if solver == "device":
        raise _unsolvable(trouble)
    _warn_once(trouble)
    return False


def check_solver(solver: Solver, device_type: str) -> None:
    """Refuse the solver `device` before anything starts, where it is known already that its kernel cannot run.

    Args:
        solver: as chosen.
        device_type: of PyTorch, such as `cuda`; the first of these devices is looked at.

    Raises:
        UsageError: as of `takes_device`.
    """
    trouble = missing_for(solver, device_type)
    if trouble is not None:
        raise _unsolvable(trouble)


def missing_for(solver: Solver, device_type: str) -> str | None:
    """Why the solver cannot run on this type of device, as far as that is known beforehand; None if it may."""
    return kernel_trial.missing(device_type, 0) if solver == "device" else None


def _unsolvable(trouble: str) -> UsageError:
    return UsageError(f"Assignments cannot be solved on the device: {trouble}; choose matching_solver scipy or auto.")


def solve_on_device(cost: Tensor, num_boxes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The assignment of least total cost for each layer and image, without a device synchronisation.

    Args:
        cost: (L, B, N, Q) float32.
        num_boxes: of each image, at most N.

    Returns:
        (L, B, N) int64, the query of each box, -1 for padding and for boxes in excess of the queries; and (L, B) int32,
        1 where a cost is not finite, and the assignment has no meaning.
    """
    from dino_lightning.losses import assignment_kernel  # here, since it imports Triton

    blocks = _blocks(cost, num_boxes)
    counts = torch.tensor(num_boxes, dtype=torch.int32).to(cost.device, non_blocking=True)
    return assignment_kernel.solve(cost, counts, rows=blocks.rows, columns=blocks.columns, excess=blocks.excess)


def to_host_later(tensor: Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Start to copy a tensor to the host; what is returned waits for it, and for nothing that was launched since.

    Args:
        tensor: any shape and type, without a gradient. From a CUDA device it travels to pinned memory meanwhile; one
            on the CPU is not copied.
    """
    if not tensor.is_cuda:
        return tensor.cpu().numpy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> npt.NDArray[Any]:
        arrived.synchronize()
        array: npt.NDArray[Any] = copy.numpy()
        return array

    return wait


def _blocks(cost: Tensor, num_boxes: Sequence[int]) -> Blocks:
    queries = cost.shape[3]
    rows = max(MIN_ROWS, *(min(count, queries) for count in num_boxes))
    columns = max(queries, *num_boxes) + 1
    rows, columns = (1 << (size - 1).bit_length() for size in (rows, columns))
    return Blocks(cost.device.type, cost.device.index or 0, rows, columns, max(num_boxes) > queries)


@functools.cache
def _trouble(blocks: Blocks) -> str | None:
    """Why the kernel cannot take such problems, or None if it can."""
    trouble = kernel_trial.missing(blocks.device_type, blocks.device_index)
    if trouble is not None:
        return trouble
    if blocks.rows > MAX_ROWS or blocks.columns > MAX_COLUMNS:
        return f"its kernel is written for at most {MAX_ROWS} x {MAX_COLUMNS - 1} boxes and queries, or the reverse"
    if blocks.device_type == "cpu":
        return None
    trouble = kernel_trial.in_a_thread(
        lambda: kernel_trial.allowed_to_wait(blocks.device_index, lambda: _tried(blocks))
    )
    name = torch.cuda.get_device_name(blocks.device_index)
    return None if trouble is None else f"its kernel failed its trial on {name} ({trouble})"


@functools.cache
def _warn_once(trouble: str) -> None:
    warnings.warn(f"Assignments are solved by scipy and not on the device: {trouble}.", stacklevel=2)


def _tried(blocks: Blocks) -> str | None:
    """Solve small and large problems, and some that are not finite; says what is wrong with the solutions."""
    draws = torch.Generator().manual_seed(0)  # the draws of the caller stay as they are
    most, other = blocks.rows, blocks.columns - 1
    boxes, queries = (other, most) if blocks.excess else (min(most, other), other)
    counts = (boxes, boxes // 3, 1, boxes)
    cost = torch.randn((2, len(counts), boxes, queries), generator=draws) * 5
    cost[0, 0, boxes // 2, queries // 2] = torch.nan
    cost[1, 3, boxes - 1, 0] = torch.inf
    device = torch.device(blocks.device_type, blocks.device_index)
    assigned, strange = (found.cpu().numpy() for found in solve_on_device(cost.to(device), counts))
    return verdict(cost.numpy(), counts, assigned, strange)


def verdict(
    cost: npt.NDArray[np.float32],
    num_boxes: Sequence[int],
    assigned: npt.NDArray[np.int64],
    strange: npt.NDArray[np.int32],
) -> str | None:
    """Compare what `solve_on_device` returned with scipy.

    Args:
        cost: (L, B, N, Q).
        num_boxes: of each image.
        assigned: (L, B, N), the query of each box.
        strange: (L, B), 1 where a cost is not finite.

    Returns:
        What is wrong with it; None if every box or every query is used, none twice, at the least total cost.
    """
    for layer, image in np.ndindex(strange.shape):
        count = num_boxes[image]
        problem, found = cost[layer, image, :count].astype(np.float64), assigned[layer, image]
        if bool(strange[layer, image]) == bool(np.isfinite(problem).all()):
            return "it does not tell costs that are finite from others"
        if strange[layer, image]:
            continue
        boxes = np.flatnonzero(found >= 0)
        chosen = found[boxes]
        if (found[count:] >= 0).any() or len(boxes) != min(problem.shape) or len(set(chosen.tolist())) != len(boxes):
            return "its assignments are not one to one"
        if (chosen >= problem.shape[1]).any():
            return "it assigns queries that there are not"
        total, least = problem[boxes, chosen].sum(), problem[linear_sum_assignment(problem)].sum()
        if not total - least <= TOLERANCE * np.abs(problem[boxes, chosen]).sum():
            return f"a total cost is {total:.6g} where {least:.6g} is the least"
    return None
