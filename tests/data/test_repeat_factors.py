"""Repeat factor sampling: images of rare classes come more often, and all else about the order stays as it is."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning import CocoDataModule
from dino_lightning.__main__ import run
from dino_lightning.data.sampling import TrainSampler, draws_of_epoch, number_of_draws
from dino_lightning.training.recipe import batches_per_epoch
from tests.conftest import TINY_ARGS
from tests.data.small_coco import annotation, document, write_images, write_json


@pytest.fixture
def skewed(root):
    """Of 10 training images all but one have a kitchen, the first two have a bath, and the last one nothing."""
    content = document(count=10)
    boxes = [annotation(number, number, 1, [4, 5, 20, 10]) for number in range(1, 10)]
    boxes += [annotation(20 + number, number, 2, [10, 15, 6, 12]) for number in (1, 2, 2)]
    boxes.append(annotation(40, 5, 2, [10, 15, 6, 12], iscrowd=1))  # counts for nothing
    content["annotations"] = boxes
    write_images(root / "images", content)
    write_json(root / "train.json", content)
    return root


def data_of(root, threshold=0.8, **options):
    chosen = {"image_size": 32, "max_size": 64, "num_workers": 0, "batch_size": 1, **options}
    return CocoDataModule(root=str(root), repeat_factor_threshold=threshold, **chosen)


def ids_of(loader):
    return [image_id for batch in loader for image_id in batch.image_ids]


@settings(deadline=None)
@given(st.lists(st.floats(1, 6), min_size=1, max_size=40), st.integers(0, 2**40))
def test_an_epoch_draws_every_image_as_often_as_its_factor_says_give_or_take_one(factors, seed):
    factors = np.array(factors)
    drawn, repeats = draws_of_epoch(factors, seed)
    counts = np.bincount(drawn, minlength=len(factors))
    assert len(drawn) == number_of_draws(factors) == round(float(factors.sum()))
    assert (counts >= np.floor(factors)).all() and (counts <= np.floor(factors) + 2).all()
    assert len(set(zip(drawn.tolist(), repeats.tolist(), strict=True))) == len(drawn)


def test_over_many_epochs_the_mean_is_the_factor():
    factors = np.array([1.0, 1.25, 1.5, 3.2, 2.05, 1.0])  # 10 in all
    counts = sum(np.bincount(draws_of_epoch(factors, seed)[0], minlength=6) for seed in range(4000)) / 4000
    assert counts[[0, 5]].tolist() == [1, 1]
    np.testing.assert_allclose(counts, factors, atol=0.03)


def test_images_of_rare_classes_come_more_often(skewed):
    data = data_of(skewed)  # the bath is in 0.2 of the images: sqrt(0.8 / 0.2) = 2
    loader = data.train_dataloader()
    for _ in range(3):
        ids = ids_of(loader)
        assert sorted(ids) == sorted([1, 1, 2, 2, *range(3, 11)])
    assert data.images_per_epoch == len(loader) == 12


def test_the_draws_of_an_image_are_augmented_differently(skewed):
    torch.manual_seed(0)
    data = data_of(skewed, augmentation="plans")
    found = [batch for _ in range(3) for batch in data.train_dataloader() if batch.image_ids == (1,)]
    assert len(found) >= 2 and not all(
        found[0].images.shape == other.images.shape and torch.equal(found[0].images, other.images)
        for other in found[1:]
    )


SENTENCE = "repeat factor sampling: 10 images are drawn 12 times an epoch; the rarest class (bath) 2.0 times"


def test_one_line_says_what_is_done(skewed, lightning_log):
    with lightning_log.at_level(logging.INFO):
        data_of(skewed)
    assert lightning_log.messages.count(SENTENCE) == 1


def test_steps_follow_from_the_draws(skewed):
    class OneProcess:
        world_size, limit_train_batches = 1, 1.0

    data = data_of(skewed, batch_size=5)
    assert batches_per_epoch(OneProcess, data) == len(data.train_dataloader()) == 2
    assert batches_per_epoch(OneProcess, data_of(skewed, batch_size=4)) == 3


def test_drawn_plans_count_once_each(rooms):
    data = CocoDataModule(
        root=str(rooms), image_size=64, max_size=96, num_workers=0, drawn_plans=3, repeat_factor_threshold=1.0
    )
    assert data.images_per_epoch == 11
    assert sum(image_id < 0 for image_id in ids_of(data.train_dataloader())) <= 3


def test_buckets_go_with_it(skewed):
    data = data_of(skewed, aspect_buckets=True, batch_size=2)
    assert sorted(ids_of(data.train_dataloader())) == sorted([1, 1, 2, 2, *range(3, 11)])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 3))
def test_processes_share_the_draws_of_an_epoch(length, processes, epoch):
    factors = 1 + np.random.default_rng(length).random(length) * 2
    samplers = [
        TrainSampler(range(length), processes=processes, rank=rank, seed=3, repeat_factors=factors)
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {len(samplers[0])} == {-(-number_of_draws(factors) // processes)}
    drawn = {(index, seed) for part in parts for index, seed in part}
    assert len(drawn) == number_of_draws(factors) and {index for index, _ in drawn} == set(range(length))


def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on_exactly(skewed):
    torch.manual_seed(5)
    loader = data_of(skewed, augmentation="plans").train_dataloader()
    whole = list(loader)
    following = list(loader)
    torch.manual_seed(5)
    started = data_of(skewed, augmentation="plans").train_dataloader()
    iterator = iter(started)
    for _ in range(7):
        next(iterator)
    torch.manual_seed(6)
    resumed = data_of(skewed, augmentation="plans").train_dataloader()
    resumed.load_state_dict(started.state_dict())
    for one, other in zip([*whole[7:], *following], [*resumed, *resumed], strict=True):
        assert one.image_ids == other.image_ids and torch.equal(one.images, other.images)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_thresholds_out_of_range_are_named(root, threshold):
    with pytest.raises(ValueError, match=f"repeat_factor_threshold is {threshold}; it must be more than 0"):
        data_of(root, threshold)


def test_fit_tells_what_is_drawn_and_how_many_steps_follow(skewed, tmp_path, capsys, lightning_log):
    arguments = ["--data.root", str(skewed), *TINY_ARGS, "--run_dir", str(tmp_path / "run"), "--data.batch_size=2"]
    arguments += ["--data.repeat_factor_threshold=0.8", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    assert run(["fit", *arguments]) == 0
    assert lightning_log.messages.count(SENTENCE) == 1
    assert "12 images x 1 epochs: 6 optimizer steps." in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
