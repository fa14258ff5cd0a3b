"""The `annotations` of a COCO file as arrays, checked."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from dino_lightning.data.box_formats import NORMALIZED, BoxFormat, another_format, to_xyxy
from dino_lightning.data.coco import CLIP_TOLERANCE, Category, CocoAnnotations, Problem
from dino_lightning.data.reading.image_entries import MAX_ID, Images
from dino_lightning.data.reading.json_file import Entry, Tables, kind_of, parsed, shown_value
from dino_lightning.data.reading.lossless import MAX_COORDINATE, Conversions
from dino_lightning.data.reading.outlines import area_of, extent_of, outline_of

OUTLINES = 2000  # polygons that are compared with their boxes
LARGEST_AREA, SMALLEST_AREA = 1.01, 0.02  # of the box; outside, the area is looked at
ROUNDING = 1.0  # square pixels
PAGES = 100_000  # annotations
FAULTY = -1  # in place of the index of an image: its entry was refused

Report = Callable[[Problem], None]


class _Annotation(msgspec.Struct, gc=False):
    """An annotation that needs no conversion."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | None = None
    area: float | None = None
    iscrowd: Literal[0, 1] | None = None


class _Outline(msgspec.Struct, gc=False):
    segmentation: Any = None


class _Rows:
    """The annotations read so far, column by column."""

    def __init__(self) -> None:
        self.numbers = array("d")  # four for each annotation
        self.images, self.categories, self.ids = array("q"), array("q"), array("q")
        self.crowd = array("b")
        self.area = array("d")
        self.positions = array("q")  # in the file

    def add(
        self, position: int, image: int, category: int, box: Sequence[float], crowd: int, area: float, given_id: int
    ) -> None:
        self.numbers.extend(box)
        self.images.append(image)
        self.categories.append(category)
        self.crowd.append(crowd)
        self.area.append(area)
        self.ids.append(given_id)
        self.positions.append(position)


@dataclass
class Context:
    """What the annotations of a file are read against.

    Attributes:
        path: the annotation file, for messages.
        images: its images.
        index_of_category: which category an id means.
        conversions: counts what had to be converted.
        report: is called with each problem.
    """

    path: Path
    images: Images
    index_of_category: Mapping[int | str, int]
    conversions: Conversions
    report: Report


