"""Ways in which datasets are broken, each as a function that breaks a fresh small one on disk."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from tests.data.small_coco import annotation, put, write_split

HUGE = 10**400
LONG_NAME = "x" * 300 + ".png"  # longer than file systems allow
TRAIN, VAL = "train/annotations.json", "val/annotations.json"

Ends = Literal["refused", "bad image", "trains"]


@dataclass(frozen=True)
class Fault:
    """A fault in the dataset of `write_dataset`.

    Attributes:
        kind: the finding it must give, or "" where nothing is wrong with it.
        ends: how `fit` ends: "refused" always, "bad image" refused or counted and left out as the user chooses, or
            "trains".
        entries: changes the parsed training file.
        files: changes files of the dataset, given its root.
        text: changes the bytes of the training file, after everything else.
    """

    kind: str
    ends: Ends
    entries: Callable[[Any], None] | None = None
    files: Callable[[Path], None] | None = None
    text: Callable[[bytes], bytes] | None = None


def write_dataset(root: Path) -> None:
    """Four images of 40, 50, 60 and 70 x 30 to train on, two to validate, two boxes in each."""
    write_split(root / TRAIN, root / "train/images", count=4)
    write_split(root / VAL, root / "val/images", count=2, first_id=11)


def break_dataset(root: Path, *faults: Fault) -> None:
    """Break a fresh dataset in one or more ways, as far as one fault leaves anything for the next."""
    write_dataset(root)
    path = root / TRAIN
    document = json.loads(path.read_text())
    for fault in faults:
        if fault.entries is not None:
            try:
                fault.entries(document)
            except (LookupError, TypeError, AttributeError):
                continue  # an earlier fault has removed or replaced the entry
    content = json.dumps(document).encode("utf-8", "surrogatepass")
    for fault in faults:
        if fault.text is not None:
            content = fault.text(content)
    path.write_bytes(content)
    for fault in faults:
        if fault.files is not None:
            fault.files(root)


def _as_shares(document: Any) -> None:
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    shares = [
        [number / side for number, side in zip(entry["bbox"], sizes[entry["image_id"]] * 2, strict=True)]
        for entry in document["annotations"]
    ]
    for entry, box in zip(document["annotations"], shares, strict=True):
        entry["bbox"] = box


def add(key: str, entry: Any) -> Callable[[Any], None]:
    return lambda document: document[key].append(entry)


def image_file(make: Callable[[Path], None], name: str = "train/images/1.png") -> Callable[[Path], None]:
    """Put something else in the place of an image file."""

    def change(root: Path) -> None:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
        if path.parent.is_dir():
            make(path)

    return change


def saved(mode: str = "RGB", form: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    noise = np.random.default_rng(99).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(noise[:, :, 0].astype(np.float32))
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def written(content: bytes, **where: str) -> Callable[[Path], None]:
    return image_file(lambda path: path.write_bytes(content) and None, **where)


def animated() -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def turned(orientation: int, size: tuple[int, int] = (40, 30)) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(form="JPEG", size=size, exif=exif)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 200 MB."""
    squeezed = zlib.compress(bytes(200_000_000), 1)
    return png(40, 30, chunk(b"zTXt", b"Comment\0\0" + squeezed), chunk(b"IDAT", zlib.compress(bytes(121 * 30))))


def zeroed(content: bytes, count: int = 200) -> bytes:
    """The content with bytes in the middle lost, as a file system leaves them behind."""
    middle = len(content) // 2
    return content[:middle] + bytes(count) + content[middle + count :]


