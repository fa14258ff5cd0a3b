"""The sheet of detections: drawn on the original images, under their file names."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.callbacks import PredictionImages, prediction_images
from dino_lightning.detections import Detections
from tests.conftest import TINY_SIZES


@pytest.fixture
def root(rooms, tmp_path):
    return shutil.copytree(rooms, tmp_path / "plans")


def sheet(data, tmp_path, monkeypatch, *, datamodule, callback=None):
    """The panels that are drawn when every ground-truth box is detected, and what the loader gave of each image.

    Of a known file, the images that come last are its first.
    """
    drawn = []
    draw = prediction_images.draw_panels
    monkeypatch.setattr(
        prediction_images, "draw_panels", lambda panels, heading: drawn.extend(panels) or draw(panels, heading)
    )
    callback = callback or PredictionImages(path=str(tmp_path / "detections.png"), num_images=3)
    module = DINOModule(num_classes=1, backbone_weights=None, **TINY_SIZES)
    trainer = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, current_epoch=0, global_step=0, loggers=[], datamodule=datamodule
    )
    batches = list(data.val_dataloader())
    for batch in batches if datamodule is None else batches[::-1]:
        found = [
            Detections(
                boxes_xyxy=torch.from_numpy(truth.boxes_xyxy).float(),
                scores=torch.ones(len(truth.labels)),
                labels=torch.from_numpy(truth.labels),
                class_names=("room",),
                category_ids=(1,),
            )
            for truth in batch.ground_truth
        ]
        callback.on_validation_batch_end(trainer, module, {"detections": found}, batch, 0)
    callback.on_validation_end(trainer, module)
    assert (tmp_path / "detections.png").read_bytes().startswith(b"\x89PNG")
    names = ("image_ids", "image_sizes", "original_sizes", "ground_truth")
    given = {name: [value for batch in batches for value in getattr(batch, name)] for name in names}
    if datamodule is not None:
        order = np.argsort(given["image_ids"])
        given = {name: [values[index] for index in order] for name, values in given.items()}
    return drawn, SimpleNamespace(**given)


def small(root):
    return CocoDataModule(root=str(root), image_size=64, max_size=96, num_workers=0, val_batch_size=4)


def test_boxes_are_drawn_on_the_original_images(root, tmp_path, monkeypatch):
    data = small(root)
    panels, batch = sheet(data, tmp_path, monkeypatch, datamodule=data)
    images = data.val_set.annotations.images
    assert [panel.title for panel in panels] == [image.file_name for image in images[:3]]
    for index, panel in enumerate(panels):
        with Image.open(data.val_set.annotations.image_path(index)) as original:
            assert np.array_equal(panel.pixels, np.asarray(original.convert("RGB")))
        assert panel.pixels.shape[:2] == batch.original_sizes[index] != batch.image_sizes[index]
        assert np.allclose(panel.truth_xyxy, batch.ground_truth[index].boxes_xyxy)
        assert np.allclose(panel.boxes_xyxy, panel.truth_xyxy, atol=1e-3)


def test_large_images_are_scaled_down_with_their_boxes(root, tmp_path, monkeypatch):
    monkeypatch.setattr("dino_lightning.visualization.panels.TALLEST", 0.5)
    data = small(root)
    panels, batch = sheet(data, tmp_path, monkeypatch, datamodule=data)
    for index, panel in enumerate(panels):
        height, width = batch.original_sizes[index]
        assert panel.pixels.shape[0] == 55  # half an inch
        assert np.allclose(panel.truth_xyxy * height / 55, batch.ground_truth[index].boxes_xyxy, atol=0.02 * width)


def test_without_the_files_the_models_input_is_drawn(root, tmp_path, monkeypatch):
    data = small(root)
    panels, batch = sheet(data, tmp_path, monkeypatch, datamodule=None)
    assert [panel.title for panel in panels] == [f"image {image_id}" for image_id in batch.image_ids[:3]]
    assert [panel.pixels.shape[:2] for panel in panels] == batch.image_sizes[:3]
    scale = batch.image_sizes[0][0] / batch.original_sizes[0][0]
    assert np.allclose(panels[0].truth_xyxy, batch.ground_truth[0].boxes_xyxy * scale, rtol=0.05)

    original = prediction_images.read_image

    def vanished(path):
        path.unlink()
        return original(path)

    monkeypatch.setattr(prediction_images, "read_image", vanished)
    panels, batch = sheet(data, tmp_path, monkeypatch, datamodule=data)
    assert [panel.pixels.shape[:2] for panel in panels] == list(batch.image_sizes[:3])


def test_original_images_are_read_once(root, tmp_path, monkeypatch):
    data = small(root)
    callback = PredictionImages(path=str(tmp_path / "detections.png"), num_images=3)
    first, _ = sheet(data, tmp_path, monkeypatch, datamodule=data, callback=callback)
    monkeypatch.setattr(prediction_images, "read_image", None)
    again, _ = sheet(data, tmp_path, monkeypatch, datamodule=data, callback=callback)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=False))
