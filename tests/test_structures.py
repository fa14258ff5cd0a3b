"""Batches and boxes: conversions that lose nothing, whatever the sizes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from dino_lightning.boxes import (
    cxcywh_to_xyxy,
    inverse_sigmoid,
    normalized_cxcywh_to_xyxy,
    paired_generalized_iou,
    xyxy_to_cxcywh,
    xyxy_to_normalized_cxcywh,
)
from dino_lightning.detections import Detections
from dino_lightning.structures import Batch, pad_targets

sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))
corner = st.floats(0, 1, width=32)
boxes = st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=5).map(
    lambda rows: torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in rows])
)


@given(boxes, sizes)
def test_box_conversions_undo_each_other(boxes_xyxy, size):
    assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes_xyxy)), boxes_xyxy, atol=1e-6, rtol=0)
    scale = torch.tensor([size[1], size[0], size[1], size[0]])
    pixels = boxes_xyxy * scale
    assert_close(normalized_cxcywh_to_xyxy(xyxy_to_normalized_cxcywh(pixels, size), size), pixels, atol=1e-4, rtol=0)


@given(boxes, boxes)
def test_generalized_iou_is_symmetric_and_bounded(first, second):
    overlap = paired_generalized_iou(first[:, None], second[None])
    assert_close(overlap, paired_generalized_iou(second[:, None], first[None]).T)
    assert ((overlap <= 1) & (overlap >= -1.001)).all()


@given(st.lists(st.floats(0.0078125, 0.9921875, width=32), min_size=1))
def test_inverse_sigmoid(values):
    values = torch.tensor(values)
    assert_close(inverse_sigmoid(values).sigmoid(), values, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=4), st.integers(1, 32))
def test_padding_keeps_every_pixel_and_adds_zeros(image_sizes, multiple):
    images = [torch.randint(1, 256, (3, *size), dtype=torch.uint8) for size in image_sizes]
    batch = Batch.from_images(images, pad_to_multiple=multiple)
    height, width = batch.images.shape[-2:]
    assert height % multiple == width % multiple == 0
    assert height - max(h for h, _ in image_sizes) < multiple
    assert batch.image_sizes == tuple(image_sizes)
    for canvas, image in zip(batch.images, images, strict=True):
        h, w = image.shape[1:]
        assert torch.equal(canvas[:, :h, :w], image)
        assert canvas.sum() == image.sum()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_targets_keep_their_counts(counts):
    targets = pad_targets([(torch.rand(n, 4), torch.arange(n) + 1) for n in counts])
    assert targets.num_boxes == tuple(counts)
    assert targets.valid.sum(1).tolist() == counts
    assert (targets.labels > 0).equal(targets.valid)
    assert targets.boxes_cxcywh.shape == (len(counts), max(counts), 4)


@pytest.mark.parametrize(
    ("images", "part"),
    [
        ([], "at least one"),
        ([torch.zeros(1, 4, 4)], r"\(3, height, width\)"),
        ([torch.zeros(4, 4)], "Image 0"),
    ],
)
def test_impossible_batches_are_refused(images, part):
    with pytest.raises(ValueError, match=part):
        Batch.from_images(images)


def test_torchvision_convention():
    image = torch.rand(3, 40, 80)
    target = {
        "boxes": torch.tensor([[8.0, 10, 40, 30], [0, 0, 80, 40]]),
        "labels": torch.tensor([2, 1]),
        "iscrowd": torch.tensor([0, 1]),
        "image_id": torch.tensor(77),
    }
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = Batch.from_torchvision([image, torch.rand(3, 20, 20)], [target, empty])
    assert batch.images.dtype == torch.uint8
    assert_close(batch.images[0, :, :40, :80].float() / 255, image, atol=0.5 / 255 + 1e-6, rtol=0)
    assert batch.image_ids == (77, 1)
    assert batch.targets.num_boxes == (1, 0)  # the crowd region is not learned
    assert batch.targets.labels[0, 0] == 1
    assert_close(batch.targets.boxes_cxcywh[0, 0], torch.tensor([0.3, 0.5, 0.4, 0.5]))
    assert batch.ground_truth[0].iscrowd.tolist() == [False, True]
    assert batch.ground_truth[0].area.tolist() == [640.0, 3200.0]
    zero_based = Batch.from_torchvision([image], [{**target, "labels": torch.tensor([0, 1])}], first_label=0)
    assert zero_based.targets.labels[0, 0] == 0
    with pytest.raises(ValueError, match="first_label=0"):
        Batch.from_torchvision([image], [{**target, "labels": torch.tensor([0, 1])}])


def test_detections_speak_coco():
    found = Detections(
        boxes_xyxy=torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 0]),
        class_names=("door", "room"),
        category_ids=(3, 70),
    )
    assert found.names == ["room", "door"]
    assert len(found.above(0.5)) == 1
    first = found.to_coco(5)[0]
    assert first == {
        "image_id": 5,
        "category_id": 70,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "score": pytest.approx(0.9),
    }
