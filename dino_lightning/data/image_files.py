"""Image files as files: their names, their headers and their bytes. Nothing here decodes pixels or needs PyTorch."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dino_lightning.errors import DataError

IMAGE_SUFFIXES = {
    ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp",
}  # fmt: skip
MAX_PIXELS = 1_000_000_000  # 3 GB of RGB; a drawing office's largest scans (A0 at 600 dpi) have half of it
EXIF_ORIENTATION = 0x0112
FEW_IMAGES = 200  # read so quickly that a progress bar is of no use
_PILLOWS_LIMIT = threading.Lock()
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def is_image(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - the name may hold a null byte


@contextmanager
def open_image(file: BinaryIO | Path) -> Iterator[Image.Image]:
    """An image of which only the header has been read: its format, mode, size, frames and EXIF data.

    Pillow's own guard against decompression bombs would refuse the scan of a large drawing; the limit here is
    `MAX_PIXELS`, known from the header before a pixel is decoded.

    Raises:
        OSError: no image, or none that Pillow knows.
        ValueError: it has more than `MAX_PIXELS` pixels.
    """
    with _PILLOWS_LIMIT:  # a global variable of Pillow, which other code in this process may rely on
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"its header says {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all; "
                "scale it down or cut it into tiles"
            )
        yield image


def has_further_pages(image: Image.Image) -> bool:
    """Whether a file has more than the one image that is read of it: pages of a scan, frames of an animation."""
    return getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # MPO: a photograph with a preview


def read_bytes(path: Path) -> bytes:
    """The content of an image file, which may be a link to one.

    Raises:
        DataError: it is missing, cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read()


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """An image file, open for reading; it may be a link to one.

    Raises:
        DataError: it is missing, cannot be read, or is no regular file: a named pipe would wait for a writer, and a
            device may have no end.
    """
    try:
        kind = _kind_of_file(path.stat().st_mode)  # before it is opened: devices may act on that
        if not kind:
            # should it have been replaced since: an opened pipe does not wait
            with open(os.open(path, _OPEN_FLAGS), "rb") as file:  # noqa: PTH123  # of a descriptor
                kind = _kind_of_file(os.fstat(file.fileno()).st_mode)
                if not kind:
                    yield file
                    return
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise DataError(f"{path} cannot be decoded ({error}).") from error
    raise DataError(f"{path} is not a regular file but {kind}.")


def _kind_of_file(mode: int) -> str:
    """What a file is by its `st_mode`, as a message names it; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def available_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
