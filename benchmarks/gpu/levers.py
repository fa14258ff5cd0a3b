"""Part 6: what single features of the step are worth: it runs with and without them, in turns in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu.report import Report, last_line
from benchmarks.gpu.steps import cases, make_step
from benchmarks.measure import interleaved
from benchmarks.step import OurStep, synchronized
from dino_lightning.model import decoder, encoder, feed_forward, lower_precision, residual_norm
from dino_lightning.model.kept_result import KeptResult

Lever = Callable[[OurStep], AbstractContextManager[object]]


def levers(report: Report) -> None:
    """The step without each of them, and with TF32; one that fails is told and left out."""
    name, (sizes, batch_size) = next(iter(cases(report).items()))
    report.attempt(name, lambda: in_turns(report, make_step(report, sizes, batch_size)))


def in_turns(report: Report, step: OurStep) -> dict[str, Any]:
    """Seconds a step with each lever, and with all of them, and the ratio to the step as it is."""
    found: dict[str, Any] = {}
    contestants: dict[str, Callable[[], None]] = {}
    for name, lever in LEVERS.items():
        call = synchronized(partial(_under, lever, step), step.device)
        try:
            call()
        except Exception as error:
            found[name] = {"error": last_line(error)}
        else:
            contestants[name] = call
    timings = interleaved(contestants, rounds=5 if report.small else 11)
    found |= {name: timing.as_json() for name, timing in timings.items()}
    as_it_is = timings["as it is"].median
    return found | {"ratio": {name: as_it_is / timing.median for name, timing in timings.items()}}


def _under(lever: Lever, step: OurStep) -> None:
    with lever(step):
        step.all_batches()


@contextmanager
def tf32(step: OurStep) -> Iterator[None]:
    """Products of float32 in TF32: heads, criterion and what autocast leaves."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def norms_folded_each_step(step: OurStep) -> AbstractContextManager[object]:
    """Nothing is kept of the frozen layers."""
    return mock.patch.object(KeptResult, "of", lambda kept, inputs, settings, compute: compute())


@contextmanager
def weights_cast_one_by_one(step: OurStep) -> Iterator[None]:
    """Autocast casts the weights itself, and each gradient back."""
    with contextlib.ExitStack() as stack:
        for module in (decoder, feed_forward, lower_precision):
            stack.enter_context(mock.patch.object(module, "lowered", lambda *weights: weights))
        yield


@contextmanager
def relu_by_itself(step: OurStep) -> Iterator[None]:
    """The feed-forward networks by two linear layers and ReLU between them."""

    def plain(x: Tensor, first: nn.Linear, second: nn.Linear, dropout: nn.Dropout) -> Tensor:
        out: Tensor = second(dropout(first(x).relu_()))
        return out

    with mock.patch.object(encoder, "feed_forward", plain), mock.patch.object(decoder, "feed_forward", plain):
        yield


def norms_by_themselves(step: OurStep) -> AbstractContextManager[object]:
    """Residual sums, norms and their copies are operations of their own."""
    return mock.patch.object(residual_norm, "_takes_kernel", lambda *_: False)


@contextmanager
def all_of_them(step: OurStep) -> Iterator[None]:
    """Every lever at once but TF32: nearly the step as it was before."""
    with contextlib.ExitStack() as stack:
        for lever in (norms_folded_each_step, weights_cast_one_by_one, relu_by_itself, norms_by_themselves):
            stack.enter_context(lever(step))
        yield


LEVERS: dict[str, Lever] = {
    "as it is": lambda step: nullcontext(),
    "TF32": tf32,
    "norms folded each step": norms_folded_each_step,
    "weights cast one by one": weights_cast_one_by_one,
    "ReLU by itself": relu_by_itself,
    "norms by themselves": norms_by_themselves,
    "these four": all_of_them,
}
