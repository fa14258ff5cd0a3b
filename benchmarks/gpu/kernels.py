"""Parts 1 and 3: whether the kernels work here, what compiling them costs, and how code for sm_86 runs here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import op
from benchmarks.gpu.report import NotHere, Report, by_reference, last_line
from benchmarks.gpu.timing import replayed

PROJECT = Path(__file__).parents[2]
TESTS = "tests/model/test_deformable_attention.py"
Backward = Callable[..., tuple[Tensor, ...]]


def tests_and_compilation(report: Report) -> None:
    """Part 1: tests marked gpu of deformable attention; seconds to compile each kernel with an empty cache."""
    here = 90 if report.small else int("".join(map(str, torch.cuda.get_device_capability())))
    both = ("_forward", "_backward")
    compiles = [(kernel, here, "bf16", coordinates) for coordinates in (2, 4) for kernel in both]  # before a first step
    others = [("_backward", 86, "bf16", 2), ("_backward", 86, "bf16", 4), ("_backward", here, "fp32", 2)]
    with TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for kernel in compiles:
            report.attempt(_name(*kernel), partial(compile_kernel, report, *kernel))
        report.attempt("tests", lambda: run_tests(report))
        for kernel in others:
            report.attempt(_name(*kernel), partial(compile_kernel, report, *kernel))


def run_tests(report: Report) -> dict[str, Any]:
    """The summary of pytest; on a CPU of two quick tests, so that this is tried out.

    Raises:
        RuntimeError: a test failed, or none ran.
    """
    chosen = ["-m", "not gpu and not slow", "-k", "golden"] if report.small else ["-m", "gpu"]
    # without conftest.py, whose imports a bare machine lacks
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        *chosen,
        TESTS,
    ]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    summary = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), done.stderr.strip()[-300:])
    if done.returncode != 0:
        failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
        raise RuntimeError(f"pytest ended with {done.returncode}: {summary} {'; '.join(failed)}")
    return {"summary": summary.strip("= "), "seconds": time.perf_counter() - start}


def _name(kernel: str, capability: int, dtype: str, coordinates: int) -> str:
    return f"{kernel} {dtype} {'points' if coordinates == 2 else 'boxes'} sm_{capability}"


def compile_kernel(report: Report, kernel: str, capability: int, dtype: str, coordinates: int) -> dict[str, float]:
    """Seconds, registers and spilled bytes; nothing runs."""
    from benchmarks.gpu.compiled import build, kernels, registers_and_spills

    start = time.perf_counter()
    levels = 1 if report.small else 4
    built = build(getattr(kernels, kernel), capability, dtype, levels=levels, coordinates=coordinates)
    seconds = time.perf_counter() - start
    registers, spills = registers_and_spills(built.asm["ptx"])
    return {"seconds": seconds, "registers": registers, "spilled bytes": spills, "shared bytes": built.metadata.shared}


def sm_86(report: Report) -> None:
    """Part 3: the backward kernel compiled for sm_86 beside the native one and one in CUDA C++, encoder and decoder.

    The PTX for sm_86 is compiled for this device by the driver: what was decided for sm_86 (layouts, scalar atomics)
    stays. An A10G has other memory and fewer multiprocessors, so the ratio says more than the time.
    """
    other = report.settings.get("kernel")
    contestants: dict[str, Callable[[op.Inputs, Path], Backward]] = {
        "Triton": lambda inputs, folder: native,
        "Triton, native PTX through CuPy": lambda inputs, folder: compiled_for(report, inputs, None, folder),
        "Triton, sm_86": lambda inputs, folder: compiled_for(report, inputs, 86, folder),
        "NVRTC": lambda inputs, folder: in_cuda,
    }
    if other:
        contestants[other] = lambda inputs, folder: by_reference(other)
    if report.settings.get("stored"):
        from benchmarks.gpu.compiled import stored

        names = stored(Path(report.settings["stored"]), 2)
        for name in names:
            triton = name.partition("_2_")[2]
            contestants[f"sm_86, {triton}"] = partial(from_store, report, triton)
    for case in ("encoder", "decoder"):
        report.attempt(case, lambda case=case: compare(report, case, contestants))


def compare(report: Report, case: str, contestants: dict[str, Callable[[op.Inputs, Path], Backward]]) -> dict[str, Any]:
    """Times of the backward kernels in bfloat16, and how far their gradients are off those of plain PyTorch."""
    shapes = op.SMALL_SHAPES if report.small else op.SHAPES
    inputs = op.draw(case, 1, report.device, torch.bfloat16, shapes=shapes)
    arguments = backward_arguments(inputs)
    expected = torch.autograd.grad(op.stacked(inputs), inputs.leaves, inputs.grad)
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[], Callable[[], object]]] = {}
    with TemporaryDirectory() as folder:
        for name, make in contestants.items():
            try:
                backward = make(inputs, Path(folder))
                off = difference(backward(*arguments, reference_gradient=False), expected)
            except NotHere as reason:
                found[name] = {"not here": str(reason)}
            except Exception as error:
                found[name] = {"error": last_line(error)}
            else:
                found[name] = {"off": off}
                makers[name] = lambda backward=backward: partial(backward, *arguments, reference_gradient=False)
        for name, timing in replayed(makers, report.device).items():
            found[name] |= timing
    return found


def backward_arguments(inputs: op.Inputs) -> tuple[Any, ...]:
    """The arguments of `triton_backward.backward`, contiguous, with the maps head by head."""
    value = inputs.value.detach().transpose(1, 2).contiguous()
    sides = [side for shape in inputs.shapes for side in shape]
    small = (inputs.sampling_offsets.detach(), inputs.attention_logits.detach())
    return inputs.grad, value, inputs.reference_points.float(), *small, sides


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """How far the gradients of values, offsets and logits are off, as a share of the largest."""
    value, _, offsets, logits = found
    pairs = {"values": value.transpose(1, 2), "offsets": offsets, "logits": logits}
    return {
        name: float((one.float() - other.float()).abs().max() / other.float().abs().max())
        for (name, one), other in zip(pairs.items(), expected, strict=True)
    }


def native(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The Triton kernel as it is launched in training."""
    if not arguments[0].is_cuda:
        raise NotHere("to launch it needs a CUDA device")
    from dino_lightning.model.deformable_attention import triton_backward

    return triton_backward.backward(*arguments, **options)


