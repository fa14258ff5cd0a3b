"""The loss of evaluation: that of all images for each of their boxes, in batches of any size on any processes."""

import lightning
import pytest
import torch

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.training import evaluation_loss
from dino_lightning.training.evaluation_loss import EvaluationLoss
from tests.conftest import TINY_SIZES
from tests.data.small_coco import document, write_images, write_json


def test_batches_of_any_size_give_the_same_loss(tmp_path):
    content = document(count=5)
    for entry in content["images"]:
        entry["width"] = 60
    content["annotations"] = content["annotations"][:7]  # one box of the fourth image, none of the fifth
    write_images(tmp_path / "images", content)
    for split in ("train", "val"):
        write_json(tmp_path / f"{split}.json", content)
    module = DINOModule(num_classes=2, backbone_weights=None, **TINY_SIZES)
    losses = []
    for size in (1, 2, 5):
        data = CocoDataModule(root=str(tmp_path), image_size=32, max_size=64, num_workers=0, val_batch_size=size)
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        (metrics,) = trainer.validate(module, data, verbose=False)
        losses.append(metrics["val/loss"])
    (whole,) = data.val_dataloader()
    with torch.no_grad():
        expected = module.eval().criterion(module.model(whole), whole.targets)["loss"]
    assert losses == pytest.approx([float(expected)] * 3, rel=1e-5)
    assert module.score_threshold == 0.3  # which only training moves


def test_a_batch_that_several_processes_have_counts_once(monkeypatch):
    def gather(parts, own):
        assert own == {(1, 2): (6.0, 2), (3,): (1.0, 0)}
        parts[:] = [own, {(4,): (5.0, 4), (1, 2): (6.0, 2)}]

    loss = EvaluationLoss()
    assert loss.compute() is None
    loss.add((1, 2), torch.tensor(6.0), 2)
    loss.add((3,), torch.tensor(1.0), 0)
    monkeypatch.setattr(evaluation_loss.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation_loss.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(evaluation_loss.dist, "all_gather_object", gather)
    assert loss.compute() == (6 + 1 + 5) / 6
