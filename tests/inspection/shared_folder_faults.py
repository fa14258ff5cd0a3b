"""Faults of a dataset whose splits share one image folder: train.json, val.json and images/.

Each is a function that breaks such a dataset on disk, with the kinds of findings that it must give. A function does
nothing where an earlier one has removed what it would change.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.small_coco import annotation, put, write_split
from tests.inspection.faults import ROOT_CATEGORY, add, animated, chunk, each, image_file, png, saved, turned

Change = Callable[[Path], None]

BIG = 60_000  # 3.6 gigapixels as a square


def write_dataset(root: Path) -> None:
    """Six images of 40, 50, ... 90 x 30 to train on, three to validate, two boxes in each."""
    write_split(root / "train.json", root / "images", count=6)
    write_split(root / "val.json", root / "images", count=3, first_id=101)


def parsed(*changes: Callable[[Any], None], name: str = "train.json") -> Change:
    """Change the parsed annotation file."""

    def change(root: Path) -> None:
        try:
            document = json.loads((root / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return  # an earlier fault
        for part in changes:
            try:
                part(document)
            except (LookupError, TypeError, AttributeError):
                return  # likewise
        (root / name).write_text(json.dumps(document))

    return change


def in_val(*changes: Callable[[Any], None]) -> Change:
    return parsed(*changes, name="val.json")


def raw(change: Callable[[bytes], bytes], name: str = "train.json") -> Change:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes())) and None


def stored(content: bytes, name: str = "1.png") -> Change:
    """Put other bytes in the place of an image file."""
    return image_file(lambda path: path.write_bytes(content) and None, f"images/{name}")


def both(*changes: Change) -> Change:
    def change(root: Path) -> None:
        for part in changes:
            part(root)

    return change


def like_another(size: tuple[int, int] | None, split: str = "train.json") -> Change:
    """A picture with something on it as image 1, and again as a new file, of another size if one is given."""
    x, y = np.meshgrid(np.linspace(0, 9, 80), np.linspace(0, 7, 60))
    waves = np.stack([127 + 120 * np.sin(x + k) * np.cos(y / (1 + k)) for k in range(3)], axis=-1)
    picture = Image.fromarray(waves.astype(np.uint8))
    other = picture.resize(size) if size else picture
    entry = {"id": 50, "file_name": "again.png", "width": other.width, "height": other.height}

    def change(root: Path) -> None:
        if (root / "images").is_dir():
            image_file(picture.save, "images/1.png")(root)
            image_file(other.save, "images/again.png")(root)

    return both(
        change,
        parsed(put("images.0.width", 80), put("images.0.height", 60)),
        parsed(add("images", entry), add("annotations", annotation(900, 50, 1, [5, 5, 20, 20])), name=split),
    )


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.png", saved())
    return buffer.getvalue()


def many_boxes(document: Any) -> None:
    for number in range(901):
        box = [number % 30, number // 50, 10 + number % 7, 9]
        document["annotations"].append(annotation(2000 + number, 6, 1 + number % 2, box))


def only_in_val(document: Any) -> None:
    document["categories"].append({"id": 3, "name": "attic"})
    document["annotations"].append(annotation(950, 101, 3, [1, 1, 9, 9]))


HEADER_ONLY = saved()[:33]  # signature and IHDR
TWIN = {"id": 51, "file_name": "1.png", "width": 40, "height": 30}
UNUSED = {"id": 9, "name": "cellar"}

FAULTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    # the file
    "json cut off": (raw(lambda content: content[:-40]), ("file-unreadable",)),
    "json empty": (raw(lambda content: b""), ("file-unreadable",)),
    "json blank": (raw(lambda content: b" \n\n"), ("file-unreadable",)),
    "json not utf-8": (raw(lambda content: content.replace(b"bath", b"b\xe4d")), ("file-unreadable",)),
    "json with byte order mark": (raw(lambda content: b"\xef\xbb\xbf" + content), ()),
    "json is a list": (raw(lambda content: b"[%b]" % content), ("file-unreadable",)),
    "json is a string": (raw(lambda content: b'"train"'), ("file-unreadable",)),
    "json twice": (raw(lambda content: content * 2), ("file-unreadable",)),
    "val cut off": (raw(lambda content: content[:-40], "val.json"), ("file-unreadable",)),
    "val empty": (raw(lambda content: b"", "val.json"), ("file-unreadable",)),
    **{f"no {key}": (parsed(put(key, ...)), ("file-unreadable",)) for key in ("images", "annotations", "categories")},
    **{
        f"{key} {what}": (parsed(put(key, value)), ("file-unreadable",))
        for key in ("images", "annotations", "categories")
        for what, value in (("an object", {"0": {}}), ("a string", "none"))
    },
    **{
        f"entry of {key} {what}": (parsed(put(f"{key}.1", value)), ("entry-malformed",))
        for key in ("images", "annotations", "categories")
        for what, value in (("a number", 7), ("a list", []))
    },
    "val without categories": (in_val(put("categories", ...)), ("file-unreadable",)),
    # ids
    **{
        f"{key} id {what}": (parsed(put(f"{key}.0.id", value)), ("entry-malformed",))
        for key in ("images", "categories")
        for what, value in (("missing", ...), ("empty", ""), ("a float", 1.5), ("true", True))
    },
    **{
        f"{key} id a number as text": (parsed(put(f"{key}.0.id", value)), ("value-converted",))
        for key, value in (("images", "1"), ("categories", "1"), ("annotations", "2"))
    },
    **{
        f"annotation id {what}": (parsed(put("annotations.0.id", value)), ())
        for what, value in (("missing", ...), ("a float", 2.5), ("true", True), ("an object", {}))
    },
    "image id twice": (parsed(put("images.1.id", 1)), ("duplicate-image-id",)),
    "category id twice": (parsed(put("categories.1.id", 1)), ("duplicate-category-id",)),
    "annotation id twice": (parsed(put("annotations.1.id", 2)), ("duplicate-annotation-id",)),
    # image entries
    **{
        f"{side} {what}": (parsed(put(f"images.1.{side}", value)), ("entry-malformed",))
        for side in ("width", "height")
        for what, value in (
            ("negative", -50),
            ("a word", "wide"),
            ("infinite", float("inf")),
        )
    },
    **{
        f"{side} {what}": (parsed(put(f"images.1.{side}", value)), ("image-size-from-file",))
        for side in ("width", "height")
        for what, value in (("missing", ...), ("zero", 0))
    },
    "width a number as text": (parsed(put("images.1.width", "50")), ("value-converted",)),
    "height a wrong number as text": (parsed(put("images.1.height", "50")), ("value-converted", "size-differs")),
    "width wrong": (parsed(put("images.1.width", 51)), ("size-differs",)),
    "width beyond memory": (parsed(put("images.1.width", 2**31 - 1)), ("size-differs",)),
    "file name missing": (parsed(put("images.1.file_name", ...)), ("entry-malformed",)),
    "file name empty": (parsed(put("images.1.file_name", "")), ("entry-malformed",)),
    "file name a list": (parsed(put("images.1.file_name", ["2.png"])), ("entry-malformed",)),
    "file name absolute": (parsed(put("images.1.file_name", "/etc/hostname")), ("file-name-escapes",)),
    "file name upwards": (parsed(put("images.1.file_name", "../images/2.png")), ("file-name-matched",)),
    "file name upwards to nothing": (parsed(put("images.1.file_name", "../images/9.png")), ("file-name-escapes",)),
    "file name upwards inside": (parsed(put("images.1.file_name", "x/../../2.png")), ("file-name-matched",)),
    "file name on a drive": (parsed(put("images.1.file_name", "D:2.png")), ("file-name-escapes",)),
    "file name on a server": (parsed(put("images.1.file_name", "\\\\host\\share\\2.png")), ("file-name-matched",)),
    "file name with null byte": (parsed(put("images.1.file_name", "2.png\0.txt")), ("image-undecodable",)),
    "file name of 5000 characters": (parsed(put("images.1.file_name", "n" * 5000)), ("image-undecodable",)),
    "file name of control characters": (
        parsed(put("images.1.file_name", "\x1b]0;owned\x07\x1b[2J\r\n.png")),
        ("image-missing",),
    ),
    # annotations
    "annotation of unknown image": (parsed(put("annotations.3.image_id", 10**6)), ("unknown-image",)),
    "annotation of an image of val": (parsed(put("annotations.3.image_id", 101)), ("unknown-image",)),
    "annotation of unknown category": (parsed(put("annotations.3.category_id", 0)), ("unknown-category",)),
    "annotation in val of unknown category": (in_val(put("annotations.3.category_id", 5)), ("unknown-category",)),
    **{
        f"bbox {what}": (parsed(put("annotations.3.bbox", value)), ("box-malformed",))
        for what, value in (
            ("missing", ...),
            ("null", None),
            ("empty", []),
            ("of three", [1, 2, 3]),
            ("of five", [1, 2, 3, 4, 5]),
            ("of words", ["one", "2", "3", "4"]),
            ("of bools", [True, True, True, True]),
            ("NaN", [float("nan"), 2, 3, 4]),
            ("infinite", [1, 2, float("inf"), 4]),
            ("1e300", [1, 2, 1e300, 4]),
        )
    },
    "bbox zero wide": (parsed(put("annotations.3.bbox", [5, 5, 0, 9])), ("box-without-area",)),
    "bbox zero high": (parsed(put("annotations.3.bbox", [5, 5, 9, 0.0])), ("box-without-area",)),
    "bbox negative": (parsed(put("annotations.3.bbox", [25, 20, -9, -9])), ("box-without-area",)),
    "bbox outside": (parsed(put("annotations.3.bbox", [50, 0, 9, 9])), ("box-without-area",)),
    "bbox far outside": (parsed(put("annotations.3.bbox", [-9e11, -9e11, 5, 5])), ("box-without-area",)),
    "bbox sticks out": (parsed(put("annotations.3.bbox", [45, 20, 20, 20])), ("box-outside",)),
    "bbox of a trillion": (parsed(put("annotations.3.bbox", [0, 0, 9e11, 9e11])), ("box-outside", "box-covers-image")),
    "bbox covers all": (parsed(put("annotations.3.bbox", [0, 0, 50, 30])), ("box-covers-image",)),
    "bbox tiny": (parsed(put("annotations.3.bbox", [5, 5, 0.05, 9])), ("box-tiny",)),
    "box twice": (parsed(add("annotations", annotation(900, 1, 1, [4, 5, 20, 10]))), ("duplicate-box",)),
    "iscrowd 2": (parsed(put("annotations.3.iscrowd", 2)), ("entry-malformed",)),
    "iscrowd -1": (parsed(put("annotations.3.iscrowd", -1)), ("entry-malformed",)),
    "area NaN": (parsed(put("annotations.3.area", float("nan"))), ("area-malformed",)),
    "area 1e300": (parsed(put("annotations.3.area", 1e300)), ("area-malformed",)),
    "image without boxes": (
        parsed(lambda document: document.update(annotations=document["annotations"][2:])),
        ("no-boxes",),
    ),
    "no annotations at all": (parsed(put("annotations", [])), ("no-boxes", "category-unused")),
    "more boxes than queries": (parsed(many_boxes), ("too-many-boxes", "beyond-evaluation")),
    # categories
    "category renamed in val": (in_val(put("categories.0.name", "kitchens")), ("classes-differ",)),
    "category only in val": (in_val(only_in_val), ("classes-differ",)),
    "category names alike": (
        both(parsed(put("categories.1.name", "kitchen")), in_val(put("categories.1.name", "kitchen"))),
        ("category-repeated",),
    ),
    "bbox of numbers as text": (parsed(put("annotations.3.bbox", ["1", "2", "3", "4"])), ("value-converted",)),
    "category unused": (parsed(add("categories", UNUSED)), ("category-unused", "category-missing")),
    "category without boxes in val": (
        in_val(each("annotations", lambda entry: entry.update(category_id=1))),
        ("category-missing",),
    ),
    "category above all": (parsed(put("categories", ROOT_CATEGORY)), ("root-category",)),
    # image files
    "image absent": (image_file(lambda path: None, "images/1.png"), ("image-missing",)),
    "image of val absent": (image_file(lambda path: None, "images/102.png"), ("image-missing",)),
    "image a folder": (image_file(Path.mkdir, "images/1.png"), ("image-undecodable",)),
    "image empty": (stored(b""), ("image-undecodable",)),
    "image of text": (stored(b"see attached\n"), ("image-undecodable",)),
    "png cut off": (stored(saved()[:-500]), ("image-undecodable",)),
    "jpeg cut off": (stored(saved(form="JPEG")[:-300]), ("image-undecodable",)),
    "png header only": (stored(HEADER_ONLY), ("image-undecodable",)),
    "jpeg signature only": (stored(b"\xff\xd8\xff\xe0"), ("image-undecodable",)),
    "png with a byte changed": (
        stored(saved()[:800] + bytes([saved()[800] ^ 0xFF]) + saved()[801:]),
        ("image-undecodable",),
    ),
    "zip named png": (stored(zipped()), ("image-undecodable",)),
    "image of val a zip": (stored(zipped(), "101.png"), ("image-undecodable",)),
    "image links to itself": (
        image_file(lambda path: path.symlink_to(path.name), "images/1.png"),
        ("image-undecodable",),
    ),
    "png claims 3.6 gigapixels": (
        stored(png(BIG, BIG, chunk(b"IDAT", zlib.compress(bytes(1000))))),
        ("image-undecodable",),
    ),
    "size other than listed": (stored(saved(size=(41, 30))), ("size-differs",)),
    "size in val other than listed": (stored(saved(size=(41, 30)), "101.png"), ("size-differs",)),
    "size swapped by exif": (stored(turned(6)), ("size-swapped", "exif-rotated")),
    "16-bit": (stored(saved("I;16")), ("sixteen-bit",)),
    "grey": (stored(saved("L")), ("grey",)),
    "palette": (stored(saved("P")), ("palette",)),
    "RGBA": (stored(saved("RGBA")), ("transparent",)),
    "CMYK": (stored(saved("CMYK", "JPEG")), ("cmyk", "name-unlike-format")),
    "animated": (stored(animated()), ("animated", "name-unlike-format")),
    "wrong suffix": (stored(saved(form="WEBP")), ("name-unlike-format",)),
    "file listed twice": (parsed(add("images", TWIN)), ("same-file",)),
    "copy": (like_another(None), ("duplicate-image",)),
    "copy of another size": (like_another((160, 120)), ("near-duplicate",)),
    "copy in val": (like_another(None, "val.json"), ("leak",)),
    "copy of another size in val": (like_another((160, 120), "val.json"), ("leak-near",)),
    "file in train and val": (in_val(add("images", TWIN)), ("leak",)),
    "file not listed": (stored(saved(), "spare.png"), ("not-listed",)),
    "val absent": (lambda root: (root / "val.json").unlink(missing_ok=True), ("no-validation",)),
}
