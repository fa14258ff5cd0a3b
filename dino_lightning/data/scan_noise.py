"""Augmentations that imitate ink, paper and scanner. They leave the boxes unchanged.

Pixels are bytes, and their products fit into 16 bits: nothing here is computed in floating point.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dino_lightning.data.images import decode_bytes
from dino_lightning.data.transforms import WHITE, LabelledImage, resize_pixels, to_page

PALEST_INK = 0.55  # of the contrast with white
DARKEST_PAPER = 0.8  # of white
PIXELS_PER_SPECK = 1500
LOWEST_RESOLUTION = 0.55  # of a blurred scan, as a share of the image's
HIGHEST_RESOLUTION = 0.9
JPEG_QUALITY = (35, 80)


def thicken(example: LabelledImage) -> LabelledImage:
    """Make dark lines thicker by one pixel, to the right and downwards."""
    return replace(example, image=_of_neighbours(torch.minimum, example.image))


def thin(example: LabelledImage) -> LabelledImage:
    """Make dark lines thinner by half a pixel; one that is a pixel wide becomes half as dark."""
    image = example.image
    lighter = _of_neighbours(torch.maximum, image)
    return replace(example, image=(image & lighter) + ((image ^ lighter) >> 1))  # the mean, within a byte


def fade(example: LabelledImage) -> LabelledImage:
    """Reduce the contrast with white by a random factor."""
    contrast = round(128 * _between(PALEST_INK, 1.0))
    darkness = example.image.to(torch.int16).sub_(WHITE).mul_(contrast).bitwise_right_shift_(7)
    return replace(example, image=darkness.add_(WHITE).to(torch.uint8))


def shade(example: LabelledImage) -> LabelledImage:
    """Darken the paper from one side to the other, as where a page was bent on the scanner."""
    height, width = example.size
    ends = DARKEST_PAPER + (1 - DARKEST_PAPER) * torch.rand(2)
    downwards = bool(torch.rand(()) < 0.5)
    length = height if downwards else width
    light = (torch.linspace(float(ends[0]), float(ends[1]), length) * 128).round().to(torch.int16)
    light = light[:, None] if downwards else light[None, :]
    return replace(example, image=example.image.to(torch.int16).mul_(light).bitwise_right_shift_(7).to(torch.uint8))


def speckle(example: LabelledImage) -> LabelledImage:
    """Scatter dark and white dots of a pixel."""
    height, width = example.size
    count = 1 + int(torch.rand(()) * height * width / PIXELS_PER_SPECK)
    rows, columns = torch.randint(height, (count,)), torch.randint(width, (count,))
    dots = torch.where(torch.rand(count) < 0.5, torch.randint(0, 128, (count,)), torch.full((count,), WHITE))
    image = example.image.clone()
    image[:, rows, columns] = dots.to(torch.uint8)
    return replace(example, image=image)


def blur(example: LabelledImage) -> LabelledImage:
    """Blur by about a pixel: scale down a little, and up again."""
    resolution = _between(LOWEST_RESOLUTION, HIGHEST_RESOLUTION)
    height, width = (max(1, round(resolution * side)) for side in example.size)
    return replace(example, image=resize_pixels(resize_pixels(example.image, (height, width)), example.size))


def save_as_jpeg(example: LabelledImage, quality: tuple[int, int] = JPEG_QUALITY) -> LabelledImage:
    """Add JPEG artefacts: compress at a random quality, from the first to the second number, and decode."""
    buffer = io.BytesIO()
    to_page(example.image).save(buffer, "JPEG", quality=int(torch.randint(quality[0], quality[1] + 1, ())))
    return replace(example, image=decode_bytes(buffer.getvalue(), "an augmented image"))


def _of_neighbours(choose: Callable[..., Tensor], image: Tensor) -> Tensor:
    """The darkest or lightest of each pixel, the one on its left and the two above them."""
    rows = image.clone()
    choose(image[:, 1:], image[:, :-1], out=rows[:, 1:])
    both = rows.clone()
    choose(rows[:, :, 1:], rows[:, :, :-1], out=both[:, :, 1:])
    return both


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
