from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_lightning.data import CocoDataModule, CocoDetection, check_classes, classes_of, load_coco
from dino_lightning.errors import DataError
from tests.data.small_coco import annotation, document, put, write_images, write_json

HUGE = 10**30


def load(tmp_path: Path, content: Any, name: str = "some.json"):
    return load_coco(write_json(tmp_path / name, content), tmp_path / "images")


def test_counts_say_what_was_found_and_repaired(tmp_path):
    content = document(count=4)  # images of 40, 50, 60 and 70 x 30
    content["annotations"] = [
        annotation(1, 3, 1, [0, 0, 60, 30]),
        annotation(2, 1, 1, [10, 10, 5, 5]),
        annotation(3, 1, 2, [-5, -5, 20, 20]),  # sticks out
        annotation(4, 1, 2, [30, 20, 10.005, 10]),  # sticks out by less than rounding
        annotation(5, 1, 1, [10, 10, 0, 5]),  # no width
        annotation(6, 1, 1, [10, 10, 5, -5]),  # negative height
        annotation(7, 1, 1, [40, 0, 10, 10]),  # outside
        annotation(8, 2, 1, [5, 5, 10, 10], iscrowd=1),
    ]
    summary = load(tmp_path, content).summary
    assert str(summary) == ("4 images, 4 boxes, 1 crowd, 3 degenerate dropped, 1 clipped, 2 images without boxes")
    assert (summary.images, summary.boxes, summary.crowd) == (4, 4, 1)
    assert (summary.degenerate, summary.clipped, summary.images_without_boxes) == (3, 1, 2)


def test_boxes_are_clipped_for_training_and_untouched_for_evaluation(tmp_path):
    content = document(count=2)
    content["annotations"] = [
        annotation(1, 2, 2, [30, 20, 40, 40], area=123.5),
        annotation(2, 1, 1, [8, 6, 16, 12]),
        annotation(3, 2, 1, [5, 5, 10, 10], iscrowd=1),
        annotation(4, 2, 1, [5, 5, 0, 10]),
        annotation(5, 2, 2, [5, 5, 10, 20]),
    ]
    write_images(tmp_path / "images", content)
    annotations = load(tmp_path, content)
    dataset = CocoDetection(annotations, classes_of(annotations))

    second = dataset[1]  # 50 x 30
    assert (second.image_id, second.original_size, second.image.shape) == (2, (30, 50), (3, 30, 50))
    # The first is clipped to 30, 20, 50, 30. Crowd and degenerate boxes are not learnt.
    expected = torch.tensor([[40 / 50, 25 / 30, 20 / 50, 10 / 30], [10 / 50, 15 / 30, 10 / 50, 20 / 30]])
    torch.testing.assert_close(second.boxes_cxcywh, expected)
    assert second.labels.tolist() == [1, 1]
    truth = second.ground_truth
    assert truth.boxes_xyxy.tolist() == [[30, 20, 70, 60], [5, 5, 15, 15], [5, 5, 15, 25]]
    assert truth.labels.tolist() == [1, 0, 1]
    assert truth.iscrowd.tolist() == [False, True, False]
    assert truth.area.tolist() == [123.5, 100, 200]  # the file's own where it has one
    assert [array.dtype for array in (truth.boxes_xyxy, truth.labels, truth.iscrowd, truth.area)] == [
        np.float64,
        np.int64,
        np.bool_,
        np.float64,
    ]
    torch.testing.assert_close(dataset[0].boxes_cxcywh, torch.tensor([[16 / 40, 12 / 30, 16 / 40, 12 / 30]]))


