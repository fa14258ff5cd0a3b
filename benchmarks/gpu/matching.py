"""Part 7: where matching should be solved, by the number of boxes in an image.

- as it is: the costs are copied, scipy solves, then all losses are computed.
- pinned, overlapped: the costs go to pinned memory while the device computes the denoising queries' losses.
- solved on the device: `HungarianMatcher(solver="device")`, which waits for some bytes once the losses are launched;
  on a CPU Triton interprets it.
- another solver, given as `--solver module:callable`: it takes the costs, (L, B, N, Q) float32 on the device, and the
  number of boxes of each image, a tuple; and returns the query of each box, (L, B, N) int64 on the device, -1 for
  padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from dino_lightning.losses import Criterion, HungarianMatcher, Matches, mean_num_boxes
from dino_lightning.losses.criterion import _denoising_losses
from dino_lightning.losses.matcher import to_host
from dino_lightning.structures import ModelOutput, Targets

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
        "pinned, overlapped": partial(overlapped, Criterion(matcher=PinnedMatcher()), output, targets),
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
    on_host = to_host(cost)
    parts: dict[str, Callable[[], object]] = {
        "costs alone": lambda: matcher.cost(*layers, targets),
        "copy alone": lambda: to_host(cost),
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


class PinnedMatcher(HungarianMatcher):
    """Copies the costs to pinned memory, and calls `meanwhile` before it waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None
        self._pinned: Tensor | None = None

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: object = None) -> Matches:
        """As of `HungarianMatcher`, without its check for what is not finite."""
        cost = self.cost(logits, boxes_cxcywh, targets)
        if self._pinned is None or self._pinned.shape != cost.shape:
            self._pinned = torch.empty(cost.shape, pin_memory=cost.is_cuda)
        self._pinned.copy_(cost, non_blocking=True)
        arrived = torch.cuda.Event() if cost.is_cuda else None
        if arrived is not None:
            arrived.record()
        with torch.enable_grad():
            self.meanwhile()
        if arrived is not None:
            arrived.synchronize()
        queries = torch.from_numpy(solved(self._pinned.numpy(), targets.num_boxes))
        queries = queries.to(logits.device, non_blocking=True)
        return Matches(queries=queries.clamp(min=0), matched=queries >= 0)


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


def overlapped(criterion: Criterion, output: ModelOutput, targets: Targets) -> tuple[Tensor, ...]:
    """The loss of the criterion and its gradients, with the denoising losses computed while the costs travel."""
    assert isinstance(criterion.matcher, PinnedMatcher) and output.denoising is not None
    denoising, parts = output.denoising, []

    def denoising_losses() -> None:
        num_boxes = mean_num_boxes(targets, output.pred_boxes.device).clamp(min=1.0)
        parts.append(criterion._weighted(_denoising_losses(denoising, targets, num_boxes, criterion.class_loss)))

    criterion.matcher.meanwhile = denoising_losses
    loss: Tensor = criterion(replace(output, denoising=None), targets)["loss"] + parts[0]
    return (loss.detach(), *torch.autograd.grad(loss, match.inputs(output)))
