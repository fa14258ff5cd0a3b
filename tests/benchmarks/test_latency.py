"""The measurement of latency runs, small, and says what was measured and what was only given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.latency import percentile
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
    printed, numbers = measured(tmp_path, "--batch_sizes", "1,2", "--no-onnx", "--no-peers")
    assert set(numbers["results"]) == {"checkpoint, batch 1", "checkpoint, batch 2"}
    for result in numbers["results"].values():
        assert 0 < result["p50_ms"] <= result["p95_ms"] and len(result["rounds"]) == 5
    assert numbers["given_ms"] == {"YOLO, as the user gave it": 600.0, "DINO, as the user expected it": 1500.0}
    assert printed.count("not measured") == 2


@pytest.mark.slow
def test_onnx_and_peers_are_timed_in_the_same_rounds(tmp_path):
    _, numbers = measured(tmp_path, "--batch_sizes", "1")
    names = {name.rpartition(", batch")[0] for name in numbers["results"]}
    assert {"checkpoint", "ONNX, onnxruntime on the CPU", "torchvision Faster R-CNN R50"} <= names


def test_an_unknown_measurement_lists_latency_among_those_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2 and "latency" in done.stdout
