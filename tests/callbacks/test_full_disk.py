"""A disk that is full when any one of a run's files is written, and rows of metrics that are broken."""

import builtins
import csv
import io
import os
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import torch

from dino_lightning.__main__ import run
from dino_lightning.callbacks import MetricsCsvResume
from dino_lightning.files import atomic_write
from tests.conftest import TINY_ARGS

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is what a full disk is made of here")


@pytest.fixture(scope="module")
def whole(rooms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    args = ["--data.root", str(rooms), "--run_dir", str(folder), *TINY_ARGS, "--trainer.log_every_n_steps=1"]
    assert run(["fit", *args, "--trainer.max_epochs=1"]) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def full(monkeypatch):
    """Makes every file with one of these words in its path one that lies on a full disk, wherever it is opened."""

    def fill(*words):
        opened = builtins.open

        def on_a_full_disk(file, mode="r", *args, **kwargs):
            concerned = not isinstance(file, int) and any(word in os.fsdecode(file) for word in words)
            if concerned and set(mode) & set("wax+"):
                Path(os.fsdecode(file)).touch()
                file = "/dev/full"
            return opened(file, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", on_a_full_disk)
        monkeypatch.setattr(io, "open", on_a_full_disk)

    return fill


def resume(folder):
    return run(["fit", "--ckpt_path", str(folder), "--trainer.max_epochs=2"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_pictures_and_tensorboard_are_done_without(copied, full, recwarn, capsys):
    full("learning_curves.png", "detections.png", "events.out")
    assert resume(copied) == 0
    told = [str(warning.message) for warning in recwarn if "No space left on device" in str(warning.message)]
    assert sorted(text.split(" could not")[0].removeprefix(f"{copied}/") for text in told) == [
        "detections.png",
        "learning_curves.png",
        "tensorboard",
    ]
    assert all("training continues without" in text for text in told)
    assert torch.load(copied / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert not list(copied.rglob("tmp-*"))


@pytest.mark.parametrize(
    "word, named",
    [
        ("tmp-last.ckpt", "checkpoints/last.ckpt"),
        ("run/metrics.csv", "metrics.csv"),
        ("tmp-metrics.csv", "checkpoints/metrics.csv"),
        ("config.yaml", "config.yaml"),
        ("tmp-run.json", "run.json"),
    ],
)
def test_what_a_run_needs_ends_it_in_one_sentence(copied, full, word, named, monkeypatch, capsys):
    last = copied / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    with monkeypatch.context() as patch:
        full(word)
        code = resume(copied)
        patch.undo()
    monkeypatch.undo()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1
    assert error.startswith("error: ") and "No space left on device" in error and str(copied / named) in error
    assert last.read_bytes() == before
    assert not list(copied.rglob("tmp-*"))


def test_files_follow_the_umask_and_leave_nothing_where_they_cannot_be_written(tmp_path, full):
    for mask, mode in ((0o027, 0o640), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            with atomic_write(tmp_path / "file.txt") as temporary:
                temporary.write_text("new")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode
    full("tmp-file")
    for write in (lambda path: path.write_text("x" * 10), lambda path: _save(path)):
        with (
            pytest.raises(OSError, match="No space left on device") as caught,
            atomic_write(tmp_path / "file.txt") as p,
        ):
            write(p)
        assert caught.value.filename == str(tmp_path / "file.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"] and (tmp_path / "file.txt").read_text() == "new"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "other.txt"):
        (tmp_path / "absent").read_text()
    assert caught.value.filename == str(tmp_path / "absent")


def _save(path):
    with path.open("wb") as file:
        torch.save({"weights": [torch.zeros(100_000) for _ in range(4)]}, file)


BROKEN = {
    "a step that is no number": lambda lines: [*lines[:3], lines[3].replace(",", ";"), *lines[4:]],
    "a value that is no number": lambda lines: [*lines[:2], lines[2].replace("0.", "O.", 1), *lines[3:]],
    "too many cells": lambda lines: [*lines[:3], lines[3].rstrip("\r\n") + ",1,2\r\n", *lines[4:]],
    "null bytes": lambda lines: [*lines[:3], "\0" * 50 + "\r\n", *lines[4:]],
    "no end": lambda lines: [*lines[:-1], lines[-1].rstrip("\r\n")[:-1]],
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("with_copy", [True, False], ids=["copy", "no copy"])
def test_a_broken_row_is_told_and_taken_from_the_copy_or_left_out(whole, tmp_path, how, with_copy):
    path, copy = tmp_path / "metrics.csv", tmp_path / "copy.csv"
    content = (whole / "metrics.csv").read_bytes().decode()
    lines = content.splitlines(keepends=True)
    path.write_bytes("".join(BROKEN[how](lines)).encode())
    if with_copy:
        copy.write_bytes(content.encode())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = MetricsCsvResume(path=path, copy=copy, resuming=True)._rows
    (sentence,) = (str(warning.message) for warning in told)
    expected = list(csv.DictReader(lines))
    if with_copy:
        assert rows == expected and sentence.endswith(f"they are taken from {copy}.")
    else:
        assert len(rows) == len(expected) - 1 and sentence.endswith("are left out.")
        assert all(row in expected for row in rows)
    assert sentence.startswith(f"{path}: 1 of its {len(expected)} rows cannot be read (first: line ")


def test_a_run_with_a_broken_row_resumes(copied, recwarn):
    (copied / "checkpoints" / "metrics.csv").unlink()
    with (copied / "metrics.csv").open("a") as file:
        file.write("garbage,\0,,x\n")
    assert resume(copied) == 0
    assert [str(warning.message) for warning in recwarn if "cannot be read" in str(warning.message)]
    with (copied / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] > max(4, len(steps) // 3)
