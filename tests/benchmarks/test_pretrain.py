"""Weights for shipping are made by the command that says so, at the sizes and lengths it is asked for."""

import pytest
import torch

from dino_lightning import load_detector
from tests.benchmarks.test_benchmarks import run


@pytest.mark.slow
def test_weights_made_before_train_on_at_the_larger_size_and_for_the_epochs_asked_for(tmp_path):
    output, short = tmp_path / "more.pt", tmp_path / "runs" / "short"
    printed = run(
        tmp_path,
        *["pretrain", "--output", str(output), "--folder", str(tmp_path / "runs")],
        *["--weights", "rooms_small", "--short_epochs", "1", "--size", "64", "--data.drawn_plans", "0"],
        *["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"],
        *["--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1", "--data.num_workers", "0"],
    )
    assert f"{output}: " in printed and "SHA-256" in printed
    checkpoint = torch.load(short / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    assert checkpoint["epoch"] == 0 and checkpoint["global_step"] == 1
    assert not (tmp_path / "runs" / "long").exists()
    detector = load_detector(output)
    assert detector.class_names == ("room",)
    assert detector.module.hparams["tta_views"] == 8
