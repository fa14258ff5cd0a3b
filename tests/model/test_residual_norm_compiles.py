"""The kernels of residual norms go through the whole compiler, for devices that this machine lacks."""

import inspect

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from benchmarks.gpu.compiled import PTXAS, registers_and_spills
from dino_lightning.model import residual_norm_kernels as kernels

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="Triton came without an assembler for NVIDIA devices")
LOWERED = ("branch", "lowered", "positioned", "grad_lowered", "grad_positioned", "grad_branch")


def build(kernel, capability, low, dim=256):
    columns, rows = kernels.blocks(dim, elements=2048 if kernel is kernels._forward else 1024)
    constants = {"DIM": dim, "COLUMNS": columns, "ROWS": rows, "ALIKE": low == "fp32"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(kernels.VARYING, "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(LOWERED, f"*{low}")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        pointers = [index for index, name in enumerate(signature) if signature[name].startswith("*")]
        aligned = {(index,): [["tt.divisibility", 16]] for index in pointers}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    else:  # Triton 3.2
        source = ASTSource(fn=kernel, signature=signature, constants=constants)
    options = {"num_warps": kernels.NUM_WARPS}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("low", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_few_registers_and_no_atomics(capability, low):
    for kernel in (kernels._forward, kernels._backward):
        ptx = build(kernel, capability, low).asm["ptx"]
        registers, spills = registers_and_spills(ptx)
        print(f"{kernel.__name__} sm_{capability} {low}: {registers} registers, {spills} bytes spilled")
        assert registers <= 80 and spills == 0
        assert ".v4." in ptx, "16 bytes at a time"
        assert "atom." not in ptx and "red.global" not in ptx


def test_other_rows_need_no_other_kernel():
    for kernel in (kernels._forward, kernels._backward):
        varying = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert varying == {name for name in kernels.VARYING if name in kernel.arg_names}
