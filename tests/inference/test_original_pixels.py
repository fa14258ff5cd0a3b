"""Whatever size an image is given, what is found in it comes back in the pixels of its file."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dino_lightning import CocoDataModule, DINOModule, load_detector
from dino_lightning.__main__ import run
from dino_lightning.structures import Batch, ModelOutput
from dino_lightning.training.detection import take_from_data
from tests.conftest import TINY_ARGS, TINY_SIZES
from tests.data.small_coco import annotation, write_json

WIDE = {"augmentation": "none", "num_workers": 0}
MODES = {
    "free": {"image_size": 120, "max_size": 200},
    "pad": {"fixed_size": 160, "fixed_size_mode": "pad", "image_size": 120},
    "letterbox": {"fixed_size": 160, "fixed_size_mode": "letterbox"},
    "stretch": {"fixed_size": 160, "fixed_size_mode": "stretch"},
}


class DarkFinder(nn.Module):
    """Stands in for the detector: finds the one dark rectangle on a white page, in 0-1 of the image it is given."""

    def forward(self, batch: Batch) -> ModelOutput:
        boxes = []
        for image, (height, width) in zip(batch.images, batch.image_sizes, strict=True):
            page = image[0, :height, :width]
            rows, columns = torch.nonzero(page < 128, as_tuple=True)
            x1, x2 = columns.min() / width, (columns.max() + 1) / width
            y1, y2 = rows.min() / height, (rows.max() + 1) / height
            boxes.append(torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)))
        found = torch.stack(boxes)[None, :, None]
        logits = torch.full((*found.shape[:3], 1), 4.0)
        return ModelOutput(logits, found, logits[0], found[0])


def finder(**changes):
    module = DINOModule(num_classes=1, **{"backbone_weights": None, **TINY_SIZES, **changes})
    module.model = DarkFinder()
    return module


def painted(height: int, width: int) -> tuple[np.ndarray, list[int]]:
    box = [round(0.2 * width), round(0.45 * height), round(0.75 * width), round(0.9 * height)]
    page = np.full((height, width, 3), 255, dtype=np.uint8)
    page[box[1] : box[3], box[0] : box[2]] = 0
    return page, box


def dataset(root: Path, sizes: list[tuple[int, int]]) -> None:
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "room"}]}
    (root / "images").mkdir(parents=True)
    for number, (height, width) in enumerate(sizes, 1):
        page, (x1, y1, x2, y2) = painted(height, width)
        Image.fromarray(page).save(root / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        content["annotations"].append(annotation(number, number, 7, [x1, y1, x2 - x1, y2 - y1]))
    for split in ("train", "val"):
        write_json(root / f"{split}.json", content)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=12)
@given(sizes=st.lists(st.tuples(st.integers(40, 300), st.integers(40, 300)), min_size=1, max_size=3))
def test_evaluation_and_detect_agree_with_the_file(mode, sizes):
    with tempfile.TemporaryDirectory() as folder:
        dataset(Path(folder), sizes)
        data = CocoDataModule(root=folder, val_batch_size=2, **WIDE, **MODES[mode])
        module = finder()
        take_from_data(module.hparams, data)
        by_id = {}
        for batch in data.val_dataloader():
            by_id |= dict(zip(batch.image_ids, zip(module(batch), batch.image_sizes, strict=True), strict=True))
        found = [by_id[image_id][0] for image_id in sorted(by_id)]
        seen = []
        module.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].image_sizes[0]))
        paths = [data.val_set.annotations.image_path(index) for index in range(len(sizes))]
        again = module.detect(paths, threshold=0.0)
        assert seen == [by_id[image_id][1] for image_id in sorted(by_id)]
        for size, evaluated, detected in zip(sizes, found, again, strict=True):
            pixel = max(side / 100 for side in size) + 1  # of the resized image, in the file's
            np.testing.assert_allclose(evaluated.boxes_xyxy[0], painted(*size)[1], atol=pixel)
            np.testing.assert_allclose(detected.boxes_xyxy[0], painted(*size)[1], atol=pixel)


def test_training_fills_the_canvas_and_evaluation_pads_nothing(tmp_path):
    dataset(tmp_path, [(60, 200), (200, 60), (90, 100)])
    for mode, preset in (("letterbox", "plans"), ("stretch", "plans"), ("letterbox", "coco"), ("stretch", "flips")):
        data = CocoDataModule(root=str(tmp_path), **{**WIDE, "augmentation": preset}, **MODES[mode])
        for batch in data.train_dataloader():
            assert batch.images.shape[-2:] == (160, 160)
            assert all(max(size) == 160 for size in batch.image_sizes)
            assert mode == "letterbox" or set(batch.image_sizes) == {(160, 160)}
        for batch in data.val_dataloader():
            assert tuple(batch.images.shape[-2:]) == batch.image_sizes[0]
            assert abs(max(batch.image_sizes[0]) - 160) <= 2
            assert mode == "letterbox" or batch.image_sizes[0] == (160, 160)


def test_an_image_is_resized_once_on_its_way_to_the_canvas(tmp_path):
    """Thin lines across a wide image survive stretching: it never passes through a small size."""
    page = np.full((100, 800, 3), 255, dtype=np.uint8)
    page[::2] = 0
    Image.fromarray(page).save(tmp_path / "lines.png")
    seen = []
    module = finder(image_size=100, max_size=100, stretch_to=100)
    module.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].images))
    module.detect([tmp_path / "lines.png"])
    assert seen[0].shape == (1, 3, 100, 100)
    assert seen[0][0, 0, ::2].max() == 0 and seen[0][0, 0, 1::2].min() == 255


def test_other_sizes_asked_of_detect_are_not_stretched(tmp_path):
    page, box = painted(60, 120)
    sizes = []
    module = finder(stretch_to=80)
    module.model.register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].image_sizes[0]))
    for options in ({}, {"image_size": 40}):
        (found,) = module.detect([page], **options)
        np.testing.assert_allclose(found.boxes_xyxy[0], box, atol=2)
    assert sizes == [(80, 80), (40, 80)]


def test_a_checkpoint_from_before_there_was_stretching_loads(tmp_path):
    module = DINOModule(num_classes=1, backbone_weights=None, **TINY_SIZES)
    hyperparameters = {name: value for name, value in module.hparams.items() if name != "stretch_to"}
    stored = {
        "state_dict": module.state_dict(),
        "hyper_parameters": hyperparameters,
        "pytorch-lightning_version": "2.5.0",
    }
    torch.save(stored, tmp_path / "old.ckpt")
    detector = load_detector(tmp_path / "old.ckpt")
    assert detector.module.hparams["stretch_to"] is None
    assert len(detector.detect([painted(40, 50)[0]], threshold=0.0)[0]) == 12


def test_a_run_from_yaml_hands_the_square_to_the_detector(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "data", [(60, 200), (200, 60), (90, 100)])
    settings_file = tmp_path / "settings.yaml"
    settings_file.write_text(
        "data:\n  root: data\n  augmentation: plans\n  fixed_size: 64\n  fixed_size_mode: stretch\n"
        "  augmentation_options:\n    rotation: 0.5\n    quarter_turns: false\n"
    )
    options = ["--config", str(settings_file), "--run_dir", "run", "--trainer.max_epochs=1", *TINY_ARGS]
    assert run(["fit", *options]) == 0
    detector = load_detector("run/checkpoints/last.ckpt")
    assert detector.module.hparams["stretch_to"] == 64
    seen = []
    detector.module.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].images.shape))
    assert detector.detect([painted(50, 90)[0]], threshold=0.0)[0].boxes_xyxy.shape == (12, 4)
    assert seen == [(1, 3, 64, 64)]
    stored = Path("run/config.yaml").read_text()
    assert "rotation: 0.5" in stored and "fixed_size_mode: stretch" in stored
    capsys.readouterr()
    assert run(["fit", *options, "--overwrite", "--data.augmentation_options.blurr=0.5"]) == 1
    assert "error: There is no augmentation option blurr; those of plans are flip, " in capsys.readouterr().err
