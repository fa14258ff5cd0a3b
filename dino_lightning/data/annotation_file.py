"""Reading COCO annotation files: checked, and turned into arrays.

Whatever is wrong with a file is said here, in one sentence that names the file and the entry; nothing after
this module has to check annotations again. `read_coco` continues after a faulty entry and collects all problems;
`load_coco` is for training, which must not start on such a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeGuard

import numpy as np

from dino_lightning.data.box_formats import BoxFormat, another_format, outline_of, to_xyxy
from dino_lightning.data.coco import CLIP_TOLERANCE, Category, CocoAnnotations, ImageEntry, Problem
from dino_lightning.data.findings import KINDS
from dino_lightning.errors import DataError

MAX_ID = 2**63  # the ids must fit into int64
MAX_COORDINATE = 1e12  # larger than any image; NaN and infinity fail the comparison with it
MAX_SIDE = 2**31 - 1  # pixels; no image format allows more
LONGEST_VALUE = 100  # characters of a faulty value that a message repeats

CrowdRule = Literal["regions", "objects"]
OUTLINES = 2000  # polygons that are compared with their boxes
Report = Callable[[Problem], None]


@dataclass(frozen=True)
class ReadOptions:
    """How to read what files of other programs write otherwise than COCO; see the arguments of `CocoDataModule`.

    Attributes:
        crowd: what annotations with `iscrowd` 1 are.
        box_format: what the four numbers of a box are; None for COCO's, of which the file is checked to have them.
    """

    crowd: CrowdRule = "regions"
    box_format: BoxFormat | None = None


AS_COCO = ReadOptions()


def load_coco(annotations: Path, images: Path, options: ReadOptions = AS_COCO) -> CocoAnnotations:
    """Read and check a COCO annotation file.

    Args:
        annotations: the JSON file.
        images: the folder its file names are relative to; not looked into here.
        options: how to read what files of other programs write otherwise.

    Raises:
        DataError: the file cannot be read, is no JSON, or breaks the format; names the file and the first faulty
            entry, and says how many more there are.
    """
    found, problems = read_coco(annotations, images, options)
    problems = [problem for problem in problems if KINDS[problem.kind].severity == "error"]
    if problems:
        more = f" (And {len(problems) - 1} more problems in this file.)" if len(problems) > 1 else ""
        raise DataError(problems[0].message + more)
    assert found is not None
    return found


def read_coco(
    annotations: Path, images: Path, options: ReadOptions = AS_COCO
) -> tuple[CocoAnnotations | None, list[Problem]]:
    """Read a COCO annotation file and collect everything that is wrong with it.

    Args:
        annotations: the JSON file.
        images: the folder its file names are relative to; not looked into here.
        options: how to read what files of other programs write otherwise.

    Returns:
        What remains without the faulty entries, or None if nothing does; and the problems.
    """
    path = Path(annotations)
    problems: list[Problem] = []
    try:
        document = read_json(path)
        for key in ("images", "annotations", "categories"):
            if key not in document:
                raise DataError(
                    f"{path}: has no {key!r}. A COCO detection file needs images, annotations and categories."
                )
            if not isinstance(document[key], list):
                raise DataError(f"{path}: {key!r} must be a list, not {_kind(document[key])}.")
    except DataError as error:
        return None, [Problem("file-unreadable", str(error))]
    for key in ("images", "annotations", "categories"):
        for position, entry in enumerate(document[key]):
            if not isinstance(entry, dict):
                message = f"{path}: entry {position} of {key!r} must be an object, not {_kind(entry)}."
                problems.append(Problem("entry-malformed", message))
        document[key] = [entry for entry in document[key] if isinstance(entry, dict)]
    categories = _parse_categories(path, document["categories"], problems.append)
    entries, faulty = parse_images(path, document["images"], problems.append)
    if not categories or not entries:
        return None, problems
    found = _parse_annotations(
        path, Path(images), categories, entries, faulty, document["annotations"], options.box_format, problems.append
    )
    if options.crowd == "objects":
        found = replace(found, iscrowd=np.zeros_like(found.iscrowd))
    return found, problems


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DataError: the file cannot be read, is no JSON, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Repair or export the file again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from error
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{path}: is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply to be a COCO file.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: the annotation file does not exist.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: must hold a JSON object, not {_kind(document)}.")
    return document


def _parse_categories(path: Path, entries: list[dict[str, Any]], report: Report) -> tuple[Category, ...]:
    if not entries:
        report(Problem("file-unreadable", f"{path}: lists no categories. List every class with an id and a name."))
    categories: dict[int, Category] = {}
    for position, entry in enumerate(entries):
        try:
            category_id = _integer(path, f"category number {position}", entry, "id")
        except DataError as error:
            report(Problem("entry-malformed", str(error)))
            continue
        if category_id in categories:
            message = f"{path}: category id {category_id} is listed twice. Give each category its own id."
            report(Problem("duplicate-category-id", message))
            continue
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            message = f"{path}: category {category_id} has no name. Give each category a name."
            report(Problem("entry-malformed", message))
            name = f"category {category_id}"  # its annotations are still usable
        categories[category_id] = Category(category_id, name.strip(), str(entry.get("supercategory", "")))
    return tuple(categories[category_id] for category_id in sorted(categories))


def parse_images(path: Path, entries: list[dict[str, Any]], report: Report) -> tuple[tuple[ImageEntry, ...], set[int]]:
    """The valid images in the order of the file, and the ids of the invalid ones, which are left out."""
    if not entries:
        report(Problem("file-unreadable", f"{path}: lists no images."))
    images: dict[int, ImageEntry] = {}
    faulty: set[int] = set()
    for position, entry in enumerate(entries):
        try:
            image_id = _integer(path, f"image number {position}", entry, "id")
        except DataError as error:
            report(Problem("entry-malformed", str(error)))
            continue
        given = entry.get("file_name")
        name = given if isinstance(given, str) else None
        if image_id in images or image_id in faulty:
            message = f"{path}: image id {image_id} is listed twice. Give each image its own id."
            report(Problem("duplicate-image-id", message, image_id, file_name=name))
            continue
        what = f"image {image_id}"
        try:
            height, width = _integer(path, what, entry, "height"), _integer(path, what, entry, "width")
            if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
                raise DataError(
                    f"{path}: {what} has width {shown_value(width)} and height {shown_value(height)}. "
                    "Give its size in pixels."
                )
            safe_name = _safe_file_name(path, what, given)
        except UnsafeNameError as error:
            report(Problem("file-name-escapes", str(error), image_id, file_name=name))
            faulty.add(image_id)
        except DataError as error:
            report(Problem("entry-malformed", str(error), image_id, file_name=name))
            faulty.add(image_id)
        else:
            images[image_id] = ImageEntry(image_id, safe_name, (height, width))
    return tuple(images.values()), faulty


class UnsafeNameError(DataError):
    """A file name that would be read from outside the image folder."""


def _safe_file_name(path: Path, what: str, name: object) -> str:
    """The file name with forward slashes; refuses one that would be read from outside the image folder."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: {what} has no file_name.")
    # Checked by the rules of both systems: files written on Windows are read on Linux, and vice versa.
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or PurePosixPath(name).is_absolute() or ".." in windows.parts:
        raise UnsafeNameError(
            f"{path}: {what} has file_name {shown_value(name)}, which leaves the image folder. "
            "File names must be relative to the image folder, without '..'."
        )
    return windows.as_posix()


