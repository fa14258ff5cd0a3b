"""Resizing and augmentation of an image together with its boxes.

All random draws come from torch's global generator, which `CocoDetection` seeds for each image, so a run can be
repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

Augmentation = Literal["coco", "plans", "flips", "none"]

# The published sizes, in pixels at image_size 800 (arXiv 2203.03605 follows DETR, arXiv 2005.12872).
REFERENCE_SIZE = 800
SHORT_SIDES = tuple(range(480, 801, 32))
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)

PLANS_SCALE = (0.75, 1.0)  # of image_size
PLANS_CROP_SCALE = (0.5, 1.0)  # of each side
PLANS_MIN_VISIBLE = 0.6  # of a box's area
PLANS_CROP_TRIES = 10


@dataclass(frozen=True)
class LabelledImage:
    """An image and its boxes, as transforms see them.

    Attributes:
        image: (3, h, w) uint8, RGB.
        boxes_xyxy: (N, 4) float32, corners in pixels of `image`.
        labels: (N,) int64, contiguous labels 0..K-1.
        landscape: the orientation that a transform with quarter turns must give; None: any.
    """

    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    landscape: bool | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


Transform = Callable[[LabelledImage], LabelledImage]


def resized_size(size: tuple[int, int], short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """The (height, width) that an image of (height, width) is resized to, by the published rule.

    The short side becomes `short_side`, or less where the long side would pass `max_size`; the long side is
    truncated to an integer. Because the short side is rounded first, the long side of an elongated image can
    still pass `max_size` by a few pixels; kept for parity.
    """
    height, width = size
    short, long = min(size), max(size)
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(1, round(max_size * short / long))
    if short == short_side:
        return size
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def resize(example: LabelledImage, size: tuple[int, int]) -> LabelledImage:
    """Resize to (height, width), bilinear with antialiasing."""
    height, width = example.size
    if (height, width) == size:
        return example
    ratios = example.boxes_xyxy.new_tensor([size[1] / width, size[0] / height] * 2)
    return replace(
        example,
        image=functional.resize(example.image, list(size), antialias=True),
        boxes_xyxy=example.boxes_xyxy * ratios,
    )


def flip_horizontal(example: LabelledImage) -> LabelledImage:
    """Mirror left to right."""
    x1, y1, x2, y2 = example.boxes_xyxy.unbind(-1)
    width = example.size[1]
    return replace(
        example,
        image=example.image.flip(-1),
        boxes_xyxy=torch.stack((width - x2, y1, width - x1, y2), dim=-1),
    )


def flip_vertical(example: LabelledImage) -> LabelledImage:
    """Mirror top to bottom."""
    x1, y1, x2, y2 = example.boxes_xyxy.unbind(-1)
    height = example.size[0]
    return replace(
        example,
        image=example.image.flip(-2),
        boxes_xyxy=torch.stack((x1, height - y2, x2, height - y1), dim=-1),
    )


def quarter_turns(example: LabelledImage, turns: int) -> LabelledImage:
    """Turn counter-clockwise by `turns` times 90 degrees."""
    for _ in range(turns % 4):
        x1, y1, x2, y2 = example.boxes_xyxy.unbind(-1)
        width = example.size[1]
        example = replace(
            example,
            image=example.image.rot90(1, (-2, -1)),
            boxes_xyxy=torch.stack((y1, width - x2, y2, width - x1), dim=-1),
        )
    return example


def crop(
    example: LabelledImage, top: int, left: int, height: int, width: int, *, min_visible: float = 0.0
) -> LabelledImage:
    """Cut out a window.

    Args:
        example: what to cut from.
        top: first row kept, in pixels.
        left: first column kept, in pixels.
        height: rows kept.
        width: columns kept.
        min_visible: boxes with less than this share of their area in the window are dropped; so are those
            without area in it.
    """
    visible_xyxy, visibility = _visible_part(example.boxes_xyxy, top, left, height, width)
    keep = (visibility > 0) & (visibility >= min_visible)
    return LabelledImage(
        image=example.image[..., top : top + height, left : left + width],
        boxes_xyxy=visible_xyxy[keep],
        labels=example.labels[keep],
    )


def _visible_part(boxes_xyxy: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(N, 4) the boxes cut to a window, in its coordinates, and (N,) the share of each box left in it."""
    shifted = boxes_xyxy - boxes_xyxy.new_tensor([left, top, left, top])
    visible = shifted.clamp(min=0).minimum(shifted.new_tensor([width, height, width, height]))
    area = (shifted[:, 2:] - shifted[:, :2]).prod(-1)
    return visible, (visible[:, 2:] - visible[:, :2]).prod(-1) / area


