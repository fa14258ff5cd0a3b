"""Order and randomness of the training images: repeatable, and resumable in the middle of an epoch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning import CocoDataModule
from dino_lightning.data.loading import Loader
from dino_lightning.data.sampling import TrainSampler, derive_seed


class Echo(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        return key


def echo(length, batch_size, *, seed=5, drop_last=False):
    """A loader of (index, seed) pairs as the sampler gives them."""
    sampler = TrainSampler(range(length), seed=seed)
    return Loader(Echo(length), sampler=sampler, batch_size=batch_size, drop_last=drop_last, collate_fn=list)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 4), st.integers(0, 30), st.booleans())
def test_a_loader_that_goes_on_gives_the_rest_of_the_epoch_and_then_the_next(length, size, epoch, taken, drop_last):
    whole = echo(length, size, drop_last=drop_last and length >= size)
    whole.sampler.set_epoch(epoch)
    batches = list(whole)
    following = list(whole)
    taken = min(taken, len(batches))
    started = echo(length, size, drop_last=whole.drop_last)
    started.sampler.set_epoch(epoch)
    iterator = iter(started)
    for _ in range(taken):
        next(iterator)
    resumed = echo(length, size, drop_last=whole.drop_last, seed=99)
    resumed.load_state_dict(started.state_dict())
    rest = list(resumed)
    if taken == len(batches):
        assert rest == following
    else:
        assert rest == batches[taken:]
        assert list(resumed) == following


@given(st.integers(1, 40), st.integers(1, 5))
def test_processes_share_the_images_between_them(length, processes):
    samplers = [TrainSampler(range(length), processes=processes, rank=rank, seed=3) for rank in range(processes)]
    parts = [[index for index, _ in sampler] for sampler in samplers]
    assert len({len(part) for part in parts}) == 1
    assert set().union(*parts) == set(range(length))


def test_seeds_differ_by_epoch_and_image():
    sampler = TrainSampler(range(20), seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [index for index, _ in first] != [index for index, _ in second]
    assert len({seed for _, seed in first + second}) == 40
    assert derive_seed(1, 2) != derive_seed(2, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_augmentation_does_not_depend_on_the_number_of_workers(rooms, workers):
    batches = []
    for number in (0, workers):
        torch.manual_seed(4)
        data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=number, augmentation="plans")
        batches.append(list(data.train_dataloader()))
    for one, other in zip(*batches, strict=True):
        assert one.image_ids == other.image_ids
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes_cxcywh, other.targets.boxes_cxcywh)
