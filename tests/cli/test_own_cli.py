"""`DINOCLI` in a user's script: own classes, own options, the folders and sentences of the command line."""

import pytest
import yaml

from dino_lightning import DINOCLI, CocoDataModule, DINOModule
from dino_lightning.errors import DataError
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