def train_transform(preset: Augmentation, image_size: int = 800, max_size: int = 1333) -> Transform:
    """The training augmentation of a preset.

    Args:
        preset: "coco", the published augmentation; "plans", for drawings, which have no up or down and carry
            meaning in every line; "flips", mirrored and turned by quarters only; "none", the same resizing as in
            evaluation.
        image_size: largest short side in pixels; all sizes of a preset scale with it.
        max_size: limit of the long side in pixels.

    Raises:
        ValueError: an unknown preset.
    """
    if preset == "coco":
        return CocoAugmentation(image_size, max_size)
    if preset == "plans":
        return PlansAugmentation(image_size, max_size)
    if preset == "flips":
        return FlipsAugmentation(image_size, max_size)
    if preset == "none":
        return eval_transform(image_size, max_size)
    raise ValueError(f"Unknown augmentation {preset!r}; choose one of {', '.join(get_args(Augmentation))}.")


def eval_transform(image_size: int = 800, max_size: int = 1333) -> Transform:
    """Resize the short side to `image_size` pixels, with the long side at most `max_size`."""
    return Resize(image_size, max_size)


# Classes rather than closures: loader workers started by `spawn` receive them pickled.
@dataclass(frozen=True)
class Resize:
    """Resize the short side to `image_size` pixels, with the long side at most `max_size`."""

    image_size: int
    max_size: int

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """Apply to one image."""
        return resize(example, resized_size(example.size, self.image_size, self.max_size))


@dataclass(frozen=True)
class FitInto:
    """Shrink what is larger than a square of `side` pixels, after another transform.

    Needed where the canvas is fixed: the published size rule may pass its limit by a few pixels.
    """

    transform: Transform
    side: int

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """Apply to one image."""
        example = self.transform(example)
        longest = max(example.size)
        if longest <= self.side:
            return example
        height, width = (max(1, round(length * self.side / longest)) for length in example.size)
        return resize(example, (height, width))


@dataclass(frozen=True)
class CocoAugmentation:
    """The published augmentation: flip, then one of many sizes, in half of the cases after a crop."""

    image_size: int
    max_size: int

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """Apply to one image."""
        if _chance():
            example = flip_horizontal(example)
        if _chance():
            short_side = self._scaled(_choice(SHORT_SIDES_BEFORE_CROP))
            example = resize(example, resized_size(example.size, short_side))
            smallest, largest = (self._scaled(side) for side in CROP_SIDES)
            width = _integer(smallest, min(example.size[1], largest))
            height = _integer(smallest, min(example.size[0], largest))
            example = _random_crop(example, height, width)
        short_side = self._scaled(_choice(SHORT_SIDES))
        return resize(example, resized_size(example.size, short_side, self.max_size))

    def _scaled(self, pixels: int) -> int:
        return max(1, round(pixels * self.image_size / REFERENCE_SIZE))


@dataclass(frozen=True)
class PlansAugmentation:
    """For drawings: mirrored, turned, scaled, and in half of the cases cropped; colours stay as they are."""

    image_size: int
    max_size: int

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """Apply to one image."""
        example = _mirrored_and_turned(example)
        smallest, largest = (max(1, round(scale * self.image_size)) for scale in PLANS_SCALE)
        example = resize(example, resized_size(example.size, _integer(smallest, largest), self.max_size))
        return careful_crop(example) if _chance() else example


@dataclass(frozen=True)
class FlipsAugmentation:
    """Mirrored and turned by quarters, at the size of evaluation."""

    image_size: int
    max_size: int

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """Apply to one image."""
        example = _mirrored_and_turned(example)
        return resize(example, resized_size(example.size, self.image_size, self.max_size))


def _mirrored_and_turned(example: LabelledImage) -> LabelledImage:
    """One of the eight ways to lay down a square, at random."""
    if _chance():
        example = flip_horizontal(example)
    if _chance():
        example = flip_vertical(example)
    return quarter_turns(example, _integer(0, 3))


def careful_crop(example: LabelledImage) -> LabelledImage:
    """Crop at random such that each box stays mostly visible or vanishes, and at least one stays.

    A half-cut room is a wrong example of a room. A window that shows some of a box, but less than 60 % of its
    area, is drawn again, up to 10 times; then the image stays whole.
    """
    for _ in range(PLANS_CROP_TRIES):
        height, width = (_integer(max(1, round(PLANS_CROP_SCALE[0] * side)), side) for side in example.size)
        top, left = _integer(0, example.size[0] - height), _integer(0, example.size[1] - width)
        _, visibility = _visible_part(example.boxes_xyxy, top, left, height, width)
        cut = (visibility > 0) & (visibility < PLANS_MIN_VISIBLE)
        emptied = len(visibility) > 0 and not bool((visibility > 0).any())
        if not emptied and not bool(cut.any()):
            return crop(example, top, left, height, width, min_visible=PLANS_MIN_VISIBLE)
    return example


def _random_crop(example: LabelledImage, height: int, width: int) -> LabelledImage:
    top, left = _integer(0, example.size[0] - height), _integer(0, example.size[1] - width)
    return crop(example, top, left, height, width)


def _chance() -> bool:
    return bool(torch.rand(()) < 0.5)


def _integer(low: int, high: int) -> int:
    """A random integer, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def _choice(values: tuple[int, ...]) -> int:
    return values[_integer(0, len(values) - 1)]
