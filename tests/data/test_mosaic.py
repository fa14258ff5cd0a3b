"""Four images in one: each whole in its quarter, its boxes with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.data import CocoDataModule, Sample
from dino_lightning.data.mosaic import mosaic


def sample(value: int, height: int, width: int) -> Sample:
    """A page of one grey with a box over all of it and one over its top left quarter."""
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]])
    image = torch.full((3, height, width), value, dtype=torch.uint8)
    return Sample(image, boxes, torch.tensor([value, value]), image_id=value, original_size=(height, width))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60)), min_size=4, max_size=4),
    seam=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_each_box_lies_over_the_pixels_of_its_image(sizes, seam):
    made = mosaic([sample(10 * (i + 1), *size) for i, size in enumerate(sizes)], torch.tensor(seam))
    height, width = sizes[0]
    assert made.image.shape == (3, height, width) and made.image_id == 10
    covered = torch.zeros(height, width, dtype=torch.int64)
    for box, label in zip(made.boxes_cxcywh[::2], made.labels[::2], strict=True):
        x1, y1 = (box[:2] - box[2:] / 2) * torch.tensor([width, height])
        x2, y2 = (box[:2] + box[2:] / 2) * torch.tensor([width, height])
        part = made.image[0, round(float(y1)) : round(float(y2)), round(float(x1)) : round(float(x2))]
        assert part.numel() > 0 and (part == label).all()
        covered[round(float(y1)) : round(float(y2)), round(float(x1)) : round(float(x2))] += 1
    assert (covered == 1).all()
    torch.testing.assert_close(made.boxes_cxcywh[1::2, 2:], made.boxes_cxcywh[::2, 2:] / 2)


def batches(root, **options):
    data = CocoDataModule(root=str(root), num_workers=0, image_size=64, max_size=64, batch_size=2, **options)
    return list(data.train_dataloader())


def test_mosaics_have_more_boxes_and_follow_the_seed(rooms):
    torch.manual_seed(4)
    plain, first, again = batches(rooms), batches(rooms, mosaic=1.0), batches(rooms, mosaic=1.0)
    count = [sum(sum(batch.targets.num_boxes) for batch in run) for run in (plain, first, again)]
    assert count[1] > 2 * count[0] and count[1] == count[2]
    assert all(torch.equal(one.images, other.images) for one, other in zip(first, again, strict=True))


def test_memory_is_planned_for_four_images(rooms):
    data, four = (CocoDataModule(root=str(rooms), num_workers=0, mosaic=p) for p in (0.0, 0.5))
    assert four.most_boxes == 4 * data.most_boxes


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_an_impossible_probability_is_refused(rooms, probability):
    with pytest.raises(ValueError, match="mosaic is"):
        CocoDataModule(root=str(rooms), mosaic=probability)
