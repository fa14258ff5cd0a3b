"""COCO annotation files: read, checked, and turned into arrays.

Whatever is wrong with a file is said here, in one sentence that names the file and the entry; nothing after
this module has to check annotations again. `read_coco` goes on after a faulty entry and collects what is wrong;
`load_coco` is for training, which should not begin on such a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from dino_lightning.structures import GroundTruth

MAX_ID = 2**63  # what 64 bits hold
MAX_COORDINATE = 1e12  # beyond any image; NaN and infinity fail the comparison with it
CLIP_TOLERANCE = 0.01  # pixels; coordinates rounded to two decimals overshoot the border by less


class DataError(ValueError):
    """Something is wrong with the user's data; the message says which file, which entry, and what to do."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with an annotation file.

    Attributes:
        kind: a name that does not change, see `dino_lightning.data.findings`.
        message: one sentence: which file, which entry, what is wrong, what to do.
        image_id: the image concerned, if it is known.
        annotation_id: the annotation concerned, if it has an id.
        file_name: the image file concerned, if it is known.
    """

    kind: str
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
    file_name: str | None = None


Report = Callable[[Problem], None]


@dataclass(frozen=True)
class Category:
    """One entry of `categories`."""

    id: int
    name: str
    supercategory: str


@dataclass(frozen=True)
class ImageEntry:
    """One entry of `images`: its size is (height, width) in pixels, its name relative to the image folder."""

    id: int
    file_name: str
    size: tuple[int, int]


@dataclass(frozen=True)
class AnnotationSummary:
    """What an annotation file holds, and what had to be repaired.

    Attributes:
        images: images listed, with boxes or without.
        boxes: boxes to learn from (not crowd, not degenerate).
        crowd: crowd regions; they count in evaluation only.
        degenerate: boxes without area inside the image; dropped.
        clipped: boxes that stuck out of the image; learnt from up to its border.
        images_without_boxes: images with nothing to learn from; kept.
    """

    images: int
    boxes: int
    crowd: int
    degenerate: int
    clipped: int
    images_without_boxes: int

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.boxes} boxes, {self.crowd} crowd, "
            f"{self.degenerate} degenerate dropped, {self.clipped} clipped, "
            f"{self.images_without_boxes} images without boxes"
        )


@dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file. The annotations of image i are the rows `offsets[i]` to `offsets[i + 1]`.

    Flat arrays rather than lists of objects: they are shared with loader workers without being copied.

    Attributes:
        path: the JSON file, for messages.
        images_folder: what the file names are relative to.
        categories: all categories listed, sorted by id.
        images: all images listed, in the order of the file.
        offsets: (images + 1,) int64.
        boxes_xyxy: (A, 4) float64, corners in pixels as annotated, not clipped.
        category_indices: (A,) int64, index into `categories`.
        iscrowd: (A,) bool.
        area: (A,) float64, square pixels; the file's `area` where it has one, else width times height.
        usable: (A,) bool, False for a box without area inside its image.
        clipped: (A,) bool, True for a usable box that sticks out of its image.
        annotation_ids: (A,) int64, -1 for an annotation without an id.
    """

    path: Path
    images_folder: Path
    categories: tuple[Category, ...]
    images: tuple[ImageEntry, ...]
    offsets: npt.NDArray[np.int64]
    boxes_xyxy: npt.NDArray[np.float64]
    category_indices: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    area: npt.NDArray[np.float64]
    usable: npt.NDArray[np.bool_]
    clipped: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]

    def image_path(self, index: int) -> Path:
        """Where the file of image `index` lies."""
        return self.images_folder / self.images[index].file_name

    def subset(self, indices: Sequence[int]) -> CocoAnnotations:
        """The same file with only the images at `indices`, in that order."""
        counts = np.diff(self.offsets)[list(indices)]
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices] or [np.zeros(0, np.int64)]
        )
        return replace(
            self,
            images=tuple(self.images[i] for i in indices),
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            **{name: getattr(self, name)[rows] for name in _ROW_ARRAYS},
        )

    @property
    def summary(self) -> AnnotationSummary:
        """The counts of this file."""
        learnable = self.usable & ~self.iscrowd
        per_image = np.diff(np.concatenate(([0], np.cumsum(learnable)))[self.offsets])
        return AnnotationSummary(
            images=len(self.images),
            boxes=int(learnable.sum()),
            crowd=int((self.usable & self.iscrowd).sum()),
            degenerate=int((~self.usable).sum()),
            clipped=int(self.clipped.sum()),
            images_without_boxes=int((per_image == 0).sum()),
        )

    def used_category_ids(self) -> set[int]:
        """The ids that at least one annotation uses."""
        return {self.categories[index].id for index in np.unique(self.category_indices).tolist()}


_ROW_ARRAYS = ("boxes_xyxy", "category_indices", "iscrowd", "area", "usable", "clipped", "annotation_ids")


def ground_truth(annotations: CocoAnnotations, labels: npt.NDArray[np.int64], index: int) -> GroundTruth:
    """What evaluation compares against in image `index`: everything as annotated but degenerate boxes."""
    rows = np.arange(annotations.offsets[index], annotations.offsets[index + 1])
    rows = rows[annotations.usable[rows]]
    return GroundTruth(
        boxes_xyxy=annotations.boxes_xyxy[rows],
        labels=labels[rows],
        iscrowd=annotations.iscrowd[rows],
        area=annotations.area[rows],
    )


