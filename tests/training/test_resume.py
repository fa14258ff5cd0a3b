"""Killed runs resume as if they had not been killed: the same images, validations and best checkpoint."""

import contextlib
import shutil
from dataclasses import replace

import lightning
import pytest
import torch

from dino_lightning.__main__ import run
from dino_lightning.cli.running import execute
from dino_lightning.files import atomic_write
from dino_lightning.metrics import CocoMetric
from dino_lightning.model import DINO
from tests.conftest import TINY_ARGS, forget_earlier_runs


class Killed(Exception):
    pass


class Recorder(lightning.Callback):
    """What a run does; ends it before a step, or at the first validation from a step on."""

    def __init__(self, before_step=None, in_validation_from=None):
        self.batches, self.validations, self.epochs = [], [], []
        self.before_step, self.in_validation_from = before_step, in_validation_from

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.before_step:
            raise Killed
        self.batches.append((trainer.current_epoch, batch_idx, trainer.global_step, *batch.image_ids))

    def on_validation_start(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        if self.in_validation_from is not None and trainer.global_step >= self.in_validation_from:
            raise Killed
        self.validations.append(trainer.global_step)

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append((trainer.current_epoch, trainer.global_step))


def fit(args, **how):
    forget_earlier_runs()
    recorder = Recorder(**how)
    with contextlib.suppress(Killed):
        execute("fit", args, [recorder])
    return recorder


@pytest.fixture
def options(rooms):
    """Eight steps in each epoch."""
    return ["--data.root", str(rooms), "--data.batch_size=1", *TINY_ARGS, "--trainer.log_every_n_steps=1"]


@pytest.mark.parametrize(
    ("how", "killed_before"),
    [
        pytest.param(
            ["--trainer.max_epochs=3", "--model.lr_schedule=cosine", "--save_every_steps=3"], 11, marks=pytest.mark.slow
        ),
        pytest.param(["--trainer.max_steps=24", "--early_stopping_patience=5"], 12, marks=pytest.mark.slow),
        (["--trainer.max_steps=24", "--trainer.max_epochs=3", "--save_every_steps=3"], 11),
        pytest.param(["--trainer.max_steps=24", "--trainer.check_val_every_n_epoch=2"], 12, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_rest_of_a_run_is_that_of_one_that_was_not_killed(options, tmp_path, how, killed_before):
    whole = fit([*options, *how, "--run_dir", str(tmp_path / "whole")])
    fit([*options, *how, "--run_dir", str(tmp_path / "run")], before_step=killed_before)
    rest = fit(["--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"])
    start = rest.batches[0][2]
    assert 0 < start < killed_before
    assert rest.batches == whole.batches[start:]
    assert rest.epochs == [epoch for epoch in whole.epochs if epoch[1] > start]
    assert rest.validations == [step for step in whole.validations if step > start]


@pytest.mark.slow
def test_a_validation_in_an_epoch_is_not_passed_over(options, tmp_path):
    own = ["--trainer.max_epochs=2", "--save_every_steps=4", "--trainer.val_check_interval=4"]
    whole = fit([*options, *own, "--run_dir", str(tmp_path / "whole")])
    fit([*options, *own, "--run_dir", str(tmp_path / "run")], in_validation_from=12)
    rest = fit(["--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"])
    assert whole.validations == [4, 8, 12, 16]
    assert rest.validations == [12, 16] and rest.batches == whole.batches[8:]


def test_a_save_due_before_a_validation_follows_after_the_next_step(options, tmp_path):
    own = ["--trainer.max_epochs=1", "--save_every_steps=4", "--trainer.val_check_interval=4"]
    fit([*options, *own, "--run_dir", str(tmp_path / "run")], before_step=6)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.slow
def test_a_run_folder_that_was_moved_keeps_its_best_checkpoint(options, tmp_path, monkeypatch):
    compute, reached = CocoMetric.compute, {"AP": 0.5}
    monkeypatch.setattr(CocoMetric, "compute", lambda metric: {**compute(metric), **reached})
    fit([*options, "--trainer.max_epochs=1", "--run_dir", str(tmp_path / "run")])
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    reached["AP"] = 0.1
    fit(["--ckpt_path", str(moved / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=2"])
    assert torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 0
    reached["AP"] = 0.6
    fit(["--ckpt_path", str(moved / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=3"])
    assert torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_a_new_run_with_the_configuration_of_one_that_went_on_begins_anew(options, tmp_path):
    run_dir = ["--run_dir", str(tmp_path / "run")]
    fit([*options, "--trainer.max_epochs=1", *run_dir])
    fit([*run_dir, "--ckpt_path", "last", "--trainer.max_epochs=2"])
    new = fit(["--config", str(tmp_path / "run" / "config.yaml"), "--run_dir", str(tmp_path / "new")])
    assert new.batches[0][:3] == (0, 0, 0) and new.batches[-1][2] == 15


def test_a_checkpoint_of_16_mixed_resumes_in_another_precision(options, tmp_path):
    fit([*options, "--trainer.max_epochs=1", "--run_dir", str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        group["fused"] = False  # as 16-mixed stores it, which needs a GPU
    torch.save(content, path)
    rest = fit(["--ckpt_path", str(path), "--trainer.max_epochs=2"])
    assert rest.batches[-1][2] == 15


def test_predictions_that_are_not_finite_in_validation_give_a_bad_score(options, tmp_path, monkeypatch, recwarn):
    forward = DINO.forward

    def broken(model, *args, **kwargs):
        output = forward(model, *args, **kwargs)
        return output if model.training else replace(output, pred_logits=output.pred_logits * float("nan"))

    monkeypatch.setattr(DINO, "forward", broken)
    seen = fit([*options, "--trainer.max_epochs=2", "--run_dir", str(tmp_path / "run")])
    assert seen.validations == [8, 16]
    assert any("12 of 12 detections have a score or a corner that is not finite" in str(w.message) for w in recwarn)


def test_evaluation_takes_starting_weights_or_says_that_it_has_nothing(options, tmp_path, capsys):
    fit([*options, "--trainer.max_epochs=1", "--run_dir", str(tmp_path / "run")])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)["state_dict"]["model.level_embedding"]
    seen = []

    class Look(lightning.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append(torch.equal(pl_module.model.level_embedding, stored))

    forget_earlier_runs()
    execute("validate", [*options, "--run_dir", str(tmp_path / "out"), "--model.weights", str(last)], [Look()])
    assert seen == [True]
    capsys.readouterr()
    assert run(["validate", *options, "--run_dir", str(tmp_path / "none")]) == 1
    assert "nothing to evaluate: give a checkpoint with --ckpt_path" in capsys.readouterr().err


def test_what_a_killed_save_left_is_removed_and_nothing_else(options, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    kept = [folder / name for name in ("tmp.ckpt", "tmp-mine.ckpt", "other.ckpt", "tmp-last.ckpt-12345678.txt")]
    for path in [*kept, folder / "tmp-last.ckpt-abc_1234.ckpt"]:
        path.write_text("x")
    left = []

    class Killing(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            with pytest.raises(Killed), atomic_write(folder / "best.ckpt") as temporary:
                left.append(temporary.match("tmp-best.ckpt-????????.ckpt"))
                raise Killed

    forget_earlier_runs()
    run = ["--run_dir", str(tmp_path / "run"), "--overwrite"]
    execute("fit", [*options, "--trainer.max_epochs=1", *run], [Killing()])
    assert left == [True]
    assert {path.name for path in folder.glob("*") if path.name.startswith(("tmp", "other"))} == {p.name for p in kept}


# What a checkpoint holds, by the names of before the classes were renamed and the modules moved into rooms. A run that
# was started then resumes from these; so none of them may change.
STORED_CALLBACKS = {"EMA", "RunReport", "AutoBatchSize", "ModelCheckpoint"}
STORED_ENTRIES = {
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
    "lr_schedulers", "hparams_name", "hyper_parameters", "raw_state_dict", "score_threshold", "noise_seed",
    "epoch_loss",
}  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_under_the_names_of_earlier_versions_resumes(options, tmp_path):
    """Exactly those entries are kept of it, so that nothing can be read under a newer name."""
    more = [*options, "--ema_decay=0.9", "--auto_batch_size=2", "--data.batch_size=1"]
    whole = fit([*more, "--trainer.max_epochs=2", "--run_dir", str(tmp_path / "whole")])
    fit([*more, "--trainer.max_epochs=2", "--run_dir", str(tmp_path / "run")], before_step=whole.batches[-1][2])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    callbacks = {key: value for key, value in content["callbacks"].items() if key.split("{")[0] in STORED_CALLBACKS}
    assert {key.split("{")[0] for key in callbacks} == STORED_CALLBACKS
    older = {name: content[name] for name in content if name in STORED_ENTRIES} | {"callbacks": callbacks}
    assert older.keys() == STORED_ENTRIES
    with atomic_write(last) as temporary:
        torch.save(older, temporary)
    rest = fit(["--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"])
    assert rest.batches == whole.batches[-len(rest.batches) :]
    finished = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "run")
    ]
    losses = [
        [(row["epoch"], row["train/loss_step"]) for row in each["callbacks"]["RunReport"]["history"]]
        for each in finished
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    for key, value in finished[0]["state_dict"].items():
        assert torch.equal(value, finished[1]["state_dict"][key]), key
