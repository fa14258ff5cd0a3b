"""`predict` through the command line: any number of images in, files with original ids out, and on it goes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from dino_lightning import load_detector
from dino_lightning.__main__ import run
from dino_lightning.inference import loop, views
from dino_lightning.inference import predict_folder as predict_command
from dino_lightning.model import DINO
from dino_lightning.training.module import DINOModule
from tests.conftest import size_of
from tests.inference.test_detector import save_tiny

CPU = ["--trainer.accelerator", "cpu", "--num_workers", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "best.ckpt")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Six images of three shapes."""
    folder = tmp_path_factory.mktemp("plans")
    for number, size in enumerate([(60, 80), (80, 60), (64, 64)] * 2):
        write_noise(folder / f"{number}.png", size, number)
    return folder


def write_noise(path, size=(40, 50), seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


def spoil(path):
    """Make a file unreadable that looks the same from outside: whoever looks into it again reports it."""
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def predict(checkpoint, *options, output):
    options = [str(option) for option in (*options, "--output", output)]
    return run(["predict", "--ckpt_path", str(checkpoint), *CPU, *options])


def content(output, name):
    return json.loads((output / name).read_text())


def rows(output):
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def coco_file(path, names, first_id=100):
    """A COCO file without annotations, as test sets have it; ids fall where names rise."""
    sizes = {name: size_of(path.parent / "images" / name) for name in names}
    images = [
        {"id": first_id - number, "file_name": name, "width": sizes[name][0], "height": sizes[name][1]}
        for number, name in enumerate(names)
    ]
    path.write_text(json.dumps({"images": images, "categories": [{"id": 7, "name": "room"}]}))
    return path


@pytest.mark.parametrize("options", [[], ["--batch_size", "4"], ["--num_workers", "2"]], ids=" ".join)
def test_a_folder_gives_what_the_detector_finds(checkpoint, plans, tmp_path, capsys, options):
    output = tmp_path / "out"
    assert predict(checkpoint, "--images", plans, *options, output=output) == 0
    found = load_detector(checkpoint)(sorted(plans.glob("*.png")))
    entries = content(output, "images.json")
    assert [entry["file_name"] for entry in entries["images"]] == [each.file for each in found]
    assert [entry["id"] for entry in entries["images"]] == [1, 2, 3, 4, 5, 6]
    assert (entries["images"][0]["height"], entries["images"][0]["width"]) == (60, 80)
    assert entries["categories"] == [{"id": 7, "name": "room"}, {"id": 3, "name": "bath"}]
    results, table = content(output, "predictions.json"), rows(output)
    count = sum(map(len, found))
    assert len(results) == len(table) == count > 0
    printed = capsys.readouterr().out
    assert f"6 images: {count:,} detections with a score of at least 0.60" in printed
    assert re.search(
        r"^Predicted 6 in [0-9.]+ s: [0-9.]+ images per second, reading and writing included$", printed, re.M
    )
    expected = [entry for number, each in enumerate(found, 1) for entry in each.to_coco(number)]
    for entry, other, row in zip(results, expected, table, strict=True):
        assert (entry["image_id"], entry["category_id"]) == (other["image_id"], other["category_id"])
        assert entry["score"] == pytest.approx(other["score"], abs=1e-4)
        assert entry["bbox"] == pytest.approx(other["bbox"], abs=0.1)
        x1, y1, width, height = entry["bbox"]
        assert [float(row[name]) for name in ("x1", "y1", "x2", "y2")] == pytest.approx(
            [x1, y1, x1 + width, y1 + height]
        )
        assert row["file"] == entries["images"][entry["image_id"] - 1]["file_name"]
        assert int(row["category_id"]) == {"room": 7, "bath": 3}[row["name"]] == entry["category_id"]
    assert sorted(path.name for path in (output / "overlays").iterdir()) == [f"{number}.png" for number in range(6)]


def test_ids_and_names_of_a_coco_file_are_kept(checkpoint, plans, tmp_path):
    shutil.copytree(plans, tmp_path / "images")
    names = [f"{number}.png" for number in (4, 0, 3)]
    source = coco_file(tmp_path / "instances_val.json", names)
    assert predict(checkpoint, "--images", source, "--threshold", 0, output=tmp_path / "out") == 0
    entries = content(tmp_path / "out", "images.json")["images"]
    assert [(entry["id"], entry["file_name"]) for entry in entries] == [(100, "4.png"), (99, "0.png"), (98, "3.png")]
    truth = COCO()
    truth.dataset = {**content(tmp_path / "out", "images.json"), "annotations": []}
    truth.createIndex()
    results = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    found = load_detector(checkpoint)([tmp_path / "images" / name for name in names], threshold=0.0)
    for image_id, each in zip((100, 99, 98), found, strict=True):
        assert len(results.getAnnIds(imgIds=[image_id])) == len(each) > 0


def test_images_of_another_folder_and_size(checkpoint, plans, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    images = [{"id": 5, "file_name": "0.png", "width": 8, "height": 6}]
    (tmp_path / "a" / "test.json").write_text(json.dumps({"images": images}))
    options = ["--images", tmp_path / "a" / "test.json", "--image_folder", plans]
    assert predict(checkpoint, *options, output=tmp_path / "out") == 0
    assert "1 images have another size than the COCO file says" in capsys.readouterr().out
    assert predict(checkpoint, *options[:2], output=tmp_path / "none") == 1
    printed = capsys.readouterr()
    assert "0.png does not exist." in printed.err and "give their folder with --image_folder." in printed.err
    assert "images per second" not in printed.out


def test_a_broken_image_is_reported_and_the_rest_done(checkpoint, plans, tmp_path, capsys):
    shutil.copytree(plans, tmp_path / "in")
    whole = (tmp_path / "in" / "2.png").read_bytes()
    (tmp_path / "in" / "2.png").write_bytes(whole[:200])
    (tmp_path / "in" / "empty.jpg").write_bytes(b"")
    output = tmp_path / "out"
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 1
    printed = capsys.readouterr()
    assert "5 images: " in printed.out and "Predicted 5 in " in printed.out and "Traceback" not in printed.err
    assert "--image_folder" not in printed.err
    assert "error: 2 images could not be read:" in printed.err
    assert printed.err.count("2.png cannot be decoded") == printed.err.count("empty.jpg cannot be decoded") == 1
    entries = content(output, "images.json")["images"]
    assert ["error" in entry for entry in entries] == [False, False, True, False, False, False, True]
    assert "cannot be decoded" in entries[2]["error"]
    assert {entry["image_id"] for entry in content(output, "predictions.json")} == {1, 2, 4, 5, 6}

    # the next run tries those again, and only those
    (tmp_path / "in" / "2.png").write_bytes(whole)
    (tmp_path / "in" / "empty.jpg").unlink()
    spoil(tmp_path / "in" / "0.png")
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 0
    assert "Resuming: 5 of 6 images are finished already." in capsys.readouterr().out
    assert {entry["image_id"] for entry in content(output, "predictions.json")} == {1, 2, 3, 4, 5, 6}


def test_small_batches_are_detected_two_at_once_and_large_ones_alone(checkpoint, plans, tmp_path, monkeypatch):
    forward, together = DINOModule.forward, threading.Barrier(2, timeout=60)
    running, most = [], []

    def watched(module, batch, meet):
        running.append(1)
        most.append(len(running))
        if meet:
            together.wait()  # raises if no second batch comes
        found = forward(module, batch)
        running.pop()
        return found

    monkeypatch.setattr(DINOModule, "forward", lambda module, batch: watched(module, batch, True))
    assert predict(checkpoint, "--images", plans, output=tmp_path / "two") == 0
    monkeypatch.setattr(DINOModule, "forward", lambda module, batch: watched(module, batch, False))
    monkeypatch.setattr(loop, "PIXELS_AT_ONCE", 1)
    most.clear()
    assert predict(checkpoint, "--images", plans, output=tmp_path / "one") == 0
    assert most == [1] * 6
    for name in ("predictions.json", "predictions.csv", "images.json", "predictions.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("options", [[], ["--num_workers", "2"], ["--tile", "50"]], ids=" ".join)
def test_pictures_are_the_same_whether_images_are_kept_or_read_again(checkpoint, plans, tmp_path, monkeypatch, options):
    """Kept ones are not decoded a second time; those with too many pixels are, and nothing else differs."""
    shutil.copytree(plans, tmp_path / "in")
    Image.open(plans / "1.png").save(tmp_path / "in" / "photo.jpg")
    again, read = [], loop.read_image
    monkeypatch.setattr(loop, "read_image", lambda path: again.append(path.name) or read(path))
    names = {"kept": set(), "some": {f"{number}.png" for number in (0, 1, 3, 4)} | {"photo.jpg"}}
    for kept, (case, decoded_again) in zip((views.KEPT_PIXELS, 64 * 64), names.items(), strict=True):
        monkeypatch.setattr(views, "KEPT_PIXELS", kept)
        assert predict(checkpoint, "--images", tmp_path / "in", *options, output=tmp_path / case) == 0
        assert sorted(again) == sorted(decoded_again)
    files = {path.relative_to(tmp_path / "kept") for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert len(files) == 7 + 6
    for file in files:
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "some" / file).read_bytes(), file


def test_an_error_in_a_detection_ends_it_and_what_came_before_is_kept(checkpoint, plans, tmp_path, monkeypatch):
    forward, calls = DINOModule.forward, []

    def failing(module, batch):
        calls.append(batch)
        if batch.original_sizes == ((64, 64),):  # the third image
            raise torch.OutOfMemoryError("full")
        return forward(module, batch)

    monkeypatch.setattr(DINOModule, "forward", failing)
    assert predict(checkpoint, "--images", plans, output=tmp_path / "out") == 1
    lines = (tmp_path / "out" / "predictions.rank0.jsonl.part").read_text().splitlines()
    kept = [Path(json.loads(line)["file"]).name for line in lines]
    assert len(calls) < 6 and kept == ["0.png", "1.png"]


def command(checkpoint, *options):
    arguments = [sys.executable, "-m", "dino_lightning", "predict", "--ckpt_path", checkpoint, *CPU, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return {"args": list(map(str, arguments)), "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def lines_of(output):
    return sum(path.read_bytes().count(b"\n") for path in output.glob("predictions.rank*.part"))


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGINT, id="interrupted"), pytest.param(signal.SIGKILL, id="killed")],
)
def test_it_goes_on_where_it_stopped(checkpoint, tmp_path, capsys, how):
    names = [f"{number:04d}.png" for number in range(600)]
    for number, name in enumerate(names):
        write_noise(tmp_path / "images" / name, (64, 64), number)
    source, output = coco_file(tmp_path / "all.json", names, 1000), tmp_path / "out"
    options = ["--images", source, "--num_workers", "1", "--batch_size", "2", "--overlays", "false"]
    process = subprocess.Popen(**command(checkpoint, *options, "--output", output))
    wait_until(lambda: lines_of(output) >= 5, process)
    process.send_signal(how)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:  # after SIGKILL the orphaned loader process may still say that its parent has gone
        assert "Traceback" not in error
        assert "Interrupted; the same command resumes from here." in error
    (part,) = output.glob("*.part")
    finished = [json.loads(line)["file"] for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 5 <= len(finished) < 600
    with part.open("a") as file:
        file.write('{"file": "0599.png", "detec')  # a line that the process did not finish writing
    for name in finished:
        spoil(tmp_path / "images" / name)
    assert predict(checkpoint, *options, output=output) == 0
    assert f"Resuming: {len(finished)} of 600 images are finished already." in capsys.readouterr().out
    assert [entry["file_name"] for entry in content(output, "images.json")["images"]] == names
    assert not list(output.glob("*.part"))
    before = (output / "predictions.json").read_bytes()
    capsys.readouterr()
    assert predict(checkpoint, *options, output=output) == 0  # nothing is left to do
    assert "per second" not in capsys.readouterr().out
    assert (output / "predictions.json").read_bytes() == before


@pytest.mark.slow
def test_several_processes_give_what_one_gives(checkpoint, plans, tmp_path):
    assert predict(checkpoint, "--images", plans, "--threshold", 0, output=tmp_path / "one") == 0
    options = ["--images", plans, "--threshold", 0, "--trainer.devices", 2, "--output", tmp_path / "two"]
    (plans / "broken.png").write_bytes(b"x")
    try:
        done = subprocess.run(**command(checkpoint, *options), timeout=200, check=False)
    finally:
        (plans / "broken.png").unlink()
    assert done.returncode == 1, done.stderr[-2000:]
    assert b"Starting with 2 processes" in done.stderr
    assert done.stderr.count(b"1 images could not be read") == 1 and b"Traceback" not in done.stderr
    one, two = (content(tmp_path / name, "predictions.json") for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for entry, other in zip(one, two, strict=True):
        assert entry["image_id"] == other["image_id"] and entry["bbox"] == pytest.approx(other["bbox"], abs=0.01)
    assert len(list((tmp_path / "two" / "overlays").iterdir())) == 6


def test_results_of_other_settings_are_not_mixed(checkpoint, plans, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--images", plans / "0.png", "--overlays", "false"]
    assert predict(checkpoint, *arguments, output=output) == 0
    assert predict(checkpoint, *arguments, "--threshold", 0, "--tile", 32, output=output) == 1
    error = capsys.readouterr().err
    assert "holds results with other settings (threshold, tile, overlap, whole_image); give another --output" in error
    few = len(content(output, "predictions.json"))
    assert predict(checkpoint, *arguments, "--threshold", 0, "--overwrite", output=output) == 0
    assert len(content(output, "predictions.json")) > few
    other = save_tiny(tmp_path / "other.ckpt", num_queries=9)
    assert predict(other, *arguments, "--threshold", 0, output=output) == 1
    assert "other settings (model)" in capsys.readouterr().err


def test_results_of_another_precision_are_not_mixed(checkpoint, plans, tmp_path, capsys):
    output, arguments = tmp_path / "out", ["--images", plans / "0.png", "--overlays", "false"]
    assert predict(checkpoint, *arguments, output=output) == 0
    assert predict(checkpoint, *arguments, "--trainer.precision", "bf16-mixed", output=output) == 1
    assert "holds results with other settings (precision); give another --output" in capsys.readouterr().err
    settings = content(output, "settings.json")
    del settings["precision"]  # as earlier versions left it
    (output / "settings.json").write_text(json.dumps(settings))
    assert predict(checkpoint, *arguments, "--trainer.precision", "32-true", output=output) == 0


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=" ".join)
def test_the_file_that_names_the_images_is_not_replaced(checkpoint, plans, tmp_path, capsys, options):
    shutil.copytree(plans, tmp_path / "images")
    source = coco_file(tmp_path / "images.json", ["1.png"])
    before = source.read_bytes()
    assert predict(checkpoint, "--images", source, *options, output=tmp_path) == 1
    assert "images.json was given as --images, and results would replace it" in capsys.readouterr().err
    assert source.read_bytes() == before and not (tmp_path / "predictions.json").exists()


@pytest.mark.parametrize("name", ["images.json", "settings.json", "predictions.csv"])
def test_files_of_others_are_replaced_only_if_asked_for(checkpoint, plans, tmp_path, capsys, name):
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text('{"mine": 1}')
    assert predict(checkpoint, "--images", plans / "1.png", output=output) == 1
    assert f"out holds {name}, which is not of predict; give another --output" in capsys.readouterr().err
    assert (output / name).read_text() == '{"mine": 1}' and not (output / "predictions.jsonl").exists()
    assert predict(checkpoint, "--images", plans / "1.png", "--overwrite", output=output) == 0
    assert len(content(output, "images.json")["images"]) == 1


def test_pictures_follow_their_images_when_further_ones_move_them(checkpoint, plans, tmp_path, capsys):
    """Pictures lie in the folders of the images without what these have in common, which is less afterwards."""
    for name in ("1.png", "2.png"):
        (tmp_path / "in" / "floor1").mkdir(parents=True, exist_ok=True)
        shutil.copy(plans / name, tmp_path / "in" / "floor1" / name)
    output = tmp_path / "out"
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 0
    before = {name: (output / "overlays" / name).read_bytes() for name in ("1.png", "2.png")}
    shutil.copy(plans / "0.png", tmp_path / "in" / "1.png")
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 0
    drawn = {path.relative_to(output / "overlays").as_posix() for path in (output / "overlays").rglob("*.png")}
    assert drawn == {"1.png", "floor1/1.png", "floor1/2.png"}
    assert {name: (output / "overlays" / "floor1" / name).read_bytes() for name in before} == before
    assert (output / "overlays" / "1.png").read_bytes() != before["1.png"]
    capsys.readouterr()
    (output / "overlays" / "floor1" / "2.png").unlink()
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 0
    assert "Resuming: 2 of 3 images are finished already." in capsys.readouterr().out
    assert (output / "overlays" / "floor1" / "2.png").read_bytes() == before["2.png"]


def test_linked_folders_are_looked_into_but_not_for_ever(checkpoint, plans, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(plans / "0.png", tmp_path / "in" / "0.png")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(plans / "1.png", tmp_path / "elsewhere" / "1.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "deep" / "self").symlink_to(tmp_path / "in" / "deep")
    assert predict(checkpoint, "--images", tmp_path / "in", output=tmp_path / "out") == 0
    entries = content(tmp_path / "out", "images.json")["images"]
    assert [entry["file_name"] for entry in entries] == [
        str(tmp_path / "in" / name) for name in ("0.png", "linked/1.png")
    ]


def test_further_pages_of_a_scan_are_said(checkpoint, tmp_path, capsys):
    pages = [Image.new("RGB", (60, 40), colour) for colour in ("white", "grey")]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in" / "two.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "in" / "one.tif")
    assert predict(checkpoint, "--images", tmp_path / "in", output=tmp_path / "out") == 0
    assert "warning: 1 files have several pages; only the first of each was looked at." in capsys.readouterr().out


def test_images_that_come_later_are_added(checkpoint, plans, tmp_path):
    shutil.copytree(plans, tmp_path / "in")
    assert predict(checkpoint, "--images", tmp_path / "in", output=tmp_path / "in" / "out") == 0
    write_noise(tmp_path / "in" / "00.png")
    # pictures of the first run lie in the folder, but are no images to look at
    assert predict(checkpoint, "--images", tmp_path / "in", output=tmp_path / "in" / "out") == 0
    entries = content(tmp_path / "in" / "out", "images.json")["images"]
    assert [(entry["id"], Path(entry["file_name"]).name) for entry in entries[:3]] == [
        (1, "0.png"), (2, "00.png"), (3, "1.png")
    ]  # fmt: skip
    assert len(entries) == 7


def test_a_file_that_was_replaced_is_looked_at_again(checkpoint, plans, tmp_path, capsys):
    shutil.copytree(plans, tmp_path / "in")
    output = tmp_path / "out"
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 0
    write_noise(tmp_path / "in" / "1.png", (40, 50), 77)
    spoil(tmp_path / "in" / "0.png")
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 0
    assert "Resuming: 5 of 6 images are finished already." in capsys.readouterr().out
    entries = content(output, "images.json")["images"]
    assert [(entry["height"], entry["width"]) for entry in entries[:2]] == [(60, 80), (40, 50)]
    boxes = [entry["bbox"] for entry in content(output, "predictions.json") if entry["image_id"] == 2]
    found = load_detector(checkpoint)(tmp_path / "in" / "1.png")
    assert boxes == [pytest.approx(entry["bbox"], abs=0.1) for entry in found.to_coco(2)]
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == [f"{number}.png" for number in range(6)]

    # what was found before is not kept as the result of a file that is no image any more
    (tmp_path / "in" / "1.png").write_bytes(b"no image")
    assert predict(checkpoint, "--images", tmp_path / "in", output=output) == 1
    assert "1.png cannot be decoded" in capsys.readouterr().err
    assert "error" in content(output, "images.json")["images"][1]


def test_other_images_need_another_folder(checkpoint, plans, tmp_path, capsys):
    """Those of `val.json` too, though its file names are those of `train.json`."""
    for number, split in enumerate(("train", "val")):
        for name in ("000001.png", "000002.png"):
            write_noise(tmp_path / split / "images" / name, seed=number)
        coco_file(tmp_path / split / f"{split}.json", ["000001.png", "000002.png"])
    output = tmp_path / "out"
    assert predict(checkpoint, "--images", tmp_path / "train" / "train.json", output=output) == 0
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    for others in (tmp_path / "val" / "val.json", plans, tmp_path / "train" / "images" / "000001.png"):
        capsys.readouterr()
        assert predict(checkpoint, "--images", others, output=output) == 1
        printed = capsys.readouterr()
        number = 1 if others.suffix == ".png" else 2
        assert f"out holds results of {number} images that are not asked for now ('00000" in printed.err
        assert "give another --output, or --overwrite to start again." in printed.err and "Resuming" not in printed.out
        assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert predict(checkpoint, "--images", tmp_path / "val" / "val.json", "--overwrite", output=output) == 0
    assert "Resuming" not in capsys.readouterr().out
    # those of an interrupted run have no file of their own yet, and are not lost either
    (output / "predictions.jsonl").rename(output / "predictions.rank0.jsonl.part")
    assert predict(checkpoint, "--images", plans, output=output) == 1
    assert "not asked for now" in capsys.readouterr().err


@pytest.fixture
def held_folder(tmp_path):
    """A folder of results that another process holds; that process is killed in the end."""
    holder = "import sys, time; from pathlib import Path; from dino_lightning.files import locked\n"
    holder += "with locked(Path(sys.argv[1]) / '.predict.lock') as free: print(free, flush=True); time.sleep(600)"
    output = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", holder, str(output)], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"True\n"
        yield output, first
    finally:
        first.kill()
        first.communicate()


def test_two_at_once_in_one_folder_are_refused(checkpoint, plans, held_folder, capsys):
    output, first = held_folder
    for options in ([], ["--overwrite"]):
        assert predict(checkpoint, "--images", plans, *options, output=output) == 1
        assert "out: another predict writes there now; wait for its end, or give" in capsys.readouterr().err
    first.kill()
    first.wait()
    assert predict(checkpoint, "--images", plans, output=output) == 0  # a killed process leaves no lock


@pytest.mark.slow
def test_a_refusal_ends_all_processes(checkpoint, plans, held_folder):
    options = ["--images", plans, "--output", held_folder[0], "--trainer.devices", 2]
    done = subprocess.run(**command(checkpoint, *options), timeout=200, check=False)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stderr.count(b"another predict writes there now") == 1


def test_an_image_without_a_line_counts_as_failed(checkpoint, plans, tmp_path, monkeypatch, capsys):
    def lose_a_line(*arguments, **options):
        predict_images(*arguments, **options)
        part = tmp_path / "out" / "predictions.rank0.jsonl.part"
        part.write_text("".join(part.read_text().splitlines(keepends=True)[1:]))

    predict_images = predict_command.predict_images
    with monkeypatch.context() as patched:
        patched.setattr(predict_command, "predict_images", lose_a_line)
        assert predict(checkpoint, "--images", plans, output=tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "5 images: " in printed.out and "0.png has no result; the next run tries it again." in printed.err
    assert predict(checkpoint, "--images", plans, output=tmp_path / "out") == 0
    assert "Resuming: 5 of 6 images" in capsys.readouterr().out


@pytest.mark.parametrize("interrupted", ["predict_images", "list_images"])
def test_after_overwrite_it_goes_on_without_it(checkpoint, plans, tmp_path, monkeypatch, capsys, interrupted):
    """Unless the earlier results are still there."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_command, interrupted, interrupt)
    assert predict(checkpoint, "--images", plans, "--overwrite", output=tmp_path / "out") == 130
    error = capsys.readouterr().err
    assert ("repeat it without --overwrite" in error) == (interrupted == "predict_images")
    assert ("the same command resumes" in error) == (interrupted == "list_images")


def test_the_folder_of_the_images_is_none_for_results(checkpoint, plans, tmp_path, capsys):
    shutil.copytree(plans, tmp_path / "in")
    assert predict(checkpoint, "--images", tmp_path / "in", output=tmp_path / "in") == 1
    error = capsys.readouterr().err
    assert f"no images but those in {tmp_path / 'in'}, the folder of the results" in error
    assert "give another --output" in error


def test_odd_and_equal_names_have_pictures_of_their_own(checkpoint, tmp_path, capsys):
    names = ["a/plan.png", "b/plan.png", "b/plan.bmp", 'x "y", [1] $.png', "Küche 図.png", "two\nlines.png"]
    names += [
        "--threshold.png",
        "long" * 60 + ".tif",
        os.fsdecode(b"latin\xe9.png"),
        "UPPER.PNG",
        "deep/er/still/1.jpeg",
    ]
    for number, name in enumerate(names):
        write_noise(tmp_path / "in" / name, seed=number)
    for name in ("notes.txt", ".hidden.png", "a/._plan.png", ".git/x.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"no image")
    output = tmp_path / "out"
    assert predict(checkpoint, "--images", tmp_path / "in", "--threshold", 0, output=output) == 0
    entries = content(output, "images.json")["images"]
    assert sorted(entry["file_name"] for entry in entries) == sorted(str(tmp_path / "in" / name) for name in names)
    assert len(rows(output)) == len(content(output, "predictions.json")) == 24 * len(names)
    drawn = [path for path in (output / "overlays").rglob("*") if path.is_file()]
    assert len(drawn) == len(names)
    assert {"plan.png", "plan.bmp.png"} <= {path.name for path in drawn}
    for path in drawn:
        with Image.open(path) as image:
            assert image.format == ("JPEG" if path.suffix == ".jpeg" else "PNG")


def test_files_folders_and_globs_can_be_mixed(checkpoint, tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.png", "b/c/3.png", "b/4.jpg", "image_without_suffix.png"):
        write_noise(tmp_path / name)
    (tmp_path / "image_without_suffix.png").rename(tmp_path / "image")
    (tmp_path / "b" / "5.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    assert predict(checkpoint, "--images", "a", "./a/1.png", "b/**/*", "image", output=tmp_path / "out") == 0
    entries = content(tmp_path / "out", "images.json")["images"]
    assert [entry["file_name"] for entry in entries] == ["a/1.png", "a/2.png", "b/4.jpg", "b/c/3.png", "image"]


def test_large_scans_are_seen_in_tiles(checkpoint, tmp_path):
    for number in range(3):
        write_noise(tmp_path / "in" / f"{number}.png", (150, 220), number)
    options = ["--tile", 80, "--overlap", 0.3, "--batch_size", 4, "--num_workers", 2]
    assert predict(checkpoint, "--images", tmp_path / "in", *options, output=tmp_path / "out") == 0
    detector = load_detector(checkpoint)
    results = content(tmp_path / "out", "predictions.json")
    for number in range(3):
        found = detector(tmp_path / "in" / f"{number}.png", tile=80, overlap=0.3)
        boxes = torch.tensor([entry["bbox"] for entry in results if entry["image_id"] == number + 1])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, found.boxes_xyxy, atol=0.1, rtol=0)
    tiles_only = ["--images", tmp_path / "in", *options, "--whole_image", "false"]
    assert predict(checkpoint, *tiles_only, output=tmp_path / "tiles") == 0
    assert content(tmp_path / "tiles", "settings.json")["whole_image"] is False


def test_the_newest_run_and_run_folders_are_found(checkpoint, plans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt")
    for number, name in enumerate(("last", "runs/a", "runs/a/checkpoints/last.ckpt")):
        assert predict(name, "--images", plans / "0.png", output=tmp_path / str(number)) == 0
    assert predict("runs/a", "--images", plans / "0.png", "--overlays", "false", output=tmp_path / "3") == 0
    assert not (tmp_path / "3" / "overlays").exists()


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--images", "nowhere.png"], 1, "error: nowhere.png does not exist."),
        (["--images", "/dev/zero"], 1, "error: /dev/zero is neither a regular file nor a folder."),
        (["--images", "nowhere*.png"], 1, "error: nowhere*.png: no images there"),
        (["--images", "{empty}"], 1, "no images there; looked for files ending in .bmp"),
        (["--images", "nowhere.json"], 1, "nowhere.json: the annotation file does not exist"),
        (["--images", "{plans}", "a.json"], 1, "a.json: a COCO file must be the only thing given; 2 were."),
        (["--images", "{list}"], 1, "must hold a JSON object, not a list"),
        (["--images", "{plans}", "--ckpt_path", "nowhere.ckpt"], 1, "nowhere.ckpt"),
        (["--images", "{plans}", "--ckpt_path", "{empty}"], 1, "holds no model"),
        (["--images", "{plans}", "--ckpt_path", "a.onnx"], 1, "predict takes a checkpoint"),
        (["--images", "{plans}", "--ckpt_path", "last"], 1, "--ckpt_path last: no run in runs/"),
        (["--images", "{plans}", "--threshold", "1.5"], 2, "--threshold is 1.5; it must lie between 0 and 1."),
        (["--images", "{plans}", "--threshold", "nan"], 2, "--threshold is nan; it must lie between 0 and 1."),
        (["--images", "{plans}", "--tile", "10"], 2, "--tile is 10; it must be at least 32 pixels."),
        (["--images", "{plans}", "--tile", "64", "--overlap", "0.95"], 2, "--overlap is 0.95; it must lie between 0"),
        (["--images", "{plans}", "--overlap", "0.3"], 2, "--overlap is for tiles, and there are none without --tile."),
        (["--images", "{plans}", "--whole_image", "false"], 2, "--whole_image is for tiles"),
        (["--images", "{plans}", "--batch_size", "0"], 2, "--batch_size is 0; it must be at least 1."),
        (["--images", "{plans}", "--num_workers", "-1"], 2, "--num_workers is -1; it must not be negative."),
        (["--images", "{plans}", "--overlays", "maybe"], 2, "'maybe' is neither true nor false"),
        (
            ["--images", "{plans}", "--trainer.precision", "8"],
            2,
            "argument --trainer.precision: invalid choice: '8' (choose from",
        ),
        (["--images", "{plans}", "--trainer.accelerator", "abacus"], 1, "abacus"),
        (["--images", "{plans}", "--trainer.devices", "many"], 1, "should be an int > 0"),
        (["--images", "{plans}", "--tiles", "64"], 2, "There is no option --tiles. Did you mean --tile?"),
        ([], 2, "the following arguments are required: --images"),
        (["--images", "{plans}", "--output", "{file}/out"], 1, "cannot be written (Not a directory)"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, plans, tmp_path, monkeypatch, capsys, options, code, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "a.onnx").write_text("")
    places = {"plans": plans, "empty": tmp_path / "empty", "list": tmp_path / "list.json", "file": tmp_path / "file"}
    options = [option.format(**places) for option in options]
    assert run(["predict", "--ckpt_path", str(checkpoint), "--output", "out", *CPU, *options]) == code
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("error:") == 1
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["predict", "--help"])
    assert ended.value.code == 0
    assert "--tile" in capsys.readouterr().out


def resident(process):
    """Bytes of memory of a process and those it started; what they share is counted for each."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_images(checkpoint, tmp_path):
    for number in range(2000):
        write_noise(tmp_path / "in" / f"{number:04d}.png", (64, 64), number)
    (tmp_path / "in" / "1000.png").write_bytes(b"broken")
    output = tmp_path / "out"
    options = ["--images", tmp_path / "in", "--output", output, "--num_workers", "2", "--batch_size", "4"]
    process = subprocess.Popen(**command(checkpoint, *options, "--threshold", "0"))
    watched, measured = psutil.Process(process.pid), {}
    for count in (200, 1000, 1950):
        wait_until(lambda count=count: lines_of(output) >= count, process, 250)
        measured[count] = resident(watched)
    error = process.communicate(timeout=250)[1].decode()
    assert process.returncode == 1 and "error: 1 images could not be read:" in error
    print({count: f"{size / 2**20:.0f} MiB" for count, size in measured.items()})
    assert max(measured[1000], measured[1950]) < measured[200] + 40 * 2**20
    assert len(content(output, "images.json")["images"]) == 2000
    assert len({entry["image_id"] for entry in content(output, "predictions.json")}) == 1999


def test_a_full_gpu_is_one_sentence_and_the_same_command_resumes(checkpoint, plans, tmp_path, monkeypatch, capsys):
    forward, calls = DINO.forward, []

    def full_on_the_third(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DINO, "forward", full_on_the_third)
    assert predict(checkpoint, "--images", plans, "--batch_size", 2, output=tmp_path / "out") == 1
    words = (
        "The GPU's memory is full; lower --batch_size. What is finished is kept: the same command resumes from here."
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {words}"
    assert predict(checkpoint, "--images", plans, "--batch_size", 1, output=tmp_path / "out") == 0
    assert len(content(tmp_path / "out", "images.json")["images"]) == 6
    assert len(calls) < 3 + 6  # images that were finished were not detected again
