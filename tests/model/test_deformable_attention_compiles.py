"""The Triton kernels go through the whole compiler, down to machine code, for devices that this machine lacks."""

import re

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.compiled import HALF, PTXAS, SINGLE, build, registers_and_spills
from dino_lightning.model.deformable_attention import triton_kernels as kernels

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="Triton came without an assembler for NVIDIA devices")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_sm_86(dtype):
    for kernel, most_registers in ((kernels._forward, 96), (kernels._backward, 192)):
        compiled = build(kernel, 86, dtype)
        registers, spills = registers_and_spills(compiled.asm["ptx"])
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
