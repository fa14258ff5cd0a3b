"""Plans drawn while training: always other ones, always the same from the same seed."""

from __future__ import annotations

import pytest
import torch

from dino_lightning.data import CocoDataModule
from dino_lightning.data.drawn_plans import MOST_DRAWN_ROOMS
from dino_lightning.errors import DataError
from tests.data.small_coco import write_split


def module(root, **arguments) -> CocoDataModule:
    options = {"image_size": 64, "max_size": 64, "fixed_size": 64, "fixed_size_mode": "stretch", "batch_size": 4}
    return CocoDataModule(root=str(root), num_workers=0, **options, **arguments)


def drawn(data: CocoDataModule, epoch: int):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    pages = {}
    for batch in loader:
        for place, image_id in enumerate(batch.image_ids):
            if image_id < 0:
                pages[image_id] = batch.images[place]
    return pages


def test_an_epoch_has_so_many_plans_beside_the_images(rooms):
    data = module(rooms, drawn_plans=9, augmentation="none")
    images = len(data.train_set)
    assert data.images_per_epoch == images + 9
    assert len(drawn(data, 1)) >= 9 - 3  # the last, incomplete batch is dropped
    assert len(data.val_dataloader().dataset) == len(data.val_set)


def test_every_epoch_has_other_plans_and_a_seed_repeats_them(rooms):
    torch.manual_seed(5)
    first, again, second = (drawn(module(rooms, drawn_plans=8, augmentation="none"), epoch) for epoch in (1, 1, 2))
    assert first.keys() == again.keys() and all(torch.equal(first[i], again[i]) for i in first)
    pages = [*first.values(), *second.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(pages) for b in pages[:i])


def test_boxes_lie_within_the_page(rooms):
    data = module(rooms, drawn_plans=12)
    boxes = torch.cat([batch.targets.boxes_cxcywh[batch.targets.valid] for batch in data.train_dataloader()])
    assert len(boxes) > 12
    assert (boxes[:, :2] - boxes[:, 2:] / 2 > -1e-6).all() and (boxes[:, :2] + boxes[:, 2:] / 2 < 1 + 1e-6).all()
    assert data.most_boxes >= MOST_DRAWN_ROOMS


def test_classes_without_a_room_are_refused(tmp_path):
    write_split(tmp_path / "train" / "annotations.json", tmp_path / "train", count=4)
    with pytest.raises(DataError, match="the dataset's classes are kitchen, bath"):
        module(tmp_path, drawn_plans=4)


@pytest.mark.parametrize("options", [{"drawn_plans": -1}, {"drawn_plans": 3, "aspect_buckets": True}])
def test_impossible_choices_are_refused(rooms, options):
    with pytest.raises(ValueError, match="drawn_plans must not be negative"):
        module(rooms, **options)
