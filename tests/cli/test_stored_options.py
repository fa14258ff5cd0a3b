"""The options of a run are in its checkpoints too: where config.yaml is cut, changed or far away, those count."""

import shutil

import pytest
import torch

from dino_lightning.__main__ import run
from dino_lightning.cli.stored_options import run_folder_of
from dino_lightning.training.resume import changed_options
from tests.cli.checkpoint_changes import train
from tests.conftest import forget_earlier_runs


@pytest.fixture(scope="module")
def finished(rooms, tmp_path_factory):
    return train(rooms, tmp_path_factory.mktemp("runs") / "run").parent.parent


@pytest.fixture
def own_run(finished, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def said(capsys, *args):
    forget_earlier_runs()
    capsys.readouterr()
    assert run(list(args)) == 0
    printed = capsys.readouterr()
    return printed.out + printed.err


def loss_in(text):
    return text.partition("val/loss")[2].split()[0]


def test_a_copied_checkpoint_is_evaluated_as_in_its_run(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_run = said(capsys, "validate", "--ckpt_path", str(finished / "checkpoints" / "last.ckpt"), "--report=false")
    assert "Options: those stored" not in in_run and "Evaluated at" not in in_run
    copy = shutil.copy(str(finished / "checkpoints" / "last.ckpt"), "copied.ckpt")
    here = ["--run_dir", "here", "--report=false"]
    copied = said(capsys, "validate", "--ckpt_path", copy, *here)
    assert "Options: those stored in" in copied
    assert loss_in(copied) == loss_in(in_run)

    root = ["--data.root", str(finished.parents[1] / "none"), "--trainer.accelerator=cpu"]
    forget_earlier_runs()
    assert run(["validate", "--ckpt_path", copy, *here, *root]) == 1
    other = said(capsys, "validate", "--ckpt_path", copy, *here, "--data.image_size=80")
    assert "Evaluated at 80/96; the checkpoint was trained at 64/96." in other
    assert loss_in(other) != loss_in(in_run)


def test_weights_and_older_checkpoints_bring_their_sizes(finished, rooms, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    older = {name: value for name, value in content.items() if not name.startswith("dino_lightning")}
    torch.save(older, "older.ckpt")
    args = ["--data.root", str(rooms), "--data.num_workers=0", "--trainer.accelerator=cpu", "--run_dir", "here"]
    args += ["--report=false", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    as_checkpoint = said(capsys, "validate", "--ckpt_path", "older.ckpt", *args)
    as_weights = said(capsys, "validate", "--model.weights", "older.ckpt", *args)
    assert "Evaluated at" not in as_checkpoint + as_weights
    assert loss_in(as_checkpoint) == loss_in(as_weights)


@pytest.mark.slow
def test_a_cut_or_changed_configuration_is_told_and_does_not_count(own_run, capsys):
    checkpoint, config = own_run / "checkpoints" / "last.ckpt", own_run / "config.yaml"
    whole = config.read_text()
    assert not list(own_run.glob("tmp*"))
    resume = ["fit", "--ckpt_path", str(checkpoint)]

    config.write_text(whole.replace("image_size: 64", "image_size: 80").replace("augmentation: plans\n", "\n"))
    printed = said(capsys, *resume)
    assert f"{config} differs from the checkpoint (data.augmentation: plans -> None; data.image_size: 64 -> 80)" in (
        printed
    )
    assert "Changed since" not in printed
    assert config.read_text() == whole

    config.write_text(whole[: whole.index("trainer:")])
    assert f"{config} is damaged; the options stored in the checkpoint are used." in said(capsys, *resume)
    config.unlink()
    assert f"{config} is missing; the options stored in the checkpoint are used." in said(capsys, *resume)
    assert config.read_text() == whole
    assert "Changed since" not in said(capsys, *resume, "--config", str(config))


def test_a_stray_configuration_makes_no_run(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir()
    assert run_folder_of(checkpoint) is None
    (tmp_path / "config.yaml").write_text("name: of another program\n")
    assert run_folder_of(checkpoint) is None
    (tmp_path / "config.yaml").write_text("data: {}\nmodel: {}\ntrainer: {}\n")
    assert run_folder_of(checkpoint) == tmp_path
    assert run_folder_of(tmp_path / "weights" / "best.ckpt") is None
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "run.json").write_text("{}")
    assert run_folder_of(checkpoint) == tmp_path


def test_lists_and_tuples_are_the_same_options():
    before = {"model": {"feature_strides": [8, 16, 32], "lr": 1.0, "pairs": [[1, 2]]}}
    assert changed_options(before, {"model": {"feature_strides": (8, 16, 32), "lr": 1.0, "pairs": [(1, 2)]}}) == []
    now = {"model": {"feature_strides": (8, 16), "lr": 1.0}}
    assert changed_options(before, now) == ["model.feature_strides: [8, 16, 32] -> [8, 16]"]
    assert changed_options(before, now, both=True)[1:] == ["model.pairs: [[1, 2]] -> None"]
