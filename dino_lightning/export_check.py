"""Is what was exported the same as the module? Run both, on several sizes of images and batches, and compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dino_lightning.data.transforms import LabelledImage
from dino_lightning.module import DINOModule
from dino_lightning.structures import Batch, Detections

BOX_TOLERANCE = 0.5  # pixels of the original image
SCORE_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 2.1  # of 255: one for each of the two directions of resizing

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]

# (height, width) of the images of each batch, in short sides of evaluation: alone, in a few sizes, many small ones.
SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((1.0, 1.3),),
    ((0.9, 0.7), (0.6, 0.8), (0.5, 1.1)),
    tuple((0.3 + 0.02 * index, 0.5 - 0.03 * index) for index in range(8)),
)


class Compared(NamedTuple):
    """How two runs over one batch differ.

    Attributes:
        batch: how many images.
        size: (height, width) of what the exported file was given.
        detections: how many were compared.
        boxes: largest difference of a corner, in pixels of the original image.
        scores: largest difference of a score.
        resized: largest difference of a resized pixel, of 255; 0 where the file does not resize.
    """

    batch: int
    size: tuple[int, int]
    detections: int
    boxes: float
    scores: float
    resized: float

    @property
    def same(self) -> bool:
        """Whether nothing differs by more than is allowed."""
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE and self.resized <= PIXEL_TOLERANCE


@torch.no_grad()
def compare_with_module(
    module: DINOModule, detect: Run, prepare: Run | None = None, batches: Sequence[Sequence[Tensor]] | None = None
) -> list[Compared]:
    """Compare on each batch.

    A file that resizes by itself is judged in two steps: its resized pixels beside those of evaluation, and its
    detections beside those of the module in the very same pixels. Rounding makes some pixels differ by one, which no
    eye sees, but which can exchange two proposals of nearly the same score, deep down in their list.

    Args:
        module: what is right, in evaluation mode.
        detect: what was exported.
        prepare: the first part of it, for one that takes images as they are; None for one that takes prepared ones.
        batches: images, each (3, H, W) uint8, of one size in a batch if there is `prepare`. Drawn ones by default.
    """
    return [_compared(module, detect, prepare, images) for images in batches or _drawn_batches(module, prepare)]


def _compared(module: DINOModule, detect: Run, prepare: Run | None, images: Sequence[Tensor]) -> Compared:
    transform, model = module.eval_transform(), module.model
    unlabelled = [LabelledImage(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)) for image in images]
    sizes = [image.size for image in unlabelled]
    batch = Batch.from_images([transform(image).image for image in unlabelled], original_sizes=sizes)
    resized, canvas = 0.0, (int(batch.images.shape[2]), int(batch.images.shape[3]))
    if prepare is None:
        found = detect(model.normalize(batch.images), torch.tensor(batch.image_sizes), torch.tensor(sizes))
    else:
        stacked, canvas = torch.stack(list(images)), sizes[0]
        found = detect(stacked)
        prepared, image_sizes, _ = prepare(stacked)
        if prepared.shape != batch.images.shape or image_sizes.tolist() != [list(size) for size in batch.image_sizes]:
            return Compared(len(images), canvas, 0, math.inf, math.inf, math.inf)
        resized = float((prepared * model.image_std + model.image_mean - batch.images).abs().max())
        batch = replace(batch, images=prepared)
    count, boxes, scores = 0, 0.0, 0.0
    for index, expected in enumerate(module(batch)):
        compared, by_box, by_score = difference(expected, Detections(*(value[index] for value in found)))
        count, boxes, scores = count + compared, max(boxes, by_box), max(scores, by_score)
    return Compared(len(images), canvas, count, boxes, scores, resized)


def _drawn_batches(module: DINOModule, prepare: Run | None) -> list[list[Tensor]]:
    side = module.hparams["stretch_to"] or module.hparams["image_size"] or 800
    batches = []
    for index, shapes in enumerate(SHAPES):
        kept = shapes if prepare is None else [shapes[0]] * len(shapes)
        sizes = [(round(height * side), round(width * side)) for height, width in kept]
        batches.append([drawn(*size, seed=10 * index + place) for place, size in enumerate(sizes)])
    return batches


def difference(expected: Detections, actual: Detections) -> tuple[int, float, float]:
    """How many detections were compared, and the largest difference of a corner and of a score.

    Each detection, of either side, is compared with the nearest of the other side that has its label, near in boxes
    and score together. Their order says nothing where scores are nearly the same; and of those that hardly made it
    into the list, the other side need not have one.
    """
    last = max((float(one.scores.min()) for one in (expected, actual) if len(one)), default=0.0)
    compared, boxes, scores = 0, 0.0, 0.0
    for one, other in ((expected, actual), (actual, expected)):
        for box, score, label in zip(one.boxes_xyxy, one.scores, one.labels, strict=True):
            rivals = other.labels == label
            by_box = (other.boxes_xyxy[rivals] - box).abs().amax(-1)
            by_score = (other.scores[rivals] - score).abs()
            if len(by_box):
                nearest = int(torch.maximum(by_box / BOX_TOLERANCE, by_score / SCORE_TOLERANCE).argmin())
                box_error, score_error = float(by_box[nearest]), float(by_score[nearest])
            else:
                box_error, score_error = float("inf"), float("inf")
            far = box_error > BOX_TOLERANCE or score_error > SCORE_TOLERANCE
            if far and float(score) <= last + SCORE_TOLERANCE:
                continue
            compared += one is expected
            boxes, scores = max(boxes, box_error), max(scores, score_error)
    return compared, boxes, scores


def drawn(height: int, width: int, seed: int) -> Tensor:
    """(3, height, width) uint8: rectangles of all sizes and colours, and some noise."""
    draws = torch.Generator().manual_seed(seed)
    image = torch.full((3, height, width), 255.0)
    for _ in range(30):
        top, left, tall, broad = torch.rand(4, generator=draws).tolist()
        rows = slice(int(top * height), int((top + 0.4 * tall**2) * height) + 2)
        columns = slice(int(left * width), int((left + 0.4 * broad**2) * width) + 2)
        image[:, rows, columns] = 255 * torch.rand(3, 1, 1, generator=draws)
    return (image + 10 * torch.randn(image.shape, generator=draws)).clamp(0, 255).to(torch.uint8)


def table(rows: Sequence[Compared]) -> str:
    """The comparison as text."""
    lines = ["batch  height x width  detections  boxes differ by  scores by  resized pixels by"]
    lines += [
        f"{row.batch:>5}  {f'{row.size[0]} x {row.size[1]}':>14}  {row.detections:>10}  {row.boxes:>12.5f} px  "
        f"{row.scores:>9.1e}  {row.resized:>17.1f}"
        for row in rows
    ]
    return "\n".join(lines)
