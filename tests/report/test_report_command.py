"""`validate` and `test` with their report, as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dino_lightning.__main__ import run
from tests.conftest import TINY_ARGS

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.enable_progress_bar=false"]
FILES = ["index.html", "per_class.csv", "per_image.csv", "report.json"]


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(rooms, tmp_path_factory):
    """A run of one epoch, with a report of its validation."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    args = ["--data.root", str(rooms), "--run_dir", str(folder), "--trainer.max_epochs=1", *TINY_ARGS]
    assert run(["fit", *args, "--model.recipe=auto"]) == 0
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "tiny")
    return Path("tiny/checkpoints/best.ckpt")


def test_validate_writes_a_report_and_says_where(checkpoint, capsys):
    assert run(["validate", "--ckpt_path", str(checkpoint), *QUIET]) == 0
    printed = capsys.readouterr().out
    folder = Path("tiny/validate/report")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert "at a score of" in printed
    assert "boxes counted:" in printed
    with Path("tiny/metrics.csv").open(newline="") as file:
        (trained,) = [row for row in csv.DictReader(file) if row["val/AP"]]
    assert f"val/loss{float(trained['val/loss']):>16.3f}" in printed  # by the recipe of the training
    assert str(folder / "index.html") in printed
    summary = json.loads((folder / "report.json").read_text())
    assert summary["stage"] == "validate"
    assert summary["num_images"] == 4
    assert summary["checkpoint"].endswith("best.ckpt")
    assert [row["file_name"] for row in summary["images"]]
    page = (folder / "index.html").read_text()
    assert page.count("data:image/jpeg") == 4
    assert summary["deformable_attention"] == summary["residual_norm"] == "PyTorch"
    assert summary["tta_views"] == 1
    assert "; deformable attention: PyTorch; residual and layer norm: PyTorch; " in page


def test_test_writes_its_own_and_compares(checkpoint, capsys):
    assert run(["validate", "--ckpt_path", str(checkpoint), *QUIET]) == 0
    again = ["--against", "tiny/validate/report/report.json"]
    assert run(["test", "--ckpt_path", str(checkpoint), *again, *QUIET]) == 0
    capsys.readouterr()
    content = Path("tiny/test/report/index.html").read_text()
    assert "Test report" in content
    assert "Compared with tiny/validate/report/report.json" in content
    assert "Of 4 images in both, 0 became better by F1 and 0 worse." in content  # there is no test split
    # a run against its own last report
    assert run(["validate", "--ckpt_path", str(checkpoint), "--against", "tiny", *QUIET]) == 0
    assert "Compared with" in Path("tiny/validate/report/index.html").read_text()


def test_without_a_report(checkpoint):
    assert run(["validate", "--ckpt_path", str(checkpoint), "--report", "false", *QUIET]) == 0
    assert not Path("tiny/validate/report").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--against", "nowhere"], "nowhere: there is no report.json"),
        (["--against", "tiny/checkpoints/best.ckpt"], "tiny/checkpoints/best.ckpt: is not a JSON file"),
        (["--against", "tiny", "--report=false"], "--against compares in the report"),
    ],
)
def test_bad_input_is_refused_before_anything_is_evaluated(checkpoint, extra, message, capsys):
    assert run(["validate", "--ckpt_path", str(checkpoint), *extra, *QUIET]) == 1
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert message in said[0]
    assert "val/AP" not in printed.out


def test_a_folder_that_cannot_be_written(checkpoint, capsys):
    Path("tiny/validate").mkdir()
    Path("tiny/validate/report").write_text("in the way")
    assert run(["validate", "--ckpt_path", str(checkpoint), *QUIET]) == 1
    printed = capsys.readouterr()
    assert "tiny/validate/report cannot be written" in printed.err
    assert "val/AP50" in printed.out  # the figures themselves are not lost


@pytest.mark.slow
def test_two_processes_write_one_report(checkpoint, tmp_path):
    assert run(["validate", "--ckpt_path", str(checkpoint), *QUIET]) == 0
    alone = json.loads(Path("tiny/validate/report/report.json").read_text())
    command = [sys.executable, "-m", "dino_lightning", "validate", "--ckpt_path", str(checkpoint), *QUIET]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir=two", "--against=tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("two/report/index.html") == 1
    together = json.loads(Path("two/report/report.json").read_text())
    assert together["images"] == alone["images"]
    for name, value in alone["values"].items():
        assert together["values"][name] == pytest.approx(value, abs=1e-6)
    assert sorted(path.name for path in Path("two/report").iterdir()) == FILES
