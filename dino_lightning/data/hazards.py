"""What of a training set can hardly be learnt at the chosen sizes, from counts of its annotation file alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dino_lightning.data.coco import CocoAnnotations

SMALLEST_SIDE = 1.0  # pixels of a box after resizing
SMALLEST_IMAGE = 32  # pixels: the stride of the coarsest published level


def hazards(
    annotations: CocoAnnotations, *, num_queries: int, image_size: int, max_size: int, stretch_to: int | None
) -> list[str]:
    """A sentence each on more boxes than queries, boxes below a pixel, and images that become slivers.

    Args:
        annotations: the training file.
        num_queries: objects that the model can find in an image.
        image_size: short side of the images in pixels.
        max_size: limit of their long side in pixels.
        stretch_to: side in pixels of the square that images are stretched to, or None.
    """
    sizes = annotations.images.sizes
    if not len(sizes):
        return []
    learnable, per_image = annotations.learnable, annotations.learnable_per_image()
    scales = _scales(sizes, image_size, max_size, stretch_to)
    sentences = []
    crowded = per_image > num_queries
    if crowded.any():
        worst = int(per_image.argmax())
        sentences.append(
            f"{_images(crowded)} more boxes than the model has queries, {num_queries} (image "
            f"{annotations.images[worst].id}: {per_image[worst]}): those in excess are never learnt. Raise "
            "--model.num_queries, or cut the images into tiles."
        )
    owners = np.repeat(np.arange(len(sizes)), np.diff(annotations.offsets))[learnable]
    limits = sizes[owners][:, [1, 0, 1, 0]]
    boxes = np.clip(annotations.boxes_xyxy[learnable], 0, limits)
    sides = (boxes[:, 2:] - boxes[:, :2]) * scales[owners][:, ::-1]
    tiny = (sides < SMALLEST_SIDE).any(axis=1)
    if tiny.any():
        first = int(np.flatnonzero(tiny)[0])
        width, height = sides[first].tolist()
        sentences.append(
            f"{int(tiny.sum())} of {len(sides)} boxes are less than a pixel wide or high after resizing (the first in "
            f"image {annotations.images[int(owners[first])].id}: {width:.2f} x {height:.2f}): they cannot be learnt. "
            "Train at a larger --data.image_size, or cut the images into tiles."
        )
    resized = sizes * scales
    slivers = resized.min(axis=1) < np.minimum(SMALLEST_IMAGE, sizes.min(axis=1))
    if slivers.any():
        worst = int(np.where(slivers, resized.min(axis=1), np.inf).argmin())
        (height, width), (new_height, new_width) = sizes[worst].tolist(), np.maximum(resized[worst], 1).tolist()
        sentences.append(
            f"{_images(slivers)} so long a shape that less than {SMALLEST_IMAGE} pixels of its short side remain "
            f"(image {annotations.images[worst].id}: {width} x {height} becomes {new_width:.0f} x {new_height:.0f}). "
            "Cut such images into tiles, or raise --data.max_size."
        )
    return sentences


def _scales(
    sizes: npt.NDArray[np.int64], image_size: int, max_size: int, stretch_to: int | None
) -> npt.NDArray[np.float64]:
    """(images, 2) by how much height and width are scaled, as `transforms.resized_size` does, without its rounding."""
    if stretch_to is not None:
        return stretch_to / sizes
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    scale: npt.NDArray[np.float64] = np.minimum(image_size / short, max_size / long)
    return np.stack((scale, scale), axis=1)


def _images(where: npt.NDArray[np.bool_]) -> str:
    count = int(where.sum())
    return "1 image has" if count == 1 else f"{count} images have"
