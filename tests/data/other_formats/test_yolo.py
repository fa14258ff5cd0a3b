"""Datasets in the format of YOLO, as their programs write them, read as COCO documents."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dino_lightning.data.images import read_image
from dino_lightning.data.other_formats.yolo import find_yolo, read_yolo
from dino_lightning.errors import DataError

NAMES = ["room", "wall"]
BOX = "1 0.5 0.5 0.5 0.2"  # in an image of 40 x 20: 10, 8, 20, 4


def picture(path: Path, size: tuple[int, int] = (40, 20), **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path, **more)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def describe(root: Path, **content) -> Path:
    given = {"names": NAMES, "train": "images/train", **content}
    return put(root / "data.yaml", yaml.safe_dump({key: value for key, value in given.items() if value is not None}))


@pytest.fixture
def root(tmp_path):
    """A dataset of one image of 40 x 20 (width x height) with one label."""
    folder = tmp_path / "set"
    picture(folder / "images/train/a.png")
    put(folder / "labels/train/a.txt", BOX)
    describe(folder)
    return folder


def read(root, split="train"):
    return read_yolo(find_yolo(root)[split])


def names_of(document):
    return [entry["file_name"] for entry in document["images"]]


def label(root, text):
    put(root / "labels/train/a.txt", text)


# ---------------------------------------------------------------------- documents


def test_boxes_become_pixels_and_ids_count_from_1_and_classes_from_0(root):
    picture(root / "images/train/b/c.png", (100, 50))
    put(root / "labels/train/b/c.txt", "0 0.25 0.5 0.5 1\n1 0.5 0.5 0.1 0.1\n")
    document, notes = read(root)
    assert document["images"] == [
        {"id": 1, "file_name": "images/train/a.png", "width": 40, "height": 20},
        {"id": 2, "file_name": "images/train/b/c.png", "width": 100, "height": 50},
    ]
    assert document["categories"] == [
        {"id": 0, "name": "room", "supercategory": ""},
        {"id": 1, "name": "wall", "supercategory": ""},
    ]
    first, second, third = document["annotations"]
    assert first == {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 8, 20, 4], "area": 80, "iscrowd": 0}
    assert (second["id"], second["image_id"], second["category_id"], second["bbox"]) == (2, 2, 0, [0, 0, 50, 50])
    assert third["bbox"] == [45, 22.5, 10, 5]
    assert notes == ()


def test_shares_are_of_the_image_as_displayed(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name in ("a.png", "b.jpg", "c.tif"):
        picture(root / "images/train" / name, exif=exif)
        put(root / "labels/train" / f"{name[0]}.txt", "0 0.5 0.5 1 1")
    document, _ = read(root)
    assert [(entry["width"], entry["height"]) for entry in document["images"]] == [(20, 40)] * 3
    assert [entry["bbox"] for entry in document["annotations"]] == [[0, 0, 20, 40]] * 3


def test_exif_data_behind_the_pixels_of_a_png_counts_as_in_decoding(root):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    Image.new("RGB", (40, 20)).save(file, "PNG")
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    content = file.getvalue()
    path = root / "images/train/a.png"
    path.write_bytes(content[:-12] + chunk + content[-12:])
    entry = read(root)[0]["images"][0]
    assert (entry["height"], entry["width"]) == tuple(read_image(path).shape[1:]) == (40, 20)


@pytest.mark.parametrize("points", ["0.1 0.2 0.6 0.2 0.3 0.8", "0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8"])
def test_outlines_and_four_corners_become_boxes_and_are_kept(root, points):
    label(root, f"0 {points}\n{BOX}")
    document, notes = read(root)
    outline, box = document["annotations"]
    assert outline["bbox"] == [4, 4, 20, 12] and outline["area"] == 240
    assert outline["segmentation"][0][:4] == [4, 4, 24, 4]
    assert box["bbox"] == [10, 8, 20, 4] and "segmentation" not in box
    (note,) = notes
    assert "1 outline (more than five numbers a line) is read as the box around it." in note


def test_keypoints_are_ignored_where_the_yaml_has_their_shape(root):
    describe(root, kpt_shape=[2, 3])
    label(root, BOX + " 0.1 0.1 2 300 0.2 1")
    document, notes = read(root)
    assert [entry["bbox"] for entry in document["annotations"]] == [[10, 8, 20, 4]]
    assert "The keypoints of 1 box are ignored." in notes[0]


def test_a_confidence_is_ignored(root):
    label(root, BOX + " 0.93")
    document, notes = read(root)
    assert document["annotations"][0]["bbox"] == [10, 8, 20, 4]
    assert "The sixth number of 1 line, a confidence, is ignored." in notes[0]


def test_a_class_may_be_written_as_a_decimal_and_lines_with_windows_ends(root):
    put(root / "labels/train/a.txt", "\ufeff0.0 0.5 0.5 1 1\r\n\r\n1.0\t0.5 0.5 1 1\r\n")
    assert [entry["category_id"] for entry in read(root)[0]["annotations"]] == [0, 1]


def test_repeated_lines_count_once(root):
    label(root, f"{BOX}\n1 0.50 0.5 0.5 0.2\n0 0.5 0.5 0.5 0.2\n{BOX}\n")
    document, notes = read(root)
    assert [entry["category_id"] for entry in document["annotations"]] == [1, 0]
    assert "2 lines repeat another one of their file and are left out." in notes[0]


def test_images_without_labels_have_no_objects_and_labels_without_images_are_counted(root):
    for name in "bcd":
        picture(root / f"images/train/{name}.png")
    put(root / "labels/train/b.txt", "")
    put(root / "labels/train/x.txt", BOX)
    put(root / "labels/train/classes.txt", "room")
    document, notes = read(root)
    assert len(document["images"]) == 4 and len(document["annotations"]) == 1
    assert any("2 images have no label file and count as images without objects: the first being" in n for n in notes)
    assert any("1 label file belongs to no image: 'labels/train/x.txt'." in note for note in notes)
    assert len(notes) == 2


# ---------------------------------------------------------------------- the yaml


@pytest.mark.parametrize("names", [{0: "room", 1: "wall"}, {1: "wall", 0: "room"}, ["room", "wall"]])
def test_names_are_a_list_or_numbered(root, names):
    describe(root, names=names, nc=2)
    assert [(entry["id"], entry["name"]) for entry in read(root)[0]["categories"]] == [(0, "room"), (1, "wall")]


@pytest.mark.parametrize("key", ["val", "valid", "validation"])
def test_the_validation_split_has_any_of_its_names(root, key):
    picture(root / "images/other/b.png")
    describe(root, **{key: "images/other", "test": None})
    assert list(find_yolo(root)) == ["train", "val"]
    assert names_of(read(root, "val")[0]) == ["images/other/b.png"]


@pytest.mark.parametrize("name", ["data.yaml", "dataset.yaml", "rooms.yml"])
def test_the_yaml_may_have_another_name(root, name):
    (root / "data.yaml").rename(root / name)
    files = find_yolo(root)["train"]
    assert (files.annotations, files.images, files.part) == (root / name, root, "train")


def test_two_descriptions_are_one_too_many(root):
    (root / "data.yaml").rename(root / "a.yaml")
    put(root / "b.yaml", (root / "a.yaml").read_text())
    put(root / "other.yaml", "names: [x")
    (root / "gone.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(DataError, match=r"b.yaml: describes a YOLO dataset, as does a.yaml"):
        find_yolo(root)


@pytest.mark.parametrize(
    "train",
    [
        "../images/train",  # Roboflow
        "./images/train",
        "/home/somebody/set/images/train",
        "C:\\data\\set\\images\\train",
        ["images/train"],
        "train.txt",
        "/home/somebody/set/train.txt",
    ],
)
def test_a_split_may_be_named_in_many_ways(root, train):
    put(root / "train.txt", "./images/train/a.png\n")
    describe(root, train=train)
    document, _ = read(root)
    assert names_of(document) == ["images/train/a.png"] and len(document["annotations"]) == 1


def test_a_path_that_names_this_folder_or_one_in_it_is_followed(tmp_path):
    picture(tmp_path / "inner/images/train/a.png")
    put(tmp_path / "inner/labels/train/a.txt", BOX)
    for path in ("inner", "./inner", str(tmp_path / "inner")):
        describe(tmp_path, path=path)
        document, _ = read(tmp_path)
        assert names_of(document) == ["inner/images/train/a.png"] and len(document["annotations"]) == 1


@pytest.mark.parametrize("path", [".", "/home/somebody/set", "../datasets/set", "D:\\set"])
def test_a_path_of_another_machine_stands_for_this_folder(root, path):
    describe(root, path=path)
    assert names_of(read(root)[0]) == ["images/train/a.png"]


def test_several_folders_make_one_split_in_the_order_of_the_paths(root):
    picture(root / "extra/images/z.png")
    put(root / "extra/labels/z.txt", BOX)
    describe(root, train=["images/train", "extra/images", "images/train"])
    document, _ = read(root)
    assert names_of(document) == ["extra/images/z.png", "images/train/a.png"] and len(document["annotations"]) == 2


@pytest.mark.parametrize(
    "line", ["./images/train/a.png", "images/train/a.png", "/x/y/images/train/a.png", "data/a.png"]
)
def test_lists_name_images_from_the_root_or_their_own_folder_or_another_machine(root, line):
    picture(root / "lists/data/a.png")
    put(root / "lists/data/a.txt", BOX)
    put(root / "lists/train.txt", f"\n{line}\n")
    put(root / "labels/train/other.txt", BOX)  # of another split's image, perhaps
    describe(root, train="lists/train.txt")
    document, notes = read(root)
    assert names_of(document) == ["lists/data/a.png" if line == "data/a.png" else "images/train/a.png"]
    assert len(document["annotations"]) == 1 and notes == ()


def test_only_the_last_images_folder_has_labels_beside_it(tmp_path):
    picture(tmp_path / "images/set/images/a.png")
    put(tmp_path / "images/set/labels/a.txt", BOX)
    describe(tmp_path, train="images/set/images")
    assert len(read(tmp_path)[0]["annotations"]) == 1


def test_labels_lie_beside_images_where_there_is_no_images_folder(tmp_path):
    picture(tmp_path / "train/a.b.png")
    put(tmp_path / "train/a.b.txt", BOX)
    describe(tmp_path, train="train")
    assert len(read(tmp_path)[0]["annotations"]) == 1


def test_a_test_split_that_is_absent_is_left_out_and_said(root):
    describe(root, test="../test/images")
    assert list(find_yolo(root)) == ["train"]
    assert "The test split is left out, for there is no '../test/images'." in read(root)[1][0]


def test_validation_on_the_training_images_is_said(root):
    describe(root, val="images/train")
    assert read(root)[1] == ()
    assert "The validation images are those of training" in read(root, "val")[1][0]


# ---------------------------------------------------------------------- without a yaml


def test_label_studio_has_a_list_of_classes_and_two_folders(tmp_path):
    picture(tmp_path / "images/a.png")
    put(tmp_path / "labels/a.txt", BOX)
    put(tmp_path / "notes.json", "{}")
    put(tmp_path / "classes.txt", "room\nwall\n")
    assert list(find_yolo(tmp_path)) == ["train"]
    document, _ = read(tmp_path)
    assert names_of(document) == ["images/a.png"] and document["annotations"][0]["bbox"] == [10, 8, 20, 4]
    assert [entry["name"] for entry in document["categories"]] == NAMES


@pytest.mark.parametrize("names", ["classes.txt", "obj.names", "labels/classes.txt", "labels/train/classes.txt"])
def test_split_folders_with_a_list_of_classes(tmp_path, names):
    for split, name in (("train", "a"), ("valid", "b")):
        picture(tmp_path / f"images/{split}/{name}.png")
        put(tmp_path / f"labels/{split}/{name}.txt", BOX)
        put(tmp_path / names.replace("train", split), "room\nwall")
    assert list(find_yolo(tmp_path)) == ["train", "val"]
    document, notes = read(tmp_path, "val")
    assert names_of(document) == ["images/valid/b.png"] and len(document["annotations"]) == 1 and notes == ()


def test_darknet_as_roboflow_writes_it(tmp_path):
    for split in ("train", "valid", "test"):
        picture(tmp_path / split / "a.jpg")
        put(tmp_path / split / "a.txt", BOX)
        put(tmp_path / split / "_darknet.labels", "room\nwall")
    found = find_yolo(tmp_path)
    assert list(found) == ["train", "val", "test"]
    assert found["val"].annotations == tmp_path / "valid/_darknet.labels" and found["val"].images == tmp_path
    document, notes = read(tmp_path, "val")
    assert names_of(document) == ["valid/a.jpg"] and len(document["annotations"]) == 1 and notes == ()


def test_darknet_as_cvat_writes_it(tmp_path):
    picture(tmp_path / "obj_train_data/a.jpg")
    put(tmp_path / "obj_train_data/a.txt", BOX)
    put(tmp_path / "obj.names", "room\nwall\n")
    put(tmp_path / "train.txt", "data/obj_train_data/a.jpg")
    assert names_of(read(tmp_path)[0]) == ["obj_train_data/a.jpg"]


def test_everything_in_one_folder(tmp_path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    put(tmp_path / "a.txt", BOX)
    put(tmp_path / "README.txt", "text")
    put(tmp_path / "classes.txt", "room\nwall\n")
    document, notes = read(tmp_path)
    assert names_of(document) == ["a.jpg", "b.jpg"] and len(document["annotations"]) == 1
    assert len(notes) == 1 and "1 image has no label file" in notes[0]


@pytest.mark.parametrize("files", [[], ["classes.txt"], ["images/a.png"], ["config.yaml"], ["data.yaml"]])
def test_other_folders_are_none(tmp_path, files):
    for name in files:
        picture(tmp_path / name) if name.endswith("png") else put(tmp_path / name, "trainer:\n  devices: 1\n")
    assert find_yolo(tmp_path) == {}
    assert find_yolo(tmp_path / "nowhere") == {}


# ---------------------------------------------------------------------- faults


def sentence(root, split="train"):
    with pytest.raises(DataError) as caught:
        read(root, split)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", ")")) and str(root) in text
    return text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 1 1", "line 2 has class 2, but there are 2 names, for the classes 0 to 1"),
        ("-1 0.5 0.5 1 1", "line 2 has class -1,"),
        ("0.5 0.5 0.5 1 1", "line 2 has class 0.5,"),
        ("nan 0.5 0.5 1 1", "line 2 has class nan,"),
        ("0 0.5 0.5 1", "line 2 has 4 numbers; it must have five"),
        ("0,0.5,0.5,1,1", "line 2 is '0,0.5,0.5,1,1'; it must be five numbers with spaces"),
        ("room 0.5 0.5 1 1", "line 2 is 'room 0.5 0.5 1 1'; it must be five numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "line 2 has 8 numbers; a box has five"),
        ("0 320 0.5 1 1", "line 2 has 320, which is no share of the image (0 to 1). Where these are pixels"),
        ("0 0.5 0.5 1 1.02", "line 2 has 1.02, which is no share"),
        ("0 0.5 nan 1 1", "line 2 has nan, which is no share"),
        ("0 0.5 0.5 -0.2 1", "line 2 has -0.2, which is no share"),
    ],
)
def test_a_faulty_line_is_named(root, line, said):
    label(root, f"{BOX}\n{line}\n")
    assert f"labels/train/a.txt: {said}" in sentence(root)


def test_rounding_beyond_the_border_is_taken(root):
    label(root, "0 0.5 0.5 1.000001 1.005")
    assert read(root)[0]["annotations"][0]["bbox"] == pytest.approx([0, -0.05, 40, 20.1], abs=1e-4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"names": None}, "data.yaml: has no names. List the names"),
        ({"names": []}, "data.yaml: has no names."),
        ({"names": {1: "room", 2: "wall"}}, "names must number its 2 classes from 0 on, without gaps."),
        ({"names": ["room", False]}, "the name of class 1 is False. Put a name there, in quotes."),
        ({"names": ["room", ["x"]]}, "the name of class 1 is a list."),
        ({"nc": 3}, "nc is 3, but names has 2 classes."),
        ({"train": 3}, "train is 3; it must name a folder"),
        ({"train": [["images/train"]]}, "train is a list; it must name a folder"),
        ({"path": 3}, "path is 3; it must be the name of a folder."),
        ({"train": "images/none"}, "train names 'images/none', which is not in"),
        ({"train": "/other/images"}, "train names '/other/images', which is not in"),
    ],
)
def test_a_faulty_yaml_is_named(root, content, said):
    describe(root, **content)
    assert said in sentence(root)


def test_a_validation_folder_that_is_absent_is_refused(root):
    describe(root, val="images/none")
    assert "val names 'images/none', which is not in" in sentence(root, "val")


@pytest.mark.parametrize(
    "text", ["names: [a\ntrain: x: y", "a: !!python/object/apply:os.getcwd []", "\x00", "[" * 9999]
)
def test_a_yaml_that_is_none_is_one_sentence(root, text):
    put(root / "data.yaml", text)
    assert "data.yaml: is no valid yaml" in sentence(root)


def test_a_yaml_of_another_encoding_is_one_sentence(root):
    (root / "data.yaml").write_bytes(b"names: [K\xfcche]\ntrain: images/train")
    assert "data.yaml: is no text in UTF-8" in sentence(root)


def test_listed_images_that_are_absent_are_counted(root):
    put(root / "train.txt", "./images/train/a.png\nimages/train/b.png\nnowhere/c.png\n")
    describe(root, train="train.txt")
    assert "train.txt: 2 of 3 images listed are not in" in sentence(root)


def test_an_image_that_is_none_is_named(root):
    for name in "bc":
        put(root / f"images/train/{name}.png", "text")
    assert "images/train/b.png: is no image that can be read" in sentence(root) and "1 more image" in sentence(root)


def test_training_images_without_a_single_label_file_are_refused(root):
    (root / "labels/train/a.txt").rename(root / "labels/a.txt")
    assert "labels/train: has no label file for any of the 1 training images." in sentence(root)


def test_an_empty_folder_and_an_empty_line_of_a_list_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    describe(tmp_path, train="images")
    assert "there are no images for train" in sentence(tmp_path)
    (tmp_path / "data.yaml").unlink()
    picture(tmp_path / "images/a.png")
    put(tmp_path / "labels/a.txt", BOX)
    put(tmp_path / "classes.txt", "room\n\nwall\n")
    assert "classes.txt: line 2 is empty." in sentence(tmp_path)


@pytest.mark.parametrize("entry", ["../outside", "../outside/list.txt", "{outside}", "images/../../outside"])
def test_nothing_outside_is_named(root, entry):
    outside = root.parent / "outside"
    picture(outside / "a.png")
    put(outside / "list.txt", str(outside / "a.png"))
    describe(root, train=entry.format(outside=outside))
    assert "outside of which nothing is read" in sentence(root)


def test_a_list_leads_to_nothing_outside(root):
    picture(root.parent / "outside/b.png")
    put(root / "train.txt", f"../outside/b.png\n{root.parent}/outside/b.png")
    describe(root, train="train.txt")
    assert "2 of 2 images listed are not in" in sentence(root)


@pytest.mark.parametrize("place", ["images/train/b.png", "labels/train/b.txt", "images/train", "labels", "data.yaml"])
def test_links_lead_to_nothing_outside(root, place):
    outside = root.parent / "outside"
    picture(root / "images/train/b.png")
    put(root / "labels/train/b.txt", BOX)
    outside.mkdir()
    (root / place).rename(outside / "moved")
    (root / place).symlink_to(outside / "moved")
    text = sentence(root)
    assert f"{place}: leads out of the dataset's folder" in text or f"{place}/train: leads out" in text


def test_links_inside_are_followed(root):
    picture(root / "store/b.png", (60, 20))
    put(root / "store/b.txt", "0 0.5 0.5 1 1")
    (root / "images/train/b.png").symlink_to(root / "store/b.png")
    (root / "labels/train/b.txt").symlink_to("../../store/b.txt")
    document, _ = read(root)
    assert document["images"][1]["width"] == 60 and document["annotations"][1]["bbox"] == [0, 0, 60, 20]


def test_a_file_too_large_for_what_it_is_is_refused(root):
    put(root / "data.yaml", "names: [room]\ntrain: images/train\n#" + 1_000_000 * "x")
    assert "data.yaml: has more than 1,000,000 bytes" in sentence(root)


def test_aliases_without_end_are_one_sentence(root):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 30)]
    put(root / "data.yaml", "\n".join([*lines, "train: images/train", "names: *a29"]))
    assert "the name of class 0 is a list. Put a name there" in sentence(root)


def test_notes_of_macos_are_no_images_and_a_list_counts_an_image_once(root):
    put(root / "images/train/._a.png", "notes")
    assert names_of(read(root)[0]) == ["images/train/a.png"]
    put(root / "train.txt", "images/train/a.png\n./images/train/a.png\n")
    describe(root, train="train.txt")
    assert names_of(read(root)[0]) == ["images/train/a.png"]


def test_a_path_outside_is_not_followed_even_if_it_exists(root):
    picture(root.parent / "outside/images/train/b.png")
    describe(root, path="../outside")
    assert names_of(read(root)[0]) == ["images/train/a.png"]
