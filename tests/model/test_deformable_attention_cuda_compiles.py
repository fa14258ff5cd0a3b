"""The backward kernel in CUDA C++ goes through NVRTC, down to machine code, for devices that this machine lacks."""

import pytest
import torch

from benchmarks.gpu.compiled_cuda import figures, tools_missing
from dino_lightning.model.deformable_attention import cuda_kernels, nvrtc

pytestmark = pytest.mark.skipif(tools_missing() is not None, reason=str(tools_missing()))


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
)
def test_registers_spills_occupancy_and_instructions(capability, coordinates, dtype):
    found = figures(capability, coordinates, dtype, reference_gradient=coordinates == 4)
    print(capability, coordinates, dtype, found)
    assert found["registers"] <= 40
    assert found["stack"] == found["local loads and stores"] == found["barriers"] == found["shared"] == 0
    assert found["instructions"] <= 2000
    assert found["occupancy"] == (1.0 if capability in (86, 89) else 0.75)


@pytest.mark.parametrize("capability", [80, 86, 89])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("levels", "points"), [(5, 3), (5, 4), (8, 4)])
def test_other_numbers_of_levels_and_points_keep_all_in_registers(capability, coordinates, levels, points):
    for reference_gradient in (False, True):
        options = {"reference_gradient": reference_gradient, "levels": levels, "points": points}
        found = figures(capability, coordinates, torch.bfloat16, **options)
        assert found["registers"] <= (40 if levels * points <= 16 else 48) and found["stack"] == 0


def test_machine_code_is_kept_on_the_disk_until_something_changes(tmp_path, monkeypatch):
    source = 'extern "C" __global__ void nothing(float* x) { *x = NUMBER; }'
    compilations = []
    compile_ = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *given: compilations.append(given) or compile_(*given))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = nvrtc.compiled(source, {"NUMBER": 1}, 86)
    (kept,) = (tmp_path / "nvrtc").iterdir()
    assert kept.read_bytes() == first == nvrtc.compiled(source, {"NUMBER": 1}, 86)
    assert len(compilations) == 1
    kept.write_bytes(b"half a file")  # as another program might leave it
    assert nvrtc.compiled(source, {"NUMBER": 1}, 86) == first == kept.read_bytes()
    for change in ((source, {"NUMBER": 2}, 86), (source, {"NUMBER": 1}, 80), (source + " ", {"NUMBER": 1}, 86)):
        nvrtc.compiled(*change)
    monkeypatch.setattr(nvrtc, "_version", lambda: (99, 0))
    nvrtc.compiled(source, {"NUMBER": 1}, 86)
    assert len(compilations) == 6 and len(list((tmp_path / "nvrtc").iterdir())) == 5


def test_a_cache_that_cannot_be_written_costs_no_more_than_a_compilation(tmp_path):
    (tmp_path / "file").write_text("")
    source = 'extern "C" __global__ void nothing() {}'
    assert nvrtc.compiled(source, {}, 86, tmp_path / "file" / "nvrtc").startswith(b"\x7fELF")


def test_what_does_not_compile_is_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"NVRTC does not compile the kernel: .*error"):
        nvrtc.compiled("this is no program", {}, 86, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_sizes_are_left_to_triton():
    assert "32 channels" in cuda_kernels.missing(16, 16)
    assert "32 levels times points" in cuda_kernels.missing(32, 33)
    assert cuda_kernels.missing(32, 32) is None
