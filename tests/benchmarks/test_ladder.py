"""The ladder of sizes: what is counted and shown, and the measurement at tiny sizes."""

import json

import pytest
import torch
from torch import nn

from benchmarks.ladder import NAMES, RUNGS, gmac, shown
from tests.benchmarks.test_benchmarks import run


def test_multiplications_of_products_and_convolutions_are_counted_once():
    convolution, image = nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 20)
    assert gmac(lambda: convolution(image)) == pytest.approx(3 * 8 * 9 * 10 * 20 / 1e9)
    tokens, dim = 50, 16
    attention, queries = nn.MultiheadAttention(dim, 4, batch_first=True).eval(), torch.zeros(1, tokens, dim)

    def attend():
        with torch.inference_mode():
            return attention(queries, queries, queries)

    attention.requires_grad_(False)
    assert gmac(attend) == pytest.approx((4 * tokens * dim * dim + 2 * tokens * tokens * dim) / 1e9)


def test_the_table_has_mean_and_range_of_the_seeds_and_dashes_for_what_was_not_measured():
    trained = {
        str(seed): {"minutes": 1.0, "steps": 10, "AP50": value, "F1": value}
        for seed, value in enumerate((0.2, 0.6, 0.5))
    }
    lines = shown({"dino_s": {"trained": trained}, "dino_m": {"size": 448, "parameters": 36_100_000, "gmac": 30.0}})
    rows = [line.replace(" to ", "..").replace(" (", "(").split() for line in lines.splitlines()[1:]]
    share = "0.433(0.200..0.600)"
    assert rows[0] == ["dino_s", *["-"] * 7, "1.0(1.0..1.0)", "10(10..10)", share, share]
    assert rows[1] == ["dino_m", "448", "36.1", "30.0", *["-"] * 8]


@pytest.mark.slow
def test_a_ladder_of_seconds_keeps_the_rows_that_were_there(rooms, tmp_path):
    """Contestants are timed and trained; later calls add to the file, make one in 8 bits and time it."""
    output, exports, int8 = tmp_path / "ladder.json", tmp_path / "exports", tmp_path / "int8"
    common = ["ladder", "--tiny", "--output", str(output)]
    training = ["--train-minutes", "0.05", "--data", str(rooms), "--only", "small_cpu", "ssdlite"]
    printed = run(tmp_path, *common, *training, "--rounds", "5", "--exports", str(exports))
    results = json.loads(output.read_text())["results"]
    assert set(results) == {"small_cpu", "ssdlite"}
    assert {"module", "ONNX"} <= set(results["small_cpu"]["ms"]) and set(results["ssdlite"]["ms"]) == {"module"}
    for name, row in results.items():
        assert name in printed and row["gmac"] > 0 and row["parameters"] > 0 and row["size"] == 96
        assert row["trained"]["0"]["steps"] > 0 and 0 <= row["trained"]["0"]["AP50"] <= 1
    files = ["--only", "dino_s", "--exports", str(exports), "--int8", str(int8)]
    run(tmp_path, *common, *files, "--rounds", "0", "--make-int8")
    assert {path.name for path in exports.iterdir()} == {"small_cpu.onnx", "dino_s.onnx"}
    assert [path.name for path in int8.iterdir()] == ["dino_s.onnx"]
    assert (int8 / "dino_s.onnx").stat().st_size < (exports / "dino_s.onnx").stat().st_size
    assert "ms" not in json.loads(output.read_text())["results"]["dino_s"]
    run(tmp_path, *common, *files, "--rounds", "5")
    later = json.loads(output.read_text())["results"]
    assert list(later) == [name for name in NAMES if name in {*results, "dino_s"}]
    assert {name: later[name] for name in results} == results
    assert later["dino_s"]["ms"]["int8"]["p50"] > 0


@pytest.mark.slow
def test_nothing_to_measure_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="nothing to measure"):
        run(tmp_path, "ladder", "--no-latency", "--only", RUNGS[0])
