"""The measurement of latency runs, small, and says what was measured and what was only given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.exported_forms import FORMS
from benchmarks.latency import BEFORE, MODULES, percentile
from benchmarks.measure import Timing
from tests.benchmarks.test_benchmarks import run

PROJECT = Path(__file__).parents[2]


def test_percentiles_are_in_milliseconds():
    timing = Timing(tuple(seconds / 100 for seconds in range(1, 102)))
    assert percentile(timing, 50) == pytest.approx(510)
    assert percentile(timing, 95) == pytest.approx(960)


def measured(tmp_path, *options):
    path = tmp_path / "latency.json"
    printed = run(
        tmp_path,
        "latency",
        "--tiny",
        "--size",
        "96x128",
        "--rounds",
        "5",
        "--device",
        "cpu",
        "--output",
        str(path),
        *options,
    )
    return printed, json.loads(path.read_text())


@pytest.mark.slow
def test_a_small_measurement_shows_percentiles_beside_what_the_user_gave(tmp_path):
    forms = ("--forms", "module", "mkl", "onnx", "onnx_static")
    printed, numbers = measured(tmp_path, "--batch_sizes", "1,2", "--no-peers", *forms)
    both = {*MODULES.values(), FORMS["onnx"]}
    assert set(numbers["results"]) == {
        *(f"{name}, batch {count}" for name in both for count in (1, 2)),
        f"{FORMS['onnx_static']}, batch 1",  # for one image only
    }
    for result in numbers["results"].values():
        assert 0 < result["p50_ms"] <= result["p95_ms"] and len(result["rounds"]) == 5
    assert numbers["given_ms"] == {"YOLO, as the user gave it": 600.0, "DINO, as the user expected it": 1500.0}
    assert printed.count("not measured") == 2


@pytest.mark.slow
def test_all_forms_and_another_commit_take_turns_and_files_are_taken_again(tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is one of the forms")
    pytest.importorskip("nncf", reason="which writes one of them")
    exports = tmp_path / "exports"
    options = ("--batch_sizes", "1", "--exports", str(exports))
    forms = ("--forms", *MODULES, *FORMS)
    printed, numbers = measured(tmp_path, *options, *forms, "--before", str(PROJECT))
    names = {name.rpartition(", batch")[0] for name in numbers["results"]}
    assert {*MODULES.values(), *FORMS.values(), BEFORE, "torchvision Faster R-CNN R50"} <= names
    compared = printed.partition("boxes differ by")[2].splitlines()[1:]
    differences = {line.split("  ")[0]: float(line.split()[-2]) for line in compared}
    assert set(differences) == set(FORMS.values())
    assert max(differences[name] for name in differences if "int8" not in name) <= 1e-3
    files = {file.name: file.stat().st_mtime_ns for file in exports.iterdir()}
    assert set(files) == {
        "open.pt2", "open.onnx", "96x128.onnx", "96x128.xml", "96x128.bin", "96x128_int8.onnx", "weights.sha256",
        "96x128_int8.xml", "96x128_int8.bin",
    }  # fmt: skip
    measured(tmp_path, *options, "--forms", "openvino", "--int8", str(exports / "96x128_int8.onnx"), "--no-peers")
    assert {file.name: file.stat().st_mtime_ns for file in exports.iterdir()} == files
    (exports / "weights.sha256").write_text("of another checkpoint\n")
    with pytest.raises(AssertionError, match="has files of other weights"):
        measured(tmp_path, *options, "--forms", "openvino", "--no-peers")


@pytest.mark.slow
def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="is no checkout"):
        measured(tmp_path, "--batch_sizes", "1", "--forms", "module", "--no-peers", "--before", str(tmp_path))


def test_an_unknown_measurement_lists_latency_among_those_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2 and "latency" in done.stdout
