"""What makes a checkpoint the best one, and what training stops by."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch

from dino_lightning.__main__ import run
from dino_lightning.callbacks.best import standing
from dino_lightning.metrics import CocoMetric
from tests.conftest import TINY_ARGS, forget_earlier_runs


@pytest.fixture
def fit(rooms, monkeypatch, tmp_path):
    """Trains with the given AP and F1 of each validation, and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    compute = CocoMetric.compute

    def train(*args, values=(), resume=False):
        forget_earlier_runs()
        given = iter([(0.0, 0.0), *values])  # the first is Lightning's sanity check
        monkeypatch.setattr(
            CocoMetric, "compute", lambda it: {**compute(it), **dict(zip(("AP", "F1"), next(given), strict=True))}
        )
        own = [] if resume else ["--data.root", str(rooms), "--data.batch_size=4", *TINY_ARGS, "--run_dir=run"]
        return run(["fit", *own, *args])

    return train


def best_epoch(folder="run"):
    return torch.load(f"{folder}/checkpoints/best.ckpt", weights_only=True)["epoch"]


def losses(folder="run"):
    with Path(folder, "metrics.csv").open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


@pytest.mark.slow
def test_among_equals_the_loss_decides_also_in_a_resumed_run_in_another_folder(fit, tmp_path):
    """Early stopping waits as long as the loss falls, although AP is 0 in every epoch."""
    nothing = [(0.0, 0.0)] * 5
    assert fit("--trainer.max_epochs=3", "--early_stopping_patience=1", "--model.lr=1e-3", values=nothing) == 0
    fell = losses()
    assert len(fell) == 3 and fell == sorted(fell, reverse=True) and fell[2] < fell[0]
    assert best_epoch() == 2
    shutil.move("run", "moved")
    still = ["--model.lr=0", "--model.backbone_lr=0", "--trainer.max_epochs=6"]  # the same weights, the same loss
    assert fit("--ckpt_path=moved/checkpoints/last.ckpt", *still, values=nothing, resume=True) == 0
    assert best_epoch("moved") == 2
    last = torch.load("moved/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 3  # the first validation that is no better ends it


def test_the_best_checkpoint_and_the_table_go_by_the_metric_that_was_chosen(fit, capsys, caplog):
    caplog.set_level("INFO")
    values = [(0.5, 0.1), (0.1, 0.5)]
    assert fit("--trainer.max_epochs=2", "--best_by=val/F1", values=values) == 0
    out = capsys.readouterr().out
    assert best_epoch() == 1
    assert "* best epoch by val/F1: F1 0.500" in out and "\n*           2" in out
    resumed = ["--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=3"]
    assert fit(*resumed, "--best_by=val/AP", values=[(0.3, 0.1)], resume=True) == 0
    assert "best_by: val/F1 -> val/AP" in capsys.readouterr().out
    assert "best.ckpt was the best by val/F1 so far; from here it is the best by val/AP" in caplog.text
    assert "learning rate was" not in caplog.text  # dropped before the last epoch, it stays so
    assert best_epoch() == 2


def test_an_absent_metric_is_refused_before_training(fit, tmp_path, capsys):
    monitors = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/map"}}]
    (tmp_path / "own.yaml").write_text(f"trainer:\n  callbacks: {monitors}\n")
    for args, named in (
        (["--best_by=val/f1"], "--best_by val/f1: "),
        (["--best_by=val/F1_class/attic"], "--best_by val/F1_class/attic: "),
        (["--config=own.yaml"], "EarlyStopping of trainer.callbacks, monitor val/map: "),
    ):
        assert fit("--trainer.max_epochs=1", *args) == 1
        error = capsys.readouterr().err
        assert named in error and "it has val/loss, val/AP, " in error and "val/F1, " in error
        assert "Traceback" not in error and not (tmp_path / "run" / "metrics.csv").exists()


def test_what_is_not_a_number_is_the_worst():
    good, bad = {"val/loss": 3.0, "val/AP": 0.2}, {"val/loss": math.nan, "val/AP": 0.2}
    assert standing(good, "val/AP") > standing(bad, "val/AP") > standing({**good, "val/AP": math.nan}, "val/AP")
    assert standing(good, "val/loss") > standing({**good, "val/loss": 3.1}, "val/loss") > standing(bad, "val/loss")
