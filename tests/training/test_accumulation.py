"""Several batches as one step: the gradients of one large batch, on one process as on two."""

import json
import os
import sys
from pathlib import Path

import lightning
import pytest
import torch

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.training.optim import AccumulatedBoxes
from tests.conftest import TINY_SIZES
from tests.training import accumulated_training
from tests.training.accumulated_training import train
from tests.training.test_ddp import run_in
from tests.training.test_synchronisation import Watch, waits_of_a_step

# Boxes of each image. With denoising queries, images of a batch are filled up to the fullest, and what fills them up
# counts as background, as published; so there each batch has the same fullest image.
BOXES = {
    "very different counts": ([3, 0, 1, 7, 2, 0, 0, 5, 4, 1], 0),
    "a step without a box": ([0, 0, 0, 0, 5, 2, 3, 4, 1, 6], 0),
    "denoising": ([5, 1, 2, 5, 5, 5, 0, 5, 5, 3], 6),
}


def train_apart(tmp_path, **options):
    """As `train`, with two processes; what each of them has."""
    script = Path(accumulated_training.__file__)
    out = tmp_path / "out.pt"
    command = [sys.executable, str(script), json.dumps({"out": str(out), "devices": 2, **options})]
    os.environ["PYTHONPATH"] = str(script.parents[2])
    run_in(tmp_path, command)
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1)]


def assert_same_steps(found, expected):
    assert len(found["steps"]) == len(expected["steps"])
    for step, (gradients, others) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        assert gradients.keys() == others.keys()
        largest = max(other.abs().max() for other in others.values())
        for name, other in others.items():
            assert (gradients[name] - other).abs().max() <= 1e-5 * max(largest, 1.0), (step, name)
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, atol=1e-5, rtol=0, msg=name)


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")


@pytest.mark.parametrize("boxes", BOXES)
def test_two_batches_of_two_are_one_of_four(boxes):
    """The third step is a rest of two images, so one batch of two."""
    counts, denoising = BOXES[boxes]
    common = {"counts": counts, "denoising": denoising, "clip": 0.1}
    large = train(batch_size=4, **common)
    assert len(large["steps"]) == 3
    assert_same_steps(train(batch_size=2, accumulate=2, **common), large)


def test_a_rest_of_several_batches_is_one_batch_too():
    counts = [3, 1, 1, 7, 2, 6]
    large = train(counts=counts, batch_size=4)
    assert_same_steps(train(counts=counts, batch_size=1, accumulate=4), large)


@pytest.mark.slow
@pytest.mark.parametrize("boxes", ["very different counts", "denoising"])
def test_two_processes_accumulate_as_one_process_with_large_batches(tmp_path, boxes):
    """Two processes, each with two batches of one image: four images for each step."""
    counts, denoising = BOXES[boxes]
    counts = counts[:8] if not denoising else [5] * 8
    common = {"counts": counts, "denoising": denoising, "clip": 0.1}
    first, second = train_apart(tmp_path, batch_size=1, accumulate=2, **common)
    assert_same_steps(first, train(batch_size=4, **common))
    assert_same_steps(second, first)


def test_the_comparison_sees_a_mean_of_quotients(monkeypatch):
    """What Lightning does by itself is another gradient where counts differ."""
    counts, _ = BOXES["very different counts"]
    large = train(counts=counts, batch_size=4)
    monkeypatch.setattr(AccumulatedBoxes, "share", lambda self, num_boxes: torch.ones(()))
    naive = train(counts=counts, batch_size=2, accumulate=2)
    with pytest.raises(AssertionError):
        assert_same_steps(naive, large)


def test_what_is_logged_is_the_loss_of_each_batch():
    counts, _ = BOXES["very different counts"]
    alone = train(counts=counts[:2], batch_size=2)
    accumulated = train(counts=counts[:4], batch_size=2, accumulate=2)
    assert accumulated["losses"][0] == alone["losses"][0]
    whole = train(counts=counts[:4], batch_size=4)["losses"][0]
    # boxes 3 and 8: the whole is their mean, weighted by boxes
    assert (3 * accumulated["losses"][0] + 8 * accumulated["losses"][1]) / 11 == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_frozen_parts_and_averages_on_two_processes(tmp_path):
    """Plain ddp misses no gradient, and the averages, which fit leaves in the module, agree bit for bit."""
    options = {"counts": [3, 0, 1, 7, 2, 4, 0, 5], "batch_size": 1, "accumulate": 2, "denoising": 0, "adam": True}
    first, second = train_apart(tmp_path, freeze=["backbone", "encoder"], ema=True, **options)
    assert len(first["steps"]) == 2
    assert not any(name.startswith(("backbone", "encoder")) for name in first["steps"][0])
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    alone = train(freeze=["backbone", "encoder"], ema=True, **{**options, "batch_size": 2})
    for name, value in alone["state"].items():
        torch.testing.assert_close(first["state"][name], value, atol=2e-4, rtol=0, msg=name)


def test_the_schedule_of_a_scheduler_callback_is_followed(rooms, tmp_path):
    """From one batch to two for each step: the steps of the second epoch are of two batches."""
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})],
    )
    module = DINOModule(num_classes=data.num_classes, backbone_weights=None, **TINY_SIZES)
    trainer.fit(module, data)
    assert trainer.global_step == 4 + 2
    assert module._accumulated.batches == 0


def test_an_accumulated_batch_waits_as_any_other(rooms, tmp_path):
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
    module = DINOModule(num_classes=data.num_classes, backbone_weights=None, **TINY_SIZES)
    for batch in (2, 3):  # the first and the last of a step
        watch = Watch(batch)
        lightning.Trainer(
            accelerator="cpu",
            max_steps=2,
            accumulate_grad_batches=2,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
            default_root_dir=tmp_path,
        ).fit(module, data)
        assert watch.waits == waits_of_a_step(rooms, tmp_path)
