"""Part 0: what the device is, and what it reaches with plain copies and matrix products."""

from __future__ import annotations

from importlib import metadata
from shutil import which
from typing import Any

import torch

from benchmarks.gpu.peaks import peaks_of
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import replayed

PACKAGES = ("torch", "triton", "lightning", "torchmetrics", "scipy", "timm", "transformers", "cupy-cuda13x", "numpy")
TOOLS = ("nvidia-smi", "ncu", "nvcc", "ptxas")


def ceilings(report: Report) -> None:
    """Keep `device`, `packages`, `copy` (GB/s) and `products` (TFLOP/s by precision)."""
    report.attempt("device", lambda: _device(report.device))
    report.attempt("packages", _packages)
    report.attempt("copy", lambda: _copy(report))
    for precision in ("bf16", "fp16", "tf32", "fp32"):
        report.attempt(f"product {precision}", lambda precision=precision: _product(report, precision))


def _device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"name": "CPU", "peaks": {}}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory in bytes": properties.total_memory,
        "L2 in bytes": getattr(properties, "L2_cache_size", None),
        "cudnn": torch.backends.cudnn.version(),
        "peaks": peaks_of(properties.name),
    }


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {tool: which(tool) for tool in TOOLS}


def _copy(report: Report) -> dict[str, Any]:
    """GB/s of a copy on the device, bytes read and written both counted; far larger than its cache."""
    size = 2**22 if report.small else 2**31
    source = torch.randn(size // 4, device=report.device)
    target = torch.empty_like(source)
    timing = replayed({"copy": lambda: lambda: target.copy_(source)}, report.device, repeats=5)["copy"]
    return {**timing, "bytes": 2 * size, "gb_per_second": 2 * size / timing["median"] / 1e9}


def _product(report: Report, precision: str) -> dict[str, Any]:
    """TFLOP/s of a large square product of random matrices."""
    side = 256 if report.small else 8192 if precision in ("bf16", "fp16") else 4096
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    one, other = (torch.randn(side, side, device=report.device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        timing = replayed({"product": lambda: lambda: one @ other}, report.device, repeats=5)["product"]
    finally:
        torch.set_float32_matmul_precision(before)
    return {**timing, "side": side, "tflops": 2 * side**3 / timing["median"] / 1e12}