def test_an_image_without_boxes_stays(tmp_path):
    content = document(count=2)
    content["annotations"] = []
    write_images(tmp_path / "images", content)
    annotations = load(tmp_path, content)
    dataset = CocoDetection(annotations, classes_of(annotations))
    assert len(dataset) == 2
    assert dataset[1].boxes_cxcywh.shape == (0, 4) and dataset[1].labels.shape == (0,)
    assert dataset[1].ground_truth.boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize(
    ("mutate", "sentence"),
    [
        (put("images", ...), "has no 'images'."),
        (put("annotations", ...), "has no 'annotations'."),
        (put("categories", ...), "has no 'categories'."),
        (put("annotations", {"a": 1}), "'annotations' must be a list, not an object."),
        (put("images.1", "x.jpg"), "entry 1 of 'images' must be an object, not a string."),
        (put("images", []), "lists no images."),
        (put("categories", []), "lists no categories."),
        (put("images.2.id", 1), "image id 1 is listed twice."),
        (put("images.0.id", 7.5), "'id' of image number 0 is 7.5, a number; it must be an integer."),
        (put("images.0.width", ...), "image 1 has no width and height, and they cannot be read from its file:"),
        (put("images.0.width", "wide"), "'width' of image 1 is 'wide', a string; it must be an integer."),
        (put("images.0.height", -1), "image 1 has width 40 and height -1."),
        (put("images.1.file_name", ...), "image 2 has no file_name."),
        (put("categories.1.id", 1), "category id 1 is listed twice."),
        (put("categories.1.id", ""), "'id' of category number 1 is '', a string;"),
        (put("categories.1.id", 1.5), "'id' of category number 1 is 1.5, a number;"),
        (put("categories.1.id", True), "'id' of category number 1 is True, true or false;"),
        (put("categories.1.name", ...), "category 2 has no name."),
        (put("annotations.3.image_id", 77), "annotation 5 has image_id 77, which no image has."),
        (put("annotations.3.image_id", [1]), "annotation 5 has image_id [1], which no image has."),
        (put("annotations.3.category_id", 9), "annotation 5 has category_id 9, which no category has."),
        (put("annotations.3.category_id", True), "annotation 5 has category_id True, which no category"),
        (put("annotations.3.bbox", ...), "annotation 5 has no bbox; it needs four finite numbers"),
        (put("annotations.3.bbox", [1, 2, 3]), "annotation 5 has bbox [1, 2, 3]; it needs four"),
        (put("annotations.3.bbox", [1, 2, 3, "4 px"]), "annotation 5 has bbox [1, 2, 3, '4 px']; it needs"),
        (put("annotations.3.bbox", {"x": 1}), "annotation 5 has an object with 'x' as bbox, as imglab"),
        (put("annotations.3.bbox", []), "annotation 5 has an empty bbox and no segmentation, as X-AnyLabeling"),
        (put("annotations.3.bbox", [1, 2, 3, float("nan")]), "annotation 5 has bbox [1, 2, 3, nan];"),
        (put("annotations.3.bbox", [1, 2, float("inf"), 4]), "annotation 5 has bbox [1, 2, inf, 4];"),
        (put("annotations.3.bbox", [1, 2, 10**400, 4]), "annotation 5 has bbox [1, 2, 1000"),
        (put("annotations.3.iscrowd", 2), "annotation 5 has iscrowd 2; it must be 0 or 1."),
        (
            put("annotations.3", {"image_id": 77}),
            "annotation number 3 (without id) has image_id 77, which no image has.",
        ),
    ],
)
def test_a_bad_file_is_refused_with_file_and_entry(tmp_path, mutate, sentence):
    content = document()
    content["categories"] = [dict(category) for category in content["categories"]]
    mutate(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'some.json'}: {sentence}")


