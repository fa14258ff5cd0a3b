"""The numbers and findings of a health report, against datasets made for them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lightning.console import columns, shown
from dino_lightning.data.annotation_file import ReadOptions
from dino_lightning.data.class_choice import class_choice
from dino_lightning.data.findings import KINDS
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.data.splits import resolve_split_files
from dino_lightning.errors import DataError
from dino_lightning.floor_plans import write_rooms_dataset
from dino_lightning.inspection.checks import Limits
from dino_lightning.inspection.inspect import inspect_dataset
from dino_lightning.inspection.page import as_html
from dino_lightning.inspection.text import as_json, as_text
from tests.conftest import size_of
from tests.data.small_coco import annotation, document, write_images, write_json
from tests.inspection.faults import FAULTS, TRAIN, VAL, write_dataset

NOT_EXPLICIT = dict.fromkeys(("train", "val", "test"), (None, None))


@pytest.fixture
def root(tmp_path):
    write_dataset(tmp_path)
    return tmp_path


def inspected(root: Path, **limits: int):
    return inspect_dataset(resolve_split_files(root, NOT_EXPLICIT), root=root, limits=Limits(**limits), progress=False)


def found(root: Path, **limits: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    report = as_json(inspected(root, **limits))
    return {(finding["kind"], finding["split"]): finding["cases"] for finding in report["findings"]}


def edit(path: Path):
    """The content of a JSON file, and how to write it back."""
    content = json.loads(path.read_text())
    return content, lambda: write_json(path, content)


def test_numbers_equal_an_independent_count(rooms):
    numbers = as_json(inspected(rooms))["splits"]["train"]
    content = json.loads(Path(numbers["annotations"]).read_text())
    boxes = [entry["bbox"] for entry in content["annotations"]]
    per_image = Counter(entry["image_id"] for entry in content["annotations"])
    counts = sorted(per_image[image["id"]] for image in content["images"])
    sides = [np.sqrt(width * height) for _, _, width, height in boxes]

    assert numbers["images"] == numbers["images_decoded"] == len(content["images"]) == 8
    assert numbers["boxes"] == len(boxes)
    assert numbers["boxes_per_image"] == {"min": counts[0], "median": np.median(counts), "max": counts[-1]}
    assert numbers["boxes_per_image_histogram"] == {str(key): value for key, value in Counter(counts).items()}
    areas = [entry["area"] for entry in content["annotations"]]
    assert numbers["boxes_small"] == sum(area <= 32**2 for area in areas)
    assert numbers["boxes_medium"] == sum(32**2 <= area <= 96**2 for area in areas)
    assert numbers["boxes_large"] == sum(area >= 96**2 for area in areas)
    assert numbers["box_width"]["median"] == pytest.approx(np.median([box[2] for box in boxes]))
    assert numbers["box_aspect_ratio"]["max"] == pytest.approx(max(box[2] / box[3] for box in boxes))
    widths = [size_of(Path(numbers["image_folder"]) / image["file_name"])[0] for image in content["images"]]
    assert numbers["image_width"] == {"min": min(widths), "median": np.median(widths), "max": max(widths)}
    area_of = {image["id"]: image["width"] * image["height"] for image in content["images"]}
    owners = [entry["image_id"] for entry in content["annotations"]]
    shares = [side / np.sqrt(area_of[owner]) for side, owner in zip(sides, owners, strict=True)]
    assert numbers["box_relative_size"]["max"] == pytest.approx(max(shares))
    for histogram, values in (("box_size_histogram", sides), ("box_relative_size_histogram", shares)):
        for bar in numbers[histogram]:
            assert bar["boxes"] == sum(bar["from"] <= value < bar["to"] for value in values)
        assert sum(bar["boxes"] for bar in numbers[histogram]) == len(boxes)


def test_classes_are_listed_with_their_boxes_in_each_split(root):
    content, write = edit(root / TRAIN)
    content["categories"] = [{"id": 7, "name": "bath"}, {"id": 3, "name": "kitchen"}]
    for entry in content["annotations"]:
        entry["category_id"] = 7 if entry["category_id"] == 2 else 3
    content["annotations"][0]["iscrowd"] = 1
    write()
    (root / VAL).unlink()
    named = ("category_id", "label", "name", "boxes")
    assert [{key: row[key] for key in named} for row in as_json(inspected(root))["classes"]] == [
        {"category_id": 3, "label": 0, "name": "kitchen", "boxes": {"train": 3}},
        {"category_id": 7, "label": 1, "name": "bath", "boxes": {"train": 4}},
    ]


def test_synthetic_plans_are_sound_and_not_taken_for_copies(tmp_path):
    write_rooms_dataset(tmp_path / "plans", num_train=40, num_val=10, size=128)
    assert found(tmp_path / "plans") == {}


def test_images_in_excess_of_queries_and_of_evaluation(root):
    content, write = edit(root / TRAIN)
    for number in range(10):
        content["annotations"].append(annotation(100 + number, 2, 1 + number % 2, [1, 1, 10 + number, 20]))
    write()  # image 2 has six boxes of either class
    assert not {"too-many-boxes", "beyond-evaluation"} & {kind for kind, _ in found(root)}
    assert found(root, num_queries=12).keys() == set()
    (case,) = found(root, num_queries=11)["too-many-boxes", "train"]
    assert (case["image_id"], case["file_name"], case["detail"]) == (2, "2.png", "12 boxes, 11 queries")
    assert found(root, max_detections=12, max_detections_of_class=6).keys() == set()
    assert [case["image_id"] for case in found(root, max_detections=11)["beyond-evaluation", "train"]] == [2]
    assert [case["image_id"] for case in found(root, max_detections_of_class=5)["beyond-evaluation", "train"]] == [2]


def test_a_box_is_tiny_by_the_size_that_training_uses(root):
    content, write = edit(root / TRAIN)
    content["annotations"][0]["bbox"] = [5, 5, 3, 10]  # in an image of 40 x 30
    write()
    assert found(root, image_size=40).keys() == set()  # 3 x 40 / 30 = 4
    assert len(found(root, image_size=39)["box-tiny", "train"]) == 1
    assert len(found(root, image_size=40, max_size=52)["box-tiny", "train"]) == 1


def test_copies_scaled_or_saved_again_are_found_within_and_across_splits(root):
    # noise has no likeness to lose; what a photograph shows survives compression
    yy, xx = np.mgrid[:240, :320]
    waves = np.stack([127 + 120 * np.sin(xx / 40 + k) * np.cos(yy / (25 + 9 * k)) for k in range(3)], axis=-1)
    picture = Image.fromarray(waves.astype(np.uint8))
    for name, copy, options in (
        ("train/images/1.png", picture, {}),
        ("train/images/2.png", picture.resize((160, 120)), {}),
        ("val/images/11.png", picture, {"quality": 60}),
        ("train/images/3.png", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {}),
    ):
        copy.save(root / name, "JPEG" if options else "PNG", **options)
    everything = found(root)
    assert [case["file_name"] for case in everything["near-duplicate", "train"]] == ["2.png"]
    (leaked,) = everything["leak-near", "val"]
    assert leaked["file_name"] == "11.png" and leaked["detail"] == "as 1.png (image 1 of train)"


def test_exact_copies_are_told_of_the_split_that_should_not_have_them(root):
    (root / "val/images/12.png").write_bytes((root / "train/images/3.png").read_bytes())
    content, write = edit(root / VAL)
    content["images"][1]["width"] = 60
    write()
    assert found(root) == {
        ("leak", "val"): [
            {"image_id": 12, "annotation_id": None, "file_name": "12.png", "detail": "as 3.png (image 3 of train)"}
        ]
    }


def test_white_pages_are_not_copies_of_each_other(root):
    for name, size in (("1.png", (40, 30)), ("2.png", (50, 30)), ("3.png", (60, 30))):
        Image.new("RGB", size, "white").save(root / "train/images" / name)
    assert found(root).keys() == set()


def test_a_size_swapped_by_exif_is_told_from_a_wrong_size(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.open(root / "train/images/1.png").copy()
    noise.save(root / "train/images/1.png", "JPEG", exif=exif)
    noise.resize((41, 30)).save(root / "train/images/2.png")
    everything = found(root)
    assert everything["size-swapped", "train"][0]["detail"] == "annotated 40 x 30, the file has 30 x 40 as displayed"
    assert everything["size-differs", "train"][0]["detail"] == "annotated 50 x 30, the file has 41 x 30 as displayed"
    assert [case["image_id"] for case in everything["exif-rotated", "train"]] == [1]


def test_classes_and_images_without_boxes(root):
    content, write = edit(root / VAL)
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 1][:1]
    write()
    everything = found(root)
    assert everything["category-missing", "val"][0]["detail"] == "category 2 (bath)"
    assert [case["image_id"] for case in everything["no-boxes", "val"]] == [12]


def test_one_image_is_too_few_to_hold_some_out(root):
    (root / VAL).unlink()
    content, write = edit(root / TRAIN)
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]
    write()
    assert {("too-few-images", "train"), ("no-validation", "train")} <= found(root).keys()


def test_files_not_listed_are_looked_for_once_in_a_folder_that_splits_share(tmp_path):
    write_dataset(tmp_path)
    for name in ("train", "val"):
        for path in (tmp_path / name / "images").iterdir():
            path.rename(tmp_path / path.name)
    Image.new("L", (3, 3)).save(tmp_path / "spare.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = {
        "train": SplitFiles(tmp_path / TRAIN, tmp_path),
        "val": SplitFiles(tmp_path / VAL, tmp_path / "train" / ".."),  # the same one
    }
    report = as_json(inspect_dataset(files, progress=False))
    (finding,) = report["findings"]
    assert (finding["kind"], [case["file_name"] for case in finding["cases"]]) == ("not-listed", ["spare.png"])


def test_every_error_kind_says_what_to_do():
    for name, kind in KINDS.items():
        assert kind.title[0].islower() or kind.title.startswith(("EXIF", "CMYK", "16")), name
        assert kind.advice.endswith((".", "?", "255.")), name
    produced = {fault.kind for fault in FAULTS.values()} - {""}
    in_this_file = {name for name in KINDS if f'"{name}"' in Path(__file__).read_text()}
    # too slow to produce: two million comparisons
    assert set(KINDS) - produced - in_this_file == {"near-unfinished"} - in_this_file


def test_a_terminal_line_is_cut_by_its_width():
    assert shown("plan.png", 20) == "plan.png"
    assert shown("a\nb\x1b[31m\u202e", 20) == "a?b?[31m?"
    assert columns("平面図.png") == 10
    assert shown("平面図" * 10, 20) == "平面図平面図平面..."
    assert columns(shown("平" + "x" * 500, 50)) <= 50


def test_wide_tables_stay_within_a_terminal(root):
    content, write = edit(root / TRAIN)
    content["categories"] += [{"id": 10**30 + k, "name": "\u5e73\u9762\u56f3" * 30 + str(k)} for k in range(60)]
    content["images"] += [
        {"id": 50 + k, "file_name": "folder/" * 30 + f"{k}.png", "width": 9999, "height": 33} for k in range(9)
    ]
    write()
    (root / "test").mkdir()
    (root / "test/annotations.json").write_text((root / VAL).read_text())
    text = as_text(inspected(root))
    assert max(columns(line) for line in text.splitlines()) <= 100
    assert "... and 32 more classes" in text and "... and 6 more" in text


def test_the_page_stays_small(root):
    content, write = edit(root / TRAIN)
    noise = np.random.default_rng(0)
    for number in range(60):
        name = f"{'long' * 40}{number}.png"
        Image.fromarray(noise.integers(0, 256, (300, 300, 3)).astype(np.uint8)).save(root / "train/images" / name)
        content["images"].append({"id": 100 + number, "file_name": name, "width": 300, "height": 300})
        boxes = [[0, 0, 300, 300], [290, 5, 50, 60], [5, 5, 0, 5], [9, 9, 0.5, 0.5], [40, 40, 20, 20], [40, 40, 20, 20]]
        for box in boxes * 5:
            content["annotations"].append(annotation(1, 100 + number, 1, box, area=-1))
    content["categories"] += [{"id": 100 + k, "name": f"{k} " + "name " * 500} for k in range(3000)]
    write()
    page = as_html(inspected(root), str(root))
    assert len(page.encode()) < 10_000_000
    assert "more, all of them in health.json" in page


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(DataError, match="no annotation file found"):
        inspected(tmp_path)


def test_one_file_whose_images_name_their_split(tmp_path):
    content = document(count=6)
    for image, part in zip(content["images"], ["train", "train", "valid", "test", "train", "attic"], strict=True):
        image["split"] = part
    write_json(tmp_path / "annotations.json", content)
    write_images(tmp_path / "images", content)
    report = as_json(inspected(tmp_path))
    assert {name: split["images"] for name, split in report["splits"].items()} == {"train": 3, "val": 1, "test": 1}
    assert [finding["kind"] for finding in report["findings"]] == ["not-listed", "split-field", "images-of-no-split"]
    assert "1 images name no split, or an unknown one" in report["findings"][2]["cases"][0]["detail"]


def test_options_that_choose_classes_are_told(root):
    def kinds_with(**choice: Any) -> dict[str, str]:
        options = ReadOptions(choice=class_choice(choice.get("classes"), choice.get("merge_classes")), drop_empty=True)
        report = inspect_dataset(resolve_split_files(root, NOT_EXPLICIT), root=root, options=options, progress=False)
        return {finding.kind: finding.cases[0].detail for finding in report.findings if finding.split == "train"}

    content, write = edit(root / TRAIN)
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 1]
    write()
    chosen = kinds_with(classes=["bath"])
    assert chosen["classes-chosen"] == "3 annotations of 1 other categories left out, as background."
    assert chosen["empty-dropped"] == "1 of 4 images have no box and are left out."
    assert "2 categories merged into room" in kinds_with(merge_classes={"room": ["bath", "kitchen"]})["classes-chosen"]
    assert "Did you mean 'bath'" in kinds_with(classes=["bat"])["class-unknown"]


def test_a_dataset_of_yolo_is_told(tmp_path):
    write_images(tmp_path / "images/train", document(count=3))
    for number in range(1, 4):
        label = tmp_path / f"labels/train/{number}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [room]\n")
    report = as_json(inspected(tmp_path))
    told = {finding["kind"]: finding["cases"][0]["detail"] for finding in report["findings"]}
    assert told["other-format"].startswith("read as YOLO.")
    assert report["splits"]["train"]["boxes"] == 3 and report["classes"][0]["category_id"] == 0
