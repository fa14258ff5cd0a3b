"""An optimizer or a scheduler of the user's, in YAML or on the command line."""

import csv
from pathlib import Path

import pytest
import torch

from dino_lightning.__main__ import run
from tests.conftest import TINY_ARGS, forget_earlier_runs

SGD = """
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.02, momentum: 0.9, weight_decay: 0.3}
"""
OPTIONS = ["--model.lr=1e-3", "--model.backbone_lr=1e-4", "--model.backbone_layer_decay=0.5", "--model.warmup_steps=4",
           "--model.group_rule=no_norm_decay", "--model.lr_drop_epochs=[1]"]  # fmt: skip


@pytest.fixture
def fit(rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sgd.yaml").write_text(SGD)

    def train(*args, resume=False):
        forget_earlier_runs()
        new = ["--data.root", str(rooms), *TINY_ARGS, *OPTIONS, "--data.batch_size=2", "--trainer.limit_val_batches=1"]
        return run(["fit", *([] if resume else new), "--run_dir=run", *args])

    return train


def groups_of(folder="run"):
    content = torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)
    return content["optimizer_states"][0]["param_groups"]


def test_it_has_the_parameter_groups_and_the_schedule_of_the_model(fit, caplog, capsys):
    """Also when resumed; with another optimizer the run is not resumed."""
    caplog.set_level("INFO")
    assert fit("--config=sgd.yaml", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1") == 0
    assert "configure_optimizers" not in caplog.text + capsys.readouterr().err
    assert "Optimizer SGD; learning rates of the parameter groups, in the ratios of the model's: " in caplog.text
    groups = groups_of()
    stages = [0.002 * 0.5**stage for stage in (4, 3, 2, 1, 0)]
    full = [group["initial_lr"] for group in groups]
    assert full[0] == full[-1] == pytest.approx(0.02)
    assert sorted(set(full)) == pytest.approx([*stages, 0.02])
    assert {group["momentum"] for group in groups} == {0.9} and "betas" not in groups[0]
    assert [group["weight_decay"] for group in (groups[0], groups[-1])] == [0.3, 0.0]
    capsys.readouterr()
    assert fit("--ckpt_path=last", "--trainer.max_epochs=2", resume=True) == 0
    with Path("run", "metrics.csv").open(newline="") as file:
        rates = [float(row["lr-SGD/pg1"]) for row in csv.DictReader(file) if row["lr-SGD/pg1"]]
    assert rates == pytest.approx([0.005, 0.01, 0.015, 0.02] + [0.002] * 4)  # warm-up, and the drop after one epoch
    capsys.readouterr()
    assert fit("--ckpt_path=last", "--trainer.max_epochs=3", "--optimizer=Adam", resume=True) == 1
    error = capsys.readouterr().err
    assert "The checkpoint's optimizer is SGD, that of this run Adam." in error and "Traceback" not in error


def test_a_scheduler_takes_the_place_of_the_models_and_says_so(fit, caplog):
    caplog.set_level("INFO")
    scheduler = ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    assert fit(*scheduler, "--trainer.max_epochs=2", "--trainer.limit_train_batches=1") == 0
    assert "The lr_scheduler ExponentialLR takes the place of the model's own schedule: warmup_steps, " in caplog.text
    groups = groups_of()
    assert groups[0]["lr"] == pytest.approx(1e-3 * 0.25) and "betas" in groups[0]
    assert groups[0]["lr"] / groups[0]["initial_lr"] == groups[1]["lr"] / groups[1]["initial_lr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer=LBFGS"], "optimizer LBFGS cannot be used with the model's parameter groups: "),
        (["--optimizer=SGD", "--optimizer.lr=-1"], "optimizer SGD cannot be used with the model's parameter groups: "),
        (["--optimizer=SGD", "--model.lr=0"], "optimizer SGD: model.lr is 0"),
    ],
    ids=["one group only", "negative rate", "no ratio"],
)
def test_one_that_cannot_be_used_is_refused_in_a_sentence(fit, capsys, options, message):
    assert fit(*options, "--trainer.max_epochs=1") == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR}",
            "--lr_scheduler: ExponentialLR needs gamma; give it in YAML as init_args: {gamma: ...}, or on the command "
            "line as --lr_scheduler.gamma VALUE.",
        ),
        (
            "lr_scheduler: {class_path: CyclicLR, init_args: {gamma: 0.5}}",
            "--lr_scheduler: CyclicLR needs base_lr and max_lr; give it in YAML as init_args: {base_lr: ..., max_lr: "
            "...}, or on the command line as --lr_scheduler.base_lr VALUE.",
        ),
        (
            "lr_scheduler: {class_path: StepLR, init_args: {step: 1}}",
            "--lr_scheduler: StepLR has no argument step; its arguments are step_size, gamma, last_epoch.",
        ),
        (
            "lr_scheduler: {class_path: StepLR, init_args: {step_size: soon}}",
            "--lr_scheduler: step_size of StepLR is soon; it must be a whole number.",
        ),
        (
            "lr_scheduler: {class_path: StepLRR}",
            "--lr_scheduler StepLRR: there is no such class; give the name of one in torch.optim.lr_scheduler, or its "
            "whole path (package.module.Class).",
        ),
        (
            "lr_scheduler: {init_args: {gamma: 0.5}}",
            "--lr_scheduler has init_args and no class: name it as class_path.",
        ),
        (
            "optimizer: {class_path: torch.optim.ASGD, init_args: {momentum: 1}}",
            "--optimizer: ASGD has no argument momentum; its arguments are lr, lambd, ",
        ),
        (
            "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping}]}",
            "--trainer.callbacks: EarlyStopping needs monitor; give it in YAML as init_args: {monitor: ...}.",
        ),
    ],
    ids=["needed", "two", "unknown", "type", "class", "no class", "optimizer", "callback"],
)
def test_a_class_that_lacks_something_is_refused_in_a_sentence(fit, capsys, text, message):
    Path("own.yaml").write_text(text)
    assert fit("--config=own.yaml") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in error
    assert not Path("run").exists()


def test_a_scheduler_that_refuses_its_arguments_ends_in_a_sentence(fit, capsys):
    scheduler = ["--lr_scheduler=CosineAnnealingWarmRestarts", "--lr_scheduler.T_0=-1"]
    assert fit(*scheduler, "--trainer.max_epochs=1") == 1
    error = capsys.readouterr().err
    assert "lr_scheduler CosineAnnealingWarmRestarts cannot be made of these arguments: " in error
    assert "Traceback" not in error
