"""A run's folder is its own, whatever is started in it, and its files lie there whatever the loggers are."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from dino_lightning.__main__ import run
from dino_lightning.cli import run_folder
from tests.conftest import TINY_ARGS

PROJECT = Path(__file__).parents[2]
STEP = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(rooms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, *STEP, "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def used(trained):
    shutil.copytree(trained, "X")
    Path("X/notes.txt").write_text("mine")
    return Path("X")


@pytest.fixture
def fit(rooms):
    return lambda *args: run(["fit", "--data.root", str(rooms), *TINY_ARGS, *STEP, *args])


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def said(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_a_used_folder_is_refused_and_untouched(used, fit, trained, capsys):
    before = contents(used)
    assert fit("--run_dir=X") == 1
    assert "X holds the results of another run (checkpoints/best.ckpt)" in said(capsys)
    assert fit("--run_dir=X", f"--ckpt_path={trained}") == 1  # resumes another run
    assert "--overwrite to remove" in said(capsys)
    assert fit("--run_dir=X", "--overwrite", "--data.batch_size=many") == 2
    assert fit("--run_dir=X", "--overwrite", "--data.root=nowhere") == 1
    assert fit("--run_dir=X", "--overwrite", "--ckpt_path=last") == 1
    assert contents(used) == before
    assert not Path("runs").exists()


def test_overwriting_removes_what_the_run_left_and_no_more(used, fit):
    (used / "validate").mkdir()
    (used / "validate/notes.txt").write_text("mine")
    (used / "checkpoints/other.ckpt").write_text("mine")
    assert fit("--run_dir=X", "--overwrite", "--trainer.enable_checkpointing=false") == 0
    assert (used / "notes.txt").read_text() == (used / "validate/notes.txt").read_text() == "mine"
    assert [path.name for path in (used / "checkpoints").iterdir()] == ["other.ckpt"]
    assert not (used / "run.json").exists()
    assert not (used / ".run.lock").exists()
    with (used / "metrics.csv").open() as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == {0}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_files_of_the_user_with_a_runs_names_are_kept(name, fit, capsys):
    Path("mine").mkdir()
    Path("mine", name).write_text("data: {root: plans}\n")
    assert fit("--run_dir=mine", "--overwrite") == 1
    assert f"mine holds a {name} that no run wrote" in said(capsys)
    assert Path("mine", name).read_text() == "data: {root: plans}\n"


def test_a_start_that_failed_on_its_data_does_not_block_the_next(rooms, capsys):
    shutil.copytree(rooms, "plans")
    image = next(Path("plans/train/images").iterdir())
    whole = image.read_bytes()
    image.write_bytes(whole[:300])
    command = ["fit", "--data.root=plans", "--run_dir=X", *TINY_ARGS, "--trainer.max_epochs=1", "--data.batch_size=8"]
    assert run(command) == 1
    assert "decoded" in said(capsys)
    image.write_bytes(whole)
    assert run(command) == 0


def test_a_start_that_failed_on_its_weights_leaves_nothing(rooms, capsys):
    command = ["fit", "--data.root", str(rooms), "--run_dir=X", *TINY_ARGS, "--model.weights=none.ckpt"]
    assert run(command) == 1
    assert "none.ckpt" in said(capsys)
    assert not Path("X").exists()


HOLD = """
import sys, time
from pathlib import Path
from dino_lightning.files import locked
with locked(Path(sys.argv[1]), remove=True) as free: print(free, flush=True); time.sleep(600)
"""


def test_a_run_that_goes_on_is_neither_resumed_nor_replaced(used, fit, capsys):
    before = contents(used)
    command = [sys.executable, "-c", HOLD, "X/.run.lock"]
    holder = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        assert holder.stdout.readline() == b"True\n"
        for more in (["--overwrite"], ["--ckpt_path=last"]):
            assert fit("--run_dir=X", *more) == 1
            assert "X: another run is writing there" in said(capsys)
    finally:
        holder.kill()
        holder.communicate()
    assert {path: content for path, content in contents(used).items() if path.name != ".run.lock"} == before
    assert fit("--run_dir=X", "--ckpt_path=last", "--trainer.max_epochs=2") == 0


def test_evaluations_replace_only_their_like(used, rooms, capsys):
    before = (used / "metrics.csv").read_bytes(), (used / "config.yaml").read_bytes()
    for name in ("best", "last", "best"):
        assert run(["validate", f"--ckpt_path=X/checkpoints/{name}.ckpt", QUIET]) == 0
    told = capsys.readouterr().out
    assert told.count("X/validate holds the results of another checkpoint or dataset; these go to ") == 1
    assert told.count("X/validate-2/report/index.html") == 1
    shutil.copytree(rooms, "plans")
    assert run(["validate", "--run_dir=X", "--ckpt_path=last", "--data.root=plans", QUIET]) == 0
    assert ((used / "metrics.csv").read_bytes(), (used / "config.yaml").read_bytes()) == before
    names = {"validate": "best", "validate-2": "last", "validate-3": "best"}
    assert {path.name for path in used.glob("validate*")} == set(names)
    for folder, name in names.items():
        assert name in yaml.safe_load((used / folder / "config.yaml").read_text())["ckpt_path"]


class Elsewhere(CSVLogger):
    """As those of services: with a folder that is not the run's."""

    def __init__(self, **more):
        super().__init__(save_dir=".", name="", version="")


