"""Datasets in the format of YOLO, read as COCO documents."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dino_lightning.data.image_files import available_cores
from dino_lightning.data.other_formats.image_folder import counted, displayed_sizes, first_of, names_in, read_text
from dino_lightning.data.other_formats.yolo_labels import LabelledBox, parse_labels
from dino_lightning.data.other_formats.yolo_layout import (
    Description,
    find_description,
    find_named,
    images_of_entry,
    images_of_named,
    label_folder,
    names_of_list,
    place_of,
    read_description,
)
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.errors import DataError

DECIMALS = 4  # of a pixel; label files have six of an image
NO_LABELS = ("classes", "train", "val", "valid", "test", "readme")  # text files that lie beside labels


def find_yolo(root: Path) -> dict[str, SplitFiles]:
    """Find the splits of a YOLO dataset: those its yaml names, or by its folders where it has a list of classes.

    A test split that is named but absent is left out: Roboflow names one in every yaml.

    Args:
        root: the dataset folder.

    Returns:
        The splits found, by name: "train", "val", "test"; empty if the folder is no YOLO dataset. The file names of
        `read_yolo` are relative to `root`.

    Raises:
        DataError: the yaml cannot be read, or lacks what it needs.
    """
    root = Path(root)
    if not root.is_dir():
        return {}
    path = find_description(root)
    if path is None:
        return {split: SplitFiles(root / names, root, split) for split, (names, _) in find_named(root).items()}
    description = read_description(path)
    absent = _absent_test(root, description)
    return {split: SplitFiles(path, root, split) for split in description.parts if not (split == "test" and absent)}


def read_yolo(files: SplitFiles) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read one split of a YOLO dataset as a COCO document.

    Args:
        files: the split, as `find_yolo` gives it.

    Returns:
        The document: images with ids 1..N in the order of their paths, annotations with ids 1..M and boxes
        x, y, width, height in pixels of the image as displayed, and the categories 0..K-1. And sentences about what
        was left out or read as something else.

    Raises:
        DataError: something is wrong with the files; names the file and the line, and says what to do.
    """
    part = files.part or "train"
    notes: list[str] = []
    if files.annotations.suffix in (".yaml", ".yml"):
        root = files.annotations.parent
        description = read_description(files.annotations)
        names, keypoints = description.names, description.keypoints
        images, whole = _images_of_part(files.annotations, description, part)
        notes += _notes_on_parts(root, description, part)
    else:
        root, names, keypoints, whole = files.images, names_of_list(files.annotations), False, True
        found = find_named(root)
        if part not in found:
            raise DataError(f"{root}: has no images with labels for {part}. Put them into images/{part}.")
        images = images_of_named(root, found[part][1])
    if not images:
        raise DataError(f"{files.annotations}: there are no images for {part}. Put them into the folder it names.")

    labels, more = _label_files(root, images, count_others=whole)
    notes += more
    if part == "train" and not any(labels):
        raise DataError(
            f"{root / label_folder(root, posixpath.dirname(images[0]))}: has no label file for any of the "
            f"{len(images)} training images. Put a .txt file for each image there."
        )
    sizes = displayed_sizes([root / name for name in images], f"{part} images")
    texts = _read_all([None if label is None else root / label for label in labels])
    counts: Counter[str] = Counter()
    annotations: list[dict[str, Any]] = []
    for image_id, (label, text, size) in enumerate(zip(labels, texts, sizes, strict=True), 1):
        if label is not None:
            for box in parse_labels(text, root / label, names, keypoints=keypoints, counts=counts):
                annotations.append(_annotation(len(annotations) + 1, image_id, box, size))
    document = {
        "images": [
            {"id": image_id, "file_name": name, "width": size[1], "height": size[0]}
            for image_id, (name, size) in enumerate(zip(_names_from(files, root, images), sizes, strict=True), 1)
        ],
        "annotations": annotations,
        "categories": [{"id": label, "name": name, "supercategory": ""} for label, name in enumerate(names)],
    }
    notes += _notes_on_labels(counts)
    return document, tuple(notes)


def _images_of_part(path: Path, description: Description, part: str) -> tuple[list[str], bool]:
    """The images of a split, sorted, and whether they are all images of their folders."""
    if part not in description.parts:
        raise DataError(f"{path}: names no {part} images. Add a line {part}: with their folder.")
    images: set[str] = set()
    whole = True
    for entry in description.parts[part]:
        found = images_of_entry(path.parent, description.base, entry)
        if found is None:
            raise DataError(
                f"{path}: {part} names {entry!r}, which is not in {path.parent}, outside of which nothing is read. "
                "Put the images there, or correct the path."
            )
        images.update(found[0])
        whole = whole and found[1]
    return sorted(images), whole


