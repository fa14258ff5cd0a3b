"""The Triton kernels go through the whole compiler, down to machine code, for devices that this machine lacks."""

import inspect
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dino_lightning.model.deformable_attention import triton_kernels as kernels  # noqa: E402

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
SINGLE = ("reference", "grad_value", "grad_reference", "grad_weights")  # float32 always
HALF = ("value", "offsets", "logits", "out", "grad_out", "grad_offsets", "grad_logits")

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="Triton came without an assembler for NVIDIA devices")


def build(kernel, capability, dtype, *, dim=32, levels=4, coordinates=2, reference_gradient=False):
    itemsize = 4 if kernel is kernels._backward or dtype == "fp32" else 2
    constants = {
        "HEADS": 8,
        "LEVELS": levels,
        "POINTS": 4,
        "DIM": dim,
        "COORDINATES": coordinates,
        "REFERENCE_GRADIENT": reference_gradient,
        "BLOCK": kernels.block_size(dim, bytes_per_thread=16, itemsize=itemsize),
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(SINGLE, "*fp32") | dict.fromkeys(HALF, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if name in SINGLE + HALF}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    else:  # Triton 3.2
        source = ASTSource(fn=kernel, signature=signature, constants=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": kernels.NUM_WARPS})


def registers_and_spills(ptx, folder):
    """Of the most demanding function; in registers and bytes."""
    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    command = [PTXAS, "-v", f"-arch={target}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = (re.findall(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return tuple(max(map(int, found)) for found in numbers)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_sm_86(dtype, tmp_path):
    for kernel, most_registers in ((kernels._forward, 96), (kernels._backward, 192)):
        compiled = build(kernel, 86, dtype)
        registers, spills = registers_and_spills(compiled.asm["ptx"], tmp_path)
        shared = compiled.metadata.shared
        print(f"{kernel.__name__} {dtype}: {registers} registers, {spills} bytes spilled, {shared} bytes shared")
        assert registers <= most_registers
        assert spills <= 32


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_other_devices(capability, dtype):
    for kernel in (kernels._forward, kernels._backward):
        assert build(kernel, capability, dtype, levels=1).asm["cubin"]


@pytest.mark.parametrize("dim", [8, 16, 64, 128])
def test_boxes_and_other_widths(dim):
    for kernel in (kernels._forward, kernels._backward):
        assert build(kernel, 86, "bf16", dim=dim, levels=1, coordinates=4, reference_gradient=True).asm["cubin"]


def test_the_gradient_of_the_maps_is_summed_in_float32_without_order():
    ptx = build(kernels._backward, 86, "bf16", levels=1).asm["ptx"]
    kinds = set(re.findall(r"\b(?:atom|red)\.[\w.:]*add[\w.:]*", ptx))
    assert kinds
    assert all("relaxed" in kind and kind.endswith("f32") for kind in kinds)


def test_other_maps_need_no_other_kernel():
    for kernel in (kernels._forward, kernels._backward):
        varying = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert varying == set(kernels.VARYING)
        assert varying == {parameter.name for parameter in kernel.params if parameter.name.islower()} - {*SINGLE, *HALF}
