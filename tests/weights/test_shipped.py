"""Weights that come with the package: found by name, checked, and used where a class is a room."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from dino_lightning import DINOModule, load_detector
from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.export.package_code import package_files, serving_code
from dino_lightning.floor_plans import write_rooms_dataset
from dino_lightning.floor_plans.dataset import draw_plan
from dino_lightning.training.initial_weights import start
from dino_lightning.training.optim import groups_of
from dino_lightning.weights import shipped
from dino_lightning.weights.loading import load_initial_weights
from dino_lightning.weights.reading import read_checkpoint

SIZES = {"backbone": "resnet10", "hidden_dim": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1,
         "ffn_dim": 16, "num_queries": 5, "backbone_weights": None, "num_feature_levels": 3}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny detector of rooms, trained with batch norms and shipped as `tiny`; gives the module it was."""
    torch.manual_seed(3)
    module = DINOModule(num_classes=1, class_names=["room"], category_ids=[1], backbone_norm="batch", **SIZES)
    checkpoint = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "score_threshold": 0.4,
        "pytorch-lightning_version": "2.6.0",
    }
    checksum = shipped.write_for_shipping(checkpoint, tmp_path / "tiny.pt")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setitem(shipped.SHIPPED, "tiny", shipped.ShippedWeights("tiny.pt", checksum, "A test."))
    return module


def test_a_detector_by_name_has_classes_threshold_and_the_norms_of_training(tiny):
    detector = load_detector("tiny")
    assert list(detector.class_names) == ["room"]
    assert detector.model.score_threshold == 0.4
    images = torch.rand(1, 3, 64, 64)
    theirs, ours = (module.model.backbone.eval()(images) for module in (tiny, detector.model))
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)  # of 16-bit numbers


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_they_start_a_training_with_either_norm(tiny, norm):
    module = DINOModule(num_classes=1, backbone_norm=norm, **SIZES)
    load_initial_weights(module.model, "tiny", ["room"])
    torch.testing.assert_close(
        module.model.decoder.class_head.weight, tiny.model.decoder.class_head.weight, rtol=1e-3, atol=1e-4
    )


def test_a_file_that_was_changed_is_not_read(tiny, tmp_path):
    (tmp_path / "tiny.pt").write_bytes((tmp_path / "tiny.pt").read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="is not the file of tiny that was shipped"):
        load_detector("tiny")
    (tmp_path / "tiny.pt").unlink()
    with pytest.raises(CheckpointError, match="the weights tiny of this package, is missing"):
        load_detector("tiny")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Room"], ["room"]),
        (["rooms"], ["room"]),
        (["room-floorplan"], ["room"]),
        (["door", "Kitchen", "living_room"], ["door", "room", "room"]),
        (["mushroom"], None),
        (["RBC", "WBC"], None),
        ([], None),
    ],
)
def test_which_classes_are_rooms(names, expected):
    assert shipped.names_for_rooms(names) == expected


@pytest.mark.parametrize(("names", "taken"), [(["door", "Kitchen"], True), (["door", "window"], False)])
def test_rooms_alone_start_from_them(tiny, names, taken):
    module = DINOModule(
        num_classes=2,
        class_names=names,
        weights_for_rooms="tiny",
        **SIZES,
        lr=4e-4,
        backbone_lr=4e-4,
        rooms_lr_factor=0.25,
    )
    before = module.model.decoder.class_head.weight.detach().clone()
    if not taken:  # the backbone's weights are null: it then says that all of them are random
        with pytest.warns(UserWarning, match="backbone starts from random weights"):
            start(module.model, module.hparams, num_images=0)
    else:
        start(module.model, module.hparams, num_images=0)
    after = module.model.decoder.class_head.weight
    (optimizer_rate,) = {group["lr"] for group in groups_of(module.model, module.hparams)}
    assert optimizer_rate == pytest.approx(1e-4 if taken else 4e-4)
    room = tiny.model.decoder.class_head.weight[0]
    assert torch.equal(after[0], before[0])  # there is no door in them
    assert torch.allclose(after[1], room, atol=1e-4) == taken


def test_weights_for_rooms_of_another_architecture_are_refused_with_the_way_out(tiny):
    module = DINOModule(num_classes=1, class_names=["room"], weights_for_rooms="tiny", **{**SIZES, "ffn_dim": 56})
    with pytest.raises(
        CheckpointError, match=r"--model.ffn_dim=.* Or start without them: --model.weights_for_rooms null\."
    ):
        start(module.model, module.hparams, num_images=0)


def test_they_are_evaluated_at_the_size_that_they_were_trained_on(tmp_path, capsys):
    """There is no configuration beside them: what the file says of its images decides."""
    plans = write_rooms_dataset(tmp_path / "plans", num_train=1, num_val=4, style="clean", seed=3)
    args = ["--data.root", str(plans), "--run_dir", str(tmp_path / "run"), "--report", "false"]
    assert run(["validate", "--ckpt_path", "rooms_small", *args]) == 0
    found = re.search(r"val/F1 +([\d.]+)", capsys.readouterr().out)
    assert float(found[1]) > 0.8


def test_every_shipped_file_is_small_and_whole():
    for name, entry in shipped.SHIPPED.items():
        path = shipped.shipped_file(name)
        assert path.stat().st_size < 8_000_000
        content = read_checkpoint(path)
        assert all(
            value.dtype == torch.float16 for value in content["state_dict"].values() if value.is_floating_point()
        )
        assert dataclasses.asdict(entry)["about"]


def test_rooms_small_finds_rooms_without_training():
    """On drawn plans that it has not seen; it found nine of ten at the end of its own training."""
    detector = load_detector("rooms_small")
    found = correct = wanted = 0
    for seed in range(900, 908):
        page, rooms = draw_plan(seed, style="realistic", size=400)
        boxes = torch.tensor([room.bbox_xyxy for room in rooms]).reshape(-1, 4)
        detections = detector(np.asarray(page.convert("RGB")))
        overlaps = box_iou(detections.boxes_xyxy, boxes.float())
        found, wanted = found + len(detections), wanted + len(boxes)
        correct += int((overlaps > 0.5).any(0).sum()) if len(detections) else 0
    assert correct > 0.7 * wanted and correct > 0.7 * found


def test_a_job_has_the_weights_and_a_served_model_does_not():
    name = "dino_lightning/weights/files/rooms_small.pt"
    assert name in package_files()
    assert name not in serving_code()
