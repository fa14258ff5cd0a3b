"""The batch that takes the most memory, computed from the annotation file and the options; no image is opened."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from dino_lightning.data.augmentation import (
    CROP_SIDES,
    REFERENCE_SIZE,
    CocoAugmentation,
    FlipsAugmentation,
    PlansAugmentation,
)
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.own_transforms import OwnTransforms
from dino_lightning.data.sizes import resized_size
from dino_lightning.data.transforms import Resize, Transform
from dino_lightning.structures import Batch

Size = tuple[int, int]  # (height, width) in pixels
MOST_ELONGATED = 8  # long side by short side of what own transforms make; beyond it a size may be a few pixels short


def largest_sizes(transform: Transform | None, size: Size) -> list[Size]:
    """Sizes such that whatever a transform makes of an image of `size` lies within one of them; canvases aside.

    Own transforms that may change the size can give any shape up to `MOST_ELONGATED`, before it is resized.

    Raises:
        TypeError: a transform that this function does not know.
    """
    if transform is None:
        return [size]
    if isinstance(transform, OwnTransforms):
        if transform.keep_size:
            return largest_sizes(transform.then, size)
        shapes = _of_any_shape(*_limits(transform.then), MOST_ELONGATED)
        return [*largest_sizes(transform.then, size), *shapes]
    if not isinstance(transform, Resize | FlipsAugmentation | PlansAugmentation | CocoAugmentation):
        raise TypeError(f"The largest image that {type(transform).__name__} can make is not known.")
    # the largest scale gives the largest image; a crop of plans is scaled as the whole image is
    sizes = [resized_size(size, transform.image_size, transform.max_size)]
    if isinstance(transform, CocoAugmentation) and transform.crop > 0:
        sizes += _after_published_crop(transform.image_size, transform.max_size)
    if turns(transform):
        sizes += [(width, height) for height, width in sizes]
    return sizes


def turns(transform: Transform | None) -> bool:
    """Whether a transform turns images by quarters, to an orientation that may be asked for."""
    if isinstance(transform, OwnTransforms):
        return turns(transform.then)
    return isinstance(transform, FlipsAugmentation | PlansAugmentation) and transform.quarter_turns


def _after_published_crop(image_size: int, max_size: int) -> list[Size]:
    """Its windows have any shape, up to this ratio of their sides, and their short side is resized in full."""
    smallest, largest = (max(1, round(side * image_size / REFERENCE_SIZE)) for side in CROP_SIDES)
    return _of_any_shape(image_size, max_size, largest / smallest)


def _of_any_shape(image_size: int, max_size: int, ratio: float) -> list[Size]:
    """The largest sizes by the published rule, of images of any shape up to a ratio of their sides."""
    short = min(image_size, max_size)
    # `resized_size` rounds the short side, so the long one may pass its limit by half the ratio
    long = min(math.ceil(image_size * ratio), math.floor(max_size + ratio / 2))
    return [(short, long), (long, short)]


def _limits(transform: Transform) -> Size:
    """`image_size` and `max_size` of a preset."""
    assert isinstance(transform, Resize | FlipsAugmentation | PlansAugmentation | CocoAugmentation)
    return transform.image_size, transform.max_size


def largest_canvas(
    transform: Transform | None, image_sizes: Iterable[Size], *, alone: bool, oriented: bool = False
) -> Size:
    """The largest (height, width) of a batch in pixels, before it is rounded up to a multiple.

    Args:
        transform: what training does to its images.
        image_sizes: of the image files.
        alone: batches of one image, which is not padded for another's sake.
        oriented: all images of a batch lie down, or all stand up.
    """
    sizes = {made for size in set(image_sizes) for made in largest_sizes(transform, size)}
    if alone:
        return max(sizes, key=lambda size: size[0] * size[1])
    if oriented:
        sizes = {(min(size), max(size)) for size in sizes}
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def most_boxes(annotations: CocoAnnotations) -> int:
    """The most boxes to learn from that any image has."""
    return int(annotations.learnable_per_image().max(initial=0))


def blank_batch(canvas: Size, *, batch_size: int, num_boxes: int, pad_to_multiple: int = 1) -> Batch:
    """Black images that fill their canvas, with boxes of label 0 in the middle."""
    image = torch.zeros((3, *canvas), dtype=torch.uint8)
    target = torch.tensor([0.5, 0.5, 0.25, 0.25]).repeat(num_boxes, 1), torch.zeros(num_boxes, dtype=torch.int64)
    return Batch.from_images([image] * batch_size, targets=[target] * batch_size, pad_to_multiple=pad_to_multiple)
