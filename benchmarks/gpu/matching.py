"""Part 7: where matching should be solved, by the number of boxes in an image.

- as it is: the costs go to pinned memory while the device computes the denoising queries' losses, then scipy solves.
- copied first: the costs are copied, scipy solves, then all losses are computed, as before.
- solved on the device: `HungarianMatcher(solver="device")`, which waits for some bytes once the losses are launched;
  on a CPU Triton interprets it.
- another solver, given as `--solver module:callable`: it takes the costs, (L, B, N, Q) float32 on the device, and the
  number of boxes of each image, a tuple; and returns the query of each box, (L, B, N) int64 on the device, -1 for
  padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks import match
from benchmarks.gpu.report import Report, by_reference, last_line
from benchmarks.measure import interleaved
from benchmarks.step import synchronized
from dino_lightning.losses import Criterion, HungarianMatcher, Matches
from dino_lightning.losses.assignment import to_host_later
from dino_lightning.structures import Targets

BOXES = (10, 50, 100, 300)
Solver = Callable[[Tensor, tuple[int, ...]], Tensor]


def matching(report: Report) -> None:
    """A case for each number of boxes."""
    for count in BOXES[:1] if report.small else BOXES:
        report.attempt(f"{count} boxes", partial(compare, report, count))


def compare(report: Report, count: int) -> dict[str, Any]:
    """Milliseconds of criterion and gradients with each matcher, and of the costs, their copy and scipy alone."""
    output, targets = match.example(count, report.device)
    criteria: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "as it is": partial(match.ours, Criterion(), output, targets),
        "copied first": partial(match.ours, Criterion(matcher=CopiedFirst()), output, targets),
        "solved on the device": partial(
            match.ours, Criterion(matcher=HungarianMatcher(solver="device")), output, targets
        ),
    }
    given = report.settings.get("solver")
    if given:
        criteria[given] = partial(match.ours, Criterion(matcher=SolvedBy(given)), output, targets)
    expected = match.ours(Criterion(), output, targets)[0]
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, call in criteria.items():
        try:
            found[name] = {"off": {"loss": float((call()[0] - expected).abs() / expected)}}
        except Exception as error:  # of one of them: the others are measured
            found[name] = {"error": last_line(error)}
        else:
            calls[name] = call

    matcher, layers = HungarianMatcher(), (output.pred_logits, output.pred_boxes)
    cost = matcher.cost(*layers, targets)
    on_host = to_host_later(cost)()
    parts: dict[str, Callable[[], object]] = {
        "costs alone": lambda: matcher.cost(*layers, targets),
        "copy alone": lambda: to_host_later(cost)(),
        "scipy alone": lambda: solved(on_host, targets.num_boxes),
    }
    timed = {name: synchronized(call, report.device) for name, call in (calls | parts).items()}
    timings = interleaved(timed, rounds=5 if report.small else 11)
    return found | {name: {**found.get(name, {}), **timing.as_json()} for name, timing in timings.items()}


def solved(cost: np.ndarray[Any, Any], num_boxes: Sequence[int]) -> np.ndarray[Any, Any]:
    """(L, B, N, Q) costs -> (L, B, N) queries, -1 for padding."""
    assigned = np.full(cost.shape[:3], -1, dtype=np.int64)
    for layer in range(cost.shape[0]):
        for image, count in enumerate(num_boxes):
            rows, columns = linear_sum_assignment(cost[layer, image, :count])
            assigned[layer, image, rows] = columns
    return assigned


class CopiedFirst(HungarianMatcher):
    """Waits for the costs and for scipy before anything else is launched."""

    @torch.no_grad()
    def launch(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: object = None
    ) -> Callable[[], Matches]:
        """As of `HungarianMatcher`, without its check for what is not finite."""
        costs = self.cost(logits, boxes_cxcywh, targets).cpu().numpy()
        queries = torch.from_numpy(solved(costs, targets.num_boxes)).to(logits.device, non_blocking=True)
        matches = Matches(queries=queries.clamp(min=0), matched=queries >= 0)
        return lambda: matches


class SolvedBy(HungarianMatcher):
    """Leaves the assignments to a solver on the device, named by `module:callable`."""

    def __init__(self, reference: str) -> None:
        super().__init__()
        self._reference = reference

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: object = None) -> Matches:
        """As of `HungarianMatcher`, without its check for what is not finite."""
        solver: Solver = by_reference(self._reference)
        queries = solver(self.cost(logits, boxes_cxcywh, targets), targets.num_boxes)
        return Matches(queries=queries.clamp(min=0), matched=queries >= 0)
