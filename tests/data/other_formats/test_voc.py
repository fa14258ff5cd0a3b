"""Datasets in the format of Pascal VOC, as their programs write them, read as COCO documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dino_lightning.data.other_formats.voc import find_voc, read_voc
from dino_lightning.errors import DataError

FROM_1, FROM_0 = "Corners are taken as counted from 1", "A corner at 0 or less occurs"


def picture(path: Path, size: tuple[int, int] = (40, 20), **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path, **more)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def thing(name="room", corners=(11, 9, 30, 12), more="", box="bndbox"):
    values = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
    )
    return f"<object><name>{name}</name>{more}<{box}>{values}</{box}></object>"


def describe(path: Path, *things: str, filename=None, size=(40, 20)) -> Path:
    filename = f"{path.stem}.png" if filename is None else filename
    wide, high = size
    sides = f"<size><width>{wide}</width><height>{high}</height><depth>3</depth></size>"
    text = f"<annotation><filename>{filename}</filename>{sides}{''.join(things)}</annotation>"
    return put(path, f'<?xml version="1.0"?>\n{text}\n')


@pytest.fixture
def root(tmp_path):
    """Two images in the folders of Pascal VOC, without lists."""
    folder = tmp_path / "set"
    for name, kind in (("a", "wall"), ("b", "room")):
        picture(folder / f"JPEGImages/{name}.png")
        describe(folder / f"Annotations/{name}.xml", thing(kind))
    return folder


def read(root, split="train"):
    return read_voc(find_voc(root)[split])


def names_of(document):
    return [entry["file_name"] for entry in document["images"]]


def boxes_of(document):
    return [entry["bbox"] for entry in document["annotations"]]


def sentence(root, split="train"):
    with pytest.raises(DataError) as caught:
        read(root, split)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", ")")) and str(root) in text
    return text


# ---------------------------------------------------------------------- documents


def test_images_boxes_and_categories_have_ids_in_the_order_of_their_names(root):
    document, notes = read(root)
    assert document["images"] == [
        {"id": 1, "file_name": "JPEGImages/a.png", "width": 40, "height": 20},
        {"id": 2, "file_name": "JPEGImages/b.png", "width": 40, "height": 20},
    ]
    assert document["categories"] == [
        {"id": 1, "name": "room", "supercategory": ""},
        {"id": 2, "name": "wall", "supercategory": ""},
    ]
    assert document["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 8, 20, 4], "area": 80, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [10, 8, 20, 4], "area": 80, "iscrowd": 0},
    ]
    (note,) = notes
    assert note.startswith(FROM_1)


@pytest.mark.parametrize("corners", [(0, 9, 30, 12), (11, 0, 30, 12)])
def test_a_corner_at_0_in_any_split_says_that_all_are_counted_from_0(root, corners):
    describe(root / "Annotations/b.xml", thing("room", corners))
    put(root / "ImageSets/Main/train.txt", "a")
    put(root / "ImageSets/Main/val.txt", "b")
    document, notes = read(root)
    assert boxes_of(document) == [[11, 9, 19, 3]]
    assert len(notes) == 1 and FROM_0 in notes[0]


def test_a_label_map_says_that_corners_are_counted_from_0(root):
    describe(root / "Annotations/a.xml", thing("room", (11, 9, 30, 12)))
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nroom:::\n")
    document, notes = read(root)
    assert boxes_of(document)[0] == [11, 9, 19, 3]
    assert notes[0].startswith("There is a labelmap.txt, as CVAT and Datumaro write it")


def test_the_first_and_the_last_pixel_make_a_whole_image(root):
    describe(root / "Annotations/a.xml", thing("room", (1, 1, 40, 20)), thing("room", (5, 5, 5, 5)))
    assert boxes_of(read(root)[0])[:2] == [[0, 0, 40, 20], [4, 4, 1, 1]]


def test_corners_may_be_decimals_in_any_order(root):
    box = "<bndbox><ymax>12.5</ymax><xmax> 30.0 </xmax><ymin>9.25</ymin><xmin>1.1e1</xmin></bndbox>"
    describe(root / "Annotations/a.xml", f"<object><name> wall </name>{box}</object>")
    assert boxes_of(read(root)[0])[0] == [10, 8.25, 20, 4.25]


def test_difficult_objects_are_crowd_regions_and_counted(root):
    more = "<difficult>1</difficult><part><name>hand</name><bndbox><xmin>0</xmin></bndbox></part>"
    describe(root / "Annotations/a.xml", thing("wall", more=more), thing("wall", more="<difficult>0</difficult>"))
    document, notes = read(root)
    assert [entry["iscrowd"] for entry in document["annotations"]] == [1, 0, 0]
    assert [entry["name"] for entry in document["categories"]] == ["room", "wall"]  # parts are no objects
    assert FROM_1 in notes[0] and "1 difficult object is read as a crowd region" in notes[1]


@pytest.mark.parametrize("size", [(0, 0), ("", ""), (40, 0), ("?", 20)])
def test_an_absent_size_is_that_of_the_image_as_displayed(root, size):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(root / "JPEGImages/a.png", exif=exif)
    describe(root / "Annotations/a.xml", thing(), size=size)
    document, notes = read(root)
    assert [(entry["width"], entry["height"]) for entry in document["images"]] == [(20, 40), (40, 20)]
    assert "1 XML file says no size; that of the image is taken." in notes[0]


def test_the_image_is_that_of_filename_even_if_the_xml_has_another_name(root):
    (root / "Annotations/a.xml").rename(root / "Annotations/0001.xml")
    document, notes = read(root)
    assert names_of(document) == ["JPEGImages/a.png", "JPEGImages/b.png"] and len(notes) == 1


@pytest.mark.parametrize("filename", ["", "old.jpg", "b.png", "C:\\plans\\old.png"])
def test_the_name_of_the_xml_helps_where_filename_is_wrong(root, filename):
    describe(root / "Annotations/a.xml", thing("wall"), filename=filename)
    document, notes = read(root)
    assert names_of(document) == ["JPEGImages/a.png", "JPEGImages/b.png"]
    assert [entry["category_id"] for entry in document["annotations"]] == [2, 1]
    assert "1 XML file does not name its image in filename" in notes[0] and "'Annotations/a.xml'" in notes[0]


def test_a_filename_with_folders_is_right(root):
    describe(root / "Annotations/a.xml", thing("wall"), filename="C:\\plans\\a.png")
    assert len(read(root)[1]) == 1


def test_images_without_xml_are_left_out_and_counted(root):
    picture(root / "JPEGImages/c.png")
    document, notes = read(root)
    assert len(document["images"]) == 2
    assert "1 image has no XML file and is left out: 'JPEGImages/c.png'." in notes[0]


def test_an_image_without_objects_is_kept(root):
    describe(root / "Annotations/a.xml")
    document, _ = read(root)
    assert len(document["images"]) == 2 and len(document["annotations"]) == 1


# ---------------------------------------------------------------------- layouts


def test_lists_make_the_splits_and_categories_are_those_of_all(root):
    put(root / "ImageSets/Main/train.txt", "a\n")
    put(root / "ImageSets/Main/val.txt", "\nb\n")
    put(root / "ImageSets/Main/trainval.txt", "a\nb\n")
    put(root / "ImageSets/Main/wall_train.txt", "a 1\n")
    found = find_voc(root)
    assert list(found) == ["train", "val"] and found["train"].annotations == root / "ImageSets/Main/train.txt"
    train, val = read(root)[0], read(root, "val")[0]
    assert (names_of(train), names_of(val)) == (["JPEGImages/a.png"], ["JPEGImages/b.png"])
    assert train["categories"] == val["categories"] and len(train["categories"]) == 2


def test_trainval_is_for_training_where_there_is_no_train(root):
    put(root / "ImageSets/Main/trainval.txt", "b\na\n")
    put(root / "ImageSets/Main/test.txt", "a")
    assert list(find_voc(root)) == ["train", "test"]
    assert names_of(read(root)[0]) == ["JPEGImages/a.png", "JPEGImages/b.png"]


def test_trainval_beside_val_is_for_training_without_it(root):
    put(root / "ImageSets/Main/trainval.txt", "a\nb\n")
    put(root / "ImageSets/Main/val.txt", "b")
    document, notes = read(root)
    assert names_of(document) == ["JPEGImages/a.png"]
    assert "1 image that ImageSets/Main/val.txt lists too is left out." in notes[0]


@pytest.mark.parametrize("line", ["a", "a  1", "a -1", "a.png", "a.xml"])
def test_a_line_of_a_list_may_have_more_than_the_name(root, line):
    put(root / "ImageSets/Main/train.txt", line)
    assert names_of(read(root)[0]) == ["JPEGImages/a.png"]


def test_a_name_with_spaces_is_one_name(root):
    picture(root / "JPEGImages/plan 1.png")
    describe(root / "Annotations/plan 1.xml", thing())
    put(root / "ImageSets/Main/train.txt", "plan 1")
    assert names_of(read(root)[0]) == ["JPEGImages/plan 1.png"]


@pytest.mark.parametrize(
    "folders", [("Annotations", "images"), ("annotations", "images"), ("Annotations", "Annotations")]
)
def test_images_may_lie_in_other_folders(tmp_path, folders):
    picture(tmp_path / folders[1] / "a.jpg")
    describe(tmp_path / folders[0] / "a.xml", thing(), filename="a.jpg")
    assert names_of(read(tmp_path)[0]) == [f"{folders[1]}/a.jpg"]


@pytest.mark.parametrize("inner", [("", ""), ("Annotations/", "JPEGImages/"), ("annotations/", "images/")])
def test_folders_for_each_split(tmp_path, inner):
    for split, kind in (("train", "wall"), ("valid", "room"), ("test", "door")):
        picture(tmp_path / f"{split}/{inner[1]}a.png")
        describe(tmp_path / f"{split}/{inner[0]}a.xml", thing(kind))
    assert list(find_voc(tmp_path)) == ["train", "val", "test"]
    document, notes = read(tmp_path, "val")
    assert names_of(document) == [f"valid/{inner[1]}a.png"] and len(notes) == 1
    assert [entry["name"] for entry in document["categories"]] == ["door", "room", "wall"]
    assert document["annotations"][0]["category_id"] == 2


def test_xml_beside_images_in_the_root(tmp_path):
    picture(tmp_path / "a.png")
    describe(tmp_path / "a.xml", thing())
    assert find_voc(tmp_path)["train"].annotations == tmp_path
    assert names_of(read(tmp_path)[0]) == ["a.png"]


@pytest.mark.parametrize("name", ["annotations.xml", "train/x.xml", "Annotations/x.xml"])
def test_other_folders_are_none(tmp_path, name):
    put(tmp_path / name, "<annotations><image/></annotations>")  # CVAT's own format
    assert find_voc(tmp_path) == {}
    assert find_voc(tmp_path / "nowhere") == {}


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (thing(name=" "), "object 2 has no name."),
        ("<object><name>x</name></object>", "object 2 has no bndbox."),
        (thing(box="robndbox"), "object 2 has a rotated box (robndbox), which is not understood."),
        (thing(corners=(1, 2, 3)), "object 2 has no ymax; it must be a number"),
        (thing(corners=(1, 2, "wide", 4)), "object 2 has 'wide' as xmax; it must be a number"),
        (thing(corners=(1, "nan", 3, 4)), "object 2 has 'nan' as ymin; it must be a number"),
        (thing(corners=(30, 2, 3, 4)), "object 2 has xmax below xmin. Exchange them"),
        (thing(corners=(3, 20, 30, 4)), "object 2 has ymax below ymin. Exchange them"),
    ],
)
def test_a_faulty_object_is_named(root, second, said):
    describe(root / "Annotations/b.xml", thing(), second)
    assert f"Annotations/b.xml: {said}" in sentence(root)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation>\n<object>\n</annotation>", "is no valid XML (line 3: "),
        ("", "is no valid XML (line 1: "),
        ("<annotations/>", "is no Pascal VOC file, for it begins with 'annotations'."),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "has a document type (DOCTYPE or ENTITY)"),
        ('<!doctype a SYSTEM "http://x"><annotation/>', "has a document type"),
        ('<?xml version="1.0" encoding="nobody"?><annotation/>', "is no valid XML ("),
    ],
)
def test_a_faulty_file_is_named(root, text, said):
    put(root / "Annotations/b.xml", text)
    assert f"Annotations/b.xml: {said}" in sentence(root)


def test_a_document_type_hides_in_no_other_encoding(root):
    (root / "Annotations/b.xml").write_bytes('<!DOCTYPE a [<!ENTITY x "y">]><annotation/>'.encode("utf-16"))
    assert "b.xml: is no XML in UTF-8." in sentence(root)


def test_an_image_that_does_not_exist_is_named(root):
    for name in "cd":
        describe(root / f"Annotations/{name}.xml", filename="plan.png")
    text = sentence(root)
    assert "Annotations/c.xml: its image 'plan.png' does not exist, nor one with the name" in text
    assert "And 1 more such files." in text


def test_two_files_of_one_image_are_refused(root):
    describe(root / "Annotations/c.xml", filename="a.png")
    assert "Annotations/c.xml: describes JPEGImages/a.png, as Annotations/a.xml does." in sentence(root)


def test_a_list_of_images_without_xml_and_an_empty_one_are_refused(root):
    put(root / "ImageSets/Main/train.txt", "a\nx\ny\n")
    assert "train.txt: 2 of 3 images listed have no XML file, the first being 'x'." in sentence(root)
    put(root / "ImageSets/Main/train.txt", "\n")
    assert "train.txt: names no images." in sentence(root)


def test_files_without_a_single_object_are_refused(root):
    for name in "ab":
        describe(root / f"Annotations/{name}.xml")
    assert "not one of its 2 XML files has an object" in sentence(root)


@pytest.mark.parametrize("place", ["Annotations/b.xml", "JPEGImages/b.png", "JPEGImages", "ImageSets/Main/train.txt"])
def test_links_lead_to_nothing_outside(root, place):
    put(root / "ImageSets/Main/train.txt", "a\nb")
    outside = root.parent / "outside"
    (root / place).rename(outside)
    (root / place).symlink_to(outside)
    assert f"{place}: leads out of the dataset's folder" in sentence(root)


def test_of_two_images_with_a_name_that_in_the_usual_folder_is_taken(root):
    picture(root / "images/a.png")
    picture(root / "Annotations/b.png")
    assert names_of(read(root)[0]) == ["JPEGImages/a.png", "JPEGImages/b.png"]
