"""The kernels of deformable attention compiled ahead of time, for any device, and loaded through CuPy.

`python -m benchmarks.gpu.compiled DIR` stores the backward kernels for sm_86 as the Triton that is installed compiles
them, so that `python -m benchmarks gpu --stored DIR` can run them where another version is (they differ much: see
benchmarks/RESULTS.md).
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dino_lightning.model.deformable_attention import triton_backward, triton_parts

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
SINGLE = ("reference", "grad_value", "grad_reference", "grad_weights")  # float32 always
HALF = ("value", "offsets", "logits", "out", "grad_out", "grad_offsets", "grad_logits")


def build(
    kernel: Any,
    capability: int,
    dtype: str,
    *,
    dim: int = 32,
    levels: int = 4,
    coordinates: int = 2,
    reference_gradient: bool = False,
    ptx_version: int | None = None,
    warps: int | None = None,
    share: float = 1.0,
) -> Any:
    """Compile a kernel as a call of it would be, for a device that need not be here.

    Args:
        kernel: `triton_forward._forward` or `triton_backward._backward`.
        capability: 86 for sm_86.
        dtype: fp32, bf16 or fp16, of values, offsets and logits.
        dim: channels of a head.
        levels: of the maps; 4 points each.
        coordinates: 2 for reference points, 4 for boxes.
        reference_gradient: whether the reference points get a gradient.
        ptx_version: 80 for version 8.0, which older drivers and assemblers take; by default the newest that Triton has.
        warps: of a program; by default as it is launched.
        share: of the queries that a program of so many warps would take.

    Returns:
        Triton's compiled kernel: `asm["ptx"]`, `asm["cubin"]`, `metadata`; `constants` is added.
    """
    backward = kernel is triton_backward._backward
    itemsize = 4 if backward or dtype == "fp32" else 2
    if warps is None:
        warps = triton_backward.backward_warps(capability) if backward else triton_parts.NUM_WARPS
    block = triton_parts.block_size(dim, bytes_per_thread=16, itemsize=itemsize, warps=warps)
    constants = {
        "HEADS": 8,
        "LEVELS": levels,
        "POINTS": 4,
        "DIM": dim,
        "COORDINATES": coordinates,
        "REFERENCE_GRADIENT": reference_gradient,
        "BLOCK": max(1, int(share * block)),
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(SINGLE, "*fp32") | dict.fromkeys(HALF, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if name in SINGLE + HALF}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    else:  # Triton 3.2
        source = ASTSource(fn=kernel, signature=signature, constants=constants)
    options = {"num_warps": warps} | ({} if ptx_version is None else {"ptx_version": ptx_version})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    compiled.constants = constants
    return compiled


def registers_and_spills(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, of the most demanding function, for the PTX's own target."""
    found = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert found is not None, "the PTX names no target"
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [PTXAS, "-v", f"-arch={found[1]}", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = (re.findall(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    registers, spills = (max(map(int, one)) for one in numbers)
    return registers, spills


def entry(ptx: str) -> tuple[str, list[str]]:
    """Name of the PTX's kernel and the types of its parameters, such as u64 and u32."""
    found = re.search(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
    assert found is not None, "the PTX has no kernel"
    return found[1], re.findall(r"\.param\s+\.(\w+)", found[2])


class Launcher:
    """A compiled kernel that is launched as Triton launches its own: `launcher[grid](*arguments, **constants)`.

    So it can stand in the place of `triton_backward._backward`, whose caller stays as it is.

    Args:
        compiled: what `build` returned.
        function: takes grid, block, arguments and `shared_mem`; `through_cupy` makes one.
    """

    def __init__(self, compiled: Any, function: Callable[..., object]) -> None:
        self._compiled, self._function = compiled, function
        _, self._types = entry(compiled.asm["ptx"])

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
        metadata = self._compiled.metadata
        if constants != self._compiled.constants or num_warps != metadata.num_warps:
            raise ValueError(f"compiled for {self._compiled.constants}, {metadata.num_warps} warps, not {constants}")
        values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        values += [0] * (len(self._types) - len(values))  # Triton's own: scratch memory, of which there is none
        typed = tuple(
            np.uint64(v) if "64" in kind else np.int32(v) for v, kind in zip(values, self._types, strict=True)
        )
        self._function(grid, (32 * num_warps,), typed, shared_mem=metadata.shared)


def through_cupy(compiled: Any, folder: Path) -> Callable[..., None]:
    """The kernel's PTX, loaded by the driver, which compiles it for the device; runs on PyTorch's current stream.

    Args:
        compiled: what `build` returned.
        folder: for the PTX file.
    """
    import cupy

    name, _ = entry(compiled.asm["ptx"])
    path = folder / f"{name}_{compiled.metadata.target.arch}.ptx"
    path.write_text(compiled.asm["ptx"])
    kernel = cupy.RawModule(path=str(path)).get_function(name)

    def launch(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_mem: int) -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel(grid, block, arguments, shared_mem=shared_mem)

    return launch


def store(folder: Path) -> list[Path]:
    """Write the backward kernels in bf16 for sm_86, for reference points and boxes, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for coordinates in (2, 4):
        built = build(triton_backward._backward, 86, "bf16", coordinates=coordinates, ptx_version=80)
        found = {"ptx": built.asm["ptx"], "shared": built.metadata.shared, "num_warps": built.metadata.num_warps}
        path = folder / f"backward_bf16_sm_86_{coordinates}_triton_{triton.__version__}.json"
        path.write_text(json.dumps({**found, "arch": 86, "constants": built.constants}))
        paths.append(path)
    return paths


def stored(folder: Path, coordinates: int) -> dict[str, Any]:
    """The kernels of `store` for so many coordinates, by name: what `Launcher` and `through_cupy` need of each.

    Raises:
        SystemExit: there are none.
    """
    found = {}
    for path in sorted(folder.glob(f"backward_*_{coordinates}_*.json")):
        told = json.loads(path.read_text())
        target = SimpleNamespace(arch=f"{told['arch']}_{path.stem}")
        metadata = SimpleNamespace(shared=told["shared"], num_warps=told["num_warps"], target=target)
        found[path.stem] = SimpleNamespace(asm={"ptx": told["ptx"]}, metadata=metadata, constants=told["constants"])
    if not found:
        raise SystemExit(f"{folder} has no kernels; python -m benchmarks.gpu.compiled {folder} stores some.")
    return found


if __name__ == "__main__":
    print("\n".join(map(str, store(Path(sys.argv[1])))))
