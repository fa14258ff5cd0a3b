"""Resizing, mirroring, turning and cutting an image together with its boxes, by torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from dino_lightning.data.sizes import Canvas, ruled_size

WHITE = 255


@dataclass(frozen=True)
class LabelledImage:
    """An image and its boxes, as transforms see them.

    Attributes:
        image: (3, h, w) uint8, RGB.
        boxes_xyxy: (N, 4) float32, corners in pixels of `image`.
        labels: (N,) int64, contiguous labels 0..K-1.
        landscape: the orientation that a transform with quarter turns must give; None: any.
        file_size: (height, width) of the image file where `image` is a copy of it scaled down, else None.
    """

    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    landscape: bool | None = None
    file_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


Transform = Callable[[LabelledImage], LabelledImage]


def resize(example: LabelledImage, size: tuple[int, int]) -> LabelledImage:
    """Resize to (height, width), bilinear with antialiasing."""
    if example.size == size:
        return example
    return replace(
        example,
        image=resize_pixels(example.image, size),
        boxes_xyxy=functional.resize(_boxes(example), list(size)).as_subclass(Tensor),
    )


def resize_pixels(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 -> (3, height, width) uint8, bilinear with antialiasing.

    The memory layout changes the speed by a factor of ten, but not the result.
    """
    height, width = size
    if image.stride(1) < image.stride(2):
        # A quarter turn swapped the strides, so resize the transposed image; one side at a time, because torchvision
        # rounds between the two sides, and the other order would change the last bit.
        return resize_pixels(resize_pixels(image.mT, (width, image.shape[1])), (width, height)).mT
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized: Tensor = functional.resize(channels_last, [height, width], antialias=True)
    return resized


def flip_horizontal(example: LabelledImage) -> LabelledImage:
    """Mirror left to right."""
    return replace(
        example,
        image=functional.horizontal_flip(example.image),
        boxes_xyxy=functional.horizontal_flip(_boxes(example)).as_subclass(Tensor),
    )


def flip_vertical(example: LabelledImage) -> LabelledImage:
    """Mirror top to bottom."""
    return replace(
        example,
        image=functional.vertical_flip(example.image),
        boxes_xyxy=functional.vertical_flip(_boxes(example)).as_subclass(Tensor),
    )


def _boxes(example: LabelledImage) -> tv_tensors.BoundingBoxes:
    box_format = tv_tensors.BoundingBoxFormat.XYXY
    return tv_tensors.BoundingBoxes(example.boxes_xyxy, format=box_format, canvas_size=example.size)


def quarter_turns(example: LabelledImage, turns: int) -> LabelledImage:
    """Turn counter-clockwise by `turns` times 90 degrees. Exactly: torchvision turns boxes by sine and cosine."""
    boxes_xyxy, width, height = example.boxes_xyxy, example.size[1], example.size[0]
    for _ in range(turns % 4):
        x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
        boxes_xyxy = torch.stack((y1, width - x2, y2, width - x1), dim=-1)
        width, height = height, width
    return replace(example, image=example.image.rot90(turns, (-2, -1)), boxes_xyxy=boxes_xyxy)


def crop(
    example: LabelledImage, top: int, left: int, height: int, width: int, *, min_visible: float = 0.0
) -> LabelledImage:
    """Crop to a window and clip the boxes to it.

    Args:
        example: what to cut from.
        top: first row kept, in pixels.
        left: first column kept, in pixels.
        height: rows kept.
        width: columns kept.
        min_visible: boxes with less than this share of their area in the window are dropped; so are those
            without area in it.
    """
    visible_xyxy, visibility = visible_part(example.boxes_xyxy, top, left, height, width)
    keep = (visibility > 0) & (visibility >= min_visible)
    return replace(
        example,
        image=functional.crop(example.image, top, left, height, width),
        boxes_xyxy=visible_xyxy[keep],
        labels=example.labels[keep],
    )


def rotate(example: LabelledImage, degrees: float) -> LabelledImage:
    """Rotate counter-clockwise about the centre by a small angle; the canvas keeps its size, new corners are white.

    A box becomes the smallest one round its four rotated corners, cut to the canvas: exact for a rectangular room,
    a little too large for a round one (by the sine of the angle). Boxes that leave the canvas are dropped.
    """
    rotated = functional.rotate(_boxes(example), degrees, fill=WHITE).as_subclass(Tensor)
    height, width = example.size
    visible_xyxy = rotated.clamp(min=0).minimum(rotated.new_tensor([width, height, width, height]))
    keep = (visible_xyxy[:, 2:] > visible_xyxy[:, :2]).all(-1)
    # Pillow rotates bytes in a quarter to two thirds of the time that torchvision takes by way of floating point.
    page = to_page(example.image)
    turned = page.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(WHITE,) * len(page.getbands()))
    return replace(example, image=from_page(turned), boxes_xyxy=visible_xyxy[keep], labels=example.labels[keep])


def to_page(image: Tensor) -> Image.Image:
    """(3, h, w) uint8 -> a Pillow image; in mode "L", which is faster, where the three channels are the same."""
    grey = torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    return Image.fromarray(image[0].numpy() if grey else image.permute(1, 2, 0).numpy())


def from_page(page: Image.Image) -> Tensor:
    """A Pillow image, mode "L" or "RGB" -> (3, h, w) uint8; the reverse of `to_page`."""
    pixels = torch.from_numpy(np.array(page))
    return pixels.expand(3, -1, -1).contiguous() if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def visible_part(boxes_xyxy: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(N, 4) the boxes cut to a window, in its coordinates, and (N,) the share of each box left in it."""
    shifted = boxes_xyxy - boxes_xyxy.new_tensor([left, top, left, top])
    visible = shifted.clamp(min=0).minimum(shifted.new_tensor([width, height, width, height]))
    area = (shifted[:, 2:] - shifted[:, :2]).prod(-1)
    return visible, (visible[:, 2:] - visible[:, :2]).prod(-1) / area


def eval_transform(image_size: int = 800, max_size: int = 1333, canvas: Canvas | None = None) -> Transform:
    """Resize the short side to `image_size` pixels, with the long side at most `max_size`; or into a canvas."""
    return Resize(image_size, max_size, canvas)


# A class rather than a closure: loader workers started by `spawn` receive it pickled.
@dataclass(frozen=True)
class Resize:
    """Resize the short side to `image_size` pixels, with the long side at most `max_size`; or into a canvas."""

    image_size: int
    max_size: int
    canvas: Canvas | None = None

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """The resized image with its boxes, in pixels of that image; a scaled-down copy gets the size of its file's."""
        return resize(example, self.resized(example.file_size or example.size))

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that an image of (height, width) is resized to."""
        return ruled_size(size, self.image_size, self.max_size, self.canvas)


def resize_by_rule(
    example: LabelledImage, short_side: int, max_size: int, canvas: Canvas | None = None
) -> LabelledImage:
    """Resize by `resized_size`, and into the canvas if there is one."""
    return resize(example, ruled_size(example.size, short_side, max_size, canvas))
