"""One XML file of a Pascal VOC dataset: checked, and turned into plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from dino_lightning.data.other_formats.image_folder import MAX_TEXT
from dino_lightning.data.reading.image_entries import MAX_SIDE
from dino_lightning.data.reading.json_file import shown_value
from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_CORNER = 1e9  # pixels; larger than any image


class VocObject(NamedTuple):
    """One object: its class, its corners xmin, ymin, xmax, ymax as they are written, and whether it is difficult."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocFile:
    """What an XML file says.

    Attributes:
        image: the name of the image file, without folders; "" where it is not said.
        size: (height, width) in pixels; None where it is not said.
        objects: in the order of the file.
    """

    image: str
    size: tuple[int, int] | None
    objects: tuple[VocObject, ...]


def read_voc_file(path: Path) -> VocFile:
    """Read one XML file.

    Raises:
        DataError: it is no XML, has a document type, or one of its objects lacks something.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise DataError(f"{path}: is no Pascal VOC file, for it begins with {shown_value(root.tag)}. Remove it.")
    objects = tuple(_object(path, number, element) for number, element in enumerate(root.findall("object"), 1))
    name = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    return VocFile(name, _size(root), objects)


def _parse(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}.") from error
    if len(content) > MAX_TEXT:
        raise DataError(f"{path}: has more than {MAX_TEXT:,} bytes, too many for the XML of one image.")
    if b"\0" in content:  # UTF-16, in which the next test would see nothing
        raise DataError(f"{path}: is no XML in UTF-8. Save it in that encoding.")
    if b"<!doctype" in (lower := content.lower()) or b"<!entity" in lower:
        raise DataError(
            f"{path}: has a document type (DOCTYPE or ENTITY), which is refused because it may name other files and "
            "grow without limit. Remove it."
        )
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: is no valid XML (line {error.position[0]}: {error.msg}). Correct it.") from error
    except (ValueError, LookupError) as error:  # an encoding that nobody knows
        raise DataError(f"{path}: is no valid XML ({error}). Correct it.") from error


def _object(path: Path, number: int, element: ElementTree.Element) -> VocObject:
    what = f"{path}: object {number}"
    name = (element.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{what} has no name. Give it the name of its class.")
    box = element.find("bndbox")
    if box is None:
        if element.find("robndbox") is not None:
            raise DataError(
                f"{what} has a rotated box (robndbox), which is not understood. Write upright boxes (bndbox)."
            )
        raise DataError(f"{what} has no bndbox. Give it one, with xmin, ymin, xmax and ymax.")
    values = []
    for corner in CORNERS:
        text = box.findtext(corner)
        value = _number(text)
        if value is None:
            found = "no" if text is None else f"{shown_value(text.strip())} as"
            raise DataError(f"{what} has {found} {corner}; it must be a number of pixels.")
        values.append(value)
    x1, y1, x2, y2 = values
    if x2 < x1 or y2 < y1:
        axis = "x" if x2 < x1 else "y"
        raise DataError(f"{what} has {axis}max below {axis}min. Exchange them, or remove the object.")
    difficult = _number(element.findtext("difficult"))
    return VocObject(name, (x1, y1, x2, y2), bool(difficult))


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    height, width = _number(root.findtext("size/height")), _number(root.findtext("size/width"))
    if height is None or width is None or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        return None
    return int(height), int(width)


def _number(text: str | None) -> float | None:
    """A finite number of pixels; None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < MAX_CORNER else None
