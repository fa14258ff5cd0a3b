"""A whole training step: `python -m benchmarks step --size 480x640`.

Detector, losses, backward pass, clipping and optimizer on random images with random boxes: images per second, share of
the peak, memory, and the time by phase. `--against transformers` compares with the Deformable DETR of that library: two
stages, box refinement, the same backbone, depth, width and number of queries, but no denoising queries, so its step
does less work. `--against rfdetr` compares with RF-DETR base, another kind of detector: one level of a DINOv2-S
backbone, 3 decoder layers, 13 groups of 300 queries; sides must be multiples of 56. Both run in the same precision as
ours. `--baseline module:callable` compares with anything else: the callable takes height, width, batch size and device,
and returns a function of no arguments that does one step.
"""

from __future__ import annotations

import argparse
import importlib
import re
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.peaks import peaks_of
from benchmarks.measure import Timing, environment, interleaved, save, table
from benchmarks.peers import CLASSES, DTYPES, random_batch, rfdetr_step, transformers_step
from dino_lightning.cli.command import HelpFormatter
from dino_lightning.losses import Criterion
from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from dino_lightning.training.optim import parameter_groups

PEERS = {"transformers": transformers_step, "rfdetr": rfdetr_step}
# Names of the kernels that multiply matrices or convolve: cuBLAS's, cuDNN's, CUTLASS's, and attention's.
PRODUCTS = re.compile(r"gemm|gemv|cutlass|xmma|nvjet|conv(?!ert)|fprop|dgrad|wgrad|fmha|flash", re.IGNORECASE)
COCO_MIX = ((640, 852), (800, 1066), (544, 725), (1066, 800), (736, 1100), (480, 640))


