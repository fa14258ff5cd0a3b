"""Facts about image files, found by opening and decoding them, many at once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from dino_lightning.console import bar_seconds
from dino_lightning.data.image_files import (
    EXIF_ORIENTATION,
    available_cores,
    has_further_pages,
    open_image,
    read_bytes,
)
from dino_lightning.data.images import decode_bytes
from dino_lightning.errors import DataError
from dino_lightning.inspection.jpeg_damage import jpeg_damage

THUMBNAIL = 32  # pixels; enough to compare two images
SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "MPO": {".jpg", ".jpeg", ".mpo"},
    "PNG": {".png"},
    "BMP": {".bmp", ".dib"},
    "TIFF": {".tif", ".tiff"},
    "WEBP": {".webp"},
    "GIF": {".gif"},
}


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image file.

    Attributes:
        missing: the file does not exist.
        error: why it cannot be decoded, or "".
        damage: what the decoder repaired, in its words, or "".
        size: (height, width) in pixels as displayed; (0, 0) if it cannot be decoded.
        notes: kinds of findings (see `KINDS`) about how the file is stored.
        turned: EXIF rotates it by 90 degrees, which swaps height and width.
        digest: hash of the file's content; b"" if it cannot be read.
        thumbnail: (32, 32) uint8, grey; zeros if it cannot be decoded.
    """

    missing: bool
    error: str
    damage: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    turned: bool
    digest: bytes
    thumbnail: npt.NDArray[np.uint8]


def image_facts(path: Path) -> ImageFacts:
    """Open and decode one file; an error is one of the facts, nothing is raised."""
    nothing = np.zeros((THUMBNAIL, THUMBNAIL), np.uint8)
    try:
        content = read_bytes(path)
    except DataError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return ImageFacts(missing, str(error), "", (0, 0), (), False, b"", nothing)
    digest = hashlib.blake2b(content, digest_size=16).digest()
    notes, turned = _how_it_is_stored(content, path.suffix.lower())
    try:
        image = decode_bytes(content, str(path))
    except (DataError, MemoryError) as error:
        message = str(error) or f"{path} cannot be decoded (out of memory)."
        return ImageFacts(False, message, "", (0, 0), tuple(notes), turned, digest, nothing)
    small = functional.resize(image, [THUMBNAIL, THUMBNAIL], antialias=True)
    grey = functional.rgb_to_grayscale(small)[0].numpy()
    size = (int(image.shape[1]), int(image.shape[2]))
    return ImageFacts(False, "", jpeg_damage(content), size, tuple(notes), turned, digest, grey)


def facts_of_all(paths: Sequence[Path], name: str, *, progress: bool = True) -> list[ImageFacts]:
    """Facts about many files in the given order, read with one thread for each core."""
    with ThreadPoolExecutor(available_cores()) as pool:  # decoders release Python's global lock
        results = pool.map(image_facts, paths)
        try:
            bar = tqdm(
                results, f"Reading {name}", len(paths), unit="image", disable=not progress, mininterval=bar_seconds()
            )
            return list(bar)
        except BaseException:  # or Ctrl-C would wait for all remaining files
            pool.shutdown(cancel_futures=True)
            raise


def _how_it_is_stored(content: bytes, suffix: str) -> tuple[list[str], bool]:
    """Kinds of notes, and whether EXIF rotates the image by 90 degrees."""
    notes: list[str] = []
    turned = False
    try:
        with open_image(io.BytesIO(content)) as image:
            mode, depth = image.mode, content[24] if image.format == "PNG" and len(content) > 24 else 8
            if mode.startswith("I;16") or mode == "I" or depth == 16:
                notes.append("sixteen-bit")
            elif mode in ("L", "1", "LA"):
                notes.append("grey")
            elif mode in ("P", "PA"):
                notes.append("palette")
            elif mode == "CMYK":
                notes.append("cmyk")
            if mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                notes.append("transparent")
            if has_further_pages(image):
                notes.append("animated")
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            if orientation in range(2, 9):
                notes.append("exif-rotated")
                turned = orientation >= 5
            if image.format in SUFFIXES and suffix not in SUFFIXES[image.format]:
                notes.append("name-unlike-format")
    except Exception:  # decoders raise anything on damaged files; decoding reports the error
        return notes, turned
    return notes, turned