def test_the_runs_files_stay_in_its_folder_whatever_the_loggers(fit, capsys):
    Path("config.yaml").write_text("mine")
    Path("logger.yaml").write_text(f"trainer: {{logger: [{{class_path: {__name__}.Elsewhere}}]}}\n")
    assert fit("--run_dir=X", "--config=logger.yaml", "--wandb=") == 0
    assert Path("config.yaml").read_text() == "mine"
    assert Path("metrics.csv").is_file()
    assert {"config.yaml", "metrics.csv", "tensorboard"} <= {path.name for path in Path("X").iterdir()}
    assert run(["validate", "--ckpt_path=X", "--trainer.logger=false", "--trainer.default_root_dir=other", QUIET]) == 0
    assert Path("X/validate/config.yaml").is_file()
    capsys.readouterr()
    assert fit("--run_dir=Y", "--trainer.logger=false", "--trainer.default_root_dir=other") == 0
    assert "tensorboard" not in capsys.readouterr().out
    assert {path.name for path in Path("Y").iterdir()} >= {"config.yaml", "run.json", "checkpoints"}
    assert not Path("other/config.yaml").exists()


def test_short_options_for_loggers_are_about_training(fit, monkeypatch, capsys):
    def refused(**more):
        assert more == {"project": "plans", "name": "X", "save_dir": "X"}
        raise ModuleNotFoundError("wandb")

    monkeypatch.setattr("dino_lightning.cli.own_loggers.WandbLogger", refused)
    assert fit("--run_dir=X", "--wandb=plans") == 1
    assert "--wandb needs the package wandb, which is not installed" in said(capsys)
    assert not Path("X").exists()
    assert run(["validate", "--ckpt_path=X", "--wandb=plans"]) == 1
    assert "--wandb is an option of fit alone" in said(capsys)


def test_plans_with_other_options_are_replaced_only_when_told_and_without_strangers(capsys):
    draw = ["rooms", "--root=plans", "--num_val=1", "--size=160", "--num_train"]
    assert run([*draw, "1"]) == 0
    before = contents("plans")
    assert run([*draw, "1"]) == 0
    assert run([*draw, "2"]) == 1
    assert "--overwrite to replace it" in said(capsys)
    assert contents("plans") == before
    Path("plans/train/images/kitchen.png").write_text("mine")
    assert run([*draw, "2", "--overwrite"]) == 1
    assert Path("plans/train/images/kitchen.png").read_text() == "mine"
    Path("plans/train/images/kitchen.png").unlink()
    assert run([*draw, "2", "--overwrite"]) == 0
    assert Path("plans/train/images/000002.png").is_file()


# ------------------------------------------------------------------ names


def test_runs_of_the_same_second_have_their_own_folders(monkeypatch):
    monkeypatch.setattr(run_folder, "_now", lambda: "now")
    assert [str(run_folder.new_folder()) for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]


JOIN = """
import os, time
from pathlib import Path
from dino_lightning.cli import run_folder
run_folder._now = lambda: f"of-process-{os.environ['RANK']}"
folder = run_folder.new_folder()
time.sleep(2)
Path(folder, f"{os.environ['RANK']}.txt").write_text(str(folder))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["--standalone", "--master_port=29517"])
def test_the_processes_of_a_torchrun_job_share_one_folder(rendezvous):
    Path("join.py").write_text(JOIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", rendezvous, "join.py"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    written = {str(path): path.read_text() for path in Path("runs").rglob("*.txt")}
    assert written == {f"runs/of-process-0/{rank}.txt": "runs/of-process-0" for rank in range(3)}
