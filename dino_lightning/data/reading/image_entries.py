"""The `images` of a COCO file: ids, sizes and file names, checked and matched with the files in the image folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dino_lightning.data.coco import ImageTable, Problem
from dino_lightning.data.other_formats.image_folder import displayed_size
from dino_lightning.data.reading.file_names import match_names
from dino_lightning.data.reading.json_file import Entry, kind_of, parsed, shown_value
from dino_lightning.data.reading.lossless import Conversions
from dino_lightning.errors import DataError

MAX_ID = 2**63  # the ids must fit into int64
MAX_SIDE = 2**31 - 1  # pixels; no image format allows more

Report = Callable[[Problem], None]
Size = tuple[int, int]


class _Image(msgspec.Struct, gc=False):
    """An image entry that needs no conversion."""

    id: int
    file_name: str
    height: int | None = None
    width: int | None = None
    split: str | None = None


class _TextId(msgspec.Struct, gc=False):
    id: str


@dataclass
class Images:
    """The images of a file.

    Attributes:
        table: the valid ones in the order of the file.
        parts: the `split` field of each, or None.
        index_of_id: which image an id of the file means, by the id as an integer.
        index_of_text: the same by ids that are text and no numbers.
        faulty: ids, of either kind, of entries that were refused, which is reported for the image alone.
    """

    table: ImageTable
    parts: list[str | None]
    index_of_id: dict[int, int] = field(default_factory=dict)
    index_of_text: dict[str, int] = field(default_factory=dict)
    faulty: set[int | str] = field(default_factory=set)


@dataclass
class _Rows:
    ids: list[int | str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[Size | None] = field(default_factory=list)
    parts: list[str | None] = field(default_factory=list)
    faulty: set[int | str] = field(default_factory=set)


def read_images(path: Path, folder: Path, entries: Sequence[Entry], conversions: Conversions, report: Report) -> Images:
    """Check the images of a file.

    Args:
        path: the annotation file, for messages.
        folder: the image folder; the files' headers are read where a size is missing.
        entries: the images as the file has them.
        conversions: counts what had to be converted.
        report: is called with each problem.
    """
    if not entries:
        report(Problem("file-unreadable", f"{path}: lists no images."))
    rows = _read_rows(path, entries, conversions, report)
    names = _inside_the_folder(path, folder, rows, report)
    sizes = _with_sizes_of_files(path, folder, rows, names, report)
    numbers = _numbered(path, rows.ids, report)
    kept = [index for index, (name, size) in enumerate(zip(names, sizes, strict=True)) if name and size]
    images = Images(
        table=ImageTable.of(
            [numbers[i] for i in kept], [names[i] or "" for i in kept], [sizes[i] or (0, 0) for i in kept]
        ),
        parts=[rows.parts[i] for i in kept],
        faulty=rows.faulty | {rows.ids[i] for i in set(range(len(names))) - set(kept)},
    )
    for index, row in enumerate(kept):
        given = rows.ids[row]
        if isinstance(given, int):
            images.index_of_id[given] = index
        else:
            images.index_of_text[given] = index
    return images


def _read_rows(path: Path, entries: Sequence[Entry], conversions: Conversions, report: Report) -> _Rows:
    rows, known = _Rows(), set[int | str]()
    decode = msgspec.json.Decoder(_Image).decode
    as_text = _ids_are_text(entries)
    for position, raw in enumerate(entries):
        try:
            if not isinstance(raw, msgspec.Raw):
                raise msgspec.ValidationError
            image = decode(raw)
            image_id: int | str = image.id
            name, size, part = image.file_name, _size(image.height, image.width), image.split
            if (size is None and (image.height or image.width)) or abs(image.id) >= MAX_ID or not name:
                raise msgspec.ValidationError
        except msgspec.MsgspecError:
            entry = parsed(raw)
            try:
                image_id = _id(path, position, entry, as_text, conversions)
            except DataError as error:
                report(Problem("entry-malformed", str(error)))
                continue
            given = entry.get("file_name") or entry.get("coco_url")  # LVIS has addresses alone
            try:
                if image_id not in known:
                    size = _given_size(path, f"image {shown_id(image_id)}", entry, conversions)
                    if not isinstance(given, str) or not given:
                        raise DataError(f"{path}: image {shown_id(image_id)} has no file_name.")
            except DataError as error:
                number = image_id if isinstance(image_id, int) else None
                report(
                    Problem("entry-malformed", str(error), number, file_name=given if isinstance(given, str) else None)
                )
                known.add(image_id)
                rows.faulty.add(image_id)
                continue
            name = given if isinstance(given, str) else ""
            part = entry.get("split")
        part = part if isinstance(part, str) else None
        if image_id in known:
            message = f"{path}: image id {shown_id(image_id)} is listed twice. Give each image its own id."
            number = image_id if isinstance(image_id, int) else None
            report(Problem("duplicate-image-id", message, number, file_name=name))
            continue
        known.add(image_id)
        rows.ids.append(image_id)
        rows.names.append(name)
        rows.sizes.append(size)
        rows.parts.append(part)
    return rows


def _ids_are_text(entries: Sequence[Entry]) -> bool:
    """Whether ids written as text must stay text: two of them would be the same number, as "1" and "01" are."""
    numbers: set[int] = set()
    texts: set[str] = set()
    decode = msgspec.json.Decoder(_TextId).decode
    text: Any
    for raw in entries:
        if isinstance(raw, msgspec.Raw):
            try:
                text = decode(raw).id
            except msgspec.MsgspecError:
                return False  # numbers, at least one
        else:
            text = raw.get("id") if isinstance(raw, dict) else None
        if not isinstance(text, str) or text in texts:
            continue
        texts.add(text)
        if text.strip().isdecimal():
            if int(text) in numbers:
                return True
            numbers.add(int(text))
    return False


def shown_id(image_id: int | str) -> str:
    """An id as messages show it."""
    return str(image_id) if isinstance(image_id, int) else shown_value(image_id)


def _id(path: Path, position: int, entry: Any, as_text: bool, conversions: Conversions) -> int | str:
    what = f"image number {position}"
    if not isinstance(entry, dict):
        raise DataError(f"{path}: entry {position} of 'images' must be an object, not {kind_of(entry)}.")
    value = entry.get("id")
    if isinstance(value, str) and value.strip() and (as_text or not value.strip().isdecimal()):
        try:
            whole = not as_text and float(value) == int(float(value))
        except (ValueError, OverflowError):
            whole = False
        if not whole:
            return value
    number = conversions.integer(value, "image id")
    if number is not None and abs(number) >= MAX_ID:
        return str(number)  # too large for an int64, so it is numbered like text
    if number is None:
        found = "is missing" if "id" not in entry else f"is {shown_value(value)}, {kind_of(value)}"
        raise DataError(f"{path}: 'id' of {what} {found}; it must be an integer.")
    return number


def _size(height: int | None, width: int | None) -> Size | None:
    if height is None or width is None or not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        return None
    return height, width


def _given_size(path: Path, what: str, entry: dict[str, Any], conversions: Conversions) -> Size | None:
    """(height, width) as the file has it, or None where it has none: absent, null, or 0 by 0."""
    sides = []
    for key in ("height", "width"):
        value = entry.get(key)
        if value is None:
            sides.append(0)
            continue
        side = conversions.integer(value, f"image {key}")
        if side is None:
            raise DataError(
                f"{path}: {key!r} of {what} is {shown_value(value)}, {kind_of(value)}; it must be an integer."
            )
        sides.append(side)
    height, width = sides
    if height == 0 or width == 0:
        return None
    if _size(height, width) is None:
        raise DataError(
            f"{path}: {what} has width {shown_value(width)} and height {shown_value(height)}. Give its size in pixels."
        )
    return height, width


def _inside_the_folder(path: Path, folder: Path, rows: _Rows, report: Report) -> list[str | None]:
    """The names of the files; None for one that would be read from outside the image folder."""
    matched = match_names(folder, rows.names)
    if sentence := matched.sentence(folder):
        report(Problem("file-name-matched", f"{path}: {sentence}"))
    for image_id, listed, name in zip(rows.ids, rows.names, matched.names, strict=True):
        if name is None:
            message = (
                f"{path}: image {shown_id(image_id)} has file_name {shown_value(listed)}, which leaves the image "
                f"folder, and its base name is not that of exactly one file in {folder}. "
                "File names must be relative to the image folder, without '..'."
            )
            number = image_id if isinstance(image_id, int) else None
            report(Problem("file-name-escapes", message, number, file_name=listed))
    return matched.names


def _with_sizes_of_files(
    path: Path, folder: Path, rows: _Rows, names: Sequence[str | None], report: Report
) -> list[Size | None]:
    """The sizes, those that the file lacks read from the headers of the images."""
    sizes = list(rows.sizes)
    missing = [index for index, size in enumerate(sizes) if size is None and names[index] is not None]
    if not missing:
        return sizes

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda index: displayed_size(folder / str(names[index])), missing))
    read = 0
    for index, size in zip(missing, found, strict=True):
        if isinstance(size, tuple):
            sizes[index], read = size, read + 1
            continue
        image_id = rows.ids[index]
        message = (
            f"{path}: image {shown_id(image_id)} has no width and height, and they cannot be read from its file: "
            f"{size} Restore the file, or give its size in pixels."
        )
        number = image_id if isinstance(image_id, int) else None
        report(Problem("entry-malformed", message, number, file_name=names[index]))
    if read:
        message = f"{path}: {read} images have no width and height; they are read from the headers of the files."
        report(Problem("image-size-from-file", message))
    return sizes


def _numbered(path: Path, ids: Sequence[int | str], report: Report) -> list[int]:
    """The ids as integers: text is numbered in the order of the file, after the highest number."""
    texts = [image_id for image_id in ids if isinstance(image_id, str)]
    if not texts:
        return [image_id for image_id in ids if isinstance(image_id, int)]
    highest = max((image_id for image_id in ids if isinstance(image_id, int)), default=0)
    number_of = {text: highest + 1 + position for position, text in enumerate(texts)}
    message = (
        f"{path}: {len(texts)} image ids are text (first: {shown_value(texts[0])}); these images are numbered from "
        f"{highest + 1} on, in the order of the file."
    )
    report(Problem("id-numbered", message))
    return [image_id if isinstance(image_id, int) else number_of[image_id] for image_id in ids]
