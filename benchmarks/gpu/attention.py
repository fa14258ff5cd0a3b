"""Part 2: deformable attention alone, forward and backward apart, by replay of CUDA graphs.

On a CPU Triton interprets its kernels, so that every path here is tried out.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import op
from benchmarks.gpu.kernels import backward_arguments
from benchmarks.gpu.peaks import projected_seconds
from benchmarks.gpu.report import Report, by_reference
from benchmarks.gpu.steps import ceilings_of, peaks_here
from benchmarks.gpu.timing import replayed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What is most worth knowing comes first.
CASES = (
    ("encoder", 2, "bf16"), ("decoder", 2, "bf16"), ("encoder", 8, "bf16"), ("decoder", 8, "bf16"),
    ("encoder", 1, "bf16"), ("decoder", 1, "bf16"), ("encoder", 2, "fp32"), ("decoder", 2, "fp32"),
    ("encoder", 8, "fp32"), ("decoder", 8, "fp32"), ("encoder", 1, "fp32"), ("decoder", 1, "fp32"),
)  # fmt: skip
BATCH = 2  # where only one is measured
LAUNCHES = ((4, 16), (1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (2, 16), (4, 8), (4, 32), (8, 16), (8, 32))
# Changes to the text of the backward kernel, to tell what its parts cost; each must be found four times.
EDITS: dict[str, tuple[str, str]] = {
    "without atomics": (r"^ *tl\.atomic_add\(.*\)\n", ""),
    "stores for atomics": (r"tl\.atomic_add\((.*), sem=\"relaxed\"\)", r"tl.store(\1)"),
    "atomics, maps not read": (r"(dot_\d\d) = tl\.sum\(.*axis=1\)$", r"\1 = weight"),
}


def operator(report: Report) -> None:
    """Cases, then launch shapes, then parts of the backward kernel, then fp32."""
    cases = (("encoder", 1, "bf16"), ("decoder", 1, "fp32")) if report.small else CASES
    for case, batch, dtype in cases[:4]:
        _case(report, case, batch, dtype)
    report.attempt("offsets of a new model", lambda: new_model(report))
    report.attempt("parts of the backward kernel", lambda: parts(report))
    report.attempt("launch shapes, backward", lambda: launch_shapes(report), seconds=0 if report.small else 20)
    for case, batch, dtype in cases[4:]:
        _case(report, case, batch, dtype)


def _case(report: Report, case: str, batch: int, dtype: str) -> None:
    name = f"{case} batch {batch} {dtype}"
    report.attempt(
        name, lambda: contestants(report, _draw(report, case, batch, dtype)), seconds=0 if report.small else 4
    )


def _draw(report: Report, case: str, batch: int, dtype: str, *, initial: bool = False) -> op.Inputs:
    shapes = op.SMALL_SHAPES if report.small else op.SHAPES
    return op.draw(case, 1 if report.small else batch, report.device, DTYPES[dtype], shapes=shapes, initial=initial)


def contestants(report: Report, inputs: op.Inputs) -> dict[str, Any]:
    """Forward and backward of the kernel, of stacked `grid_sample`, and of `--baseline`."""
    attends: dict[str, Callable[[op.Inputs], Tensor]] = {"kernel": op.kernel, "stacked": op.stacked}
    if report.settings.get("baseline"):
        attends[report.settings["baseline"]] = by_reference(report.settings["baseline"])
    forward = {name: partial(_forward, attend, inputs) for name, attend in attends.items()}
    # launched on a device alone; forward it is the kernel
    in_cuda = {} if report.small else {"kernel, backward in CUDA C++": op.cuda_backward}
    backward = {name: partial(_backward, attend, inputs) for name, attend in (attends | in_cuda).items()}
    found: dict[str, Any] = {
        "forward": replayed(forward, report.device),
        "backward": replayed(backward, report.device),
        "difference": op.largest_difference(attends, inputs),
        "least bytes": {way: op.least_bytes(inputs, backward=way == "backward") for way in ("forward", "backward")},
        "float32 additions": op.corners_inside(inputs) * op.DIM,
    }
    ceilings = ceilings_of(report, peaks_here(report))
    for way in ("forward", "backward"):
        seconds = found[way]["kernel"].get("median")
        if seconds is not None:
            found[f"{way} GB/s"] = found["least bytes"][way] / seconds / 1e9
        if seconds is not None and len(ceilings) == 2:
            there = projected_seconds(0.0, seconds, tflops=ceilings["bf16"], gb_per_second=ceilings["gb_per_second"])
            found.setdefault("projection for A10G", {})[way] = there
    return found


def _forward(attend: Callable[[op.Inputs], Tensor], inputs: op.Inputs) -> Callable[[], object]:
    return partial(op.forward, attend, inputs)


def _backward(attend: Callable[[op.Inputs], Tensor], inputs: op.Inputs) -> Callable[[], object]:
    """The backward pass alone, of a forward pass that is made now."""
    out = attend(inputs)
    return partial(torch.autograd.grad, out, inputs.leaves, inputs.grad, retain_graph=True)


def new_model(report: Report) -> dict[str, Any]:
    """The backward kernel with offsets as they start, of which half of all additions are zero, and after training."""
    makers = {}
    for name, initial in (("trained", False), ("new", True)):
        inputs = _draw(report, "encoder", BATCH, "bf16", initial=initial)
        makers[name] = partial(_direct, _module(), backward_arguments(inputs))
    return replayed(makers, report.device)


def parts(report: Report) -> dict[str, Any]:
    """The backward kernel as it is, and with each of `EDITS`: what atomics, and all but atomics, cost."""
    arguments = backward_arguments(_draw(report, "encoder", BATCH, "bf16"))
    with TemporaryDirectory() as folder:
        makers = {"as it is": partial(_direct, _module(), arguments)}
        for name, (pattern, replacement) in EDITS.items():
            makers[name] = partial(_direct, edited(_module(), pattern, replacement, Path(folder)), arguments)
        return replayed(makers, report.device)


def edited(module: ModuleType, pattern: str, replacement: str, folder: Path) -> ModuleType:
    """The module with a change to its text, written to a folder and imported from there, since Triton reads the file.

    Raises:
        ValueError: the text has changed, so that the edit no longer fits it.
    """
    assert module.__file__ is not None
    text, count = re.subn(pattern, replacement, Path(module.__file__).read_text(encoding="utf-8"), flags=re.MULTILINE)
    if count != 4:
        raise ValueError(
            f"{pattern} was found {count} times in {module.__name__}, not 4; the edit must follow its text"
        )
    path = folder / f"edited{len(list(folder.glob('*.py')))}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def launch_shapes(report: Report) -> dict[str, Any]:
    """The backward kernel with other numbers of warps and of queries to a program; compiled side by side beforehand."""
    shapes = LAUNCHES[:1] if report.small else LAUNCHES
    arguments = backward_arguments(_draw(report, "encoder", BATCH, "bf16"))
    spawn, workers = multiprocessing.get_context("spawn"), min(len(shapes), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(partial(_compile, report.device), shapes))
    makers = {f"{warps} warps, {block} queries": partial(_shaped, arguments, warps, block) for warps, block in shapes}
    warps = _module().backward_warps(_module().capability(torch.device(report.device)))
    block = _module().block_size(op.DIM, bytes_per_thread=16, itemsize=4, warps=warps)
    return {"now": f"{warps} warps, {block} queries", **replayed(makers, report.device)}


def _compile(device: str, shape: tuple[int, int]) -> None:
    """Run the kernel once on a few queries and as many levels; the code stays in Triton's cache on the disk."""
    maps = op.SMALL_SHAPES if device == "cpu" else op.SMALL_SHAPES[:1] * len(op.SHAPES)
    _shaped(backward_arguments(op.draw("encoder", 1, device, torch.bfloat16, shapes=maps)), *shape)()


def _module() -> ModuleType:
    from dino_lightning.model.deformable_attention import triton_backward

    return triton_backward


def _direct(module: ModuleType, arguments: tuple[Any, ...]) -> Callable[[], object]:
    """The backward kernel without PyTorch's way to it."""
    return partial(module.backward, *arguments, reference_gradient=False)


def _shaped(arguments: tuple[Any, ...], warps: int, block: int) -> Callable[[], object]:
    """As `_direct`, launched in another shape."""
    module = _module()

    def call() -> object:
        with mock.patch.multiple(module, backward_warps=lambda *_: warps, block_size=lambda *_, **__: block):
            return module.backward(*arguments, reference_gradient=False)

    return call
