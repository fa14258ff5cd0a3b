"""A run that is interrupted, or whose disk is full, or whose checkpoint is damaged, loses nothing that was saved."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import lightning
import psutil
import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from dino_lightning.__main__ import run
from dino_lightning.callbacks import GracefulCheckpoint
from dino_lightning.model.deformable_attention import set_implementation
from tests.conftest import TINY_ARGS

PATIENCE = 200  # seconds, on a loaded machine


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def options(rooms, folder, epochs=4):
    own = [f"--trainer.max_epochs={epochs}", "--trainer.log_every_n_steps=1", "--save_every_steps=3"]
    return ["--data.root", str(rooms), "--run_dir", str(folder), "--data.batch_size=1", *TINY_ARGS, *own]


@pytest.fixture(scope="module")
def whole(rooms, tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(["fit", *options(rooms, folder)]) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def logged_metrics(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(row["step"], name): float(value) for row in rows for name, value in row.items() if value}


def start(arguments, **how):
    command = [sys.executable, "-m", "dino_lightning.fit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **how
    )


def wait_for_steps(folder, process):
    limit = time.monotonic() + PATIENCE
    metrics = folder / "metrics.csv"
    while not metrics.is_file() or metrics.read_text().count("\n") < 6:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_resumes_as_if_nothing_had_been(rooms, whole, tmp_path, number, capsys):
    folder = tmp_path / "interrupted"
    process = start(options(rooms, folder))
    wait_for_steps(folder, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert "saving a checkpoint after this step" in output and "fit --ckpt_path" in output
    assert "Traceback" not in output
    done = len(logged_metrics(folder))
    assert done < len(logged_metrics(whole))
    assert run(["fit", "--run_dir", str(folder), "--ckpt_path", "last"]) == 0
    assert logged_metrics(folder) == logged_metrics(whole)
    assert "Changed since" not in capsys.readouterr().out


def two_processes(rooms, folder):
    process = start([*options(rooms, folder, epochs=20), "--trainer.devices=2", "--trainer.strategy=ddp"])
    wait_for_steps(folder, process)
    (other,) = (each for each in psutil.Process(process.pid).children() if "dino_lightning.fit" in each.cmdline())
    return process, other


@pytest.mark.slow
def test_a_signal_to_the_first_process_stops_both(rooms, tmp_path):
    process, other = two_processes(rooms, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    other.wait(timeout=60)
    assert "error" not in output and output.count("Stopped at step") == 1


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_other_down_with_the_cause(rooms, tmp_path):
    process, other = two_processes(rooms, tmp_path / "run")
    other.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: Rank 1 was killed by SIGKILL" in output


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(copied, rooms):
    last = copied / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    limit = len(before) // 2
    more = ["--run_dir", str(copied), "--ckpt_path", "last", "--trainer.max_epochs=6"]
    process = start(more, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert "could not be written" in line and "is intact" in line
    assert last.read_bytes() == before
    assert not list(last.parent.glob("tmp*"))
    assert run(["fit", *more]) == 0


@pytest.mark.parametrize("how", ["cut short", "empty", "gone", "bits flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied, how, capsys, recwarn):
    last = copied / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    if how == "gone":
        last.unlink()
    elif how == "bits flipped":
        content[len(content) // 2] ^= 16
        last.write_bytes(content)
    else:
        last.write_bytes(content[: len(content) // 3 if how == "cut short" else 0])
    expected = logged_metrics(copied)
    assert run(["fit", "--run_dir", str(copied), "--ckpt_path", "last"]) == 0
    assert capsys.readouterr().err.count("Resuming from the one before it") == 1
    assert logged_metrics(copied) == expected
    last.write_bytes(b"")
    (last.parent / "previous.ckpt").write_bytes(b"nothing")
    assert run(["fit", "--run_dir", str(copied), "--ckpt_path", "last"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error:")


def test_other_classes_are_refused_with_the_difference(copied, rooms, tmp_path, capsys):
    other = shutil.copytree(rooms, tmp_path / "other")
    for split in ("train", "val"):
        path = other / split / "annotations.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = "chamber"
        path.write_text(json.dumps(content))
    more = ["--run_dir", str(copied), "--ckpt_path", "last", "--trainer.max_epochs=6"]
    assert run(["fit", *more, "--data.root", str(other)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "class_names ['room'] in the checkpoint, ['chamber'] here" in error and "--model.weights" in error


def test_another_architecture_is_refused_with_the_difference(copied, capsys):
    more = ["--run_dir", str(copied), "--ckpt_path", "last", "--trainer.max_epochs=6"]
    assert run(["fit", *more, "--model.hidden_dim=64", "--model.num_queries=20"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "hidden_dim 32 in the checkpoint, 64 here; num_queries 12 in the checkpoint, 20 here" in error
    assert run(["fit", *more]) == 0  # with its configuration as it was


def test_options_given_anew_win_and_are_listed(copied, capsys):
    more = ["--run_dir", str(copied), "--ckpt_path", "last", "--trainer.max_epochs=5", "--model.lr=0.003"]
    assert run(["fit", *more]) == 0
    printed = capsys.readouterr().out
    assert "Changed since the checkpoint was written:\n" in printed
    assert "trainer.max_epochs: 4 -> 5" in printed and "model.lr: 0.0001 -> 0.003" in printed
    rates = {value for (_, name), value in logged_metrics(copied).items() if name.startswith("lr-")}
    assert any(rate == pytest.approx(0.003) or rate == pytest.approx(0.0003) for rate in rates)


def test_the_record_has_what_the_run_was_made_with(copied, rooms):
    record = json.loads((copied / "run.json").read_text())
    (first,) = record["starts"]
    assert first["from_step"] == 0 and first["packages"]["torch"] and first["command"]
    assert record["classes"] == [{"label": 0, "category_id": 1, "name": "room"}]
    assert record["data"]["train"]["images"] == 8 and len(record["data"]["train"]["sha256"]) == 64
    set_implementation("pytorch")
    try:
        assert run(["fit", "--run_dir", str(copied), "--ckpt_path", "last", "--trainer.max_epochs=5"]) == 0
    finally:
        set_implementation("auto")
    again = json.loads((copied / "run.json").read_text())
    assert [start["from_step"] for start in again["starts"]] == [0, 32]
    assert [start["deformable_attention"] for start in again["starts"]] == ["PyTorch", "PyTorch (as chosen)"]
    assert [start["residual_norm"] for start in again["starts"]] == ["PyTorch", "PyTorch"]
    assert {start["compiled"] for start in again["starts"]} == {"no (it pays on CUDA devices only)"}
    assert {start["cuda_graphs"] for start in again["starts"]} == {"no (not asked for)"}
    assert again["data"] == record["data"]


def test_the_configuration_repeats_the_run(whole, tmp_path):
    folder = tmp_path / "again"
    assert run(["fit", "--config", str(whole / "config.yaml"), "--run_dir", str(folder)]) == 0
    assert logged_metrics(folder) == logged_metrics(whole)


def test_resuming_does_not_need_the_initial_weights(whole, rooms, tmp_path):
    weights = shutil.copy(whole / "checkpoints" / "best.ckpt", tmp_path / "start.ckpt")
    folder = tmp_path / "run"
    assert run(["fit", *options(rooms, folder, epochs=1), "--model.weights", str(weights)]) == 0
    weights.unlink()
    assert run(["fit", "--run_dir", str(folder), "--ckpt_path", "last", "--trainer.max_epochs=2"]) == 0


def test_no_process_is_asked_before_each_batch_whether_it_got_a_signal(tmp_path, monkeypatch):
    """Lightning's own question would be a device synchronisation in each step of ddp."""
    asked = []
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda self: asked.append(1), raising=False)
    loop = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    ).fit_loop.epoch_loop
    GracefulCheckpoint(checkpoint=tmp_path / "last.ckpt").on_fit_start(loop.trainer, None)
    loop._broadcast_sigterm_tensor()
    assert not asked