def load_coco(annotations: Path, images: Path) -> CocoAnnotations:
    """Read and check a COCO annotation file.

    Args:
        annotations: the JSON file.
        images: the folder its file names are relative to; not looked into here.

    Raises:
        DataError: the file cannot be read, is no JSON, or breaks the format; names the file and the first faulty
            entry, and says how many more there are.
    """
    found, problems = read_coco(annotations, images)
    if problems:
        more = f" (And {len(problems) - 1} more problems in this file.)" if len(problems) > 1 else ""
        raise DataError(problems[0].message + more)
    assert found is not None
    return found


def read_coco(annotations: Path, images: Path) -> tuple[CocoAnnotations | None, list[Problem]]:
    """Read a COCO annotation file and collect everything that is wrong with it.

    Args:
        annotations: the JSON file.
        images: the folder its file names are relative to; not looked into here.

    Returns:
        What remains without the faulty entries, or None if nothing does; and the problems.
    """
    path = Path(annotations)
    problems: list[Problem] = []
    try:
        document = _read_json(path)
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
    entries, faulty = _parse_images(path, document["images"], problems.append)
    if not categories or not entries:
        return None, problems
    found = _parse_annotations(
        path, Path(images), categories, entries, faulty, document["annotations"], problems.append
    )
    return found, problems


def _read_json(path: Path) -> dict[str, Any]:
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
            name = f"category {category_id}"  # its annotations are not to blame
        categories[category_id] = Category(category_id, name.strip(), str(entry.get("supercategory", "")))
    return tuple(categories[category_id] for category_id in sorted(categories))


def _parse_images(path: Path, entries: list[dict[str, Any]], report: Report) -> tuple[tuple[ImageEntry, ...], set[int]]:
    """The images, and the ids of those left out."""
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
            if height < 1 or width < 1:
                raise DataError(f"{path}: {what} has width {width} and height {height}. Give its size in pixels.")
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
    # Judged by both systems' rules: files written on Windows are read here, and the other way round.
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or PurePosixPath(name).is_absolute() or ".." in windows.parts:
        raise UnsafeNameError(
            f"{path}: {what} has file_name {name!r}, which leaves the image folder. "
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
    report: Report,
) -> CocoAnnotations:
    index_of_image = {image.id: index for index, image in enumerate(images)}
    index_of_category = {category.id: index for index, category in enumerate(categories)}
    boxes_xywh: list[list[float]] = []
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
            continue  # that has been said
        if type(image_id) is not int or image_id not in index_of_image:
            problem = (
                "unknown-image",
                f"has image_id {image_id!r}, which no image has. Add the image, or remove the annotation.",
            )
        elif type(category_id) is not int or category_id not in index_of_category:
            problem = (
                "unknown-category",
                f"has category_id {category_id!r}, which no category has. Add the category, or remove the annotation.",
            )
        elif not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            found = "no bbox" if box is None else f"bbox {box!r}"
            problem = ("box-malformed", f"has {found}; it needs four finite numbers: x, y, width, height.")
        elif crowd not in (0, 1):
            problem = ("entry-malformed", f"has iscrowd {crowd!r}; it must be 0 or 1.")
        if problem is not None:
            message = f"{path}: {_annotation(entry, position)} {problem[1]}"
            known = image_id if type(image_id) is int and image_id in index_of_image else None
            report(Problem(problem[0], message, known, _id_or_none(entry.get("id"))))
            continue
        assert isinstance(box, list) and type(image_id) is int and type(category_id) is int
        given_area = entry.get("area")
        boxes_xywh.append(box)
        image_indices.append(index_of_image[image_id])
        category_indices.append(index_of_category[category_id])
        iscrowd.append(bool(crowd))
        given_id = _id_or_none(entry.get("id"))
        annotation_ids.append(-1 if given_id is None else given_id)
        area.append(given_area if _is_number(given_area) and given_area >= 0 else box[2] * box[3])

    owners = np.array(image_indices, dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    xywh = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)[order]
    boxes_xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    sizes = np.array([image.size for image in images], dtype=np.float64)[owners]
    limits = sizes[:, [1, 0, 1, 0]]
    inside = np.clip(boxes_xyxy, 0, limits).astype(np.float32)  # judged in the precision that training uses
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
        area=np.array(area, dtype=np.float64)[order],
        usable=usable,
        clipped=usable & sticks_out,
        annotation_ids=np.array(annotation_ids, dtype=np.int64)[order],
    )


def _annotation(entry: dict[str, Any], position: int) -> str:
    return f"annotation {entry['id']!r}" if "id" in entry else f"annotation number {position} (without id)"


def _id_or_none(value: object) -> int | None:
    return value if type(value) is int and abs(value) < MAX_ID else None


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and not one so large that it cannot be computed with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_COORDINATE


def _integer(path: Path, what: str, entry: dict[str, Any], key: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        found = "is missing" if key not in entry else f"is {value!r}, {_kind(value)}"
        raise DataError(f"{path}: {key!r} of {what} {found}; it must be an integer.")
    return value


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
