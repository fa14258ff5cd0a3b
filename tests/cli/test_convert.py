"""The command `convert`: published files to ours and back, exactly."""

import argparse

import pytest
import torch
from PIL import Image

from dino_lightning import load_detector
from dino_lightning.__main__ import run
from dino_lightning.model import DINO
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.published_layout import to_published
from dino_lightning.weights.reading import coco_names, is_class_entry
from tests.conftest import TINY_SIZES

SIZES = {**TINY_SIZES, "backbone_norm": "frozen", "trainable_backbone_layers": 3}


def convert(source, output, *args):
    return run(["convert", "--weights", str(source), "--output", str(output), *args])


def read(path):
    return torch.load(path, weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def published(tmp_path):
    """As the published program writes it, with COCO's 91 rows."""
    torch.manual_seed(0)
    model = DINO(num_classes=91, **SIZES)
    args = argparse.Namespace(nheads=4, lr=1e-4)
    torch.save({"model": to_published(model.state_dict()), "args": args, "epoch": 11}, tmp_path / "published.pth")
    return tmp_path / "published.pth", model


@pytest.fixture
def ours(tmp_path):
    torch.manual_seed(1)
    module = DINOModule(
        num_classes=2, class_names=["room", "hall"], category_ids=[7, 9], backbone_weights=None, **SIZES
    )
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "score_threshold": 0.4,
        "optimizer_states": [{"much": torch.zeros(1000)}],
    }
    torch.save(content, tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt", module


def test_published_to_ours_and_back(published, tmp_path, capsys):
    path, model = published
    assert convert(path, tmp_path / "ours.ckpt") == 0
    said = capsys.readouterr().out
    assert "a checkpoint of dino_lightning" in said
    assert "resnet10, 91 classes" in said
    detector = load_detector(tmp_path / "ours.ckpt")
    state = {key.removeprefix("model."): value for key, value in read(tmp_path / "ours.ckpt")["state_dict"].items()}
    assert equal(state, model.state_dict())
    assert detector.class_names[1] == "person"
    assert convert(tmp_path / "ours.ckpt", tmp_path / "back.pth") == 0
    assert f"dn_labelbook_size={91}" in capsys.readouterr().out
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = torch.load(path, weights_only=True)["model"]
    assert equal(read(tmp_path / "back.pth")["model"], before)


def test_ours_to_published_and_back(ours, tmp_path):
    path, module = ours
    assert convert(path, tmp_path / "published.pth") == 0
    content = read(tmp_path / "published.pth")
    assert content.keys() == {"model"}
    assert "transformer.decoder.class_embed.1.weight" in content["model"]
    assert convert(tmp_path / "published.pth", tmp_path / "back.ckpt") == 0
    back = read(tmp_path / "back.ckpt")
    assert equal(back["state_dict"], module.state_dict())
    assert back["hyper_parameters"]["backbone"] == "resnet10"
    assert back["hyper_parameters"]["num_queries"] == SIZES["num_queries"]


def test_ours_to_ours_keeps_what_prediction_needs(ours, tmp_path):
    path, module = ours
    assert convert(path, tmp_path / "slim.ckpt", "--layout", "ours") == 0
    content = read(tmp_path / "slim.ckpt")
    assert "optimizer_states" not in content
    assert content["score_threshold"] == 0.4
    assert content["hyper_parameters"] == dict(module.hparams)
    assert equal(content["state_dict"], module.state_dict())


def test_contiguous_classes_of_coco(published, tmp_path):
    path, model = published
    assert convert(path, tmp_path / "coco80.ckpt", "--contiguous") == 0
    content = read(tmp_path / "coco80.ckpt")
    settings = content["hyper_parameters"]
    rows = [row for row, name in enumerate(coco_names()) if name != "N/A"]
    assert settings["num_classes"] == len(settings["class_names"]) == 80
    assert settings["category_ids"] == rows
    for key in filter(is_class_entry, model.state_dict()):
        expected = [*rows, 91] if key == "label_embedding.weight" else rows
        assert torch.equal(content["state_dict"][f"model.{key}"], model.state_dict()[key][expected])
    detections = load_detector(tmp_path / "coco80.ckpt")
    assert detections.category_ids[-1] == 90


def test_a_converted_file_detects_what_the_model_detects(published, tmp_path):
    path, model = published
    assert convert(path, tmp_path / "ours.ckpt") == 0
    module = DINOModule(num_classes=91, backbone_weights=None, **SIZES)
    module.model.load_state_dict(model.state_dict())
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    expected = module.detect([image], threshold=0.0, image_size=64, max_size=96)[0]
    found = load_detector(tmp_path / "ours.ckpt").model.detect([image], threshold=0.0, image_size=64, max_size=96)[0]
    assert torch.equal(found.boxes_xyxy, expected.boxes_xyxy)
    assert torch.equal(found.scores, expected.scores)


def test_validate_takes_a_converted_file(rooms, tmp_path, ours):
    torch.manual_seed(0)
    torch.save({"model": to_published(DINO(num_classes=1, **SIZES).state_dict())}, tmp_path / "one.pth")
    assert convert(tmp_path / "one.pth", tmp_path / "one.ckpt") == 0
    args = ["--data.root", str(rooms), "--ckpt_path", str(tmp_path / "one.ckpt"), "--trainer.accelerator=cpu"]
    args += ["--data.num_workers=0", "--data.image_size=64", "--data.max_size=96", "--trainer.logger=false"]
    assert run(["validate", *args, f"--run_dir={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--contiguous"], "has 2 classes, not COCO's 91"),
        ([], "exists; give --overwrite"),
    ],
)
def test_refusals(ours, tmp_path, capsys, args, part):
    path, _ = ours
    output = tmp_path / "there.pth"
    if not args:
        output.write_text("precious")
    assert convert(path, output, *args) == 1
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert output.exists() == (not args)
    if not args:
        assert output.read_text() == "precious"
        assert convert(path, output, "--overwrite") == 0
        assert "model" in read(output)


def test_what_is_no_detector_is_refused(tmp_path, capsys):
    torch.save(DINO(num_classes=1, **SIZES).backbone.state_dict(), tmp_path / "backbone.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name, part in {
        "backbone.pth": "only whole detectors",
        "text.pth": "is not a PyTorch checkpoint",
        "none.pth": "does not exist",
    }.items():
        assert convert(tmp_path / name, tmp_path / "out.pth") == 1
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_heads_that_do_not_fit_are_refused(published, tmp_path, capsys):
    path, model = published
    args = argparse.Namespace(nheads=5)
    torch.save({"model": to_published(model.state_dict()), "args": args}, path)
    assert convert(path, tmp_path / "out.ckpt") == 1
    assert "sizes are none that this program can build" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(ours, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert convert(ours[0], tmp_path / "file" / "out.pth") == 1
    assert "cannot be written" in capsys.readouterr().err
