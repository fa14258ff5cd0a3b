"""The command line as a user calls it: real YAML, real files, exit codes and sentences."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import Namespace

from dino_lightning import CocoDataModule, fit
from dino_lightning.__main__ import run
from dino_lightning.cli import config_files
from dino_lightning.cli import lightning_cli as cli
from tests.conftest import TINY_ARGS

CONFIGS = Path(__file__).parents[2] / "configs"
LOG = ["--trainer.log_every_n_steps=1"]
SMALL = ["--data.image_size=64", "--data.max_size=96", "--data.num_workers=0"]


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(rooms, tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    code = run(
        [
            "fit",
            "--data.root",
            str(rooms),
            "--run_dir",
            str(folder),
            "--trainer.max_epochs=2",
            *TINY_ARGS,
            *LOG,
        ]
    )
    assert code == 0
    return folder


def marked(config):
    """The longer schedules of a published model and its larger relative differ little from the first: slow."""
    others = config.startswith("coco") and config != "coco_r50_4scale_12ep.yaml"
    return pytest.param(config, marks=pytest.mark.slow if others else ())


@pytest.mark.parametrize("config", [marked(path.name) for path in sorted(CONFIGS.glob("*.yaml"))])
def test_every_config_runs_a_step(config, rooms):
    text = (CONFIGS / config).read_text()
    assert len(text.splitlines()) <= 30
    args = [
        "--config",
        str(CONFIGS / config),
        "--data.root",
        str(rooms),
        "--trainer.fast_dev_run=true",
        *SMALL,
    ]
    args += [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.num_nodes=1",
        "--trainer.precision=32-true",
    ]
    args += ["--model.backbone_weights=null", "--data.batch_size=1", "--trainer.enable_progress_bar=false"]
    args += ["--model.weights=null", "--model.weights_for_rooms=null"]
    if "fixed_size:" in text:
        args.append("--data.fixed_size=128")
    assert run(["fit", *args]) == 0


def test_a_run_leaves_checkpoints_metrics_pictures_and_its_configuration(trained):
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(trained / "checkpoints" / name, weights_only=True)
        assert checkpoint["hyper_parameters"]["class_names"] == ["room"]
        assert checkpoint["hyper_parameters"]["category_ids"] == [1]
        assert checkpoint["hyper_parameters"]["image_size"] == 64
        assert 0 <= checkpoint["score_threshold"] <= 1
        data = CocoDataModule.load_from_checkpoint(trained / "checkpoints" / name)
        assert len(data.train_set) == 8 and (data.image_size, data.max_size) == (64, 96)
    logged = yaml.safe_load((trained / "hparams.yaml").read_text())
    assert logged["hidden_dim"] == 32 and logged["datamodule"]["augmentation"] == "plans"
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"val/AP", "val/AP50", "val/F1", "val/F1_threshold", "train/loss_epoch", "train/grad_norm"} <= set(rows[0])
    for picture in ("detections.png", "learning_curves.png"):
        assert (trained / picture).read_bytes().startswith(b"\x89PNG")
    assert list((trained / "tensorboard").glob("events.*"))
    assert not list(trained.rglob("tmp*"))
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["hidden_dim"] == 32


def test_the_summary_says_where_everything_is(rooms, capsys):
    args = ["--data.root", str(rooms), "--trainer.max_epochs=1", "--run_dir", "here", *TINY_ARGS]
    assert run(["fit", *args]) == 0
    printed = capsys.readouterr().out
    for part in (
        "room",
        "train: 8 images",
        "best checkpoint  here/checkpoints/best.ckpt",
        "validate --ckpt_path",
    ):
        assert part in printed


def test_validate_finds_the_run_behind_a_checkpoint(trained, capsys):
    before = (trained / "metrics.csv").read_bytes()
    quiet = ["--trainer.enable_progress_bar=false"]
    assert run(["validate", "--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), *quiet]) == 0
    printed = capsys.readouterr().out
    assert "val/AP50" in printed
    assert "precision" in printed
    assert (trained / "metrics.csv").read_bytes() == before
    assert run(["test", "--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), *quiet]) == 0
    assert "test/AP50" in capsys.readouterr().out


def test_a_checkpoint_without_its_run_still_knows_its_sizes(trained, rooms, tmp_path, capsys):
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
    args = ["--data.root", str(rooms), "--data.image_size=64", "--data.max_size=96", "--data.num_workers=0"]
    assert run(["validate", "--ckpt_path", str(moved), "--trainer.accelerator=cpu", *args]) == 0
    assert "val/AP50" in capsys.readouterr().out


def test_resuming_goes_on_where_it_stopped_and_the_users_values_win(rooms):
    args = ["--data.root", str(rooms), "--run_dir", "runs/one", "--trainer.max_epochs=1", *TINY_ARGS]
    assert run(["fit", *args]) == 0
    first = torch.load("runs/one/checkpoints/last.ckpt", weights_only=True)
    assert run(["fit", "--ckpt_path", "last", "--trainer.max_epochs=3", "--model.lr=0.003"]) == 0
    last = torch.load("runs/one/checkpoints/last.ckpt", weights_only=True)
    assert first["epoch"] == 0
    assert last["epoch"] == 2
    assert last["global_step"] == 3 * first["global_step"]
    assert last["hyper_parameters"]["lr"] == 0.003
    assert last["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.003
    history = last["callbacks"]["RunReport"]["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_a_run_that_is_at_its_end_says_so_when_it_is_resumed(rooms, capsys):
    args = ["--data.root", str(rooms), "--run_dir", "runs/one", "--trainer.max_epochs=1", *TINY_ARGS]
    assert run(["fit", *args, "--trainer.num_sanity_val_steps=1"]) == 0
    assert "Nothing was left" not in capsys.readouterr().out
    assert run(["fit", "--ckpt_path", "last"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was left to train: epoch 1 of 1 was done already. A larger --trainer.max_epochs goes on." in said
    assert "Last epoch: errors" not in said  # of the images of the sanity check
    assert run(["fit", "--ckpt_path", "last", "--trainer.max_epochs=2"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was left" not in said and "Last epoch: errors" in said


def test_without_a_configuration_the_published_number_of_epochs_is_trained(rooms, capsys):
    args = ["--data.root", str(rooms), "--run_dir", "runs/one", *TINY_ARGS]
    few = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    assert run(["fit", *args, *few]) == 0
    assert "No --config given: the published recipe, 12 epochs of DINO R50" in capsys.readouterr().out
    assert torch.load("runs/one/checkpoints/last.ckpt", weights_only=True)["epoch"] == 11
    assert run(["fit", *args, *few, "--run_dir", "runs/two", "--trainer.max_steps=2"]) == 0
    said = capsys.readouterr().out
    assert "the published recipe of DINO R50" in said and "8 images: 2 optimizer steps." in said
    assert torch.load("runs/two/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_last_with_no_run_is_refused(capsys):
    assert run(["fit", "--ckpt_path", "last"]) == 1
    assert "no run in runs/ has a checkpoint" in capsys.readouterr().err


def test_seeded_runs_repeat(rooms):
    losses = []
    for name in ("a", "b", "c"):
        seed = "--seed_everything=7" if name != "c" else "--seed_everything=8"
        args = ["--data.root", str(rooms), "--run_dir", name, "--trainer.max_epochs=1", seed, *TINY_ARGS]
        assert run(["fit", *args, "--trainer.log_every_n_steps=1"]) == 0
        with Path(name, "metrics.csv").open() as file:
            losses.append([row["train/loss_step"] for row in csv.DictReader(file) if row["train/loss_step"]])
    assert len(losses[0]) > 2
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("option", ["overfit_batches=2", "limit_train_batches=3", "accumulate_grad_batches=2"])
def test_lightnings_own_options_for_batches(rooms, option):
    args = ["--data.root", str(rooms), "--run_dir", "run", "--trainer.max_epochs=2", f"--trainer.{option}", *TINY_ARGS]
    assert run(["fit", *args]) == 0
    assert run(["fit", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_epochs=3"]) == 0


def test_bf16_mixed_runs_on_cpu(rooms):
    args = [
        "--data.root",
        str(rooms),
        "--trainer.fast_dev_run=2",
        "--trainer.precision=bf16-mixed",
        *TINY_ARGS,
    ]
    assert run(["fit", *args]) == 0


def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, expected in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        for given in ("bf16-mixed", None):
            trainer = Namespace(precision=given, accelerator="gpu")
            cli.Commands.before_instantiate_classes(
                SimpleNamespace(_given=Namespace(trainer=trainer), subcommand="fit")
            )
            assert trainer.precision == expected
    assert "16-mixed instead of bf16-mixed" in capsys.readouterr().out


def test_without_a_config_the_published_model_is_sized_for_the_device(rooms, capsys):
    args = ["--data.root", str(rooms), "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    args += ["--model.backbone_weights=null", "--data.image_size=64", "--data.num_workers=0"]
    assert run(["fit", *args]) == 0
    assert "the published recipe, 12 epochs of DINO R50 4-scale" in capsys.readouterr().out


def test_starting_weights_are_named_in_one_line(trained, rooms, capfd, caplog):
    weights = trained / "checkpoints" / "best.ckpt"
    args = [
        "--data.root",
        str(rooms),
        "--trainer.fast_dev_run=true",
        f"--model.weights={weights}",
        *TINY_ARGS,
    ]
    with caplog.at_level("INFO"):
        assert run(["fit", *args]) == 0
    said = caplog.text + capfd.readouterr().err
    assert "class heads: 1 of 1 classes matched by name" in said


def break_annotations(folder, change):
    path = folder / "train" / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def copy_rooms(rooms, to):
    import shutil

    shutil.copytree(rooms, to)
    return to


BAD_INPUT = {
    "missing root": (lambda d: None, ["--data.root=nowhere"], 1, ["nowhere", "does not exist"]),
    "no annotations": (lambda d: [p.unlink() for p in d.rglob("annotations.json")], [], 1, ["annotations"]),
    "broken json": (
        lambda d: (d / "train/annotations.json").write_text('{"images": [1,\n 2'),
        [],
        1,
        ["annotations.json", "line 2"],
    ),
    "unknown image": (
        lambda d: break_annotations(d, lambda c: c["annotations"][0].update(image_id=999)),
        [],
        1,
        ["999", "annotation"],
    ),
    "unknown category": (
        lambda d: break_annotations(d, lambda c: c["annotations"][0].update(category_id=55)),
        [],
        1,
        ["55", "annotation"],
    ),
    "undecodable image": (
        lambda d: [p.write_bytes(b"\x89PNG nonsense") for p in (d / "train/images").iterdir()],
        [],
        1,
        ["train/images", "Image ", "cannot be decoded"],
    ),
    "no checkpoint": (lambda d: None, ["--model.weights=README.md"], 1, ["README.md", "does not exist"]),
    "not a checkpoint": (
        lambda d: (d / "w.pth").write_text("hello"),
        ["--model.weights=data/w.pth"],
        1,
        ["data/w.pth", "not a"],
    ),
    "resume from nothing": (lambda d: None, ["--ckpt_path=nowhere.ckpt"], 1, ["nowhere.ckpt", "does not exist"]),
    "resume from text": (
        lambda d: (d / "w.ckpt").write_text("hello"),
        ["--ckpt_path=data/w.ckpt"],
        1,
        ["data/w.ckpt", "not a"],
    ),
    "class count": (lambda d: None, ["--model.num_classes=0"], 2, ["num_classes"]),
    "impossible size": (lambda d: None, ["--model.hidden_dim=30"], 1, ["hidden_dim=30", "multiple of 4"]),
    "misspelled option": (
        lambda d: None,
        ["--model.hiden_dim=32"],
        2,
        ["--model.hiden_dim", "Did you mean --model.hidden_dim?", "num_queries"],
    ),
    "abbreviated option": (
        lambda d: None,
        ["--trainer.max_e=2"],
        2,
        ["no option --trainer.max_e.", "Did you mean --trainer.max_epochs?"],
    ),
    "wrong type": (lambda d: None, ["--data.batch_size=many"], 2, ["batch_size", "many"]),
    "missing config": (lambda d: None, ["--config=none.yaml"], 2, ["none.yaml"]),
    "unknown key in config": (
        lambda d: (d / "c.yaml").write_text("model:\n  nun_queries: 3\n"),
        ["--config=data/c.yaml"],
        2,
        ["nun_queries", "Did you mean --model.num_queries?"],
    ),
    "precision": (lambda d: None, ["--trainer.precision=64-true"], 1, ["precision 64-true is not possible"]),
    "no gpu": (
        lambda d: None,
        ["--trainer.accelerator=gpu", "--trainer.devices=99"],
        1,
        ["gpu"],
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_sentence(case, rooms, capsys):
    prepare, extra, code, parts = BAD_INPUT[case]
    data = copy_rooms(rooms, Path("data"))
    prepare(data)
    args = ["fit", "--data.root=data", "--trainer.max_epochs=1", *TINY_ARGS, *extra]
    assert run(args) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    for part in parts:
        assert part in said[0], said[0]


def test_a_solver_that_this_device_lacks_is_refused_before_anything_is_written(rooms, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = ["--data.root", str(rooms), "--model.matching_solver=device", *TINY_ARGS]
    assert run(["fit", *args]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "it needs a CUDA device" in said and "choose matching_solver scipy or auto" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_cuda_graphs_without_a_gpu_are_refused_before_anything_is_written(rooms, tmp_path, capsys):
    args = ["--data.root", str(rooms), "--data.fixed_size=96", "--model.cuda_graphs=true", *TINY_ARGS]
    assert run(["fit", *args, "--trainer.accelerator=cpu"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "they need a CUDA device" in said and "leave out --model.cuda_graphs" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_solver_that_this_device_lacks_is_scipy_in_an_evaluation(rooms, trained, monkeypatch, capsys, command):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    printed = []
    for solver in ("device", "scipy"):
        args = [
            "--ckpt_path",
            str(trained / "checkpoints" / "best.ckpt"),
            "--data.root",
            str(rooms),
            "--run_dir",
            solver,
        ]
        more = [f"--model.matching_solver={solver}", "--trainer.accelerator=cpu", "--model.num_denoising=0"]
        assert run([command, *args, *more]) == 0
        printed.append(capsys.readouterr().out)
    said = "matching_solver device is scipy here, for the losses of the evaluation: it needs a CUDA device"
    assert printed[0].count(said) == 1 and "matching_solver device" not in printed[1]
    losses = [re.findall(r"/loss +([\d.]+)", text) for text in printed]
    assert losses[0] == losses[1] != []


def test_an_exit_code_reaches_the_shell_and_no_traceback_is_shown(tmp_path):
    command = [sys.executable, "-m", "dino_lightning.fit", "--data.root", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: nowhere" in done.stderr


def test_rooms_are_drawn_on_request(capsys):
    args = ["--root=plans", "--num_train=2", "--num_val=1", "--style=realistic", "--size=200"]
    assert run(["rooms", *args]) == 0
    assert len(json.loads(Path("plans/train/annotations.json").read_text())["images"]) == 2
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("important")
    assert run(["rooms", "--root=mine"]) == 1
    assert "error:" in capsys.readouterr().err
    assert Path("mine/thesis.txt").read_text() == "important"


def test_help_of_the_program_and_unknown_commands(capsys):
    assert run([]) == 2
    assert run(["--help"]) == 0
    assert run(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_packaged_configs_are_found_from_anywhere(rooms):
    assert config_files.config_path("rooms_demo.yaml").is_file()
    assert config_files.config_path("rooms_demo") == config_files.config_path("rooms_demo.yaml")
    args = ["--data.root", str(rooms), "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--data.num_workers=0"]
    assert fit.run(["--config", "configs/rooms_demo.yaml", *args]) == 0
    assert fit.run(["--config=rooms_demo", *args]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("configs/smal_cpu.yaml", "Did you mean configs/small_cpu.yaml"),
        ("smallcpu", "Did you mean configs/small_cpu.yaml"),
        ("mine.yaml", "With this package come coco_r50_4scale_12ep, "),
    ],
)
def test_a_configuration_that_is_absent_is_answered_with_those_that_are_there(rooms, capsys, name, words):
    assert run(["fit", "--config", name, "--data.root", str(rooms)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"{name} does not exist. " in line and words in line


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has a GPU")
def test_a_configuration_for_gpus_says_what_to_do_without_one(rooms, tmp_path, capsys):
    config = str(CONFIGS / "room_detection.yaml")
    args = ["--config", config, "--data.root", str(rooms), "--model.weights=null", "--model.backbone_weights=null"]
    assert run(["fit", *args, "--run_dir", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr().err
    assert "error: PyTorch finds no GPU here" in printed and "--config small_cpu.yaml" in printed
    assert not (tmp_path / "run" / "config.yaml").exists()
