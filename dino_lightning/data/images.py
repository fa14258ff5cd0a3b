"""Image files decoded the way a viewer shows them: 8-bit RGB, upright, on white.

Plain JPEG files go through torchvision's decoder, which is faster and gives the same pixels; everything else, and
whatever it refuses, goes through Pillow. PNG files always go through Pillow: torchvision 0.29 ends the process on a
damaged one.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino_lightning.data.image_files import EXIF_ORIENTATION, open_image, read_bytes
from dino_lightning.errors import DataError
from dino_lightning.structures import to_uint8

try:  # deprecated since torchvision 0.29 in favour of a package with FFmpeg behind it; Pillow does without
    from torchvision.io import ImageReadMode, decode_jpeg

    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")
    USE_TORCHVISION = True
except ImportError:
    USE_TORCHVISION = False

JPEG_SIGNATURE = b"\xff\xd8\xff"

ImageLike = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor


def read_image(path: Path) -> Tensor:
    """Decode an image file.

    EXIF orientation is applied, transparency is laid on white, grey and CMYK become RGB, and 16-bit values
    are scaled, not clipped: 65535 becomes 255.

    Args:
        path: a JPEG, PNG, BMP, TIFF, WebP, GIF (its first frame) or anything else that Pillow reads.

    Returns:
        (3, height, width) uint8, RGB, in channels-last memory, which torchvision resizes fastest.

    Raises:
        DataError: the file is missing, no regular file, or cannot be decoded.
    """
    return decode_bytes(read_bytes(path), str(path))


def decode_image(file: BinaryIO, name: str) -> Tensor:
    """As `read_image`, from an open file; `name` stands for it in messages."""
    return decode_bytes(file.read(), name)


def decode_bytes(content: bytes, name: str) -> Tensor:
    """As `read_image`, from the content of a file; `name` stands for it in messages."""
    try:
        pixels = _decode_jpeg(content) if USE_TORCHVISION else None
        if pixels is not None:
            return pixels
        with open_image(io.BytesIO(content)) as image:
            return torch.from_numpy(_to_rgb(ImageOps.exif_transpose(image), image.format)).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise DataError(f"{name} cannot be decoded ({error}).") from error


def _decode_jpeg(content: bytes) -> Tensor | None:
    """(3, height, width) of a plain JPEG, or None for whatever Pillow should look at."""
    if not content.startswith(JPEG_SIGNATURE):
        return None
    with open_image(io.BytesIO(content)) as image:
        if image.mode not in ("L", "RGB") or image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            return None
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # a copy: torch warns about read-only buffers
    try:
        pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB)
    except RuntimeError:
        return None
    return pixels


def _to_rgb(image: Image.Image, file_format: str | None) -> npt.NDArray[np.uint8]:
    """(height, width, 3) RGB, transparency on white, 16 bits scaled to 8."""
    # Older Pillow opens 16-bit grey PNG files in the 32-bit mode.
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16 bits")
    if sixteen_bits:
        grey = ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return np.array(image.convert("RGB"))


def to_pixels(image: object) -> Tensor:
    """An `ImageLike` -> (3, H, W) uint8, RGB, 0-255.

    An opened Pillow image is converted as its file would be, but not rotated by its EXIF orientation: boxes are
    given in the pixels of the image object that the caller holds.

    Raises:
        DataError: a file that cannot be read.
        ValueError: something else than an image, or pixels of another kind.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(_to_rgb(image, image.format)).permute(2, 0, 1)
    elif isinstance(image, Tensor):
        pixels = to_uint8(image)
    elif isinstance(image, np.ndarray):
        array = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise ValueError(f"Expected an RGB image, (H, W, 3) uint8; got shape {array.shape} of {array.dtype}.")
        pixels = torch.from_numpy(np.require(array, requirements=("C", "W"))).permute(2, 0, 1)
    else:
        hint = "; could a file not be read?" if image is None else ""
        raise ValueError(
            f"Expected an image: a path, a PIL image, an array or a tensor; got {type(image).__name__}{hint}"
        )
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"Expected an RGB image, (3, H, W); got shape {tuple(pixels.shape)} of {pixels.dtype}.")
    if 0 in pixels.shape:
        raise ValueError(f"Expected an image; got one of {pixels.shape[1]} x {pixels.shape[2]} pixels.")
    return pixels
