"""What NVRTC makes of the backward kernel in CUDA C++: `python -m benchmarks.gpu.compiled_cuda` prints it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import table
from dino_lightning.model.deformable_attention import cuda_kernels, nvrtc

WARPS = {80: 64, 86: 48, 89: 48, 90: 64}  # that a multiprocessor can hold, of 65,536 registers
REGISTERS = 65536
CASES = (  # dtype, coordinates, whether reference points get a gradient
    (torch.bfloat16, 2, False),
    (torch.bfloat16, 4, False),
    (torch.bfloat16, 4, True),
    (torch.float32, 2, False),
)


def tools() -> Path:
    """The folder of `cuobjdump` and `nvdisasm`, which come with Triton."""
    found = importlib.util.find_spec("triton")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "backends/nvidia/bin"


def tools_missing() -> str | None:
    """What is missing here to compile and to look at machine code; None if nothing is."""
    try:
        nvrtc.library()
    except OSError as reason:
        return f"there is no NVRTC ({reason})"
    if importlib.util.find_spec("triton") is None or not (tools() / "nvdisasm").exists():
        return "cuobjdump and nvdisasm, which come with Triton, are not here"
    return None


def figures(
    capability: int,
    coordinates: int,
    dtype: torch.dtype,
    *,
    reference_gradient: bool = False,
    levels: int = 4,
    points: int = 4,
) -> dict[str, float]:
    """Registers, stack and instructions of the kernel of eight heads, and which share of the warps has room.

    All is unrolled, so that a warp runs each instruction once at most: those of one query and head.
    """
    macros = cuda_kernels.macros(
        heads=8,
        levels=levels,
        points=points,
        coordinates=coordinates,
        dtypes=(dtype,) * 3,
        reference_gradient=reference_gradient,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        source = cuda_kernels.SOURCE.read_text(encoding="utf-8")
        path.write_bytes(nvrtc.compiled(source, macros, capability, Path(folder)))
        usage = _said("cuobjdump", "-res-usage", path)
        code = _said("nvdisasm", "-c", path)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*?);", code)
    names = Counter(name.split(".")[0] for name, _ in lines)
    registers, stack, shared = (int(one) for one in re.findall(r"(?:REG|STACK|SHARED):(\d+)", usage)[:3])
    of_warp = -(-registers // 8) * 8 * 32
    blocks = REGISTERS // (of_warp * cuda_kernels.WARPS)
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local loads and stores": names["LDL"] + names["STL"],
        "barriers": names["BAR"],
        "occupancy": min(1.0, blocks * cuda_kernels.WARPS / WARPS[capability]),
        "instructions": sum(names.values()) - names["NOP"],
        "shuffles": names["SHFL"],
        "additions": names["RED"] + names["REDG"],
    }


def _said(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tools() / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print a table by device, dtype and coordinates."""
    rows = [("device", "inputs", "registers", "stack", "occupancy", "instructions", "shuffles", "additions")]
    for capability in WARPS:
        for dtype, coordinates, gradient in CASES:
            found = figures(capability, coordinates, dtype, reference_gradient=gradient)
            kind = "points" if coordinates == 2 else "boxes with their gradient" if gradient else "boxes"
            numbers = (found[name] for name in ("registers", "stack"))
            rest = (found[name] for name in ("instructions", "shuffles", "additions"))
            inputs = f"{str(dtype).removeprefix('torch.')}, {kind}"
            shown = (*map(str, numbers), f"{found['occupancy']:.0%}", *map(str, rest))
            rows.append((f"sm_{capability}", inputs, *shown))
    print(table(rows))


if __name__ == "__main__":
    main()
