"""Parts 4, 5 and 9: whole training steps of R50 4-scale, eager, compiled, and beside transformers' Deformable DETR."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu.peaks import peaks_of, projected_seconds
from benchmarks.gpu.report import Report
from benchmarks.measure import interleaved
from benchmarks.peers import random_batch, transformers_step
from benchmarks.step import COCO_MIX, OurStep, count_flops, figures, rates, synchronized
from dino_lightning.model import compiled_layers

# What is most worth knowing comes first: the rest is skipped when time runs out.
CASES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "800x1333 batch 2": (((800, 1333),), 2),
    "640x640 batch 4": (((640, 640),), 4),
    "800x1333 batch 8": (((800, 1333),), 8),
    "coco-mix batch 2": (COCO_MIX, 2),
    "320x320 batch 8": (((320, 320),), 8),
    "800x1333 batch 4": (((800, 1333),), 4),
}
SMALL_CASES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "64x96 batch 2": (((64, 96),), 2),
    "mix batch 1": (((64, 96), (96, 64)), 1),
}
SMALL_SIZES = {
    "backbone": "resnet18",
    "hidden_dim": 64,
    "ffn_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_queries": 30,
}
SECONDS = 12.0  # that a case needs at least


def cases(report: Report) -> dict[str, tuple[tuple[tuple[int, int], ...], int]]:
    """Sizes and batch size, by name."""
    return SMALL_CASES if report.small else CASES


def make_step(
    report: Report,
    sizes: tuple[tuple[int, int], ...],
    batch_size: int,
    *,
    backend: str | None = None,
    cuda_graphs: bool = False,
) -> OurStep:
    """A step in bfloat16; of a small model on a CPU."""
    batches = [random_batch(*size, batch_size, report.device) for size in sizes]
    own = SMALL_SIZES if report.small else None
    return OurStep(batches, report.device, "bf16", backend=backend, cuda_graphs=cuda_graphs, sizes=own)


def eager(report: Report) -> None:
    """Part 4: a case for each of `cases`."""

    def measure(sizes: tuple[tuple[int, int], ...], batch_size: int) -> dict[str, Any]:
        step = make_step(report, sizes, batch_size)
        for _ in range(1 if report.small else 2):
            step.all_batches()
        return measured(report, step, lambda: count_flops(step))

    for name, case in cases(report).items():
        report.attempt(name, partial(measure, *case), seconds=0 if report.small else SECONDS)


def compiled(report: Report) -> None:
    """Part 5: as part 4, compiled. Operations are those that part 4 counted: counting them ends compiled code.

    CUDA graphs come after the case that they are compared with, and once more where launches count the most.
    """
    chosen = cases(report)
    first, mix = next(iter(chosen)), next(name for name in chosen if "mix" in name)
    graphed = [name for name in (first, "640x640 batch 4") if name in chosen]
    for name in (first, mix, *chosen):  # the mix shows what other sizes cost, so it comes early
        seconds = 0 if report.small else 25
        if name not in report.results:
            report.attempt(name, partial(compiled_case, report, name, *chosen[name]), seconds=seconds)
        if name in graphed:
            graphed.remove(name)
            case = partial(compiled_case, report, name, *chosen[name], cuda_graphs=True)
            report.attempt(f"{name}, CUDA graphs", case, seconds=seconds)


def compiled_case(
    report: Report, name: str, sizes: tuple[tuple[int, int], ...], batch_size: int, *, cuda_graphs: bool = False
) -> dict[str, Any]:
    """A case with `warm up`: seconds of each step of the rounds through the sizes, and graphs made until then.

    Raises:
        RuntimeError: there are no CUDA graphs, so that what is measured would be something else.
    """
    torch._dynamo.reset()
    counters.clear()
    backend = "eager" if report.small else "inductor"
    recorded = {"backend": "eager"} if report.small else compiled_layers.GRAPHED  # there are no CUDA graphs on a CPU
    with mock.patch.object(compiled_layers, "GRAPHED", recorded):
        step = make_step(report, sizes, batch_size, backend=backend, cuda_graphs=cuda_graphs)
    warm_up: list[dict[str, float]] = []
    for _ in range(4 if cuda_graphs else 2):  # CUDA graphs are recorded in the second, and replayed from the third on
        for _ in step.batches:
            start = time.perf_counter()
            synchronized(step, report.device)()
            graphs = counters["stats"]["unique_graphs"]
            warm_up.append({"seconds": time.perf_counter() - start, "graphs": graphs})
    if cuda_graphs and step.layers is not None and not report.small:
        skipped = counters["inductor"]["cudagraph_skips"]
        if skipped or not step.layers.cuda_graphs:
            raise RuntimeError(step.layers.trouble_with_graphs or f"PyTorch left out {skipped} CUDA graphs")
    counted = report.earlier(4).get(name, {}).get("flops per image")
    found = measured(report, step, None if counted is None else lambda: counted * step.images)
    typical = found["seconds"]["median"] / found["steps"]
    extra = sum(one["seconds"] - typical for one in warm_up)
    later = counters["stats"]["unique_graphs"] - warm_up[len(step.batches) - 1]["graphs"]
    return found | {"warm up": warm_up, "seconds to compile": extra, "graphs after the first round": later}


def measured(report: Report, step: OurStep, flops: Callable[[], float] | None) -> dict[str, Any]:
    """`benchmarks.step.figures` of a step, its share of the device's peak, and a projection for the A10G.

    Args:
        report: of the part.
        step: warmed up.
        flops: operations of all batches, called last; None if they are not known.
    """
    rounds = 5 if report.small else 9
    timing = interleaved({"ours": synchronized(step.all_batches, report.device)}, rounds=rounds)["ours"]
    peaks = peaks_here(report)
    found = figures(step, timing)
    if flops is not None:
        found |= rates(flops(), step.images, timing.median, peaks.get("bf16"))
    return found | projection(found, ceilings_of(report, peaks))


def peer(report: Report) -> None:
    """Part 9: transformers' Deformable DETR beside ours, with and without denoising queries, in turns."""
    try:
        import transformers  # noqa: F401  # whether it is there
    except ImportError as reason:
        report.add("transformers", {"not here": f"it needs transformers ({reason})"})
        return
    size, batch_size = ((224, 224), 1) if report.small else ((800, 1333), 2)  # no smaller: it wants 900 proposals
    for precision in ("bf16", "fp32"):
        report.attempt(precision, partial(against_transformers, report, size, batch_size, precision))
        if report.small or "error" not in report.results[precision]:
            return


