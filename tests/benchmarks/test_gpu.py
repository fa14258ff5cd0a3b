"""The measurements of a GPU, on a CPU: every part runs, whatever happens to one of them, and its results are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, match
from benchmarks.gpu import attention, matching, steps, table
from benchmarks.gpu.peaks import peaks_of, projected_seconds
from benchmarks.step import is_product
from dino_lightning.losses import Criterion

PROJECT = Path(__file__).parents[2]
MISSING = ("jsonargparse", "pycocotools", "faster_coco_eval", "msgspec", "simplejpeg")  # on a bare machine
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize(
    ("name", "bf16", "bandwidth"),
    [
        ("NVIDIA H200", 989.4, 4800),
        ("NVIDIA H100 80GB HBM3", 989.4, 3350),
        ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A10G", 70, 600),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40S", 362, 864),
        ("Tesla T4", None, 320),
        ("Tesla V100-SXM2-16GB", None, 900),
    ],
)
def test_peaks_by_the_name_of_the_device(name, bf16, bandwidth):
    found = peaks_of(name)
    assert (found.get("bf16"), found["gb_per_second"]) == (bf16, bandwidth)


@pytest.mark.parametrize("name", ["NVIDIA A10", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "AMD Instinct MI300X"])
def test_an_unknown_device_has_no_peaks(name):
    assert peaks_of(name) == {}


def test_a_projection_scales_products_and_the_rest_apart():
    assert projected_seconds(0.01, 0.0, tflops=700, gb_per_second=4800) == pytest.approx(0.1)
    assert projected_seconds(0.0, 0.01, tflops=700, gb_per_second=4800) == pytest.approx(0.08)


FOUND = {
    "date": "2026-11-29",
    "command": "python -m benchmarks gpu",
    "settings": {"device": "cuda"},
    "environment": {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "commit": "abc"},
    "parts": {
        "3": {
            "title": "backward kernel compiled for sm_86",
            "status": "partial",
            "seconds": 12.0,
            "error": "encoder: see there",
            "results": {
                "encoder": {
                    "Triton": {"median": 0.001, "spread": 0.1, "by": "graph", "off": {"values": 1e-3}},
                    "Triton, sm_86": {"median": 0.003, "spread": 0.1, "by": "graph"},
                    "NVRTC": {"not here": "not built"},
                },
                "decoder": {"error": "RuntimeError: a | b"},
            },
        },
        "4": {"title": "step", "status": "out of time", "seconds": 80.0, "error": "Killed", "results": {}},
    },
}


AS_ON_A_GPU = {
    "2": {
        "encoder batch 2 bf16": {
            "forward": {"kernel": {"median": 2e-4, "spread": 0.1, "by": "graph"}},
            "backward": {"kernel": {"median": 8e-4, "spread": 0.1, "by": "launches", "no graph": "it waits"}},
            "forward GB/s": 812.0,
            "backward GB/s": 406.0,
            "projection for A10G": {"forward": 0.0015, "backward": 0.006},
        }
    },
    "4": {
        "800x1333 batch 2": {
            "images": 2,
            "steps": 1,
            "images per second": 20.0,
            "seconds": {"median": 0.1, "spread": 0.2},
            "peak memory in bytes": 4 * 2**30,
            "kernels": 4000,
            "busy": 0.25,
            "kernel seconds": 0.02,
            "product seconds": 0.01,
            "share of peak": 0.028,
        }
    },
}


def test_what_only_a_gpu_says_is_in_the_table():
    step = AS_ON_A_GPU["4"]["800x1333 batch 2"]
    step |= steps.projection(step, {"bf16": 700.0, "gb_per_second": 4800.0})
    assert step["projection for A10G"]["seconds a step in kernels"] == pytest.approx(0.01 * 10 + 0.01 * 8)
    part = {"title": "title", "status": "ok", "seconds": 1.0}
    printed = table.as_text({**FOUND, "parts": {n: {**part, "results": one} for n, one in AS_ON_A_GPU.items()}})
    for expected in (
        "812 GB/s at least; A10G, projected: 1.500 ms",
        "no graph: it waits",
        "4000",
        "25%",
        "2.8%",
        "11.1",
    ):
        assert expected in printed


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("nvjet_tst_128x64_64x8_2x1_v_bz_NNT", True),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", True),
        ("fmha_cutlassB_bf16_aligned_64x64_k32_sm80(params)", True),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::conv_thing>", False),
        ("triton_poi_fused_addmm_convolution_relu_0", False),
        ("_backward", False),
        ("Memcpy HtoD (Pageable -> Device)", False),
    ],
)
def test_kernels_that_multiply_are_told_by_their_names(name, product):
    assert is_product(name) == product


def test_the_section_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text(f"# Results\n\nbefore\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    table.write_section(FOUND, path)
    table.write_section(FOUND, path)  # again: the same
    text = path.read_text()
    assert text.startswith("# Results\n\nbefore\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert text.count("NVIDIA H200, 2026-11-29") == 1 and "torch 2.11.0" in text
    assert "| encoder | Triton, sm_86 | 3.000 (10%) | 3.00 |  |" in text
    assert "| encoder | NVRTC |  |  | not here: not built |" in text
    assert "- decoder: error: RuntimeError: a | b" in text
    assert "out of time after 80 s" in text


@pytest.mark.parametrize(
    "text", ["nothing", f"{table.END}\n{table.BEGIN}", f"{table.BEGIN}\n{table.BEGIN}\n{table.END}"]
)
def test_a_file_without_the_markers_is_left_alone(tmp_path, text):
    path = tmp_path / "RESULTS.md"
    path.write_text(text)
    with pytest.raises(SystemExit, match="once each"):
        table.write_section(FOUND, path)
    assert path.read_text() == text


def test_results_that_a_table_was_not_made_for_do_not_stop_the_others():
    parts = {number: {**FOUND["parts"]["3"], "results": {"odd": {"value": 1}}} for number in ("0", "1", "4", "8", "10")}
    printed = table.as_text({**FOUND, "parts": {**parts, "3": FOUND["parts"]["3"]}})
    assert printed.count("no table") == 2 and "KeyError: 'summary'" in printed and "Triton, sm_86" in printed


def test_the_results_file_has_the_markers():
    text = gpu.RESULTS.read_text(encoding="utf-8")
    assert text.count(table.BEGIN) == text.count(table.END) == 1


def test_the_edits_fit_the_text_of_the_kernel(tmp_path):
    pytest.importorskip("triton")
    for pattern, replacement in attention.EDITS.values():
        module = attention.edited(attention._module(), pattern, replacement, tmp_path)
        assert module._backward is not attention._module()._backward
    with pytest.raises(ValueError, match="found 0 times"):
        attention.edited(attention._module(), "no such text", "", tmp_path)


def test_a_kernel_compiled_ahead_gets_as_many_arguments_as_it_takes(tmp_path):
    compiled = pytest.importorskip("benchmarks.gpu.compiled", reason="needs Triton")
    from benchmarks import op
    from benchmarks.gpu.kernels import backward_arguments

    if not compiled.PTXAS.exists():
        pytest.skip("Triton came without an assembler for NVIDIA devices")
    launched = []
    built = compiled.build(compiled.triton_backward._backward, 86, "bf16", levels=1)
    launcher = compiled.Launcher(built, lambda *arguments, **options: launched.append((*arguments, options)))
    inputs = op.draw("encoder", 1, "cpu", torch.bfloat16, shapes=op.SMALL_SHAPES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.triton_backward, "_backward", launcher)
        patch.setattr(compiled.triton_backward, "capability", lambda device: 86)
        compiled.triton_backward.backward(*backward_arguments(inputs), reference_gradient=False)
        with pytest.raises(ValueError, match="compiled for"):
            compiled.triton_backward.backward(*backward_arguments(inputs), reference_gradient=True)
    path, _ = compiled.store(tmp_path)  # as this Triton compiles them; read back, they launch as before
    ((name, again),) = compiled.stored(tmp_path, 2).items()
    assert name == path.stem and again.constants["COORDINATES"] == 2 and again.metadata.num_warps == 1
    assert compiled.entry(again.asm["ptx"])[1] == compiled.entry(built.asm["ptx"])[1]
    with pytest.raises(SystemExit, match="has no kernels"):
        compiled.stored(tmp_path / "empty", 2)
    (grid, block, arguments, options) = launched[0]
    _, types = compiled.entry(built.asm["ptx"])
    assert grid == (16,) and block == (32,) and options == {"shared_mem": built.metadata.shared}
    assert [type(one) for one in arguments] == [np.uint64 if kind == "u64" else np.int32 for kind in types]
    assert arguments[types.index("u32")] == 6  # the number of queries comes first
    assert all(one == 0 for one in arguments[21:])  # no maps beyond the first level, and no scratch memory


def test_matching_while_the_costs_travel_changes_nothing():
    output, targets = match.example(10, "cpu")
    expected = match.ours(Criterion(), output, targets)
    actual = match.ours(Criterion(matcher=matching.CopiedFirst()), output, targets)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_parts_are_chosen_by_number():
    assert gpu._numbers("4, 0,4") == (0, 4)
    with pytest.raises(gpu.argparse.ArgumentTypeError, match="choose from"):
        gpu._numbers("0,11")


def run(monkeypatch, tmp_path, parts, *arguments):
    """The command with parts of our own; returns the exit of `main` and what it wrote."""
    monkeypatch.setattr(
        gpu, "PARTS", {n: gpu.Part(f"part {n}", 10, 10, f"tests.benchmarks.gpu_parts:{name}") for n, name in parts}
    )
    output = tmp_path / "out" / "gpu.json"
    numbers = ",".join(str(n) for n, _ in parts)
    command = ["gpu", "--device", "cpu", "--parts", numbers, "--output", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    try:
        gpu.main()
        code = None
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(output.read_text())


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_is_told_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    parts = [(0, "raises"), (1, "sleeps"), (2, "measures")]
    code, found = run(monkeypatch, tmp_path, parts, "--minutes", "1.2")
    assert code is None
    failed, late, measured = found["parts"].values()
    assert failed["status"] == "failed" and failed["error"] == "RuntimeError: the device fell off the bus"
    assert late["status"] == "out of time" and late["results"] == {"before": {"value": 1}}
    assert measured["status"] == "partial" and measured["error"].startswith("second")
    assert measured["results"]["second"] == {"error": "ZeroDivisionError: division by zero"}
    assert measured["results"]["third"] == {"value": 2}
    assert "skipped" in measured["results"]["fourth"]
    assert measured["results"]["fifth"] == {"not here": "this needs a CUDA device"}
    printed = capsys.readouterr().out
    assert "the device fell off the bus" in printed and "out of time" in printed and "division by zero" in printed
    assert torch.__version__.startswith(found["environment"]["versions"]["torch"])


@pytest.mark.slow
def test_without_a_part_that_measured_anything_the_exit_code_tells(monkeypatch, tmp_path):
    code, _ = run(monkeypatch, tmp_path, [(0, "raises")], "--minutes", "1")
    assert code == "No part measured anything; each says why in its line of the table."


@pytest.mark.slow
def test_a_bare_machine_runs_the_parts(tmp_path):
    """Without the packages that only the command line and evaluation need; the whole fit says so and is left out."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--minutes", "4", "--output", str(output)]
    done = subprocess.run(
        [*command, "--parts", "0,3,6,7,8"], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())["parts"]
    assert {part["status"] for part in found.values()} == {"ok"}, done.stdout
    assert (
        "jsonargparse" in found["8"]["results"]["fit"]["not here"]
        or "msgspec" in found["8"]["results"]["fit"]["not here"]
    )
    assert found["0"]["results"]["product bf16"]["tflops"] > 0
    for name in ("copied first", "solved on the device"):
        assert found["7"]["results"]["10 boxes"][name]["off"]["loss"] < 1e-5


def test_what_the_parts_import_a_bare_machine_has():
    modules = ("attention", "ceilings", "compiled", "kernels", "levers", "matching", "ncu", "steps")
    code = BLOCK + f"import importlib\nfor name in {modules!r}: importlib.import_module('benchmarks.gpu.' + name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
