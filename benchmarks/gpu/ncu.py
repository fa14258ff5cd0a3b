"""Part 10: what NVIDIA's profiler says of the backward kernel: `python -m benchmarks.gpu.ncu` is what it watches."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from shutil import which
from typing import Any

import torch

from benchmarks import op
from benchmarks.gpu.kernels import PROJECT, backward_arguments
from benchmarks.gpu.report import NotHere, Report

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats")


def backward(report: Report) -> None:
    """The metrics of one launch of the backward kernel at the encoder's size."""
    report.attempt("backward kernel", lambda: profile(report))


def profile(report: Report) -> dict[str, Any]:
    """Metric by name, with its unit.

    Raises:
        NotHere: there is no profiler, or no device.
        RuntimeError: it failed; says with what.
    """
    if report.small:
        run_backward("cpu", 1)
    report.need_cuda("the profiler")
    if which("ncu") is None:
        raise NotHere("it needs ncu, NVIDIA's Nsight Compute")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = ["ncu", "--csv", "--page", "details", "--apply-rules", "no", "--clock-control", "none", *sections]
    command += ["--kernel-name", "_backward"]
    command += ["--launch-skip", "1", "--launch-count", "1", sys.executable, "-m", "benchmarks.gpu.ncu"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    found = metrics(done.stdout)
    if done.returncode != 0 or not found:
        said = (done.stdout + done.stderr).strip().splitlines()
        print("\n".join(said))
        raise RuntimeError(f"ncu ended with {done.returncode}: {' '.join(said[-3:])[-300:]}")
    return found


def metrics(text: str) -> dict[str, str]:
    """The rows of ncu's CSV, which follow lines of its own and of the program."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in csv.DictReader(io.StringIO("\n".join(lines)))
        if row.get("Metric Name")
    }


def run_backward(device: str, times: int) -> None:
    """Launch the backward kernel so often: on a CPU in Triton's interpreter, on a few queries."""
    from dino_lightning.model.deformable_attention import triton_backward

    shapes = op.SHAPES if device == "cuda" else op.SMALL_SHAPES
    inputs = op.draw("encoder", 2 if device == "cuda" else 1, device, torch.bfloat16, shapes=shapes)
    for _ in range(times):
        triton_backward.backward(*backward_arguments(inputs), reference_gradient=False)


if __name__ == "__main__":
    run_backward("cuda", 2)
    torch.cuda.synchronize()