def test_broken_json_is_located(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"images": [],\n  "annotations": [}\n')
    with pytest.raises(DataError, match=r"broken\.json: is not valid JSON: .* at line 2, column 19\."):
        load_coco(path, tmp_path)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (b'{"images": "\xff"}', "is not UTF-8 text (byte 12, line 1); it looks like Latin-1"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"images": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_what_is_no_coco_file_at_all_is_refused(tmp_path, written, sentence):
    path = tmp_path / "odd.json"
    path.write_bytes(written)
    with pytest.raises(DataError, match=re.escape(f"odd.json: {sentence}")):
        load_coco(path, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: the annotation file does not exist"):
        load_coco(tmp_path / "none.json", tmp_path)


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "windows.json"
    path.write_text(json.dumps(document()), encoding="utf-8-sig")
    assert len(load_coco(path, tmp_path).images) == 3


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "a/../../secret.png", "/etc/secret.png", "..\\secret.png", "a\\..\\..\\secret.png",
     "C:\\secret.png", "C:secret.png", "\\\\server\\share\\secret.png", "\\secret.png"],
)  # fmt: skip
def test_a_file_name_must_not_leave_the_image_folder(tmp_path, name):
    content = document()
    content["images"][1]["file_name"] = name
    with pytest.raises(DataError, match=r"some\.json: image 2 has file_name .* leaves the image folder"):
        load(tmp_path, content)


def test_a_message_stays_one_line_of_bounded_length(tmp_path):
    content = document()
    content["images"][1]["file_name"] = "/" + "\n\x1b[2J" * 2000
    with pytest.raises(DataError) as caught:
        load(tmp_path, content)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
    message = str(DataError("start\n\x1b[2J " + "x" * 9000 + " end"))
    assert message.startswith("start ?[2J xxx") and message.endswith("xxx end") and len(message) < 1500


def test_all_that_is_wrong_is_counted_and_the_command_named(tmp_path):
    content = document()
    for entry in content["annotations"][:3]:
        entry["bbox"] = None
    content["annotations"][3]["area"] = -1  # odd, but no reason to refuse
    with pytest.raises(DataError, match=r"has no bbox; .* \(And 2 more problems in this file\.\)"):
        load(tmp_path, content)
    write_json(tmp_path / "train.json", content)
    with pytest.raises(DataError, match=r"And 2 more .* python -m dino_lightning inspect --data\.root ") as caught:
        CocoDataModule(root=str(tmp_path))
    assert str(caught.value).endswith(f"inspect --data.root {tmp_path}")


def test_file_names_written_on_windows_are_found(tmp_path):
    content = document(count=1)
    content["images"][0]["file_name"] = "floor/one..a.png"
    write_images(tmp_path / "images", content)
    content["images"][0]["file_name"] = "floor\\one..a.png"
    annotations = load(tmp_path, content)
    assert CocoDetection(annotations, classes_of(annotations))[0].image.shape == (3, 30, 40)


@pytest.mark.parametrize("ids", [(1, 2), (0, 1), (7, 90), (90, 7), (HUGE, -3), (0, HUGE)])
def test_labels_follow_the_sorted_category_ids(tmp_path, ids):
    content = document(count=1)
    content["categories"] = [{"id": ids[0], "name": "first"}, {"id": ids[1], "name": "second"}]
    content["annotations"] = [annotation(1, 1, ids[0], [1, 2, 3, 4]), annotation(2, 1, ids[1], [5, 6, 7, 8])]
    write_images(tmp_path / "images", content)
    annotations = load(tmp_path, content)
    classes = classes_of(annotations)
    assert classes.category_ids == tuple(sorted(ids))
    sample = CocoDetection(annotations, classes)[0]
    found = [(classes.category_ids[label], classes.names[label]) for label in sample.labels.tolist()]
    assert found == [(ids[0], "first"), (ids[1], "second")]


def roboflow() -> dict[str, Any]:
    content = document()
    content["categories"] = [
        {"id": 0, "name": "rooms", "supercategory": "none"},
        {"id": 1, "name": "kitchen", "supercategory": "rooms"},
        {"id": 2, "name": "bath", "supercategory": "rooms"},
    ]
    return content


def test_the_unused_root_category_of_roboflow_is_no_class(tmp_path):
    classes = classes_of(load(tmp_path, roboflow()))
    assert classes.category_ids == (1, 2)
    assert classes.names == ("kitchen", "bath")
    assert classes.left_out.name == "rooms"


@pytest.mark.parametrize(
    "mutate",
    [
        put("annotations.0.category_id", 0),  # it is used
        put("categories.2.supercategory", "none"),  # it is not the root of all
        put("categories.0.supercategory", "building"),
        put("categories.0.id", 3),
    ],
)
def test_any_other_category_stays_a_class(tmp_path, mutate):
    content = roboflow()
    mutate(content)
    classes = classes_of(load(tmp_path, content))
    assert len(classes) == 3 and classes.left_out is None


def test_an_unused_category_stays_a_class(tmp_path):
    content = document()
    content["categories"] = [*content["categories"], {"id": 9, "name": "cellar"}]
    assert classes_of(load(tmp_path, content)).names == ("kitchen", "bath", "cellar")


def test_categories_must_mean_the_same_in_all_files(tmp_path):
    classes = classes_of(load(tmp_path, document(), "train.json"))

    unknown = document()
    unknown["categories"] = [*unknown["categories"], {"id": 5, "name": "attic"}]
    check_classes(load(tmp_path, unknown, "val.json"), classes)  # listed but not used: harmless
    unknown["annotations"][0]["category_id"] = 5
    with pytest.raises(DataError, match=r"val\.json: category 5 \('attic'\) has annotations but is no class"):
        check_classes(load(tmp_path, unknown, "val.json"), classes)

    renamed = document()
    renamed["categories"] = [{"id": 1, "name": "bathroom"}, {"id": 2, "name": "kitchen"}]
    with pytest.raises(DataError, match=r"val\.json: category 1 is named 'bathroom' here but 'kitchen' in the"):
        check_classes(load(tmp_path, renamed, "val.json"), classes)


def test_classes_are_matched_by_name_where_only_the_ids_differ(tmp_path):
    classes = classes_of(load(tmp_path, document(), "train.json"))
    numbered_otherwise = document()
    numbered_otherwise["categories"] = [{"id": 1, "name": "bath"}, {"id": 2, "name": "kitchen"}]
    val = load(tmp_path, numbered_otherwise, "val.json")
    check_classes(val, classes)
    assert classes.by_name(val) and not classes.by_name(load(tmp_path, document(), "same.json"))
    assert classes.labels_of(val).tolist() == [1, 0] * 3

    ambiguous = document()
    ambiguous["categories"] = [
        {"id": 1, "name": "bath"}, {"id": 2, "name": "bath", "supercategory": "wet"}, {"id": 3, "name": "kitchen"}
    ]  # fmt: skip
    with pytest.raises(DataError, match="category 1 is named 'bath' here but 'kitchen'"):
        check_classes(load(tmp_path, ambiguous, "val.json"), classes)


def test_boxes_keep_the_order_of_the_file(tmp_path):
    content = document(count=2)
    content["annotations"] = [annotation(k, 1 + k % 2, 1, [1, 1, 1 + k / 100, 2]) for k in range(400)]
    annotations = load(tmp_path, content)
    widths = annotations.boxes_xyxy[:, 2] - annotations.boxes_xyxy[:, 0]
    assert annotations.offsets.tolist() == [0, 200, 400]
    np.testing.assert_allclose(widths, [1 + k / 100 for start in (0, 1) for k in range(start, 400, 2)])


def test_a_subset_keeps_each_image_with_its_boxes(tmp_path):
    content = document(count=4)
    del content["annotations"][0:2]  # the first image has none
    content["annotations"].reverse()
    whole = load(tmp_path, content)
    part = whole.subset([3, 0, 1])
    assert [image.id for image in part.images] == [4, 1, 2]
    assert np.diff(part.offsets).tolist() == [2, 0, 2]
    assert part.boxes_xyxy[0].tolist() == whole.boxes_xyxy[whole.offsets[3]].tolist()
    assert part.summary.boxes == 4 and part.summary.images_without_boxes == 1
    assert whole.subset([]).summary.images == 0
