"""What the compiler makes of other launch shapes of the Triton kernels: `python -m benchmarks.gpu.launch_shapes`.

Nothing runs; the table says which shapes a device should try first, not which is the fastest. It takes a quarter of an
hour on one core for all devices; `python -m benchmarks.gpu.launch_shapes 86` takes one of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.compiled import build, registers_and_spills
from benchmarks.gpu.compiled_cuda import REGISTERS, WARPS, tools
from benchmarks.measure import table
from dino_lightning.model.deformable_attention.triton_backward import _backward
from dino_lightning.model.deformable_attention.triton_forward import _forward

SHARED = {80: 164, 86: 100, 89: 100, 90: 228}  # KiB of a multiprocessor
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32}  # of a multiprocessor, at most
SHAPES = tuple((warps, share) for warps in (1, 2, 4, 8) for share in (0.5, 1.0, 2.0))


def figures(kernel: Any, capability: int, warps: int, share: float = 1.0, **changes: Any) -> dict[str, float]:
    """Registers, spilled bytes, occupancy, and of the loop over points: instructions of a query, and barriers.

    Args:
        kernel: `triton_forward._forward` or `triton_backward._backward`, in bfloat16 by default.
        capability: 86 for sm_86.
        warps: of a program.
        share: of the queries with which every thread has 16 bytes of one query's channels.
        **changes: other arguments of `build`.
    """
    built = build(kernel, capability, changes.pop("dtype", "bf16"), warps=warps, share=share, **changes)
    registers, spills = registers_and_spills(built.asm["ptx"])
    code = _machine_code(built.asm["cubin"])
    names = [name for name, _ in code["lines"]]
    loop = Counter(names[slice(*code["loops"][0])])
    block, shared = built.constants["BLOCK"], built.metadata.shared
    programs = min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), WARPS[capability] // warps, BLOCKS[capability])
    if shared:
        programs = min(programs, SHARED[capability] * 1024 // (shared + 1024))
    return {
        "warps": warps,
        "queries": block,
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "occupancy": programs * warps / WARPS[capability],
        "instructions of a query and point": loop.total() * warps / block,
        "barriers in the loop": loop["BAR"],
        "barriers": names.count("BAR"),
    }


def _machine_code(cubin: bytes) -> dict[str, Any]:
    """Instructions by name, and first and last of each loop, the longest but one first: levels are unrolled."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([tools() / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in said.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(lines)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            lines.append((found[1].split(".")[0], found[2]))
    loops = []
    for end, (name, rest) in enumerate(lines):
        target = re.search(r"(\.L_x_\w+)", rest) if name == "BRA" else None
        if target is not None and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end + 1))
    loops.sort(key=lambda loop: loop[0] - loop[1])
    return {"lines": lines, "loops": loops[1:] or loops}


def main() -> None:
    """Print a table by device, kernel and shape."""
    chosen = [int(one) for one in sys.argv[1:]] or [80, 86, 90]
    rows = [("device", "kernel", "warps", "queries", "registers", "spills", "occupancy", "instructions", "barriers")]
    for capability in chosen:
        for kernel, coordinates in ((_forward, 2), (_backward, 2), (_backward, 4)):
            for shape in SHAPES:
                found = figures(kernel, capability, *shape, coordinates=coordinates)
                inputs = "points" if coordinates == 2 else "boxes"
                numbers = [str(found[name]) for name in ("warps", "queries", "registers", "spills")]
                loop = f"{found['instructions of a query and point']:.0f}"
                rest = [f"{found['occupancy']:.0%}", loop, str(found["barriers"])]
                rows.append((f"sm_{capability}", f"{kernel.__name__} {inputs}", *numbers, *rest))
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
