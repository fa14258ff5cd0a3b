"""Ink, paper and scanner: what happens to a drawing between the pen and the file. Boxes stay where they are."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from dino_lightning.data.images import decode_bytes
from dino_lightning.data.transforms import LabelledImage

PALEST_INK = 0.55  # of the contrast with white
DARKEST_PAPER = 0.8  # of white
PIXELS_PER_SPECK = 1500
BLUR_RADIUS = (0.3, 0.8)  # pixels
JPEG_QUALITY = (35, 80)


def thicken(example: LabelledImage) -> LabelledImage:
    """Make dark lines thicker by one pixel, to the right and downwards."""
    image = example.image.clone()
    torch.minimum(image[:, 1:], example.image[:, :-1], out=image[:, 1:])
    wider = image.clone()
    torch.minimum(wider[:, :, 1:], image[:, :, :-1], out=wider[:, :, 1:])
    return replace(example, image=wider)


def fade(example: LabelledImage) -> LabelledImage:
    """Bring everything nearer to white."""
    share = round(256 * (PALEST_INK + (1 - PALEST_INK) * float(torch.rand(()))))
    darkness = (255 - example.image).to(torch.int32) * share >> 8
    return replace(example, image=(255 - darkness).to(torch.uint8))


def shade(example: LabelledImage) -> LabelledImage:
    """Darken the paper from one side to the other, as where a page was bent on the scanner."""
    height, width = example.size
    ends = DARKEST_PAPER + (1 - DARKEST_PAPER) * torch.rand(2)
    downwards = bool(torch.rand(()) < 0.5)
    length = height if downwards else width
    light = (torch.linspace(float(ends[0]), float(ends[1]), length) * 128).round().to(torch.int16)
    light = light[:, None] if downwards else light[None, :]
    return replace(example, image=(example.image.to(torch.int16) * light >> 7).to(torch.uint8))


def speckle(example: LabelledImage) -> LabelledImage:
    """Scatter dark and white dots of a pixel."""
    height, width = example.size
    count = 1 + int(torch.rand(()) * height * width / PIXELS_PER_SPECK)
    rows, columns = torch.randint(height, (count,)), torch.randint(width, (count,))
    dots = torch.where(torch.rand(count) < 0.5, torch.randint(0, 128, (count,)), torch.full((count,), 255))
    image = example.image.clone()
    image[:, rows, columns] = dots.to(torch.uint8)
    return replace(example, image=image)


def blur(example: LabelledImage) -> LabelledImage:
    """Blur by less than a pixel."""
    low, high = BLUR_RADIUS
    radius = low + (high - low) * float(torch.rand(()))
    blurred = _page(example).filter(ImageFilter.BoxBlur(radius))
    return replace(example, image=torch.from_numpy(np.array(blurred)).permute(2, 0, 1))


def save_as_jpeg(example: LabelledImage) -> LabelledImage:
    """Compress and decode."""
    buffer = io.BytesIO()
    _page(example).save(buffer, "JPEG", quality=int(torch.randint(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1, ())))
    return replace(example, image=decode_bytes(buffer.getvalue(), "an augmented image"))


def _page(example: LabelledImage) -> Image.Image:
    return Image.fromarray(example.image.permute(1, 2, 0).numpy())