def against_transformers(report: Report, size: tuple[int, int], batch_size: int, precision: str) -> dict[str, Any]:
    """Seconds a step of each, and theirs over ours."""
    batches = [random_batch(*size, batch_size, report.device)]
    sizes = SMALL_SIZES if report.small else None
    steps: dict[str, Callable[[], object]] = {
        name: OurStep(batches, report.device, precision, num_denoising=count, sizes=sizes)
        for name, count in (("ours", 100), ("ours, no denoising", 0))
    }
    steps["transformers"] = transformers_step(*size, batch_size, report.device, precision)
    contestants = {name: synchronized(step, report.device) for name, step in steps.items()}
    timings = interleaved(contestants, rounds=5 if report.small else 9)
    found: dict[str, Any] = {name: timing.as_json() for name, timing in timings.items()}
    theirs = timings["transformers"].median
    return found | {"ratio": {name: theirs / timing.median for name, timing in timings.items()}, "images": batch_size}


def peaks_here(report: Report) -> dict[str, float]:
    """Of the device that is measured, by its data sheet; empty if that is not known."""
    return peaks_of(torch.cuda.get_device_name()) if report.device == "cuda" else {}


def ceilings_of(report: Report, peaks: dict[str, float]) -> dict[str, float]:
    """`bf16` in TFLOP/s and `gb_per_second`: measured by part 0, or of the data sheet; empty on an unknown device."""
    measured = report.earlier(0)
    found = {
        "bf16": measured.get("product bf16", {}).get("tflops", peaks.get("bf16")),
        "gb_per_second": measured.get("copy", {}).get("gb_per_second", peaks.get("gb_per_second")),
    }
    return {name: value for name, value in found.items() if value is not None} if report.device == "cuda" else {}


def projection(found: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """What a step would take on an A10G if its kernels reached the same shares of that device's ceilings."""
    if "kernel seconds" not in found or len(ceilings) < 2:
        return {}
    seconds = projected_seconds(
        found["product seconds"],
        found["kernel seconds"] - found["product seconds"],
        tflops=ceilings["bf16"],
        gb_per_second=ceilings["gb_per_second"],
    )
    per_step = found["images"] / found["steps"]
    return {"projection for A10G": {"seconds a step in kernels": seconds, "images per second": per_step / seconds}}
