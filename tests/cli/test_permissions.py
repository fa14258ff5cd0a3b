"""What may not be read or written ends every command in one sentence that names what the user named."""

import shutil

import pytest

from dino_lightning import load_detector
from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from sagemaker_entry import launch
from tests.conftest import TINY_ARGS
from tests.permissions import permissions_count

DATA = ["--data.root", "plans"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=1", *TINY_ARGS]
FIT = ["fit", *DATA, *SHORT, "--run_dir", "new"]
IMAGE = "plans/train/images/000001.png"
CHECKPOINT = "run/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def trained(rooms, tmp_path_factory):
    """A dataset `plans`, and a run of one epoch on it, `run`."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(rooms, folder / "plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["fit", *DATA, *SHORT, "--run_dir", "run"]) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A working directory with both, and a folder `locked` in which nothing can be written."""
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o555)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "locked"))
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def bound(action):
    """What an action gives where permissions count."""
    with permissions_count() as counts:
        if not counts:
            pytest.skip("root is not bound by permissions here")
        return action()


def contents(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


# command, what is forbidden (a file or folder, and its mode), what the sentence says
UNREADABLE = {
    "annotations": (FIT, "plans/train/annotations.json", 0, "plans/train/annotations.json: cannot be read"),
    "dataset": (FIT, "plans", 0o111, "plans: the dataset folder cannot be read"),
    "split": (FIT, "plans/train", 0, "plans/train: the folder cannot be read"),
    "images": ([*FIT, "--data.on_bad_image=skip"], "plans/train/images", 0, "plans/train/images: the folder cannot be"),
    "resume": (["fit", "--ckpt_path", CHECKPOINT], CHECKPOINT, 0, f"{CHECKPOINT} cannot be read"),
    "validate": (["validate", "--ckpt_path", CHECKPOINT, *DATA], CHECKPOINT, 0, f"{CHECKPOINT} cannot be read"),
    "weights": (["validate", "--model.weights", CHECKPOINT, *DATA], CHECKPOINT, 0, f"{CHECKPOINT} cannot be read"),
    "predict": (["predict", "--ckpt_path", "run", "--images", IMAGE], CHECKPOINT, 0, f"{CHECKPOINT} cannot be read"),
    "export": (["export", "--ckpt_path", CHECKPOINT], CHECKPOINT, 0, f"{CHECKPOINT} cannot be read"),
    "convert": (["convert", "--weights", "run", "--output", "x.pth"], CHECKPOINT, 0, f"{CHECKPOINT} cannot be read"),
    "to predict": (
        ["predict", "--ckpt_path", "run", "--images", "plans/val/images"],
        "plans/val/images", 0, "plans/val/images: the folder cannot be read",
    ),
    "to copy": (["to_coco", *DATA, "--output", "copy"], IMAGE, 0, f"{IMAGE} cannot be read"),
    "config": ([*FIT, "--config", "run/config.yaml"], "run/config.yaml", 0, "run/config.yaml cannot be read"),
    "metrics": (["fit", "--ckpt_path", "run"], "run/metrics.csv", 0, "run/metrics.csv cannot be read"),
    "copy of them": (
        ["fit", "--ckpt_path", "run"],
        "run/checkpoints/metrics.csv", 0, "run/checkpoints/metrics.csv cannot be read",
    ),
    "to draw again": (["rooms", "--root", "plans"], "plans", 0, "plans cannot be read"),
    "to preview": (["preview", *DATA, "--output", "p.png", "--num_images", "8"], IMAGE, 0, f"{IMAGE} cannot be read"),
}  # fmt: skip
UNWRITABLE = {
    "fit": (["fit", *DATA, *SHORT, "--run_dir", "locked/run"], "locked/run"),
    "fit there": (["fit", *DATA, *SHORT, "--run_dir", "locked"], "locked"),
    "predict": (["predict", "--ckpt_path", "run", "--images", IMAGE, "--output", "locked/p"], "locked/p"),
    "onnx": (["export", "--ckpt_path", "run", "--output", "locked/x.onnx"], "locked/x.onnx"),
    "torch": (["export", "--ckpt_path", "run", "--output", "locked/x.pt2", "--format", "torch"], "locked/x.pt2"),
    "directory": (["export", "--ckpt_path", "run", "--output", "locked/m", "--format", "directory"], "locked/m"),
    "convert": (["convert", "--weights", "run", "--output", "locked/x.pth"], "locked/x.pth"),
    "rooms": (["rooms", "--root", "locked/rooms", "--num_train", "1", "--num_val", "1"], "locked/rooms"),
    "inspect": (["inspect", *DATA, "--output", "locked/i"], "locked/i"),
    "to_coco": (["to_coco", *DATA, "--output", "locked/c"], "locked/c"),
    "preview": (["preview", *DATA, "--output", "locked/p.png", "--num_images", "1"], "locked/p.png"),
}


def the_sentence(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named(case, place, capsys):
    command, path, mode, said = UNREADABLE[case]
    (place / path).chmod(mode)
    before = contents(place)
    assert bound(lambda: run(command)) == 1
    assert said in (sentence := the_sentence(capsys)) and "Permission denied" in sentence
    assert contents(place) == before


def test_a_configuration_by_its_whole_path_is_named(place, capsys):
    path = place / "run" / "config.yaml"
    path.chmod(0)
    assert bound(lambda: run([*FIT, "--config", str(path)])) == 1
    assert f"{path} cannot be read (Permission denied)" in the_sentence(capsys)


@pytest.mark.parametrize("case", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_named_as_given(case, place, capsys):
    command, named = UNWRITABLE[case]
    before = contents(place)
    assert bound(lambda: run(command)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    said = f"error: {named} cannot be written (Permission denied). Make the folder writable, or give another --"
    assert len(lines) == 1 and lines[0].startswith(said)
    assert contents(place) == before


def test_a_run_is_not_resumed_where_it_cannot_be_written(place, capsys):
    (place / "run").chmod(0o555)
    before = contents(place)
    assert bound(lambda: run(["fit", "--ckpt_path", "run", "--trainer.max_epochs=2"])) == 1
    assert "run cannot be written (Permission denied)" in the_sentence(capsys)
    assert contents(place) == before


def test_a_run_is_not_resumed_without_a_copy_of_its_metrics(place, capsys):
    (place / "run" / "checkpoints").chmod(0o555)
    assert bound(lambda: run(["fit", "--ckpt_path", "run", "--trainer.max_epochs=2"])) == 1
    assert "run/checkpoints/metrics.csv could not be written (Permission denied)" in the_sentence(capsys)


def test_a_cache_of_weights_that_cannot_be_written_is_said_once(place, capsys):
    assert bound(lambda: run(["weights", "get", "dino_r50_4scale_24ep"])) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "locked/dino_lightning/weights, cannot be written" in error
    assert "XDG_CACHE_HOME" in error


def test_load_detector_names_the_checkpoint(place):
    (place / CHECKPOINT).chmod(0)
    with pytest.raises(CheckpointError, match=r"best\.ckpt cannot be read \(Permission denied\): change its"):
        bound(lambda: load_detector(CHECKPOINT))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_image_stops_training_in_one_sentence(workers, place, capsys):
    (place / IMAGE).chmod(0)
    assert bound(lambda: run([*FIT, f"--data.num_workers={workers}"])) == 1
    assert f"plans/train/annotations.json: {IMAGE} cannot be read (Permission denied). Restore" in the_sentence(capsys)


@pytest.mark.slow
def test_an_unreadable_image_is_left_out_where_asked(place):
    (place / IMAGE).chmod(0)
    with pytest.warns(UserWarning) as caught:
        assert bound(lambda: run([*FIT, "--data.on_bad_image=skip"])) == 0
    assert any("1 of 8 images cannot be read and are left out" in str(warning.message) for warning in caught)


@pytest.mark.slow
def test_launch_names_an_unreadable_image(place, capsys):
    (place / IMAGE).chmod(0)
    arguments = ["--data", "plans", "--config", "run/config.yaml", "--local", "--local-dir", "opt"]
    assert bound(lambda: launch.main(arguments)) == 1
    assert f"{IMAGE} cannot be read (Permission denied). Restore or remove it" in the_sentence(capsys)
