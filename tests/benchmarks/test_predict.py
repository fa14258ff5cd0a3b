"""The comparison of `predict` with its model alone runs at a tiny size, and keeps its plans."""

import json

import pytest
import torch

from benchmarks.predict import ALONE, in_memory, rate_alone
from dino_lightning.inference.detector import load_module
from tests.benchmarks.test_benchmarks import run
from tests.cli.test_predict import write_noise
from tests.inference.test_detector import save_tiny

KINDS = [f"predict, {kind}, {pictures} pictures" for kind in ("JPG", "PNG") for pictures in ("without", "with")]


@pytest.mark.slow
def test_each_way_is_compared_with_the_model_alone(tmp_path):
    output, plans = tmp_path / "predict.json", tmp_path / "plans"
    options = ["--config", "small_cpu", "--tiny", "--images", "3", "--size", "160", "--rounds", "2", "--device", "cpu"]
    options += ["--tta_views", "2"]
    printed = run(tmp_path, "predict", *options, "--plans", str(plans), "--output", str(output))
    results = json.loads(output.read_text())["results"]
    costs = results.pop("processor_seconds")
    assert list(results) == [ALONE, *KINDS] and all(case in printed for case in results)
    assert all(len(case["rounds"]) == 2 and min(case["rounds"]) > 0 for case in results.values())
    assert costs[ALONE] > 0 and all(costs[kind][part] > 0 for kind in ("jpg", "png") for part in ("read", "picture"))
    assert {path.suffix for path in plans.rglob("*.*g") if path.parent.name == "jpg"} == {".jpg"}
    assert "3 plans, cpu, 1 threads, batches of 1, 2 views, 2 rounds" in printed


def test_the_model_alone_sees_every_image_once_in_batches_of_one_shape(tmp_path, monkeypatch):
    module = load_module(save_tiny(tmp_path / "best.ckpt"))
    for number, size in enumerate([(60, 80), (80, 60), (60, 80), (60, 80)]):
        write_noise(tmp_path / "images" / f"{number}.png", size)
    images, seen = in_memory(module, sorted((tmp_path / "images").iterdir())), []
    forward = type(module).forward
    monkeypatch.setattr(
        type(module), "forward", lambda self, batch: seen.append(batch.original_sizes) or forward(self, batch)
    )
    assert rate_alone(module, images, 2) > 0
    assert sorted(map(list, seen)) == [[(60, 80)], [(60, 80)] * 2, [(80, 60)]]
    assert all(pixels.dtype == torch.uint8 and pixels.is_contiguous() for pixels, _ in images)
