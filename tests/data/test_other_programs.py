"""Datasets as other programs write them, read through the data module as `fit` reads them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as masks

from dino_lightning.data import CocoDataModule
from dino_lightning.data.annotation_file import load_coco, read_coco
from dino_lightning.data.read_splits import read_splits
from dino_lightning.data.splits import find_split_files
from dino_lightning.errors import DataError
from tests.data.small_coco import annotation, document, write_images, write_json, write_split

NOTHING_GIVEN = {f"{split}_{what}": None for split in ("train", "val", "test") for what in ("annotations", "images")}


def read(root: Path, **given: Any):
    return read_splits({"root": str(root), **NOTHING_GIVEN, **given}, val_fraction=0.3, seed=0, files_must_exist=True)


def data(root: Path, **options: Any) -> CocoDataModule:
    return CocoDataModule(root=str(root), image_size=32, max_size=64, num_workers=0, **options)


def said(splits) -> str:
    return "\n".join((*splits.notes, *splits.repairs))


# --- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "CVAT task": {"train": ("annotations/instances_default.json", "images/default")},
    "CVAT project": {
        "train": ("annotations/instances_Train.json", "images/Train"),
        "val": ("annotations/instances_Validation.json", "images/Validation"),
    },
    "Label Studio": {"train": ("result.json", "images")},
    "FiftyOne": {"train": ("labels.json", "data")},
    "FiftyOne by split": {
        "train": ("train/labels.json", "train/data"),
        "val": ("validation/labels.json", "validation/data"),
    },
    "MediaPipe": {
        "train": ("train/labels.json", "train/images"),
        "val": ("validation/labels.json", "validation/images"),
    },
    "VIA": {"train": ("via_export_coco.json", ".")},
    "labelme2coco": {"train": ("dataset/train.json", "images"), "val": ("dataset/val.json", "images")},
    "upper case": {"train": ("Train/Annotations.JSON", "Train/Images"), "val": ("Val/Annotations.JSON", "Val/Images")},
    "Darwin": {"train": ("releases/latest/coco.json", "images")},
    "Supervisely": {
        "train": ("train/annotations/instances.json", "train/img"),
        "val": ("valid/annotations/instances.json", "valid/img"),
    },
    "gzipped": {
        "train": ("train/annotations.json.gz", "train/images"),
        "val": ("val/annotations.json.gz", "val/images"),
    },
    "splits in folders of images": {"train": ("train.json", "imgs/train"), "val": ("valid.json", "imgs/valid")},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_programs_are_found_with_their_images(tmp_path, name):
    for number, (json_file, images) in enumerate(LAYOUTS[name].values()):
        content = document(count=4, first_id=1 + 10 * number)
        write_images(tmp_path / images, content)
        path = tmp_path / json_file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    found = find_split_files(tmp_path)
    expected = {split: tmp_path / json_file for split, (json_file, _) in LAYOUTS[name].items()}
    assert {split: files.annotations for split, files in found.items()} == expected
    splits = read(tmp_path)
    assert len(splits.train.images) == (4 if "val" in found else 3)
    assert all(splits.train.image_path(index).is_file() for index in range(len(splits.train.images)))
    assert "val" not in found or [image.id for image in splits.val.images] == [11, 12, 13, 14]


def test_one_json_for_each_image_is_one_split(tmp_path):
    for number in range(1, 6):
        content = document(count=1, first_id=number)
        content["images"][0]["id"] = 1  # each file numbers its own
        for entry in content["annotations"]:
            entry["image_id"] = 1
        name = content["images"][0]["file_name"] = f"plan{number}.png"
        write_images(tmp_path / "images", content)
        write_json(tmp_path / "ann" / f"{name}.json", content)
    splits = read(tmp_path)
    names = {image.file_name for part in (splits.train, splits.val) for image in part.images}
    assert names == {f"plan{number}.png" for number in range(1, 6)}
    assert len({image.id for part in (splits.train, splits.val) for image in part.images}) == 5
    assert splits.train.summary.boxes + splits.val.summary.boxes == 10


def test_files_that_do_not_tell_their_split_are_listed_with_the_command(tmp_path):
    write_split(tmp_path / "batch_a.json", tmp_path / "images")
    write_split(tmp_path / "batch_b.json", tmp_path / "images")
    with pytest.raises(DataError) as caught:
        find_split_files(tmp_path)
    assert "batch_a.json, batch_b.json look like COCO files" in str(caught.value)
    command = f"--data.root {tmp_path} --data.train_annotations '[batch_a.json, batch_b.json]'"
    assert str(caught.value).endswith(command)


def test_files_of_other_formats_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"What lies there, train/metadata.jsonl, is not read; export it as COCO."):
        find_split_files(tmp_path)


def test_json_files_of_other_formats_are_named(tmp_path):
    write_json(tmp_path / "plan.json", {"version": "5.0", "shapes": [], "imagePath": "plan.png"})
    with pytest.raises(DataError, match=r"none of its JSON files \(plan.json\) is a COCO file.*LabelMe's own format"):
        find_split_files(tmp_path)


# --- several files of a split ----------------------------------------------------------------------------------------


def two_files(root: Path) -> None:
    write_split(root / "annotations/train.json", root / "images", count=4)
    more = document(count=3, first_id=21)
    for image in more["images"]:
        image["id"] -= 20  # as in the first file
    for entry in more["annotations"]:
        entry["image_id"] -= 20
        entry["category_id"] = {1: 5, 2: 2}[entry["category_id"]]
    more["categories"] = [{"id": 5, "name": "kitchen"}, {"id": 2, "name": "bath"}, {"id": 1, "name": "attic"}]
    write_images(root / "images", {"images": [{**image, "id": image["id"] + 20} for image in more["images"]]})
    write_json(root / "annotations/train2.json", more)
    write_split(root / "annotations/val.json", root / "images", count=2, first_id=41)


def test_another_file_of_a_split_is_named_and_not_read(tmp_path):
    two_files(tmp_path)
    splits = read(tmp_path)
    assert len(splits.train.images) == 4
    beside = "annotations/train.json, annotations/val.json"
    assert f"annotations/train2.json looks like a COCO file and is not used beside {beside}" in said(splits)


@pytest.mark.parametrize(
    "given", [["annotations/train.json", "annotations/train2.json"], "annotations/train*.json"], ids=["list", "pattern"]
)
def test_several_files_are_one_split(tmp_path, given):
    two_files(tmp_path)
    splits = read(tmp_path, train_annotations=given)
    train = splits.train
    assert [image.id for image in train.images] == [1, 2, 3, 4, 5, 6, 7]
    assert [image.file_name for image in train.images][4:] == ["21.png", "22.png", "23.png"]
    assert splits.classes.names == ("kitchen", "bath", "attic")
    labels = splits.classes.labels_of(train)
    assert labels.tolist() == [0, 1] * 7  # by name, whatever the ids
    assert "3 images of train2.json have ids that an earlier file uses" in said(splits)
    assert "joined by name" in said(splits)
    alone = load_coco(tmp_path / "annotations/train2.json", tmp_path / "images")
    np.testing.assert_array_equal(train.boxes_xyxy[-6:], alone.boxes_xyxy)


def test_files_that_annotate_the_same_images_are_joined_image_by_image(tmp_path):
    content = write_split(tmp_path / "all.json", tmp_path / "images", count=3)
    for name, category in (("kitchens.json", 1), ("baths.json", 2)):
        part = [entry for entry in content["annotations"] if entry["category_id"] == category]
        write_json(tmp_path / name, {**content, "annotations": part})
    joined = read(tmp_path, train_annotations=["kitchens.json", "baths.json"], val_annotations="all.json").train
    assert len(joined.images) == 3 and np.diff(joined.offsets).tolist() == [2, 2, 2]


def test_a_pattern_without_files_and_an_empty_list_are_refused(tmp_path):
    two_files(tmp_path)
    with pytest.raises(DataError, match=r"--data.train_annotations: no file fits none\*.json"):
        read(tmp_path, train_annotations="none*.json")
    with pytest.raises(DataError, match=r"--data.train_annotations: the list is empty"):
        read(tmp_path, train_annotations=[])


def test_images_declared_for_another_split_are_not_trained_on(tmp_path):
    content = document(count=6)
    for image, part in zip(content["images"], ["train", "Train", "val", "test", "validation", "train"], strict=True):
        image["split"] = part
    write_images(tmp_path / "images", content)
    write_json(tmp_path / "annotations.json", content)
    for named in ({}, {"train_annotations": "annotations.json"}):
        splits = read(tmp_path, **named)
        assert [image.id for image in splits.train.images] == [1, 2, 6]
        assert [image.id for image in splits.val.images] == [3, 5]
        assert [image.id for image in splits.test.images] == [4]
        assert "the field 'split' of its images is followed: 3 train, 2 val, 1 test." in said(splits)
        assert "held out" not in said(splits)


# --- values ----------------------------------------------------------------------------------------------------------


def as_written(value: Any) -> list[Any]:
    return [str(value), float(value), f"{value}.0"]


@given(st.data())
def test_numbers_of_another_type_are_read_without_loss(data):
    """Whatever numbers are written as text or floats, the arrays are those of the plain file."""
    content = document(count=2)
    odd = json.loads(json.dumps(content))
    for key, names in (("images", ["id", "width", "height"]), ("annotations", ["id", "image_id", "category_id"])):
        for entry in odd[key]:
            for name in names:
                entry[name] = data.draw(st.sampled_from([entry[name], *as_written(entry[name])]))
    for entry in odd["annotations"]:
        entry["bbox"] = [data.draw(st.sampled_from([value, str(value), f"{value}.000"])) for value in entry["bbox"]]
        entry["iscrowd"] = data.draw(st.sampled_from([0, False, "0", 0.0, None]))
    plain, converted = (
        read_in_memory(content),
        read_in_memory(odd),
    )
    assert plain.images == converted.images
    for name in ("boxes_xyxy", "category_indices", "iscrowd", "annotation_ids", "area"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(converted, name), err_msg=name)


def read_in_memory(content: Any):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_json(Path(folder) / "a.json", content)
        found, problems = read_coco(path, Path(folder))
        assert {problem.kind for problem in problems} <= {"value-converted"}, problems
        return found


def test_conversions_are_counted_once(tmp_path):
    content = document(count=3)
    for entry in content["annotations"]:
        entry["bbox"] = [f"{value}.0000" for value in entry["bbox"]]
    _, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    (problem,) = problems
    assert problem.kind == "value-converted"
    assert "24 bbox numbers (first: '4.0000')" in problem.message


def test_ids_that_are_text_stay_apart(tmp_path):
    content = document(count=3)
    for image, name in zip(content["images"], ["1", "01", "plan"], strict=True):
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                entry["image_id"] = name
        image["id"] = name
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert [problem.kind for problem in problems] == ["id-numbered"]
    assert [image.id for image in found.images] == [1, 2, 3]
    assert np.diff(found.offsets).tolist() == [2, 2, 2]


@pytest.mark.parametrize("value", ["1,5", "4 px", "", True, [4], "nan", "inf", "0x10", "9" * 50])
def test_what_is_no_number_stays_refused(tmp_path, value):
    content = document(count=1)
    content["annotations"][0]["bbox"][2] = value
    with pytest.raises(DataError, match="it needs four finite numbers"):
        load_coco(write_json(tmp_path / "a.json", content), tmp_path)


def test_sizes_that_are_missing_come_from_the_files(tmp_path):
    content = document(count=4)
    write_images(tmp_path, content)
    for image, value in zip(content["images"], [None, 0, ..., {}], strict=True):
        if value is ...:
            del image["width"], image["height"]
        elif value != {}:
            image["width"] = image["height"] = value
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert [image.size for image in found.images] == [(30, 40), (30, 50), (30, 60), (30, 70)]
    assert [problem.message.partition(": ")[2] for problem in problems] == [
        "3 images have no width and height; they are read from the headers of the files."
    ]


# --- boxes from outlines, areas --------------------------------------------------------------------------------------


def test_outlines_give_the_boxes_that_are_missing(tmp_path):
    content = document(count=1)
    pixels = np.zeros((30, 40), np.uint8, order="F")
    pixels[3:12, 5:25] = 1
    packed = masks.encode(pixels)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate(([0], pixels.flatten("F"), [2]))) != 0), prepend=0)
    outlines = [
        [[5, 3, 25, 3, 25, 12, 5, 12]],
        [5, 3, 25, 3, 25, 12, 5, 12],
        [[5, 3, 10, 3, 10, 5], [20, 7, 25, 7, 25, 12]],
        {"size": [30, 40], "counts": packed["counts"].decode()},
        {"size": [30, 40], "counts": runs.tolist()},
    ]
    content["annotations"] = [
        {"id": number, "image_id": 1, "category_id": 1, "segmentation": outline, "bbox": box}
        for number, (outline, box) in enumerate(zip(outlines, [None, [], None, [], None], strict=True), 1)
    ]
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert found.boxes_xyxy.tolist() == [[5, 3, 25, 12]] * 5
    assert [problem.kind for problem in problems] == ["box-from-outline"]
    assert "5 annotations have an outline and no bbox" in problems[0].message


@pytest.mark.parametrize(
    "outline",
    [
        {"size": [30, 40], "counts": "PPP0"},
        {"size": [30, 40], "counts": [1, 2]},
        {"size": [30], "counts": "1"},
        {"counts": "1"},
        [["a", 1, 2, 3, 4, 5]],
        [[1, 2]],
        "polygon",
    ],
)
def test_outlines_that_are_none_are_refused(tmp_path, outline):
    content = document(count=1)
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": outline}]
    with pytest.raises(DataError, match="annotation 1 has no bbox, and a segmentation that is neither a polygon nor"):
        load_coco(write_json(tmp_path / "a.json", content), tmp_path)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (150, 150),  # a polygon in its box
        (200, 200),
        (201.9, 201.9),  # rounding
        (1200, 200),  # the image's
        (0, 200),
        (0.17, 200),  # a share of the image
    ],
)
def test_an_area_counts_where_it_can_be_that_of_its_box(tmp_path, given, taken):
    content = document(count=1)
    content["annotations"] = [annotation(1, 1, 1, [4, 5, 20, 10], area=given)]
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert found.area.tolist() == [taken]
    assert [problem.kind for problem in problems] == ([] if given == taken else ["area-implausible"])


def test_a_small_area_stays_where_the_outline_has_it(tmp_path):
    content = document(count=1)
    thin = [[4, 5, 24, 15, 24, 15.2]]  # 2 of 204 square pixels
    content["annotations"] = [
        annotation(1, 1, 1, [4, 5, 20, 10.2], area=2, segmentation=thin),
        annotation(2, 1, 1, [4, 5, 20, 10.2], area=1, segmentation=[[4, 5, 24, 5, 24, 15]]),
    ]
    found, _ = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert found.area.tolist() == pytest.approx([2, 204])


# --- file names ------------------------------------------------------------------------------------------------------

NAMES = {
    "Windows": "images\\{stem}.png",
    "Label Studio": "..\\..\\label-studio\\media\\upload\\4\\{stem}.png",
    "Label Studio with its prefix": "/data/upload/4/3fa85f64-{stem}.png",
    "another machine": "/home/someone/data/{stem}.png",
    "a drive": "C:\\Users\\someone\\{stem}.png",
    "address": "https://example.org/bucket/{stem}.png?token=1",
    "percent": "%7Bx%7D/{quoted}.png",
    "project": "images\\1/{stem}.png",
    "no suffix": "{stem}",
    "upper case": "{stem}.PNG",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_machines_are_matched_by_their_base(tmp_path, name):
    content = document(count=3)
    for image in content["images"]:
        image["file_name"] = f"plan {image['id']}.png"
    write_images(tmp_path / "images", content)
    for image in content["images"]:
        stem = image["file_name"][:-4]
        image["file_name"] = NAMES[name].format(stem=stem, quoted=stem.replace(" ", "%20"))
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path / "images")
    assert [image.file_name for image in found.images] == ["plan 1.png", "plan 2.png", "plan 3.png"]
    assert [problem.kind for problem in problems] == ["file-name-matched"]
    assert "3 file names are not those of the files" in problems[0].message


def test_a_base_name_that_two_files_have_is_not_guessed(tmp_path):
    content = document(count=2)
    for image, folder in zip(content["images"], "ab", strict=True):
        image["file_name"] = f"{folder}/plan.png"
    write_images(tmp_path / "images", content)
    content["images"][0]["file_name"] = "C:\\plan.png"
    with pytest.raises(
        DataError, match=r"image 1 has file_name 'C:.*plan.png', which leaves the image folder, and its"
    ):
        load_coco(write_json(tmp_path / "a.json", content), tmp_path / "images")


def test_two_names_do_not_become_one_file(tmp_path):
    content = document(count=2)
    write_images(tmp_path / "images", {"images": content["images"][:1]})
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "camera1/1.png", "camera2/1.png"
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path / "images")
    assert [image.file_name for image in found.images] == ["camera1/1.png", "camera2/1.png"] and not problems
    content["images"][0]["file_name"] = "1.png"  # this one is the file
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path / "images")
    assert [image.file_name for image in found.images] == ["1.png", "camera2/1.png"] and not problems


def test_nothing_outside_the_image_folder_is_matched(tmp_path):
    content = document(count=1)
    write_images(tmp_path, content)  # beside the image folder
    (tmp_path / "images").mkdir()
    content["images"][0]["file_name"] = "../1.png"
    with pytest.raises(DataError, match="leaves the image folder"):
        load_coco(write_json(tmp_path / "a.json", content), tmp_path / "images")


# --- classes ---------------------------------------------------------------------------------------------------------


def rooms(root: Path) -> None:
    names = ["bedroom", "kitchen", "wall", "door"]
    for split, first in (("train", 1), ("val", 11)):
        content = document(count=3, first_id=first)
        content["categories"] = [{"id": 10 * k, "name": name} for k, name in enumerate(names, 1)]
        content["annotations"] = [
            annotation(100 * image["id"] + k, image["id"], 10 * k, [k, k, 10, 10])
            for image in content["images"]
            for k in range(1, 5)
            if image["id"] != first or k == 3  # the first image has a wall alone
        ]
        write_images(root / split / "images", content)
        write_json(root / split / "annotations.json", content)


def test_classes_are_chosen_and_merged_with_their_ids(tmp_path):
    rooms(tmp_path)
    merged = data(tmp_path, classes=["room"], merge_classes={"room": ["kitchen", "bedroom"]})
    assert merged.class_names == ["room"] and merged.category_ids == [10]
    assert merged.train_set.annotations.summary.boxes == merged.val_set.annotations.summary.boxes == 4
    assert merged.train_set.annotations.summary.images_without_boxes == 1
    doors = data(tmp_path, classes=["door", "kitchen"])
    assert doors.class_names == ["kitchen", "door"] and doors.category_ids == [20, 40]  # by id, as always
    fewer = data(tmp_path, classes=["door"], drop_empty=True)
    assert [image.id for image in fewer.train_set.annotations.images] == [2, 3]
    assert len(fewer.val_set) == 3


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"classes": ["kitchn"]}, DataError, "'kitchn', which --data.classes names. Did you mean 'kitchen'"),
        ({"classes": ["Wall"]}, DataError, "Did you mean 'wall'?"),
        ({"classes": ["x"]}, DataError, "It has bedroom, door, kitchen, wall."),
        ({"merge_classes": {"room": ["attic"]}}, DataError, "'attic', which --data.merge_classes names"),
        ({"classes": []}, ValueError, "classes is an empty list"),
        ({"classes": ["wall", "wall"]}, ValueError, "classes names a class twice"),
        ({"merge_classes": {"a": ["wall"], "b": ["wall"]}}, ValueError, "merge_classes puts 'wall' into two classes"),
        ({"classes": ["wall"], "merge_classes": {"a": ["wall"]}}, ValueError, "classes names 'wall', which"),
    ],
)
def test_a_choice_of_classes_that_cannot_be_is_refused(tmp_path, options, error, sentence):
    rooms(tmp_path)
    with pytest.raises(error) as caught:
        data(tmp_path, **options)
    assert sentence in str(caught.value)


def test_repeated_categories_are_one(tmp_path):
    content = document(count=2)
    content["categories"] = [{"id": k, "name": "room"} for k in (4, 1, 2, 3)] + [{"id": 4, "name": "room"}]
    for number, entry in enumerate(content["annotations"]):
        entry["category_id"] = 1 + number
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert [(category.id, category.name) for category in found.categories] == [(1, "room")]
    assert found.category_indices.tolist() == [0] * 4
    assert "4 entries of 'categories' repeat another one (room)" in problems[0].message


def test_a_folder_without_its_images_is_found_elsewhere_in_the_root(tmp_path):
    write_split(tmp_path / "train/annotations.json", tmp_path / "pictures", count=4)
    assert find_split_files(tmp_path)["train"].images == tmp_path / "pictures"
    shutil.rmtree(tmp_path / "pictures")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path)


def test_category_ids_that_are_words_are_numbered(tmp_path):
    content = document(count=2)
    content["categories"] = [{"id": "k", "name": "kitchen"}, {"id": 4, "name": "bath"}, {"id": "a", "name": "attic"}]
    for entry in content["annotations"]:
        entry["category_id"] = {1: "k", 2: 4}[entry["category_id"]]
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert [(category.id, category.name) for category in found.categories] == [
        (4, "bath"),
        (5, "kitchen"),
        (6, "attic"),
    ]
    assert found.category_indices.tolist() == [1, 0, 1, 0]
    assert [problem.kind for problem in problems] == ["id-numbered"]


def test_images_with_an_address_in_place_of_a_name(tmp_path):
    content = document(count=2)
    write_images(tmp_path, content)
    for image in content["images"]:
        image["coco_url"] = f"http://images.example.org/train2017/{image.pop('file_name')}"
    found, _ = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert [image.file_name for image in found.images] == ["1.png", "2.png"]


def test_one_more_file_without_a_split_is_for_training(tmp_path):
    write_split(tmp_path / "annotations/trainval.json", tmp_path / "images", count=4)
    write_split(tmp_path / "annotations/test.json", tmp_path / "images", count=2, first_id=11)
    assert {split: files.annotations.name for split, files in find_split_files(tmp_path).items()} == {
        "train": "trainval.json",
        "test": "test.json",
    }


# --- found by people who tried ---------------------------------------------------------------------------------------


def subfolders(root: Path, names: str) -> dict[str, Any]:
    """Six images in three folders below images/, two of each name; `names` says how the file calls them."""
    content = document(count=6)
    for number, image in enumerate(content["images"]):
        image["file_name"] = f"h{number // 2}/img{number % 2}.png"
    write_images(root / "images", content)
    for image in content["images"]:
        image["file_name"] = names.format(name=image["file_name"], base=image["file_name"].rpartition("/")[2])
    write_json(root / "annotations.json", content)
    return content


@pytest.mark.parametrize("names", ["{name}", "D:\\x\\{name}", "/home/x/images/{name}", "images/{name}"])
def test_images_in_subfolders_with_equal_base_names_are_told_apart(tmp_path, names):
    subfolders(tmp_path, names)
    splits = read(tmp_path)
    for part in (splits.train, splits.val):
        for index, image in enumerate(part.images):
            expected = tmp_path / f"images/h{(image.id - 1) // 2}/img{(image.id - 1) % 2}.png"
            assert part.image_path(index) == expected


def test_base_names_that_several_subfolders_have_are_refused(tmp_path):
    subfolders(tmp_path, "{base}")
    with pytest.raises(DataError, match=r"img0.png does not exist"):
        read(tmp_path)


def test_cvat_with_subfolders(tmp_path):
    content = document(count=6)
    for number, image in enumerate(content["images"]):
        image["file_name"] = f"sub{number % 2}/{number}.png"
    write_images(tmp_path / "images/default", content)
    write_json(tmp_path / "annotations/instances_default.json", content)
    splits = read(tmp_path)
    assert splits.train.images_folder == tmp_path / "images/default" and not splits.repairs


def test_one_image_under_two_ids_is_told(tmp_path):
    content = document(count=3)
    write_images(tmp_path / "images", content)
    content["images"].append({**content["images"][0], "id": 9})
    write_json(tmp_path / "train.json", content)
    write_split(tmp_path / "val.json", tmp_path / "images", count=2)
    assert "1 image files are listed again under another id (first: 1.png)" in said(read(tmp_path))


@pytest.mark.parametrize("order", [[1, 0, 3, 2], [0, 1, 3, 2]], ids=["y first", "height first"])
def test_boxes_that_all_outlines_contradict_are_refused(tmp_path, order):
    content = document(count=6)
    for image in content["images"]:
        image["width"], image["height"] = 400, 300
    for entry in content["annotations"]:
        x, y, width, height = 20 + entry["id"], 150 - entry["id"], 200, 30
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        entry["bbox"] = [[x, y, width, height][k] for k in order]
    with pytest.raises(DataError, match=r"12 of 12 outlines lie outside their boxes, and no order of the four numbers"):
        load_coco(write_json(tmp_path / "a.json", content), tmp_path)


def test_boxes_larger_than_their_outlines_are_no_alarm(tmp_path):
    content = document(count=6)
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x + 3, y + 3, x + width - 1, y + 3, x + 4, y + height - 2]]  # what is seen of it
    _, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert not problems


def test_outlines_that_are_shares_say_nothing_about_boxes_in_pixels(tmp_path):
    content = document(count=6)
    for entry in content["annotations"]:
        entry["segmentation"] = [[0.1, 0.1, 0.5, 0.1, 0.5, 0.6]]
    _, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert not problems


def test_nan_as_pandas_writes_it_is_no_crowd(tmp_path):
    content = document(count=2)
    for entry in content["annotations"]:
        entry |= {"iscrowd": float("nan"), "segmentation": float("nan")}
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert not found.iscrowd.any() and {problem.kind for problem in problems} == {"crowd-odd"}


@pytest.mark.parametrize(("listed", "way"), [("plan 1.png", "suffix"), ("Küche.jpg", "accents")])
def test_another_suffix_and_another_way_to_write_accents(tmp_path, listed, way):
    content = document(count=1)
    content["images"][0]["file_name"] = {"suffix": "plan 1.tif", "accents": "Ku\u0308che.jpg"}[way]
    write_images(tmp_path, content)
    on_disk = content["images"][0]["file_name"]
    content["images"][0]["file_name"] = listed
    found, problems = read_coco(write_json(tmp_path / "a.json", content), tmp_path)
    assert [image.file_name for image in found.images] == [on_disk]
    assert [problem.kind for problem in problems] == ["file-name-matched"]


def test_case_makes_no_other_class(tmp_path):
    write_split(tmp_path / "train.json", tmp_path / "images", count=3)
    content = document(count=2)
    content["categories"] = [{"id": 7, "name": " Bath"}, {"id": 8, "name": "KITCHEN"}]
    for entry in content["annotations"]:
        entry["category_id"] = {1: 8, 2: 7}[entry["category_id"]]
    write_json(tmp_path / "val.json", content)
    splits = read(tmp_path)
    assert splits.classes.names == ("kitchen", "bath")
    assert splits.classes.labels_of(splits.val).tolist() == [0, 1] * 2


def test_negative_sizes_are_told(tmp_path):
    content = document(count=3)
    content["annotations"][0]["bbox"] = [24, 15, -20, -10]
    write_images(tmp_path / "images", content)
    write_json(tmp_path / "train.json", content)
    write_split(tmp_path / "val.json", tmp_path / "images", count=2)
    assert "1 boxes without area inside their image are dropped, 1 of them with a negative width" in said(
        read(tmp_path)
    )


def test_a_pipe_in_place_of_annotations_is_no_wait(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("annotations.json", "train/annotations.json", "train/labels.json.gz"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="no annotation file found"):
        find_split_files(tmp_path)
    with pytest.raises(DataError, match=r"annotations.json: is not a regular file"):
        load_coco(tmp_path / "annotations.json", tmp_path)
