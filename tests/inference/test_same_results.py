"""Evaluation, `predict` and `detect` find the same, whatever the batches; what leaves the program is in the image."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dino_lightning import Detections, load_detector
from dino_lightning.__main__ import run
from dino_lightning.inference import views
from dino_lightning.inference.tiling import Window
from dino_lightning.inference.views import BATCHES_WAITING, Unreadable, View
from tests.conftest import TINY_ARGS
from tests.data.small_coco import write_json
from tests.inference.test_detector import save_tiny
from tests.inference.test_original_pixels import dataset

SIZES = [(60, 80), (80, 60), (60, 80), (64, 64), (70, 40), (60, 80), (80, 60)]
CLASSES = {"num_classes": 1, "class_names": ["room"], "category_ids": [7]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a dataset of images of several sizes, a model that finds half of its boxes, and its threshold."""
    folder = tmp_path_factory.mktemp("same")
    dataset(folder / "data", SIZES)
    path = save_tiny(folder / "model" / "model.ckpt", **CLASSES)
    stored = torch.load(path, weights_only=True)
    torch.manual_seed(1)
    for name, value in stored["state_dict"].items():
        if "bbox_head" in name:
            value.normal_(std=0.3)
    torch.save(stored, path)
    images = sorted((folder / "data" / "images").iterdir())
    found = load_detector(path)(images, threshold=0.0)
    content = json.loads((folder / "data" / "val.json").read_text())
    content["annotations"] = [
        {**entry, "id": 100 * number + place}
        for number, one in enumerate(found, 1)
        for place, entry in enumerate(one.to_coco(number)[::2])
    ]
    write_json(folder / "data" / "val.json", content)
    scores = torch.cat([one.scores for one in found]).double().sort().values
    middle = scores[len(scores) // 4 : -len(scores) // 4]
    widest = int(middle.diff().argmax())  # a threshold that rounding does not pass
    stored["score_threshold"] = float((middle[widest] + middle[widest + 1]) / 2)
    torch.save(stored, path)
    return folder / "data", path, stored["score_threshold"]


def test_validate_and_predict_find_the_same_in_any_batches(trained, tmp_path, capsys):
    root, checkpoint, threshold = trained
    reports, losses = [], []
    for size, source in ((1, "--ckpt_path"), (4, "--model.weights")):
        options = ["--data.root", root, "--data.val_batch_size", size, "--data.pad_to_multiple", 64, *TINY_ARGS]
        folder = tmp_path / f"validate{size}"
        command = ["validate", source, checkpoint, "--run_dir", folder, *options, "--model.num_denoising", 0]
        assert run([str(part) for part in command]) == 0
        (file,) = folder.rglob("report.json")
        reports.append(json.loads(file.read_text()))
        printed = capsys.readouterr().out
        losses.append(re.search(r"val/loss +([\d.]+)", printed)[1])
        best = reports[-1]["values"]
        assert (
            f"F1 at the threshold of the model, {threshold:.3f}: {reports[-1]['at_threshold']['f1']:.3f}; best F1 on "
            f"these images: {best['F1']:.3f}, at {best['F1_threshold']:.3f}\nat a score of {threshold:.3f}, from which "
        ) in printed
        page = file.with_name("index.html").read_text()
        assert f"at a score of at least <strong>{threshold:.3f}</strong>, the threshold of the model" in page
        assert f"<strong>{best['F1']:.3f}</strong>, at {best['F1_threshold']:.3f}" in page
    alone, together = reports
    assert alone["threshold"] == together["threshold"] == threshold != alone["values"]["F1_threshold"]
    assert together["values"] == pytest.approx(alone["values"], abs=1e-5)
    assert losses[0] == losses[1]
    for size in (1, 4):
        output = tmp_path / f"predict{size}"
        command = ["predict", "--ckpt_path", checkpoint, "--images", root / "val.json", "--output", output]
        more = ["--batch_size", size, "--num_workers", 0, "--trainer.accelerator", "cpu", "--overlays", "false"]
        assert run([str(part) for part in (*command, "--image_folder", root / "images", *more)]) == 0
        found = json.loads((output / "predictions.json").read_text())
        counted = {row["image_id"]: row["counted"] for row in alone["images"]}
        assert {row["image_id"]: row["counted"] for row in together["images"]} == counted
        assert {number: sum(one["image_id"] == number for one in found) for number in counted} == counted
        assert len(found) == alone["counts"]["counted"] > 0
        for one in found:
            (x, y, width, height), size = one["bbox"], SIZES[one["image_id"] - 1]
            assert min(x, y) >= 0 and x + width <= size[1] + 1e-6 and y + height <= size[0] + 1e-6
        assert f"with a score of at least {threshold:.3f}" in capsys.readouterr().out


def test_boxes_that_leave_the_program_are_in_the_image(trained):
    root, checkpoint, _ = trained
    detector, paths = load_detector(checkpoint), sorted((root / "images").iterdir())
    raw = []
    detector.module.register_forward_hook(lambda _, __, found: raw.extend(found))
    for found, (height, width) in zip(detector(paths, threshold=0.0), SIZES, strict=True):
        assert len(found) > 0
        for entry in found.to_dict()["detections"]:
            x1, y1, x2, y2 = entry["box"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert min(float(found.boxes_xyxy.min()) for found in raw) < -1  # evaluation compares what the model says


NUMBERS = st.one_of(st.floats(-300, 300, width=32), st.sampled_from([0.0, 100.0, 60.0, float("inf"), float("nan")]))


@given(corners=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=8))
@settings(deadline=None)
def test_clipping_keeps_what_is_in_the_image_and_nothing_else(corners):
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    numbers = torch.arange(len(boxes))
    found = Detections(boxes, numbers / 10, numbers).within((60, 100))
    x1, y1, x2, y2 = found.boxes_xyxy.unbind(1)
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= 100) & (y1 >= 0) & (y1 < y2) & (y2 <= 60)).all()
    edges = np.array([100, 60, 100, 60])
    expected = [
        (number, np.clip(box, 0, edges).tolist())
        for number, box in enumerate(boxes.numpy())
        if not np.isnan(box).any() and (np.clip(box, 0, edges)[2:] > np.clip(box, 0, edges)[:2]).all()
    ]
    assert list(zip(found.labels.tolist(), found.boxes_xyxy.tolist(), strict=True)) == expected
    assert torch.equal(found.scores, found.labels / 10)


@given(
    shapes=st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 4))), max_size=80),
    size=st.integers(1, 5),
)
@example(shapes=[(1, width) for width in range(1, 41)], size=2)
@settings(deadline=None)
def test_batches_of_views_have_one_shape_and_hold_back_few(shapes, size):
    held, seen = 0, []

    def stream():
        nonlocal held
        for number, shape in enumerate(shapes):
            if shape is None:
                yield Unreadable(number, "")
                continue
            held += 1
            assert held <= BATCHES_WAITING * size
            yield View(number, shape, Window(0, 0, *shape), 1, torch.zeros(3, *shape))

    for batch in views.batches(stream(), size):
        if isinstance(batch, Unreadable):
            seen.append(batch.listed)
            continue
        assert 1 <= len(batch) <= size
        assert len({view.pixels.shape for view in batch}) == 1
        held -= len(batch)
        seen += [view.listed for view in batch]
    assert sorted(seen) == list(range(len(shapes))) and held == 0
