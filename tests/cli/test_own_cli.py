"""`DINOCLI` in a user's script: own classes, own options, the folders and sentences of the command line."""

from pathlib import Path

import pytest
import torch
import yaml

from dino_lightning import DINOCLI, CocoDataModule, DINOModule
from dino_lightning.errors import DataError, UsageError
from tests.conftest import TINY_ARGS

SHORT = [*TINY_ARGS, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.num_sanity_val_steps=0"]


class OwnModule(DINOModule):
    def __init__(self, *, smoothing: float = 0.0, **options):
        super().__init__(**options)
        self.smoothing = smoothing


class OwnData(CocoDataModule):
    pass


class OwnCLI(DINOCLI):
    said = None

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--note", type=str, default="none")
        parser.link_arguments("data.batch_size", "model.smoothing")

    def before_fit(self):
        super().before_fit()
        self.said = self.config.fit.note


def test_own_classes_and_options(rooms, tmp_path, capsys):
    options = [f"--data.root={rooms}", f"--run_dir={tmp_path / 'run'}", "--note=first try", "--data.batch_size=4"]
    cli = OwnCLI(OwnModule, OwnData, args=["fit", *options, *SHORT], trainer_defaults={"log_every_n_steps": 7})
    assert type(cli.model) is OwnModule and type(cli.datamodule) is OwnData and cli.said == "first try"
    assert cli.model.smoothing == 4 and cli.model.hparams["class_names"] == ["room"]
    assert cli.trainer.global_step == 1 and cli.trainer.log_every_n_steps == 7
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["note"] == "first try" and config["data"]["batch_size"] == 4
    assert f"{cli.program} validate --ckpt_path {tmp_path / 'run'}" in capsys.readouterr().out
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    again = OwnCLI(OwnModule, OwnData, args=["validate", "--ckpt_path", checkpoint, "--report=false"])
    assert again.config.validate.note == "first try" and again.model.smoothing == 4


def test_bad_input_is_raised_in_python_and_a_sentence_in_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = ["fit", "--data.root=nowhere", *SHORT]
    with pytest.raises(DataError, match="nowhere"):
        DINOCLI(args=wrong)
    for given, code, said in (
        (wrong, 1, "nowhere"),
        ([], 1, "Give a command: fit, validate, test"),
        (["fit", "--nonsense=1"], 2, "--nonsense"),
    ):
        monkeypatch.setattr("sys.argv", ["train.py", *given])
        with pytest.raises(SystemExit) as end:
            OwnCLI(OwnModule)
        assert end.value.code == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert said in line


def test_run_false_makes_everything_and_runs_nothing(rooms, tmp_path, monkeypatch):
    """Then a step by hand, and another by the Trainer, whose folder holds what that of `fit` does."""
    monkeypatch.chdir(tmp_path)
    options = [f"--data.root={rooms}", "--note=mine", "--data.batch_size=2", "--trainer.max_steps=1", *SHORT]
    cli = OwnCLI(OwnModule, OwnData, args=options, run=False)
    assert type(cli.model) is OwnModule and type(cli.datamodule) is OwnData and cli.model.smoothing == 2
    assert cli.config.note == "mine" and cli.said is None and cli.trainer.global_step == 0
    assert list(tmp_path.iterdir()) == []

    batch = next(iter(cli.datamodule.train_dataloader()))
    optimizer = torch.optim.SGD(cli.model.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # of the denoising queries
        loss = cli.model.criterion(cli.model.model(batch), batch.targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] and list(tmp_path.iterdir()) == []

    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1
    (folder,) = Path("runs").iterdir()
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "run.json", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= written
    assert ".run.lock" not in written
    with pytest.raises(UsageError, match="holds the results of another run"):
        OwnCLI(OwnModule, OwnData, args=[f"--run_dir={folder}", *options], run=False)
    again = OwnCLI(OwnModule, OwnData, args=["validate", "--ckpt_path", str(folder), "--report=false"])
    assert again.config.validate.note == "mine"


def test_run_false_takes_options_of_no_command(rooms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given, said in (
        (["fit", f"--data.root={rooms}"], "With run=False nothing is run: leave out fit"),
        (["--ckpt_path=last"], "With run=False there is no --ckpt_path: give the checkpoint to trainer.fit"),
        (["--overwrite"], "With run=False there is no --overwrite: "),
        ([f"--data.root={rooms}", *SHORT, "--nonsense=1"], "There is no option --nonsense"),
    ):
        monkeypatch.setattr("sys.argv", ["train.py", *given])
        with pytest.raises(SystemExit) as end:
            DINOCLI(run=False)
        assert end.value.code in (1, 2)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert said in line
    assert list(tmp_path.iterdir()) == []


def test_two_of_run_false_have_folders_of_their_own(rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--data.root={rooms}", *SHORT]
    first, second = (DINOCLI(args=options, run=False) for _ in range(2))
    assert Path(first.trainer.default_root_dir) != Path(second.trainer.default_root_dir)
    taken = [f"--run_dir={tmp_path / 'same'}", *options]
    first, second = (DINOCLI(args=taken, run=False) for _ in range(2))
    first.trainer.fit(first.model, first.datamodule)
    with pytest.raises(UsageError, match="holds the results of another run"):
        second.trainer.fit(second.model, second.datamodule)
