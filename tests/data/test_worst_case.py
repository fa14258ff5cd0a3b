"""The worst case holds: no batch of the loader is larger, and one image comes up to it."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from dino_lightning.data import CocoDataModule
from dino_lightning.data.augmentation import Augmentation, train_transform
from dino_lightning.data.transforms import LabelledImage, eval_transform
from dino_lightning.data.worst_case import largest_canvas, largest_sizes
from tests.data.small_coco import annotation, write_images, write_json

SIZES = ((60, 90), (90, 60), (61, 61), (40, 130), (131, 40))  # (height, width)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A dataset with images of several shapes and one to five boxes each."""
    root = tmp_path_factory.mktemp("shapes")
    images, annotations = [], []
    for index, (height, width) in enumerate(SIZES):
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": height, "width": width})
        for number in range(index + 1):
            annotations.append(annotation(10 * index + number + 1, index + 1, 1, [2 + number, 3, 20, 20]))
    annotations.append(annotation(999, 5, 1, [0, 0, 10, 10], iscrowd=1))  # nothing to learn from
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "room"}]}
    for split in ("train", "val"):
        write_json(root / split / "annotations.json", content)
        write_images(root / split, content)
    return root


def blank(size):
    return LabelledImage(torch.zeros(3, *size, dtype=torch.uint8), torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.zeros(1))


@pytest.mark.parametrize("max_size", [30, 47, 60, 70, 200])
@pytest.mark.parametrize("preset", get_args(Augmentation))
def test_no_draw_of_an_augmentation_is_larger(preset, max_size):
    transform = train_transform(preset, 48, max_size)
    torch.manual_seed(0)
    for size in SIZES:
        bounds = largest_sizes(transform, size)
        made = {transform(blank(size)).size for _ in range(120)}
        for height, width in made:
            assert any(height <= bound[0] and width <= bound[1] for bound in bounds), (size, (height, width), bounds)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augmentation": "plans"},
        {"augmentation": "plans", "aspect_buckets": True},
        {"augmentation": "flips", "pad_to_multiple": 32},
        {"augmentation": "none"},
        {"augmentation": "none", "aspect_buckets": True},
        {"fixed_size": 64},
        {"fixed_size": 70, "fixed_size_mode": "stretch", "augmentation": "plans"},
    ],
    ids=str,
)
def test_no_batch_of_the_loader_is_larger(shapes, options, batch_size):
    data = CocoDataModule(root=str(shapes), image_size=48, max_size=80, num_workers=0, batch_size=batch_size, **options)
    worst = data.worst_case_batch(batch_size)
    assert len(worst) == batch_size
    assert worst.targets.num_boxes == (5,) * batch_size
    assert worst.targets.valid.all()
    for _ in range(8):
        for batch in data.train_dataloader():
            assert batch.images.numel() <= worst.images.numel()
            if batch_size > 1:
                dims, bounds = sorted(batch.images.shape[-2:]), sorted(worst.images.shape[-2:])
                assert dims[0] <= bounds[0] and dims[1] <= bounds[1]
            assert max(batch.targets.num_boxes) <= 5


@pytest.mark.parametrize("preset", get_args(Augmentation))
def test_the_bound_is_reached(preset):
    """Without crops, whose extremes are rare."""
    options = {name: 0.0 for name in ("crop", "rotate") if preset == "plans" or (preset, name) == ("coco", "crop")}
    for max_size in (47, 200):
        transform = train_transform(preset, 48, max_size, options)
        torch.manual_seed(0)
        for size in SIZES:
            assert set(largest_sizes(transform, size)) <= {transform(blank(size)).size for _ in range(200)}


def test_one_batch_of_all_images_has_the_worst_canvas(shapes):
    data = CocoDataModule(
        root=str(shapes), image_size=48, max_size=80, num_workers=0, batch_size=5, augmentation="none"
    )
    (batch,) = data.train_dataloader()
    assert batch.images.shape == data.worst_case_batch(5).images.shape


def test_lying_and_standing_images_together_make_the_canvas_larger():
    transform = eval_transform(480, 640)
    assert largest_canvas(transform, [(480, 640), (640, 480)], alone=True) in [(480, 640), (640, 480)]
    assert largest_canvas(transform, [(480, 640), (640, 480)], alone=False) == (640, 640)
    assert largest_canvas(transform, [(480, 640), (640, 480)], alone=False, oriented=True) == (480, 640)


def test_the_number_of_boxes_may_be_given(shapes):
    data = CocoDataModule(root=str(shapes), image_size=48, max_size=80, num_workers=0)
    assert data.most_boxes == 5
    assert data.worst_case_batch(2, num_boxes=3).targets.num_boxes == (3, 3)
    assert data.worst_case_batch(1, num_boxes=0).targets.num_boxes == (0,)


def test_an_unknown_transform_is_refused():
    with pytest.raises(TypeError, match="The largest image that"):
        largest_sizes(lambda example: replace(example), (4, 4))
