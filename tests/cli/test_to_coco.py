"""`python -m dino_lightning to_coco` as a user calls it: what it writes, says and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from dino_lightning.__main__ import run
from dino_lightning.cli.command import Terminated
from tests.data.small_coco import annotation, document, write_images, write_json, write_split


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path):
    """A dataset with sparse ids, and images in folders of which one has the names of the other."""
    content = document(3)
    content["categories"] = [
        {"id": 7, "name": "bath", "supercategory": "wet"},
        {"id": 3, "name": "kitchen"},
        {"id": 9, "name": "Küche", "supercategory": ""},
    ]
    content["images"][0].update(id=50, file_name="a/plan.png")
    content["images"][1].update(id=40, file_name="b/plan.png")
    content["images"][2].update(id=60, file_name="b/PLAN.png")
    content["annotations"] = [
        annotation(5, 50, 7, [4.25, 5, 20.1, 10], area=99.5),
        annotation(0, 50, 3, [-3, 5, 20, 10]),
        annotation(5, 40, 3, [0.1, 0.2, 0.3, 0.4], iscrowd=1),
        annotation(8, 40, 3, [5, 5, 0, 10]),
        annotation(9, 60, 9, [1, 2, 3, 4], segmentation=[[1, 2, 4, 2, 4, 6]]),
    ]
    del content["annotations"][4]["id"]
    folder = tmp_path / "given"
    write_json(folder / "train.json", content)
    write_images(folder / "images", content)
    return folder


def written(place):
    return json.loads(Path(place, "annotations.json").read_text(encoding="utf-8"))


def convert(*more, root="given", output="clean"):
    return run(["to_coco", "--data.root", str(root), "--output", str(output), *more])


def load(path, capsys):
    coco = COCO(str(path))
    capsys.readouterr()
    return coco


def test_pycocotools_reads_the_same_boxes(root, capsys):
    assert convert() == 0
    after = load("clean/train/annotations.json", capsys)  # of the file given, it takes none without ids
    assert after.getImgIds() == [50, 40, 60] and set(after.cats) == {3, 7, 9}
    kept = [entry for entry in json.loads((root / "train.json").read_text())["annotations"] if entry["bbox"][2] > 0]
    found = after.dataset["annotations"]
    assert len(after.anns) == len(found) == len(kept) == 4  # each with an id of its own
    keys = ("image_id", "category_id", "bbox")
    order = {50: 0, 40: 1, 60: 2}
    kept.sort(key=lambda entry: order[entry["image_id"]])
    assert [[entry[key] for key in keys] for entry in found] == [[entry[key] for key in keys] for entry in kept]
    assert [entry["area"] for entry in found] == [99.5, 200, 0.12, 12]
    assert [entry["iscrowd"] for entry in found] == [0, 0, 1, 0]
    assert found[0]["id"] == 5 and after.loadImgs(40)[0]["width"] == 50


def test_files_are_plain(root):
    convert()
    text = Path("clean/train/annotations.json").read_text(encoding="utf-8")
    assert '"bbox": [4.25, 5, 20.1, 10]' in text and '"bbox": [0.1, 0.2, 0.3, 0.4]' in text
    assert written("clean/train")["categories"] == [
        {"id": 3, "name": "kitchen", "supercategory": ""},
        {"id": 7, "name": "bath", "supercategory": "wet"},
        {"id": 9, "name": "Küche", "supercategory": ""},
    ]
    assert str(root) not in text


def test_images_are_copied_under_names_of_their_own(root):
    convert()
    names = {entry["id"]: entry["file_name"] for entry in written("clean/train")["images"]}
    assert names == {50: "plan.png", 40: "plan_40.png", 60: "PLAN_60.png"}
    assert sorted(path.name for path in Path("clean/train/images").iterdir()) == sorted(names.values())
    assert Path("clean/train/images/plan_40.png").read_bytes() == (root / "images/b/plan.png").read_bytes()
    assert not any(path.is_symlink() for path in Path("clean").rglob("*"))
    assert Path("clean").stat().st_mode & 0o777 == 0o755


def test_the_table_says_what_was_written_and_how_to_train(root, capsys):
    assert convert(output="clean set") == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["split", "images", "boxes", "crowd", "left", "out", "renamed"]
    assert lines[1] == ["train", "3", "3", "1", "1", "2"]
    assert "Left out: boxes without area" in said.out and "Renamed: images whose name" in said.out
    assert said.out.endswith("\nTrain with: python -m dino_lightning.fit --data.root 'clean set'\n")
    assert said.err == ""


def test_links_lead_to_the_originals(root):
    assert convert("--images", "link") == 0
    link = Path("clean/train/images/plan_40.png")
    assert link.is_symlink() and link.resolve() == (root / "images/b/plan.png").resolve()


def test_without_images_the_names_stay_and_the_folder_is_named(root, capsys):
    assert convert("--images", "none") == 0
    assert [path.name for path in Path("clean/train").iterdir()] == ["annotations.json"]
    assert [entry["file_name"] for entry in written("clean/train")["images"]] == [
        "a/plan.png",
        "b/plan.png",
        "b/PLAN.png",
    ]
    assert "--data.root clean --data.train_images given/images\n" in capsys.readouterr().out


def test_all_splits_are_written_and_none_is_invented(tmp_path, root, capsys):
    write_split(tmp_path / "all/train/annotations.json", tmp_path / "all/train/images")
    write_split(tmp_path / "all/valid/annotations.json", tmp_path / "all/valid/images", 1, 70)
    write_split(tmp_path / "all/test/annotations.json", tmp_path / "all/test/images", 2, 80)
    assert convert(root="all") == 0
    assert sorted(path.name for path in Path("clean").iterdir()) == ["test", "train", "val"]
    assert [entry["id"] for entry in written("clean/test")["images"]] == [80, 81]
    assert convert(output="other") == 0
    assert [path.name for path in Path("other").iterdir()] == ["train"]
    capsys.readouterr()
    assert convert(root="clean", output="again") == 0  # what it writes, it reads
    assert written("again/val") == written("clean/val")


def test_options_of_fit_say_what_boxes_are(root):
    content = document(1)
    content["annotations"] = [annotation(1, 1, 1, [4, 5, 24, 15], iscrowd=1)]
    write_json(root / "train.json", content)
    write_images(root / "images", content)
    assert convert("--data.box_format", "xyxy", "--data.crowd", "objects") == 0
    (entry,) = written("clean/train")["annotations"]
    assert (entry["bbox"], entry["area"], entry["iscrowd"]) == ([4, 5, 20, 10], 200, 0)


def test_an_existing_folder_is_kept_as_it_is(root, capsys):
    Path("clean").mkdir()
    assert convert() == 0
    before = sorted(Path("clean").rglob("*"))
    assert convert("--images", "none") == 1
    assert capsys.readouterr().err.startswith("error: clean: exists already.")
    assert sorted(Path("clean").rglob("*")) == before
    Path("file").write_text("text")
    assert convert(output="file") == 1 and Path("file").read_text() == "text"


def test_absent_images_are_one_sentence_and_leave_nothing(root, capsys):
    (root / "images/b/plan.png").unlink()
    assert convert() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 3 images listed do not exist, the first being image 40" in line
    assert [path.name for path in Path().iterdir()] == ["given"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(root, monkeypatch, capsys, error):
    copy, copied = shutil.copyfileobj, []

    def failing(source, target, length):
        if copied:
            raise error
        copied.append(copy(source, target, length))

    monkeypatch.setattr("dino_lightning.data.coco_writer.shutil.copyfileobj", failing)
    code = convert()
    assert code == {KeyboardInterrupt: 130, Terminated: 143}.get(error, 1)
    assert [path.name for path in Path().iterdir()] == ["given"]
    assert "Traceback" not in capsys.readouterr().err


def test_the_output_is_needed(root, capsys):
    assert run(["to_coco", "--data.root", "given"]) == 2
    assert "--output" in capsys.readouterr().err