def read_annotations(
    context: Context,
    images_folder: Path,
    categories: tuple[Category, ...],
    tables: Tables,
    box_format: BoxFormat | None,
) -> CocoAnnotations:
    """Check the annotations of a file, sort them by image, and find out what is usable.

    Args:
        context: what they refer to.
        images_folder: goes into the result.
        categories: all of the file.
        tables: the lists of the file.
        box_format: what the numbers of a box are; None for COCO's, which is checked.
    """
    entries = tables.annotations
    rows, from_outline = _read_rows(context, tables)
    tables.drop_pages()
    table = context.images.table
    owners = np.array(rows.images, dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    numbers = np.array(rows.numbers, dtype=np.float64).reshape(-1, 4)[order]
    positions = np.array(rows.positions, dtype=np.int64)[order]
    sizes = table.sizes.astype(np.float64)[owners]
    outlined = np.isin(positions, np.array(sorted(from_outline), dtype=np.int64))
    refused = False
    if box_format is None:
        known = _outlines(entries, positions, outlined)
        if sentence := another_format(numbers, sizes, known):
            context.report(Problem("box-format", f"{context.path}: {sentence}"))
            refused = True
    boxes_xyxy = to_xyxy(numbers, sizes, box_format or "xywh")
    if outlined.any():  # their numbers are the corners' extent, whatever the order of the others
        unit: BoxFormat = "normalized-xywh" if (box_format or "").startswith(NORMALIZED) else "xywh"
        boxes_xyxy[outlined] = to_xyxy(numbers[outlined], sizes[outlined], unit)
    limits = sizes[:, [1, 0, 1, 0]]
    inside = np.clip(boxes_xyxy, 0, limits).astype(np.float32)  # checked in the precision that training uses
    usable = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    sticks_out = ((boxes_xyxy < -CLIP_TOLERANCE) | (boxes_xyxy > limits + CLIP_TOLERANCE)).any(axis=1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    if box_format in (None, "xywh") and not refused:
        # of boxes in another format, the file's own may be made of the numbers as if they were COCO's
        areas = _areas(context, np.array(rows.area, dtype=np.float64)[order], areas, usable, positions, entries)
    counts = np.bincount(owners, minlength=len(table))
    return CocoAnnotations(
        path=context.path,
        images_folder=images_folder,
        categories=categories,
        images=table,
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=boxes_xyxy,
        category_indices=np.array(rows.categories, dtype=np.int64)[order],
        iscrowd=np.array(rows.crowd, dtype=np.bool_)[order],
        area=areas,
        usable=usable,
        clipped=usable & sticks_out,
        annotation_ids=np.array(rows.ids, dtype=np.int64)[order],
    )


def _read_rows(context: Context, tables: Tables) -> tuple[_Rows, set[int]]:
    """The annotations that are in order, and which of them have the extent of their outline for a box."""
    rows, from_outline = _Rows(), set[int]()
    decode = msgspec.json.Decoder(_Annotation).decode
    index_of_image, index_of_category = context.images.index_of_id, context.index_of_category
    for position, raw in enumerate(tables.annotations):
        if position % PAGES == 0:
            tables.drop_pages()  # a large file is not in memory while its arrays grow
        try:
            if not isinstance(raw, msgspec.Raw):
                raise msgspec.ValidationError
            found = decode(raw)
            image, category = index_of_image[found.image_id], index_of_category[found.category_id]
            box, area, given_id = found.bbox, found.area, -1 if found.id is None else found.id
            if max(box) >= MAX_COORDINATE or min(box) <= -MAX_COORDINATE or abs(given_id) >= MAX_ID:
                raise msgspec.ValidationError
            if area is None:
                area = np.nan
            elif not 0 <= area < MAX_COORDINATE:
                raise msgspec.ValidationError
        except (msgspec.MsgspecError, KeyError, UnicodeDecodeError):
            _read_other(context, position, parsed(raw), rows, from_outline)
        else:
            rows.add(position, image, category, box, found.iscrowd or 0, area, given_id)
    if from_outline:
        message = f"{len(from_outline)} annotations have an outline and no bbox; the outline's extent is their box."
        context.report(Problem("box-from-outline", f"{context.path}: {message}"))
    return rows, from_outline


def _read_other(context: Context, position: int, entry: Any, rows: _Rows, from_outline: set[int]) -> None:
    """An annotation that is not as COCO has it: converted, or reported."""
    if not isinstance(entry, dict):
        message = f"{context.path}: entry {position} of 'annotations' must be an object, not {kind_of(entry)}."
        context.report(Problem("entry-malformed", message))
        return
    convert = context.conversions
    image = _image_index(context, entry.get("image_id"))
    if image == FAULTY:
        return  # already reported for the image
    given_id = entry.get("id")
    number = given_id if type(given_id) is int else convert.integer(given_id, "annotation id")
    annotation_id = -1 if number is None or abs(number) >= MAX_ID else number

    def report(kind: str, sentence: str) -> None:
        known = None if image is None else int(context.images.table.ids[image])
        file_name = None if image is None else context.images.table.name(image)
        message = f"{context.path}: {_annotation(entry, position)} {sentence}"
        context.report(Problem(kind, message, known, None if annotation_id == -1 else annotation_id, file_name))

    if image is None:
        shown = shown_value(entry.get("image_id"))
        report("unknown-image", f"has image_id {shown}, which no image has. Correct it, or add the image.")
        return
    category = None
    given_category = entry.get("category_id")
    if isinstance(given_category, str) and given_category in context.index_of_category:
        category = context.index_of_category[given_category]
    elif not isinstance(given_category, (list, dict)):
        category_id = convert.integer(given_category, "category_id")
        category = None if category_id is None else context.index_of_category.get(category_id)
    if category is None:
        shown = shown_value(entry.get("category_id"))
        report("unknown-category", f"has category_id {shown}, which no category has. Correct it, or add the category.")
        return
    box, is_outline = _box(entry, convert)
    if isinstance(box, str):
        report("segmentation-only" if is_outline else "box-malformed", box)
        return
    crowd = 0 if entry.get("iscrowd") is None else convert.flag(entry["iscrowd"], "iscrowd")
    if crowd is None:
        if isinstance(entry["iscrowd"], (int, float)) and entry["iscrowd"] == entry["iscrowd"]:  # not NaN, of pandas
            report("entry-malformed", f"has iscrowd {shown_value(entry['iscrowd'])}; it must be 0 or 1.")
            return
        report("crowd-odd", f"has iscrowd {shown_value(entry['iscrowd'])}; it is read as 0.")
        crowd = 0
    area = None if entry.get("area") is None else convert.number(entry["area"], "area")
    if entry.get("area") is not None and (area is None or area < 0):
        report("area-malformed", f"has area {shown_value(entry['area'])}; width times height is taken instead.")
        area = None
    if is_outline:
        from_outline.add(position)
    rows.add(position, image, category, box, crowd, np.nan if area is None else area, annotation_id)


def _image_index(context: Context, value: Any) -> int | None:
    """Which image an `image_id` means; `FAULTY` for one that was refused, None for none."""
    images = context.images
    if isinstance(value, str):
        if value in images.index_of_text:
            return images.index_of_text[value]
        if value in images.faulty:
            return FAULTY
        if images.index_of_text and not images.index_of_id:
            return None  # ids are text: "01" is not "1"
    if isinstance(value, (list, dict)):
        return None
    number = context.conversions.integer(value, "image_id")
    if number is None:
        return None
    if abs(number) >= MAX_ID:
        return images.index_of_text.get(str(number))
    return FAULTY if number in images.faulty else images.index_of_id.get(number)


def _box(entry: dict[str, Any], convert: Conversions) -> tuple[Sequence[float] | str, bool]:
    """The four numbers of a box and whether they are the extent of the outline; or a sentence for what is wrong."""
    box, segmentation = entry.get("bbox"), entry.get("segmentation")
    if box is None or box == []:
        corners = extent_of(segmentation)
        if not np.isnan(corners[0]) and max(map(abs, corners)) < MAX_COORDINATE:
            x1, y1, x2, y2 = corners
            return (x1, y1, x2 - x1, y2 - y1), True
        if segmentation:
            return "has no bbox, and a segmentation that is neither a polygon nor a run-length mask.", True
        if box == [] and not segmentation:
            return (
                "has an empty bbox and no segmentation, as X-AnyLabeling writes rotated boxes; "
                "it needs four finite numbers: x, y, width, height. Export it again as rectangles or polygons.",
                False,
            )
        return "has no bbox; it needs four finite numbers: x, y, width, height.", False
    if isinstance(box, dict):
        keys = ", ".join(map(str, box))
        return (
            f"has an object with {shown_value(keys)} as bbox, as imglab writes it; "
            "it must be a list of four numbers: x, y, width, height.",
            False,
        )
    if isinstance(box, list) and len(box) == 4:
        numbers = [convert.number(value, "bbox number") for value in box]
        if None not in numbers:
            return [number for number in numbers if number is not None], False
    return f"has bbox {shown_value(box)}; it needs four finite numbers: x, y, width, height.", False


def _outlines(
    entries: Sequence[Entry], positions: npt.NDArray[np.int64], outlined: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(A, 4) corners of polygons in pixels, NaN where there is none, or where it is not among the first looked at."""
    decode = msgspec.json.Decoder(_Outline).decode
    corners = np.full((len(positions), 4), np.nan)
    for row in np.flatnonzero((positions < OUTLINES) & ~outlined).tolist():
        corners[row] = outline_of(_segmentation(entries[positions[row]], decode))
    return corners


def _segmentation(raw: Entry, decode: Callable[[Any], _Outline]) -> Any:
    try:
        return decode(raw).segmentation if isinstance(raw, msgspec.Raw) else raw.get("segmentation")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _areas(
    context: Context,
    given: npt.NDArray[np.float64],
    of_boxes: npt.NDArray[np.float64],
    usable: npt.NDArray[np.bool_],
    positions: npt.NDArray[np.int64],
    entries: Sequence[Entry],
) -> npt.NDArray[np.float64]:
    """The areas of the file where they can be: no larger than the box, and far smaller only with an outline that is."""
    absent = np.isnan(given)
    wrong = usable & ~absent & ((given > of_boxes * LARGEST_AREA + ROUNDING) | (given <= 0))
    small = usable & ~absent & ~wrong & (given < of_boxes * SMALLEST_AREA - ROUNDING)
    decode = msgspec.json.Decoder(_Outline).decode
    for row in np.flatnonzero(small).tolist():
        outline = area_of(_segmentation(entries[positions[row]], decode))
        wrong[row] = not abs(outline - given[row]) <= max(ROUNDING, 0.05 * outline)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        message = (
            f"{int(wrong.sum())} of {len(given)} areas cannot be those of their boxes (first: area {given[first]:g} of "
            f"a box of {of_boxes[first]:g} square pixels); width times height is taken instead."
        )
        context.report(Problem("area-implausible", f"{context.path}: {message}"))
    return np.where(absent | wrong, of_boxes, given)


def _annotation(entry: dict[str, Any], position: int) -> str:
    return f"annotation {shown_value(entry['id'])}" if "id" in entry else f"annotation number {position} (without id)"
