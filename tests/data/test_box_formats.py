"""Boxes in other orders and units: recognised by evidence, refused with what they are, and read on request."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.__main__ import run
from dino_lightning.data import CocoDataModule
from dino_lightning.data.box_formats import another_format, to_xyxy
from dino_lightning.errors import DataError
from tests.conftest import TINY_ARGS

FORMATS = ["xyxy", "cxcywh", "normalized-xywh", "normalized-xyxy", "normalized-cxcywh"]
NONE = np.full((0, 4), np.nan)


def written_as(box, size, box_format):
    """A box of COCO's in another format."""
    x, y, width, height = box
    numbers = {
        "xywh": [x, y, width, height],
        "xyxy": [x, y, x + width, y + height],
        "cxcywh": [x + width / 2, y + height / 2, width, height],
    }[box_format.removeprefix("normalized-")]
    across = [size[1], size[0]] * 2 if box_format.startswith("normalized-") else [1] * 4
    return [number / side for number, side in zip(numbers, across, strict=True)]


@pytest.fixture
def rewritten(rooms, tmp_path):
    """Copies of the plans with boxes of another format, with outlines or without."""

    def write(box_format, *, outlines):
        root = shutil.copytree(rooms, tmp_path / box_format)
        for file in root.glob("*/*.json"):
            content = json.loads(file.read_text())
            sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
            for entry in content["annotations"]:
                x, y, width, height = entry["bbox"]
                entry.pop("segmentation", None)
                if outlines:
                    entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                entry["bbox"] = written_as(entry["bbox"], sizes[entry["image_id"]], box_format)
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]  # as programs do that take the numbers for COCO's
            file.write_text(json.dumps(content))
        return root

    return write


@pytest.mark.parametrize("outlines", [True, False])
@pytest.mark.parametrize("box_format", FORMATS)
def test_another_format_is_refused_and_read_on_request(rewritten, rooms, box_format, outlines, tmp_path, capsys):
    root = rewritten(box_format, outlines=outlines)
    with pytest.raises(DataError, match=f"--data.box_format {box_format}"):
        CocoDataModule(root=str(root))
    assert run(["inspect", "--data.root", str(root), "--output", str(tmp_path / "health")]) == 1
    assert "boxes that are not x, y, width, height in pixels" in capsys.readouterr().out
    read, plain = CocoDataModule(root=str(root), box_format=box_format), CocoDataModule(root=str(rooms))
    for ours, theirs in ((read.train_set, plain.train_set), (read.val_set, plain.val_set)):
        np.testing.assert_allclose(ours.annotations.boxes_xyxy, theirs.annotations.boxes_xyxy, atol=1e-6)
        extents = theirs.annotations.boxes_xyxy[:, 2:] - theirs.annotations.boxes_xyxy[:, :2]
        np.testing.assert_allclose(ours.annotations.area, extents.prod(axis=1), rtol=1e-9)
    options = ["--data.root", str(root), "--data.box_format", box_format]
    assert run(["inspect", *options, "--output", str(tmp_path / "read")]) == 0


def test_a_run_on_boxes_of_another_format(rewritten, tmp_path):
    options = ["--data.root", str(rewritten("cxcywh", outlines=True)), "--data.box_format", "cxcywh"]
    run_dir = tmp_path / "run"
    assert run(["fit", *options, "--run_dir", str(run_dir), "--trainer.max_epochs=1", *TINY_ARGS]) == 0
    assert "box_format: cxcywh" in (run_dir / "config.yaml").read_text()


def test_coco_boxes_can_be_insisted_on(rewritten):
    root = rewritten("xyxy", outlines=True)
    with pytest.warns(UserWarning, match="boxes that stick out, by up to .* pixels, are clipped"):
        assert CocoDataModule(root=str(root), box_format="xywh").num_classes == 1


@pytest.mark.parametrize("outlines", [True, False])
def test_coco_boxes_are_never_taken_for_others(rewritten, outlines):
    CocoDataModule(root=str(rewritten("xywh", outlines=outlines)))


def test_a_wrong_word(rooms):
    with pytest.raises(ValueError, match="box_format is 'yxyx'; choose one of xywh, xyxy"):
        CocoDataModule(root=str(rooms), box_format="yxyx")


@st.composite
def within(draw):
    """Boxes inside an image of 100 x 200, as COCO has them; some leave it by less than a pixel, as by rounding."""
    count = draw(st.integers(1, 40))
    boxes = []
    for _ in range(count):
        width, height = draw(st.integers(2, 200)), draw(st.integers(2, 100))
        x, y = draw(st.integers(0, 200 - width)), draw(st.integers(0, 100 - height))
        boxes.append([x, y, width + draw(st.floats(0, 0.5)), height + draw(st.floats(0, 0.5))])
    return np.array(boxes, dtype=np.float64)


@settings(max_examples=200, deadline=None)
@given(within())
def test_no_box_inside_its_image_is_an_alarm(numbers):
    sizes = np.tile([100.0, 200.0], (len(numbers), 1))
    assert another_format(numbers, sizes, np.full_like(numbers, np.nan)) == ""
    outlines = to_xyxy(numbers, sizes, "xywh") + 0.4
    assert another_format(numbers, sizes, outlines) == ""


def test_a_few_boxes_that_leave_their_image_prove_nothing():
    sizes = np.tile([100.0, 100.0], (4, 1))
    numbers = np.array([[50.0, 50, 90, 90]] * 4)
    assert another_format(numbers, sizes, np.full_like(numbers, np.nan)) == ""
    numbers, sizes = np.repeat(numbers, 2, axis=0), np.repeat(sizes, 2, axis=0)
    sentence = another_format(numbers, sizes, np.full_like(numbers, np.nan))
    assert "x1, y1, x2, y2" in sentence and "8 of 8 leave their image, by up to 40 pixels" in sentence
    assert another_format(NONE, np.zeros((0, 2)), NONE) == ""