def _absent_test(root: Path, description: Description) -> list[str]:
    entries = description.parts.get("test", ())
    return [entry for entry in entries if place_of(root, description.base, entry) is None]


def _notes_on_parts(root: Path, description: Description, part: str) -> list[str]:
    notes = []
    if part == "train" and (absent := _absent_test(root, description)):
        notes.append(f"The test split is left out, for there is no {absent[0]!r}.")
    if part == "val" and description.parts["val"] == description.parts.get("train"):
        notes.append("The validation images are those of training, so evaluation says nothing about other images.")
    return notes


def _label_files(root: Path, images: Sequence[str], *, count_others: bool) -> tuple[list[str | None], list[str]]:
    """The label file of each image or None, and notes; `count_others`: label files without an image are counted."""
    places: dict[str, str] = {}
    present: dict[str, set[str]] = {}
    wanted: set[str] = set()
    labels: list[str | None] = []
    for image in images:
        folder, name = posixpath.split(image)
        if folder not in places:
            places[folder] = label_folder(root, folder)
            present[places[folder]] = names_in(root / places[folder], root)
        label = posixpath.splitext(name)[0] + ".txt"
        place = posixpath.join(places[folder], label)
        wanted.add(place)
        labels.append(place if label in present[places[folder]] else None)
    notes = []
    if without := [image for image, label in zip(images, labels, strict=True) if label is None]:
        what = (
            "has no label file and counts as an image"
            if len(without) == 1
            else "have no label file and count as images"
        )
        notes.append(f"{counted(len(without), 'image')} {what} without objects: {first_of(without)}.")
    if count_others:
        files = {posixpath.join(folder, name) for folder, names in present.items() for name in names if _is_label(name)}
        if others := sorted(files - wanted):
            what = "belongs" if len(others) == 1 else "belong"
            notes.append(f"{counted(len(others), 'label file')} {what} to no image: {first_of(others)}.")
    return labels, notes


def _is_label(name: str) -> bool:
    return name.endswith(".txt") and name.lower().split(".")[0] not in NO_LABELS


def _read_all(paths: Sequence[Path | None]) -> list[str]:
    """The content of all label files; empty for None."""
    with ThreadPoolExecutor(available_cores()) as pool:
        try:
            return list(pool.map(lambda path: "" if path is None else read_text(path), paths))
        except BaseException:  # or Ctrl-C would wait for all remaining files
            pool.shutdown(cancel_futures=True)
            raise


def _annotation(annotation_id: int, image_id: int, box: LabelledBox, size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    x1, y1, x2, y2 = box.corners
    wide, high = (x2 - x1) * width, (y2 - y1) * height
    annotation: dict[str, Any] = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": box.label,
        "bbox": [round(value, DECIMALS) for value in (x1 * width, y1 * height, wide, high)],
        "area": round(max(wide, 0.0) * max(high, 0.0), DECIMALS),
        "iscrowd": 0,
    }
    if box.outline:
        sides = (width, height) * (len(box.outline) // 2)
        pixels = [round(value * side, DECIMALS) for value, side in zip(box.outline, sides, strict=True)]
        annotation["segmentation"] = [pixels]
    return annotation


def _notes_on_labels(counts: Counter[str]) -> list[str]:
    notes = []
    if number := counts["outlines"]:
        what = "is read as the box around it" if number == 1 else "are read as the boxes around them"
        notes.append(f"{counted(number, 'outline')} (more than five numbers a line) {what}.")
    if number := counts["confidences"]:
        notes.append(f"The sixth number of {counted(number, 'line')}, a confidence, is ignored.")
    if number := counts["keypoints"]:
        notes.append(f"The keypoints of {counted(number, 'box', 'boxes')} are ignored.")
    if number := counts["duplicates"]:
        what = "repeats another one of its file and is" if number == 1 else "repeat another one of their file and are"
        notes.append(f"{counted(number, 'line')} {what} left out.")
    return notes


def _names_from(files: SplitFiles, root: Path, images: Sequence[str]) -> list[str]:
    """The names of images relative to the folder that file names are to be relative to."""
    if files.images.resolve() == root.resolve():
        return list(images)
    prefix = os.path.relpath(root.resolve(), files.images.resolve()).replace("\\", "/")
    names = [posixpath.normpath(posixpath.join(prefix, name)) for name in images]
    if any(name.startswith("../") for name in names):
        raise DataError(
            f"{files.images}: does not hold the images that {files.annotations} names. Leave the image folder out: the "
            "dataset says where its images are."
        )
    return names
