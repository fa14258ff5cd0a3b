"""Image files decoded the way a viewer shows them: 8-bit RGB, upright, on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from dino_lightning.data.coco import DataError

# What torchvision decodes just as wanted. It drops alpha, knows no BMP or TIFF, and no EXIF elsewhere.
_TORCHVISION_MODES = {"JPEG": {"L", "RGB"}, "MPO": {"RGB"}, "PNG": {"L", "RGB", "I;16"}}
_ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}


def read_image(path: Path) -> Tensor:
    """Decode an image file.

    EXIF orientation is applied, transparency is laid on white, grey and CMYK become RGB, and 16-bit values
    are scaled, not clipped: 65535 becomes 255.

    Args:
        path: a JPEG, PNG, BMP, TIFF, WebP, GIF (first frame) or anything else Pillow reads.

    Returns:
        (3, height, width) uint8, RGB.

    Raises:
        DataError: the file is missing or cannot be decoded.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    try:
        with Image.open(path) as image:
            if (
                image.mode in _TORCHVISION_MODES.get(image.format or "", ())
                and "transparency" not in image.info
            ):
                try:
                    decoded = decode_image(str(path), mode=ImageReadMode.RGB, apply_exif_orientation=True)
                    return _to_uint8(decoded)
                except RuntimeError:
                    pass  # Pillow forgives more, for example some damaged JPEG markers
            return torch.from_numpy(_decode_with_pillow(image)).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise DataError(f"{path} cannot be decoded ({error}).") from error


def _to_uint8(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    return ((pixels.to(torch.int32) + 128) // 257).to(torch.uint8)


def _decode_with_pillow(image: Image.Image) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """(height, width, 3) uint8."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        grey = _to_uint8(torch.from_numpy(np.asarray(upright).astype(np.int32))).numpy()
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16 bits")
    if upright.mode in _ALPHA_MODES or "transparency" in upright.info:
        coloured = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return np.array(upright.convert("RGB"))
