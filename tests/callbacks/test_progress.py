"""The progress bar as a terminal of 80 columns shows it, and the lines that take its place in a file."""

import io
import sys

import lightning
import pytest
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.callbacks import Progress
from dino_lightning.callbacks.progress import BAR_FORMAT
from tests.conftest import TINY_SIZES


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def train(rooms, folder):
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0)
    module = DINOModule(num_classes=data.num_classes, backbone_weights=None, **TINY_SIZES)
    trainer = lightning.Trainer(
        max_epochs=2,
        limit_train_batches=2,
        log_every_n_steps=1,
        callbacks=[Progress()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)


def test_the_bar_counts_from_one_and_shows_f1_and_the_time_left_first(rooms, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr(sys, "stdout", Terminal())
    train(rooms, tmp_path)
    shown = [line for line in sys.stdout.getvalue().replace("\n", "\r").split("\r") if line.startswith("Epoch")]
    assert {line.split(":")[0] for line in shown} == {"Epoch 1/2", "Epoch 2/2"}
    assert max(map(len, shown)) <= 80
    last = shown[-1]
    assert last.index("2/2, F1=") < last.index("left=0:00:0") < last.index("loss=") < last.index("it/s]")


def test_nothing_is_cut_off_in_a_long_training():
    line = Tqdm.format_meter(
        n=7393, total=7393, elapsed=600.0, ncols=79, prefix="Epoch 13/14", bar_format=BAR_FORMAT,
        postfix="F1=0.512, left=21:03:12, loss=17.20",
    )  # fmt: skip
    assert len(line) <= 79 and line.endswith("it/s]")
    assert "F1=0.512, left=21:03:12, loss=17.20" in line


def test_a_file_gets_a_line_for_each_epoch(rooms, tmp_path, capsys):
    train(rooms, tmp_path)
    printed = capsys.readouterr().out
    assert "\r" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("Epoch")]
    assert [line.partition(":")[0] for line in lines] == ["Epoch 1/2 done", "Epoch 2/2 done"]
    assert "F1 " in lines[-1] and "left 0:00:00" in lines[-1] and "loss " in lines[-1]


def test_a_file_gets_lines_within_a_long_epoch(rooms, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dino_lightning.callbacks.progress.SECONDS_BETWEEN_LINES", 0.0)
    train(rooms, tmp_path)
    printed = capsys.readouterr().out
    assert "Epoch 1/2, batch 1/2" in printed and "Validation, batch 1" in printed


@pytest.mark.parametrize(("max_epochs", "name"), [(3, "Epoch 1/3"), (-1, "Epoch 1"), (None, "Epoch 1")])
def test_an_epoch_without_a_last_one(max_epochs, name):
    from types import SimpleNamespace

    from dino_lightning.callbacks.progress import _epoch

    assert _epoch(SimpleNamespace(current_epoch=0, max_epochs=max_epochs)) == name