class OurStep:
    """A training step of DINO R50 4-scale with its recipe.

    Args:
        batches: one for each step, in turns.
        device: "cuda" or "cpu".
        precision: fp32, or bf16 or fp16 by autocast.
        backend: of `torch.compile`, for the layers of encoder and decoder; None leaves them as they are.
        cuda_graphs: replay the compiled layers as CUDA graphs.
        num_denoising: 0 for the work of a detector without denoising queries.
        sizes: further arguments of `DINO`.
    """

    def __init__(
        self,
        batches: list[Batch],
        device: str,
        precision: str,
        *,
        backend: str | None = None,
        cuda_graphs: bool = False,
        num_denoising: int = 100,
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):  # made there: tensors that only have shapes cannot be moved
            self.model = DINO(num_classes=CLASSES, num_denoising=num_denoising, **(sizes or {})).train()
        self.layers = None if backend is None else self.model.compile_layers(backend, cuda_graphs=cuda_graphs)
        self.criterion = Criterion()
        groups = parameter_groups(self.model, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.batches, self.device, self.number = batches, device, 0
        self.dtype = DTYPES[precision]

    @property
    def images(self) -> int:
        """In all batches."""
        return sum(len(batch.images) for batch in self.batches)

    def __call__(self) -> None:
        """Run one whole training step."""
        loss = self.forward()
        loss.backward()
        if self.layers is not None:
            self.layers.keep_gradients()
        self.update()

    def all_batches(self) -> None:
        """Run a step for each of the batches."""
        for _ in self.batches:
            self()

    def forward(self) -> torch.Tensor:
        """The loss of the next batch."""
        batch = self.batches[self.number % len(self.batches)]
        self.number += 1
        if self.layers is not None:
            self.layers.begin_step()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            output = self.model(batch)
        loss: torch.Tensor = self.criterion(output, batch.targets)["loss"]
        return loss

    def update(self) -> None:
        """Clip the gradients and update the weights."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


def synchronized(call: Callable[[], object], device: str) -> Callable[[], None]:
    """Run the call and synchronise with the device."""

    def timed() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return timed


@contextmanager
def phases(step: OurStep) -> Iterator[dict[str, float]]:
    """Seconds spent in the parts of the forward pass, by hooks that synchronise with the device."""
    seconds: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}

    def now() -> float:
        if step.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    handles = []
    parts: dict[str, nn.Module] = {
        "backbone": step.model.backbone,
        "encoder": step.model.encoder,
        "query selection": step.model.query_selection,
        "decoder": step.model.decoder,
        "match": step.criterion.matcher,
        "criterion": step.criterion,
    }

    def watch(name: str, part: nn.Module) -> None:
        def before(*_: Any) -> None:
            started[name] = now()

        def after(*_: Any) -> None:
            seconds[name] += now() - started[name]

        handles.extend([part.register_forward_pre_hook(before), part.register_forward_hook(after)])

    for name, part in parts.items():
        watch(name, part)
    denoise = step.model._denoising_queries

    def timed_denoise(*arguments: Any) -> Any:
        start = now()
        made = denoise(*arguments)
        seconds["denoising"] += now() - start
        return made

    step.model._denoising_queries = timed_denoise  # type: ignore[method-assign]  # taken back below
    try:
        yield seconds
    finally:
        del step.model._denoising_queries
        for handle in handles:
            handle.remove()


def breakdown(step: OurStep, rounds: int) -> dict[str, float]:
    """Seconds of each phase of a step, on average."""
    totals: dict[str, float] = defaultdict(float)
    synchronise = torch.cuda.synchronize if step.device == "cuda" else (lambda: None)
    for _ in range(rounds):
        with phases(step) as seconds:
            start = time.perf_counter()
            loss = step.forward()
            synchronise()
            forward = time.perf_counter() - start
        for name, value in seconds.items():
            totals[name] += value
        named = sum(seconds[name] for name in ("backbone", "encoder", "query selection", "decoder", "denoising"))
        totals["rest of forward"] += forward - named - seconds["criterion"]
        for name, call in (("backward", loss.backward), ("optimizer", step.update)):
            start = time.perf_counter()
            call()
            synchronise()
            totals[name] += time.perf_counter() - start
    totals["loss"] = totals.pop("criterion") - totals["match"]
    return {name: value / rounds for name, value in totals.items()}


def launches(step: OurStep) -> dict[str, Any]:
    """The kernels of a step (CUDA only).

    Returns:
        `kernels`, their number; `busy`, the share of the time in which one was running, while profiled, which slows the
        host; `kernel seconds` of all, and `product seconds` of those that multiply matrices or convolve; `largest`: the
        fifteen that take longest, by name, each [number, seconds].
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    # the optimizer's own mark spans all of its kernels
    kernels = [event for event in events if not getattr(event, "is_user_annotation", False)]
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in kernels:
        one = by_name[event.name]
        one[0], one[1] = one[0] + 1, one[1] + event.device_time / 1e6
    largest = sorted(by_name.items(), key=lambda named: -named[1][1])[:15]
    running = sum(one[1] for one in by_name.values())
    return {
        "kernels": len(kernels),
        "busy": running / seconds,
        "kernel seconds": running,
        "product seconds": sum(one[1] for name, one in by_name.items() if is_product(name)),
        "largest": {name[:120]: one for name, one in largest},
    }


def is_product(kernel: str) -> bool:
    """Whether a kernel of this name multiplies matrices or convolves."""
    fused = kernel.startswith(("triton_poi", "triton_red", "triton_per"))  # named after all that is fused into them
    return PRODUCTS.search(kernel) is not None and "elementwise" not in kernel and not fused


def figures(step: OurStep, seconds: Timing) -> dict[str, Any]:
    """What there is to say of a step that took so long for all of its batches: rate, phases, memory and kernels."""
    result: dict[str, Any] = {
        "images": step.images,
        "steps": len(step.batches),
        "images per second": step.images / seconds.median,
        "seconds": seconds.as_json(),
        "seconds by phase": breakdown(step, len(step.batches)),
    }
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.all_batches()
        return result | {"peak memory in bytes": torch.cuda.max_memory_allocated()} | launches(step)
    return result | {"peak memory in bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def count_flops(step: OurStep) -> int:
    """Operations of matrix products and convolutions in all batches, two for each multiply-add.

    To be called last in a process: after it, PyTorch no longer takes the compiled code of the layers (seen with 2.11).
    """
    with FlopCounterMode(display=False) as counter:
        step.all_batches()
    total: int = counter.get_total_flops()
    return total


def rates(flops: float, images: int, seconds: float, peak_tflops: float | None = None) -> dict[str, float]:
    """Operations by image and second, and the share of the device's peak, if it is known."""
    found = {"flops per image": flops / images, "flops per second": flops / seconds}
    return found | ({"share of peak": flops / seconds / (peak_tflops * 1e12)} if peak_tflops else {})


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks step", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--size", default="480x640", help="height x width, or coco-mix")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--num_denoising", type=int, default=100, help="0: the work of a detector without them")
    parser.add_argument("--against", choices=tuple(PEERS), help="a peer to measure beside")
    parser.add_argument("--baseline", help="module:callable, see above")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--peak_tflops", type=float, help="of the device in this precision; by default by its data sheet"
    )
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes = COCO_MIX if options.size == "coco-mix" else (tuple(int(side) for side in options.size.split("x")),)
    batches = [random_batch(height, width, options.batch_size, device) for height, width in sizes]
    backend = "inductor" if options.compile else None
    step = OurStep(batches, device, options.precision, backend=backend, num_denoising=options.num_denoising)
    contestants = {"dino_lightning": synchronized(step.all_batches, device)}
    for name in (options.against, options.baseline):
        if name is None:
            continue
        if name in PEERS:
            steps = [PEERS[name](*size, options.batch_size, device, options.precision) for size in sizes]
        else:
            module, _, attribute = name.partition(":")
            make = getattr(importlib.import_module(module), attribute)
            steps = [make(*size, options.batch_size, device) for size in sizes]
        contestants[name] = synchronized(lambda steps=steps: [one() for one in steps], device)  # type: ignore[misc]  # bound now, not in the next round
    timings = interleaved(contestants, rounds=options.rounds)
    ours = timings["dino_lightning"]
    if options.peak_tflops is None and device == "cuda":
        options.peak_tflops = peaks_of(torch.cuda.get_device_name()).get(options.precision)
    result = figures(step, ours)
    result |= rates(count_flops(step), step.images, ours.median, options.peak_tflops)
    result |= {
        "settings": {**vars(options), "output": None, "device": device},
        "images per second": {name: step.images / timing.median for name, timing in timings.items()},
        "ratio": {name: timing.median / ours.median for name, timing in timings.items()},
        "seconds": {name: timing.as_json() for name, timing in timings.items()},
    }

    print(f"{options.size}, batch {options.batch_size}, {options.precision}, {device}, {options.rounds} rounds\n")
    rows = [("", "images/s", "seconds/step", "spread", "time, ours = 1")]
    for name, timing in timings.items():
        rows.append(
            (
                name,
                f"{step.images / timing.median:.3f}",
                f"{timing.median / len(batches):.3f}",
                f"{timing.spread:.0%}",
                f"{timing.median / ours.median:.2f}",
            )
        )
    print(table(rows))
    an_image, a_second = (result[f"flops per {unit}"] / 1e12 for unit in ("image", "second"))
    print(f"\n{an_image:.3f} TFLOP an image, {a_second:.3f} TFLOP/s", end="")
    print(f", {result['share of peak']:.1%} of {options.peak_tflops} TFLOP/s" if options.peak_tflops else "")
    print(f"peak memory {result['peak memory in bytes'] / 2**30:.2f} GiB" + ("" if device == "cuda" else " (process)"))
    if "kernels" in result:
        print(f"{result['kernels']} kernels a step, busy {result['busy']:.0%} of the time (while profiled)")
    parts = result["seconds by phase"]
    whole = sum(parts.values())
    print()
    print(table([("phase", "seconds", "share"), *((n, f"{v:.4f}", f"{v / whole:.1%}") for n, v in parts.items())]))
    if options.output is not None:
        save(options.output, {"environment": environment(), "result": result})


if __name__ == "__main__":
    main()