def _parse_annotations(
    path: Path,
    images_folder: Path,
    categories: tuple[Category, ...],
    images: tuple[ImageEntry, ...],
    faulty_images: set[int],
    entries: list[dict[str, Any]],
    box_format: BoxFormat | None,
    report: Report,
) -> CocoAnnotations:
    index_of_image = {image.id: index for index, image in enumerate(images)}
    index_of_category = {category.id: index for index, category in enumerate(categories)}
    numbers_of_boxes: list[list[float]] = []
    outlines: list[Sequence[float]] = []
    image_indices: list[int] = []
    category_indices: list[int] = []
    iscrowd: list[bool] = []
    area: list[float] = []
    annotation_ids: list[int] = []
    for position, entry in enumerate(entries):
        image_id, category_id, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
        crowd = entry.get("iscrowd") or 0
        problem: tuple[str, str] | None = None
        # The type tests also keep True, 1.0 and lists (which cannot be hashed) from passing as the id 1.
        if type(image_id) is int and image_id in faulty_images:
            continue  # already reported for the image
        if type(image_id) is not int or image_id not in index_of_image:
            problem = (
                "unknown-image",
                f"has image_id {shown_value(image_id)}, which no image has. Add the image, or remove the annotation.",
            )
        elif type(category_id) is not int or category_id not in index_of_category:
            problem = (
                "unknown-category",
                f"has category_id {shown_value(category_id)}, which no category has. Add the category, or remove the "
                "annotation.",
            )
        elif not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            only_segmentation = box is None and bool(entry.get("segmentation"))
            found = "no bbox" if box is None else f"bbox {shown_value(box)}"
            found = "a segmentation but no bbox" if only_segmentation else found
            kind = "segmentation-only" if only_segmentation else "box-malformed"
            problem = (kind, f"has {found}; it needs four finite numbers: x, y, width, height.")
        elif crowd not in (0, 1):
            problem = ("entry-malformed", f"has iscrowd {shown_value(crowd)}; it must be 0 or 1.")
        if problem is not None:
            message = f"{path}: {_annotation(entry, position)} {problem[1]}"
            known = image_id if type(image_id) is int and image_id in index_of_image else None
            file_name = None if known is None else images[index_of_image[known]].file_name
            report(Problem(problem[0], message, known, _id_or_none(entry.get("id")), file_name))
            continue
        assert isinstance(box, list) and type(image_id) is int and type(category_id) is int
        given_area = entry.get("area")
        odd = []
        if _is_number(given_area) and given_area >= 0:
            area.append(given_area)
        else:
            area.append(np.nan)
            if given_area is not None:
                detail = f"has area {shown_value(given_area)}; width times height is taken instead."
                odd.append(("area-malformed", detail))
        if entry.get("iscrowd") is not None and not isinstance(entry["iscrowd"], (int, float)):
            odd.append(("crowd-odd", f"has iscrowd {shown_value(entry['iscrowd'])}; it is read as 0."))
        for kind, sentence in odd:
            message = f"{path}: {_annotation(entry, position)} {sentence}"
            name = images[index_of_image[image_id]].file_name
            report(Problem(kind, message, image_id, _id_or_none(entry.get("id")), name))
        numbers_of_boxes.append(box)
        outlines.append(outline_of(entry.get("segmentation") if len(outlines) < OUTLINES else None))
        image_indices.append(index_of_image[image_id])
        category_indices.append(index_of_category[category_id])
        iscrowd.append(bool(crowd))
        given_id = _id_or_none(entry.get("id"))
        annotation_ids.append(-1 if given_id is None else given_id)

    owners = np.array(image_indices, dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    numbers = np.array(numbers_of_boxes, dtype=np.float64).reshape(-1, 4)[order]
    sizes = np.array([image.size for image in images], dtype=np.float64)[owners]
    if box_format is None:
        corners = np.array(outlines, dtype=np.float64).reshape(-1, 4)[order]
        if sentence := another_format(numbers, sizes, corners):
            report(Problem("box-format", f"{path}: {sentence}"))
    boxes_xyxy = to_xyxy(numbers, sizes, box_format or "xywh")
    areas = np.array(area, dtype=np.float64)[order]
    if box_format in (None, "xywh"):
        areas = np.where(np.isnan(areas), numbers[:, 2] * numbers[:, 3], areas)
    else:  # the file's own may be made of the numbers as if they were COCO's
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    limits = sizes[:, [1, 0, 1, 0]]
    inside = np.clip(boxes_xyxy, 0, limits).astype(np.float32)  # checked in the precision that training uses
    usable = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    sticks_out = ((boxes_xyxy < -CLIP_TOLERANCE) | (boxes_xyxy > limits + CLIP_TOLERANCE)).any(axis=1)
    counts = np.bincount(owners, minlength=len(images))
    return CocoAnnotations(
        path=path,
        images_folder=images_folder,
        categories=categories,
        images=images,
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=boxes_xyxy,
        category_indices=np.array(category_indices, dtype=np.int64)[order],
        iscrowd=np.array(iscrowd, dtype=np.bool_)[order],
        area=areas,
        usable=usable,
        clipped=usable & sticks_out,
        annotation_ids=np.array(annotation_ids, dtype=np.int64)[order],
    )


def _annotation(entry: dict[str, Any], position: int) -> str:
    return f"annotation {shown_value(entry['id'])}" if "id" in entry else f"annotation number {position} (without id)"


def _id_or_none(value: object) -> int | None:
    return value if type(value) is int and abs(value) < MAX_ID else None


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number with an absolute value below `MAX_COORDINATE`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_COORDINATE


def shown_value(value: object) -> str:
    """A faulty value as a message repeats it."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _integer(path: Path, what: str, entry: dict[str, Any], key: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        found = "is missing" if key not in entry else f"is {shown_value(value)}, {_kind(value)}"
        raise DataError(f"{path}: {key!r} of {what} {found}; it must be an integer.")
    return value


def _kind(value: object) -> str:
    """The JSON type of a value, as a message names it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