def in_cuda(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The kernel in CUDA C++, compiled by NVRTC for this device."""
    if not arguments[0].is_cuda:
        raise NotHere("to launch it needs a CUDA device")
    from dino_lightning.model.deformable_attention import cuda_kernels

    return cuda_kernels.backward(*arguments, **options)


def compiled_for(report: Report, inputs: op.Inputs, capability: int | None, folder: Path) -> Backward:
    """`triton_backward.backward` with its kernel compiled for another device (None: for this one) and loaded by CuPy.

    Raises:
        NotHere: it compiled, and there is no CUDA device to run it.
    """
    from benchmarks.gpu.compiled import build, triton_backward

    if capability is None:
        capability = 90 if report.small else int("".join(map(str, torch.cuda.get_device_capability())))
    coordinates = inputs.reference_points.shape[-1]
    built = build(triton_backward._backward, capability, "bf16", levels=len(inputs.shapes), coordinates=coordinates)
    return launched(report, built, folder)


def from_store(report: Report, name: str, inputs: op.Inputs, folder: Path) -> Backward:
    """As `compiled_for`, of the stored kernel whose name ends so."""
    from benchmarks.gpu.compiled import stored

    found = stored(Path(report.settings["stored"]), inputs.reference_points.shape[-1])
    return launched(report, next(built for stem, built in found.items() if stem.endswith(name)), folder)


def launched(report: Report, built: Any, folder: Path) -> Backward:
    """`triton_backward.backward` with a compiled kernel in the place of its own.

    Raises:
        NotHere: there is no CUDA device to run it.
    """
    from benchmarks.gpu.compiled import Launcher, registers_and_spills, through_cupy, triton_backward

    registers, spills = registers_and_spills(built.asm["ptx"])
    told = f"sm_{built.metadata.target.arch}: {registers} registers, {spills} bytes spilled"
    print(f"{told}, {built.metadata.shared} bytes shared")
    report.need_cuda(f"compiled ({told}); to run it")
    launcher = Launcher(built, through_cupy(built, folder))

    def backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        warps = built.metadata.num_warps
        with mock.patch.multiple(triton_backward, _backward=launcher, backward_warps=lambda *_: warps):
            return triton_backward.backward(*arguments, **options)

    return backward
