"""What the readers of YOLO and Pascal VOC folders share: files inside the dataset's folder, and sizes of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dino_lightning.console import bar_seconds
from dino_lightning.data.image_files import EXIF_ORIENTATION, FEW_IMAGES, available_cores, open_image, open_regular
from dino_lightning.data.reading.json_file import shown_value
from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

STORED_WIDTH, STORED_HEIGHT = 256, 257  # tags of a TIFF file
MAX_TEXT = 50_000_000  # bytes of a label, list or XML file; real ones have a thousandth of it


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path lies in the folder `root` once all links are followed; it need not exist."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, links in a circle
        return False


def exists(path: Path) -> bool:
    """As `Path.exists`, and False for a name that the file system refuses."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def require_inside(path: Path, root: Path) -> None:
    """Raise `DataError` for a path that leads out of the dataset's folder."""
    if not is_inside(path, root):
        raise DataError(
            f"{path}: leads out of the dataset's folder {root}, outside of which nothing is read. Put the files into "
            "it, instead of links to them."
        )


def names_in(folder: Path, root: Path) -> set[str]:
    """The names of the files in a folder; empty if there is no such folder.

    Raises:
        DataError: the folder or one of its files is a link that leads out of `root`.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return set()
    require_inside(folder, root)
    names = set()
    for entry in entries:
        if entry.is_symlink():
            require_inside(folder / entry.name, root)
        if entry.is_file():
            names.add(entry.name)
    return names


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The content of a text file in UTF-8 of at most `limit` bytes, with a byte order mark or without.

    Raises:
        DataError: it cannot be read, is no such text, or is too large for one.
    """
    try:
        with path.open("rb") as file:
            too_large = os.fstat(file.fileno()).st_size > limit
            content = b"" if too_large else file.read()
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}.") from error
    if too_large:
        raise DataError(f"{path}: has more than {limit:,} bytes, too many for such a file of a dataset.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text in UTF-8. Save it in that encoding.") from error


def displayed_sizes(paths: Sequence[Path], name: str) -> list[tuple[int, int]]:
    """The sizes of images as a viewer shows them, EXIF rotation applied; only headers are read.

    Args:
        paths: the image files.
        name: of what they are, for the progress bar.

    Returns:
        (height, width) in pixels of each.

    Raises:
        DataError: files that are no images; names the first and says how many there are.
    """
    with ThreadPoolExecutor(available_cores()) as pool:  # waiting for a disk happens outside Python's global lock
        results = pool.map(displayed_size, paths)
        try:
            title, few = f"Reading sizes of {name}", _few(paths)
            found = list(tqdm(results, title, len(paths), unit="image", disable=few, mininterval=bar_seconds()))
        except BaseException:  # or Ctrl-C would wait for all remaining files
            pool.shutdown(cancel_futures=True)
            raise
    errors = [(path, size) for path, size in zip(paths, found, strict=True) if isinstance(size, str)]
    if errors:
        more = f" (And {len(errors) - 1} more images.)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0][0]}: is no image that can be read ({errors[0][1]}). Restore or remove it.{more}")
    return [size for size in found if not isinstance(size, str)]


def _few(paths: Sequence[Path]) -> bool:
    return len(paths) <= FEW_IMAGES


def displayed_size(path: Path) -> tuple[int, int] | str:
    """(height, width) in pixels of an image as a viewer shows it, from its header; or why it cannot be read."""
    try:
        with open_regular(path) as file, open_image(file) as image:
            width, height = image.size
            if image.format == "TIFF":  # newer Pillow has turned its size already
                tags = image.tag_v2  # type: ignore[attr-defined]  # of Pillow's class for TIFF
                width, height = tags.get(STORED_WIDTH, width), tags.get(STORED_HEIGHT, height)
            return (width, height) if _orientation(image, path) in range(5, 9) else (height, width)
    except Exception as error:  # decoders raise whatever they like on damaged files
        return str(error) or type(error).__name__


def _orientation(image: Image.Image, path: Path) -> int:
    # Pillow decodes a whole PNG file to look for EXIF data behind the pixels, where hardly any file has it.
    if image.format == "PNG" and "exif" not in image.info and not _has_exif_behind_pixels(path):
        raw = "Raw profile type exif" in image.info
        return int(Image.Image.getexif(image).get(EXIF_ORIENTATION, 1)) if raw else 1
    return int(image.getexif().get(EXIF_ORIENTATION, 1))


def _has_exif_behind_pixels(path: Path) -> bool:
    """Whether a PNG file has EXIF data after its pixels; jumps from chunk to chunk."""
    with path.open("rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            pixels = pixels or kind == b"IDAT"
            begin = file.read(min(length, 16)) if pixels and kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if pixels and (kind == b"eXIf" or begin.startswith(b"Raw profile type")):
                return True
            file.seek(length - len(begin) + 4, os.SEEK_CUR)
    return False


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def first_of(names: Sequence[str]) -> str:
    """The first of some names, as a note tells it."""
    return f"the first being {shown_value(names[0])}" if len(names) > 1 else shown_value(names[0])