def walls(document: Any) -> None:
    """Forty slivers beside the four boxes of class 1."""
    for number in range(40):
        box = [1 + number % 10, 2, 2, 18 + number // 10]
        document["annotations"].append(annotation(1000 + number, 4, 1, box))


def same_boxes(document: Any) -> None:
    """Twenty-four boxes of class 1 of 20 x 10 pixels in six images."""
    for image_id in (61, 62):
        document["images"].append({"id": image_id, "file_name": "4.png", "width": 70, "height": 30})
    for image_id in (1, 2, 3, 4, 61, 62):
        for x in range(4 if image_id > 60 else 3):
            document["annotations"].append(annotation(2000 + 10 * image_id + x, image_id, 1, [x, 6 + x, 20, 10]))


def instead_of_json(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return image_file(make, TRAIN)


def without(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name, ignore_errors=True)


def folder_is_a_file(root: Path) -> None:
    shutil.rmtree(root / "train/images", ignore_errors=True)
    (root / "train/images").write_text("moved")


def copied(source: str, target: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        if (root / source).is_file() and (root / target).parent.is_dir():
            image_file(lambda path: path.write_bytes((root / source).read_bytes()) and None, target)(root)

    return change


def odd_name(root: Path) -> None:
    if (root / "train/images").is_dir():
        name = os.path.join(os.fsencode(root / "train/images"), b"caf\xe9.png")  # noqa: PTH118  # bytes, not UTF-8
        with open(name, "wb") as file:  # noqa: PTH123 - as above
            file.write(saved())


def in_val(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        try:
            document = json.loads((root / VAL).read_text())
        except (OSError, ValueError):
            return  # an earlier fault has removed or replaced it
        change(document)
        (root / VAL).write_text(json.dumps(document))

    return edit


def attic(document: Any) -> None:
    document["categories"].append({"id": 3, "name": "attic"})
    document["annotations"].append(annotation(95, 11, 3, [1, 1, 9, 9]))


def words_as_category_ids(document: Any) -> None:
    for entry in document["categories"]:
        entry["id"] = entry["name"]
    names = {1: "kitchen", 2: "bath"}
    for entry in document["annotations"]:
        entry["category_id"] = names[entry["category_id"]]


def refused(kind: str, entries: Callable[[Any], None]) -> Fault:
    return Fault(kind, "refused", entries)


def text(kind: str, change: Callable[[bytes], bytes]) -> Fault:
    return Fault(kind, "refused", text=change)


def bad_image(kind: str, change: Callable[[Path], None]) -> Fault:
    return Fault(kind, "bad image", files=change)


def image(kind: str, content: bytes) -> Fault:
    return Fault(kind, "trains", files=written(content))


def each(key: str, change: Callable[[Any], None]) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for entry in document[key]:
            change(entry)

    return edit


EXTRA = {"file_name": "4.png", "width": 70, "height": 30}
NAN, INFINITY = float("nan"), float("inf")
ROOT_CATEGORY = [{"id": 0, "name": "rooms", "supercategory": "none"}] + [
    {"id": number, "name": name, "supercategory": "rooms"} for number, name in ((1, "kitchen"), (2, "bath"))
]
OUTLINE = {"id": 90, "image_id": 2, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}

FAULTS: dict[str, Fault] = {
    # the JSON as a file
    "json cut off": text("file-unreadable", lambda content: content[: len(content) // 2]),
    "json empty": text("file-unreadable", lambda content: b""),
    "json is text": text("file-unreadable", lambda content: b"id,file\n1,1.png\n"),
    "json with a comma too many": text("file-unreadable", lambda content: content[:-1] + b",}"),
    "json in utf-16": Fault("", "trains", text=lambda content: content.decode("utf-8", "replace").encode("utf-16")),
    "json in utf-16 cut": text(
        "file-unreadable", lambda content: content.decode("utf-8", "replace").encode("utf-16")[:-1]
    ),
    "json in gzip": Fault("", "trains", text=gzip.compress),
    "json in gzip cut": text("file-unreadable", lambda content: gzip.compress(content)[:-9]),
    "json in latin-1": text("file-unreadable", lambda content: content.replace(b"kitchen", b"caf\xe9")),
    "json in a zip": text("file-unreadable", lambda content: b"PK\x03\x04" + content),
    "json of null bytes": text("file-unreadable", lambda content: bytes(len(content))),
    "json nested deeply": text("file-unreadable", lambda content: b"[" * 100_000),
    "json number of 5000 digits": text("file-unreadable", lambda content: b'{"images": ' + b"1" * 5000 + b"}"),
    "json is a list": text("file-unreadable", lambda content: b"[" + content + b"]"),
    "json is null": text("file-unreadable", lambda content: b"null"),
    "json with a byte order mark": Fault("", "trains", text=lambda content: b"\xef\xbb\xbf" + content),
    # its keys
    "no images key": refused("file-unreadable", put("images", ...)),
    "no annotations key": refused("file-unreadable", put("annotations", ...)),
    "no categories key": refused("file-unreadable", put("categories", ...)),
    "images an object": refused("file-unreadable", put("images", {"1": {}})),
    "annotations null": refused("file-unreadable", put("annotations", None)),
    "no images": refused("file-unreadable", put("images", [])),
    "no categories": refused("file-unreadable", put("categories", [])),
    "no annotations": refused("nothing-to-learn", put("annotations", [])),
    "image a string": refused("entry-malformed", put("images.1", "2.png")),
    "annotation null": refused("entry-malformed", put("annotations.2", None)),
    "category a list": refused("entry-malformed", put("categories.0", [1, "kitchen"])),
    # images
    "image id missing": refused("entry-malformed", put("images.0.id", ...)),
    "image id a string": Fault("value-converted", "trains", put("images.0.id", "1")),
    "image id a float": Fault("value-converted", "trains", put("images.0.id", 1.0)),
    "image id half": refused("entry-malformed", put("images.0.id", 1.5)),
    "image id a word": Fault("id-numbered", "trains", add("images", {**EXTRA, "id": "plan"})),
    "image id true": refused("entry-malformed", put("images.0.id", True)),
    "image id NaN": refused("entry-malformed", put("images.0.id", NAN)),
    "image id twice": refused("duplicate-image-id", put("images.1.id", 1)),
    "image id huge": Fault(
        "id-numbered", "trains", add("images", {"id": HUGE, "file_name": "4.png", "width": 70, "height": 30})
    ),
    "width a string": Fault("value-converted", "trains", put("images.1.width", "50")),
    "width a word": refused("entry-malformed", put("images.1.width", "wide")),
    "width missing": Fault("image-size-from-file", "trains", put("images.1.width", ...)),
    "height zero": Fault("image-size-from-file", "trains", put("images.2.height", 0)),
    "width missing and no file": refused("entry-malformed", add("images", {"id": 9, "file_name": "none.png"})),
    "height negative": refused("entry-malformed", put("images.2.height", -30)),
    "width NaN": refused("entry-malformed", put("images.2.width", NAN)),
    "width huge": refused("entry-malformed", put("images.2.width", HUGE)),
    "width wrong": refused("size-differs", put("images.2.width", 61)),
    "file name missing": refused("entry-malformed", put("images.3.file_name", ...)),
    "file name empty": refused("entry-malformed", put("images.3.file_name", "")),
    "file name a number": refused("entry-malformed", put("images.3.file_name", 4)),
    "file name upwards": refused("file-name-escapes", put("images.3.file_name", "../../val/images/11.png")),
    "file name absolute": refused("file-name-escapes", put("images.3.file_name", "/etc/passwd")),
    "file name on a drive": refused("file-name-escapes", put("images.3.file_name", "C:\\plans\\9.png")),
    "file name of another machine": Fault("file-name-matched", "trains", put("images.3.file_name", "C:\\plans\\4.png")),
    "file name with a null byte": Fault("image-undecodable", "bad image", put("images.3.file_name", "4\0.png")),
    "file name very long": Fault("image-undecodable", "bad image", put("images.3.file_name", LONG_NAME)),
    "file name half a character": Fault("image-undecodable", "bad image", put("images.3.file_name", "\ud800.png")),
    "file name a folder": Fault("image-undecodable", "bad image", put("images.3.file_name", ".")),
    "file name of markup": Fault("image-missing", "bad image", put("images.3.file_name", "<script>x</script>\x1b[2J")),
    "file name through a file": Fault("image-undecodable", "bad image", put("images.3.file_name", "1.png/9.png")),
    "file under two ids": Fault(
        "same-file", "trains", add("images", {"id": 77, "file_name": "4.png", "width": 70, "height": 30})
    ),
    # annotations
    "annotation of no image": refused("unknown-image", put("annotations.3.image_id", 99)),
    "image_id a string": Fault("value-converted", "trains", put("annotations.3.image_id", "2")),
    "image_id a word": refused("unknown-image", put("annotations.3.image_id", "two")),
    "image_id a list": refused("unknown-image", put("annotations.3.image_id", [2])),
    "image_id missing": refused("unknown-image", put("annotations.3.image_id", ...)),
    "annotation of no category": refused("unknown-category", put("annotations.3.category_id", 9)),
    "category_id true": refused("unknown-category", put("annotations.3.category_id", True)),
    "category_id a float": Fault("value-converted", "trains", put("annotations.3.category_id", 1.0)),
    "bboxes as shares of the image": refused("box-format", _as_shares),
    "bbox missing": refused("box-malformed", put("annotations.4.bbox", ...)),
    "bbox of three": refused("box-malformed", put("annotations.4.bbox", [1, 2, 3])),
    "bbox of numbers as text": Fault("value-converted", "trains", put("annotations.4.bbox", ["1", "2", "3", "4"])),
    "bbox of words": refused("box-malformed", put("annotations.4.bbox", ["a", "2", "3", "4"])),
    "bbox empty": refused("box-malformed", put("annotations.4.bbox", [])),
    "bbox an object": refused("box-malformed", put("annotations.4.bbox", {"x": 1})),
    "bbox nested": refused("box-malformed", put("annotations.4.bbox", [[1, 2, 3, 4]])),
    "bbox of nulls": refused("box-malformed", put("annotations.4.bbox", [None] * 4)),
    "bbox NaN": refused("box-malformed", put("annotations.4.bbox", [1, 2, NAN, 4])),
    "bbox infinite": refused("box-malformed", put("annotations.4.bbox", [1, 2, INFINITY, 4])),
    "bbox huge": refused("box-malformed", put("annotations.4.bbox", [1, 2, HUGE, 4])),
    "bbox zero wide": Fault("box-without-area", "trains", put("annotations.4.bbox", [5, 5, 0, 5])),
    "bbox negative": Fault("box-without-area", "trains", put("annotations.4.bbox", [20, 20, -5, -5])),
    "bbox outside": Fault("box-without-area", "trains", put("annotations.4.bbox", [500, 500, 5, 5])),
    "bbox sticks out by rounding": Fault("box-rounded", "trains", put("annotations.4.bbox", [20, 10, 40.4, 9])),
    "bbox sticks out": Fault("box-outside", "trains", put("annotations.4.bbox", [50, 20, 50, 50])),
    "bbox covers all": Fault("box-covers-image", "trains", put("annotations.4.bbox", [0, 0, 60, 30])),
    "bbox tiny": Fault("box-tiny", "trains", put("annotations.4.bbox", [5, 5, 0.01, 5])),
    "box twice": Fault("duplicate-box", "trains", add("annotations", annotation(91, 1, 1, [4, 5, 20, 10]))),
    "outline only": Fault("box-from-outline", "trains", add("annotations", OUTLINE)),
    "outline of words": refused("segmentation-only", add("annotations", {**OUTLINE, "segmentation": ["a"]})),
    "boxes of walls": Fault("class-slivers", "trains", walls),
    "boxes of a template": Fault("class-all-the-same", "trains", same_boxes),
    "annotation id twice": Fault("duplicate-annotation-id", "trains", put("annotations.1.id", 2)),
    "annotation ids missing": Fault("", "trains", each("annotations", lambda entry: entry.pop("id"))),
    "annotation id huge": Fault("", "trains", put("annotations.1.id", HUGE)),
    "annotation id a list": Fault("", "trains", put("annotations.1.id", [3])),
    "crowd of two": refused("entry-malformed", put("annotations.2.iscrowd", 2)),
    "crowd a string": Fault("value-converted", "trains", put("annotations.2.iscrowd", "1")),
    "crowd an empty list": Fault("crowd-odd", "trains", put("annotations.2.iscrowd", [])),
    "area NaN": Fault("area-malformed", "trains", put("annotations.2.area", NAN)),
    "area negative": Fault("area-malformed", "trains", put("annotations.2.area", -4)),
    "area a number as text": Fault("value-converted", "trains", put("annotations.2.area", "150")),
    "area a word": Fault("area-malformed", "trains", put("annotations.2.area", "large")),
    "area of the image": Fault("area-implausible", "trains", put("annotations.2.area", 1500)),
    "area zero": Fault("area-implausible", "trains", put("annotations.2.area", 0)),
    # categories
    "category id twice": refused("duplicate-category-id", put("categories.1.id", 1)),
    "category id a number as text": Fault("value-converted", "trains", put("categories.1.id", "2")),
    "category id a word": Fault("id-numbered", "trains", words_as_category_ids),
    "category id a word that annotations do not use": refused("unknown-category", put("categories.1.id", "two")),
    "category id half": refused("entry-malformed", put("categories.1.id", 1.5)),
    "category id missing": refused("entry-malformed", put("categories.1.id", ...)),
    "category name missing": refused("entry-malformed", put("categories.1.name", ...)),
    "category name blank": refused("entry-malformed", put("categories.1.name", "  ")),
    "category name a number": refused("entry-malformed", put("categories.1.name", 7)),
    "category names alike": Fault("category-repeated", "refused", put("categories.1.name", "kitchen")),
    "category names alike under others": Fault(
        "duplicate-category-name", "refused", put("categories.1", {"id": 2, "name": "kitchen", "supercategory": "x"})
    ),
    "category listed again": Fault("category-repeated", "trains", add("categories", {"id": 2, "name": "bath"})),
    "category ids other in val": Fault(
        "classes-by-name",
        "trains",
        files=in_val(put("categories", [{"id": 1, "name": "bath"}, {"id": 2, "name": "kitchen"}])),
    ),
    "an annotation file of no split": Fault(
        "unused-annotations", "trains", files=copied("train/annotations.json", "old.json")
    ),
    "another annotation file": Fault(
        "other-annotations", "trains", files=copied("train/annotations.json", "train/more.json")
    ),
    "category names differ in val": Fault(
        "classes-differ", "refused", files=in_val(put("categories.0.name", "<img src=//evil.example/x>"))
    ),
    "category only in val": Fault(
        "classes-differ",
        "refused",
        files=in_val(attic),
    ),
    "category unused": Fault("category-unused", "trains", add("categories", {"id": 8, "name": "\ud800$x_{$<b>"})),
    "category above all": Fault("root-category", "trains", put("categories", ROOT_CATEGORY)),
    "supercategory an object": Fault("", "trains", put("categories.0.supercategory", {"a": [1]})),
    # files
    "json is a folder": Fault("", "refused", files=instead_of_json(Path.mkdir)),
    "json points to itself": Fault("", "refused", files=instead_of_json(lambda path: path.symlink_to(path.name))),
    "json absent": Fault("", "refused", files=instead_of_json(lambda path: None)),
    "image folder absent": Fault("image-missing", "refused", files=without("train/images")),
    "image folder a file": Fault("image-missing", "refused", files=folder_is_a_file),
    "val broken": Fault(
        "file-unreadable", "refused", files=image_file(lambda path: path.write_text("{") and None, VAL)
    ),
    "val absent": Fault("no-validation", "trains", files=without("val")),
    "image absent": bad_image("image-missing", image_file(lambda path: None)),
    "image empty": bad_image("image-undecodable", written(b"")),
    "image of text": bad_image("image-undecodable", written(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "image of null bytes": bad_image("image-undecodable", written(bytes(5000))),
    "png cut off": bad_image("image-undecodable", written(saved()[:900])),
    "jpeg cut off": bad_image("image-undecodable", written(saved(form="JPEG")[:400])),
    "png with wrong checksums": bad_image("image-undecodable", written(saved().replace(b"IHDR", b"IHDX"))),
    "image a folder": bad_image("image-undecodable", image_file(Path.mkdir)),
    "image points to itself": bad_image("image-undecodable", image_file(lambda path: path.symlink_to(path.name))),
    "image points nowhere": bad_image("image-missing", image_file(lambda path: path.symlink_to("gone.png"))),
    "image a named pipe": bad_image("image-undecodable", image_file(os.mkfifo)),
    "image a socket": bad_image(
        "image-undecodable", image_file(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600) and None)
    ),
    "image a device": bad_image("image-undecodable", image_file(lambda path: path.symlink_to("/dev/zero"))),
    "image of terapixels": bad_image("image-undecodable", written(png(2_000_000, 500_000, chunk(b"IDAT", b"")))),
    "image with a text bomb": bad_image("image-undecodable", written(text_bomb())),
    "image of 32-bit floats": bad_image("image-undecodable", written(saved("F", "TIFF"))),
    "image animated": image("animated", animated()),
    "image 16-bit": image("sixteen-bit", saved("I;16")),
    "jpeg with zeros inside": image("image-damaged", zeroed(saved(form="JPEG"))),
    "jpeg without its end": bad_image("image-undecodable", written(saved(form="JPEG")[:-2])),
    "image grey": image("grey", saved("L")),
    "image palette": image("palette", saved("P")),
    "image transparent": image("transparent", saved("RGBA")),
    "image cmyk": image("cmyk", saved("CMYK", "JPEG")),
    "image under a wrong suffix": image("name-unlike-format", saved(form="JPEG")),
    "image turned over": image("exif-rotated", turned(3)),
    "image turned by a quarter": Fault("size-swapped", "refused", files=written(turned(6))),
    "image turned and annotated so": image("exif-rotated", turned(8, (30, 40))),
    "image with broken exif": image("name-unlike-format", saved(form="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "image of another size": Fault("size-differs", "refused", files=written(saved(size=(30, 40)))),
    "image more than listed": Fault("not-listed", "trains", files=written(saved(), name="train/images/more.png")),
    "file name no utf-8": Fault("not-listed", "trains", files=odd_name),
    "copy in training": Fault(
        "duplicate-image",
        "trains",
        add("images", {"id": 78, "file_name": "copy.png", "width": 70, "height": 30}),
        copied("train/images/4.png", "train/images/copy.png"),
    ),
    "copy in validation": Fault("leak", "trains", files=copied("train/images/1.png", "val/images/11.png")),
}
