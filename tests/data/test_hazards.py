"""What `fit` says of a training set that can hardly be learnt, from its annotation file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_lightning.data import CocoDataModule
from dino_lightning.data.annotation_file import load_coco
from dino_lightning.data.hazards import hazards
from dino_lightning.data.sizes import resized_size
from tests.data.small_coco import annotation, document, write_images, write_json


def said(tmp_path, content, **sizes):
    annotations = load_coco(write_json(tmp_path / "a.json", content), tmp_path)
    return hazards(annotations, **{"num_queries": 9, "image_size": 64, "max_size": 96, "stretch_to": None, **sizes})


def page(width: int, height: int, *boxes: list[float]):
    content = document(count=1)
    content["images"][0] |= {"width": width, "height": height}
    content["annotations"] = [annotation(k, 1, 1, box) for k, box in enumerate(boxes, 1)]
    return content


def test_nothing_is_said_of_a_usual_dataset(tmp_path):
    assert said(tmp_path, document(count=4)) == []
    assert said(tmp_path, page(20, 20, [1, 1, 9, 9])) == []  # small, but as it is


def test_more_boxes_than_queries(tmp_path):
    content = page(60, 60, *([k, k, 9, 9] for k in range(10)))
    (sentence,) = said(tmp_path, content)
    assert sentence.startswith("1 image has more boxes than the model has queries, 9 (image 1: 10)")
    assert said(tmp_path, content, num_queries=10) == []


@pytest.mark.parametrize(("side", "count"), [(9.9, 1), (10.1, 0)])
def test_boxes_below_a_pixel(tmp_path, side, count):
    sentences = said(tmp_path, page(640, 640, [10, 10, 300, side], [10, 10, 300, 300]))
    assert len(sentences) == count
    assert not count or sentences[0].startswith("1 of 2 boxes are less than a pixel wide or high after resizing (the")
    stretched = said(tmp_path, page(640, 64, [10, 10, 9.9, 50]), image_size=64, max_size=64, stretch_to=64)
    assert "0.99 x 50.00" in stretched[0]


def test_images_that_become_slivers(tmp_path):
    thin, sentence = said(tmp_path, page(40, 6000, [1, 1, 38, 500]), image_size=150, max_size=150)
    assert thin.startswith("1 of 1 boxes are less than a pixel")
    assert "1 image has so long a shape" in sentence and "(image 1: 40 x 6000 becomes 1 x 150)" in sentence


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(16, 900), st.integers(16, 1400))
def test_the_scales_are_those_of_resizing(size, image_size, max_size):
    from dino_lightning.data.hazards import _scales

    ours = np.array(size) * _scales(np.array([size]), image_size, max_size, None)[0]
    ratio = max(size) / min(size)
    np.testing.assert_allclose(np.maximum(ours, 1), resized_size(size, image_size, max_size), atol=1 + ratio)


def test_the_data_module_says_it(tmp_path):
    content = page(60, 60, *([k, k, 9, 9] for k in range(10)))
    write_images(tmp_path / "images", content)
    write_json(tmp_path / "a.json", content)
    options = {"root": str(tmp_path), "train_annotations": "a.json", "val_annotations": "a.json", "image_size": 64}
    options |= {"max_size": 96, "classes": ["kitchen"]}
    data = CocoDataModule(**options)
    assert "image 1: 10" in data.hazards(9)[0]
    assert data.hazards(10) == []
    (sentence,) = CocoDataModule(**options, mosaic=0.5).hazards(39)
    assert sentence.startswith(
        "An image can have up to 40 boxes with mosaic or drawn plans, 10 without, and the model has 39"
    )
    assert CocoDataModule(**options, mosaic=0.5).hazards(40) == []
