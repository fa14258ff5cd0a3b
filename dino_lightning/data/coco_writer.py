"""A dataset written as clean COCO: a folder for each split, with `annotations.json` and its images in `images`."""

from __future__ import annotations

import json
import posixpath
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from dino_lightning.console import bar_seconds
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.image_files import FEW_IMAGES, open_regular
from dino_lightning.data.image_places import check_files_exist, check_images_folder
from dino_lightning.errors import DataError
from dino_lightning.files import BLOCK

ImageMode = Literal["copy", "link", "none"]
ANNOTATIONS, IMAGES = "annotations.json", "images"
DECIMALS = 6  # of a pixel


@dataclass(frozen=True)
class WrittenSplit:
    """What has been written of a split: numbers of images, boxes, crowd regions and boxes left out, and new names."""

    images: int
    boxes: int
    crowd: int
    left_out: int
    renamed: int


def write_coco(
    splits: Mapping[str, CocoAnnotations], output: Path, images: ImageMode = "copy"
) -> dict[str, WrittenSplit]:
    """Write splits as COCO files into a new folder, which is whole or absent.

    Ids of categories and images are kept. Boxes are written as annotated, also where they stick out of their image;
    those without area inside it are left out. An annotation without an id of its own gets a new one.

    Args:
        splits: what to write, by the names of the splits.
        output: the folder to make; may exist if it is empty.
        images: whether image files are copied, are symbolic links to the originals, or stay where they are, which
            leaves their names as they are too.

    Returns:
        What has been written of each split.

    Raises:
        DataError: the folder has files in it, or images do not exist.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: exists already. Name a folder that does not exist, or an empty one.")
    if images != "none":
        for split in splits.values():
            check_images_folder(split)
            check_files_exist(split)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"tmp-{output.name[:40]}-"))
    try:
        written = {name: _write_split(split, temporary / name, name, images) for name, split in splits.items()}
        temporary.chmod(0o755)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return written


def _write_split(split: CocoAnnotations, folder: Path, name: str, images: ImageMode) -> WrittenSplit:
    names = [image.file_name for image in split.images] if images == "none" else unique_names(split)
    folder.mkdir()
    with (folder / ANNOTATIONS).open("w", encoding="utf-8") as file:
        json.dump(coco_document(split, names), file)
    if images != "none":
        (folder / IMAGES).mkdir()
        few = len(names) <= FEW_IMAGES
        verb = "Copying" if images == "copy" else "Linking"
        bar = tqdm(names, f"{verb} {name} images", unit="image", disable=few, mininterval=bar_seconds())
        for index, new in enumerate(bar):
            source, target = split.image_path(index), folder / IMAGES / new
            if images == "copy":
                _copy(source, target)
            else:
                target.symlink_to(source.resolve())
    summary = split.summary
    renamed = sum(new != image.file_name.rpartition("/")[2] for new, image in zip(names, split.images, strict=True))
    renamed = 0 if images == "none" else renamed
    return WrittenSplit(summary.images, summary.boxes, summary.crowd, summary.degenerate, renamed)


def _copy(source: Path, target: Path) -> None:
    """Copy an image.

    Raises:
        DataError: it cannot be read.
        OSError: the copy cannot be written.
    """
    with open_regular(source) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, BLOCK)


def unique_names(split: CocoAnnotations) -> list[str]:
    """A name without folders for each image, no two alike, not even where case makes no difference.

    Of images with the same name in different folders, the first one keeps it, and others get their id: `plan_7.jpg`.
    """
    taken: set[str] = set()
    names = []
    for image in split.images:
        stem, suffix = posixpath.splitext(posixpath.basename(image.file_name))
        name, number = f"{stem}{suffix}", 0
        while name.casefold() in taken:
            name = f"{stem}_{image.id}{f'_{number}' if number else ''}{suffix}"
            number += 1
        taken.add(name.casefold())
        names.append(name)
    return names


def coco_document(split: CocoAnnotations, names: list[str]) -> dict[str, Any]:
    """A COCO document of a split.

    Args:
        split: what to write.
        names: the `file_name` of each image.
    """
    owners = np.repeat(np.arange(len(split.images)), np.diff(split.offsets))
    ids = _own_ids(split)
    annotations = []
    for row in np.flatnonzero(split.usable).tolist():
        x1, y1, x2, y2 = split.boxes_xyxy[row].tolist()
        annotations.append(
            {
                "id": ids[row],
                "image_id": split.images[owners[row]].id,
                "category_id": split.categories[split.category_indices[row]].id,
                "bbox": [_plain(value) for value in (x1, y1, x2 - x1, y2 - y1)],
                "area": _plain(float(split.area[row])),
                "iscrowd": int(split.iscrowd[row]),
            }
        )
    return {
        "info": {"description": "Written by dino_lightning to_coco"},
        "licenses": [],
        "images": [
            {"id": image.id, "file_name": name, "width": image.size[1], "height": image.size[0]}
            for image, name in zip(split.images, names, strict=True)
        ],
        "annotations": annotations,
        "categories": [
            {"id": category.id, "name": category.name, "supercategory": category.supercategory}
            for category in split.categories
        ],
    }


def _own_ids(split: CocoAnnotations) -> list[int]:
    """The id of each annotation; those without one, or with one that another has, get the next ones that are free."""
    given = split.annotation_ids.tolist()
    following = max([0, *given]) + 1
    taken: set[int] = set()
    ids = []
    for annotation_id in given:
        if annotation_id < 1 or annotation_id in taken:  # pycocotools takes 0 for no match
            annotation_id, following = following, following + 1
        taken.add(annotation_id)
        ids.append(annotation_id)
    return ids


def _plain(value: float) -> int | float:
    """A number of pixels as short as it can be written, without the traces of subtraction."""
    rounded = round(value, DECIMALS)
    return int(rounded) if rounded.is_integer() else rounded
