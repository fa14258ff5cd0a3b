"""The Triton kernels go through the whole compiler, down to machine code, for devices that this machine lacks."""

import re

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.compiled import HALF, PTXAS, SINGLE, build, registers_and_spills
from dino_lightning.model.deformable_attention.triton_backward import _backward, backward_warps
from dino_lightning.model.deformable_attention.triton_forward import _forward
from dino_lightning.model.deformable_attention.triton_parts import NUM_WARPS, VARYING

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="Triton came without an assembler for NVIDIA devices")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_sm_86(dtype):
    for kernel, most_registers in ((_forward, 64), (_backward, 128)):
        compiled = build(kernel, 86, dtype)
        registers, spills = registers_and_spills(compiled.asm["ptx"])
        shared = compiled.metadata.shared
        print(f"{kernel.__name__} {dtype}: {registers} registers, {spills} bytes spilled, {shared} bytes shared")
        assert registers <= most_registers
        assert spills == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_other_devices(capability, dtype):
    for kernel in (_forward, _backward):
        assert build(kernel, capability, dtype, levels=1).asm["cubin"]


@pytest.mark.parametrize("dim", [8, 16, 64, 128])
def test_boxes_and_other_widths(dim):
    for kernel in (_forward, _backward):
        assert build(kernel, 86, "bf16", dim=dim, levels=1, coordinates=4, reference_gradient=True).asm["cubin"]


def test_the_gradient_of_the_maps_is_summed_in_float32_without_order():
    ptx = build(_backward, 86, "bf16", levels=1).asm["ptx"]
    kinds = set(re.findall(r"\b(?:atom|red)\.[\w.:]*add[\w.:]*", ptx))
    assert kinds
    assert all("relaxed" in kind and kind.endswith("f32") for kind in kinds)


def test_other_maps_need_no_other_kernel():
    for kernel in (_forward, _backward):
        varying = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert varying == set(VARYING)
        assert varying == {parameter.name for parameter in kernel.params if parameter.name.islower()} - {*SINGLE, *HALF}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_launch_shapes_are_those_that_the_compiler_makes_most_of(capability):
    """The shapes beside them lose registers, spill, or run more instructions; no device was asked."""
    from benchmarks.gpu.launch_shapes import figures

    forward = figures(_forward, capability, NUM_WARPS)
    smaller, larger = (figures(_forward, capability, NUM_WARPS, share) for share in (0.5, 2.0))
    assert forward["spills"] == 0 and forward["registers"] <= 56 and forward["barriers"] == 0
    name = "instructions of a query and point"
    assert smaller[name] > 1.3 * forward[name]
    assert larger["occupancy"] < 0.75 * forward["occupancy"]
    for coordinates in (2, 4):
        one, four = (figures(_backward, capability, warps, coordinates=coordinates) for warps in (1, 4))
        print(capability, coordinates, one, four)
        assert one["spills"] == 0 and one["registers"] <= (160 if capability < 90 else 64)
        assert one["registers"] <= four["registers"] + 1 and one["occupancy"] >= four["occupancy"]
        assert one["barriers"] < four["barriers"] / 7 and one[name] < four[name]
    assert backward_warps(capability) == (1 if capability < 90 else 4)
