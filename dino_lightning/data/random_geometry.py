"""Random draws, and geometric augmentations that combine several of them.

All draws come from torch's global generator, which `CocoDetection` seeds for each image, so a run can be repeated.
"""

from __future__ import annotations

import torch

from dino_lightning.data.transforms import (
    LabelledImage,
    crop,
    flip_horizontal,
    flip_vertical,
    quarter_turns,
    visible_part,
)

CROP_TRIES = 10


def careful_crop(example: LabelledImage, *, min_crop: float = 0.5, min_visible: float = 0.6) -> LabelledImage:
    """Crop at random so that each box stays mostly visible or leaves the crop entirely, and at least one stays.

    A half-cut room is a wrong example of a room. A window that shows some of a box, but less than `min_visible` of
    its area, is drawn again, up to 10 times; then the image stays whole.
    """
    for _ in range(CROP_TRIES):
        height, width = (integer(max(1, round(min_crop * side)), side) for side in example.size)
        top, left = integer(0, example.size[0] - height), integer(0, example.size[1] - width)
        _, visibility = visible_part(example.boxes_xyxy, top, left, height, width)
        cut = (visibility > 0) & (visibility < min_visible)
        emptied = len(visibility) > 0 and not bool((visibility > 0).any())
        if not emptied and not bool(cut.any()):
            return crop(example, top, left, height, width, min_visible=min_visible)
    return example


def mirrored_and_turned(example: LabelledImage, flip: float, turn: bool) -> LabelledImage:
    """One of the eight flips and quarter turns at random, or of the four with the required orientation, if any."""
    if chance(flip):
        example = flip_horizontal(example)
    if chance(flip):
        example = flip_vertical(example)
    if not turn:
        return example
    turns = integer(0, 3)
    height, width = example.size
    if example.landscape is not None and height != width:
        turns = turns // 2 * 2 + int((width > height) != example.landscape)
    return quarter_turns(example, turns)


def random_crop(example: LabelledImage, height: int, width: int) -> LabelledImage:
    """A crop of (height, width) pixels at a random position."""
    top, left = integer(0, example.size[0] - height), integer(0, example.size[1] - width)
    return crop(example, top, left, height, width)


def chance(probability: float) -> bool:
    """True with this probability."""
    return bool(torch.rand(()) < probability)


def integer(low: int, high: int) -> int:
    """A random integer, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def uniform(low: float, high: float) -> float:
    """A random number, uniform in [low, high)."""
    return low + (high - low) * float(torch.rand(()))


def choice(values: tuple[int, ...]) -> int:
    """One of the values at random, all equally likely."""
    return values[integer(0, len(values) - 1)]
