"""Check an exported file against the module: run both on batches of several sizes and compare the detections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_lightning.boxes import paired_iou
from dino_lightning.data.transforms import LabelledImage
from dino_lightning.detections import Detections
from dino_lightning.export.exported_model import ImageRule, Run
from dino_lightning.model.query_selection import SelectedQueries
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule

BOX_TOLERANCE = 0.5  # pixels of the original image
SCORE_TOLERANCE = 1e-3
IOU_TOLERANCE = 1e-2  # beside the threshold of non-maximum suppression
PIXEL_TOLERANCE = 2.1  # of 255: one for each of the two directions of resizing

# The same of one image in a canvas of fixed size, in shares of its sides: the whole of it, parts, and a small one.
IN_CANVAS = ((1.0, 1.0), (1.3, 0.8), (0.5, 1.2), (0.3, 0.2))

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
        exchanged: queries that began with another proposal, of nearly the same score.
        proposals: largest difference between the scores of proposals of one rank.
    """

    batch: int
    size: tuple[int, int]
    detections: int
    boxes: float
    scores: float
    resized: float
    exchanged: int
    proposals: float

    @property
    def same(self) -> bool:
        """Whether all differences are within the tolerances."""
        return (
            self.boxes <= BOX_TOLERANCE
            and max(self.scores, self.proposals) <= SCORE_TOLERANCE
            and self.resized <= PIXEL_TOLERANCE
        )


@torch.no_grad()
def compare_with_module(
    module: DINOModule,
    detect: Run,
    prepare: Run | None = None,
    batches: Sequence[Sequence[Tensor]] | None = None,
    *,
    rule: ImageRule | None = None,
) -> list[Compared]:
    """The differences between an exported file and its module, one row per batch.

    The encoder's proposals become queries by their rank. Among 900 of them some have scores that are the same but for
    the last digits; these change places from one way of computing to the next, as from one GPU to another, and what
    the two queries find changes a little. So proposals are compared by the scores at each rank, and detections with the
    module's own from the same proposals.

    A file that resizes by itself is checked in two steps: its resized pixels against those of evaluation, and its
    detections against those of the module on the same pixels. Rounding makes some pixels differ by one, which is
    invisible, but can swap two low-ranked proposals of nearly the same score.

    Args:
        module: the reference, in evaluation mode.
        detect: what was exported.
        prepare: the first part of it, for one that takes images as they are; None for one that takes prepared ones.
        batches: images, each (3, H, W) uint8, of one size in a batch if there is `prepare`. Drawn ones by default.
        rule: of a file of fixed size, how it wants its image; None for one that leaves sizes open.
    """
    if rule is not None and rule.static is not None:
        return [_in_canvas(module, detect, rule, image) for image in _drawn_for_canvas(rule.static)]
    return [_compared(module, detect, prepare, images) for images in batches or _drawn_batches(module, prepare)]


def _in_canvas(module: DINOModule, detect: Run, rule: ImageRule, image: Tensor) -> Compared:
    """The comparison for one image and a file of fixed size."""
    model, resized = module.model, rule.resized(image)
    size = (int(resized.shape[1]), int(resized.shape[2]))
    asked = size if rule.preprocessing == "inside" else (int(image.shape[1]), int(image.shape[2]))
    batch = Batch.from_images([resized], original_sizes=[asked])
    batch = replace(batch, images=rule.padded(resized)[None])
    if rule.preprocessing == "inside":
        found = detect(batch.images)
    else:
        found = detect(model.normalize(batch.images), torch.tensor([size]), torch.tensor([asked]))
    canvas = (int(batch.images.shape[2]), int(batch.images.shape[3]))
    return _differences(module, batch, found, canvas, 0.0)


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
            return Compared(len(images), canvas, 0, math.inf, math.inf, math.inf, 0, math.inf)
        resized = float((prepared * model.image_std + model.image_mean - batch.images).abs().max())
        batch = replace(batch, images=prepared)
    return _differences(module, batch, found, canvas, resized)


def _differences(
    module: DINOModule, batch: Batch, found: tuple[Tensor, ...], canvas: tuple[int, int], resized: float
) -> Compared:
    """How what was found in a batch differs from what the module finds."""
    detections, own, best = _detected(module, batch)
    exchanged, proposals = int((own != found[3]).sum()), 0.0
    if exchanged:
        detections, _, taken = _detected(module, batch, found[3])
        proposals = float((best - taken).abs().max())
    count, boxes, scores = 0, 0.0, 0.0
    for index, expected in enumerate(detections):
        kept = found[1][index] > 0  # 0: taken out by non-maximum suppression
        actual = Detections(found[0][index][kept], found[1][index][kept], found[2][index][kept])
        compared, by_box, by_score = difference(expected, actual, module.hparams["nms_iou_threshold"])
        count, boxes, scores = count + compared, max(boxes, by_box), max(scores, by_score)
    return Compared(len(detections), canvas, count, boxes, scores, resized, exchanged, proposals)


def _detected(
    module: DINOModule, batch: Batch, token_indices: Tensor | None = None
) -> tuple[list[Detections], Tensor, Tensor]:
    """Detections of the module, from these proposals or its own; (B, Q) tokens of the proposals, and their scores."""
    seen: list[SelectedQueries] = []

    def take(_: nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "token_indices": token_indices}

    selection = module.model.query_selection
    hooks = [
        selection.register_forward_pre_hook(take, with_kwargs=True),
        selection.register_forward_hook(lambda _, __, selected: seen.append(selected)),
    ]
    try:
        detections: list[Detections] = module(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return detections, seen[0].token_indices, seen[0].logits.amax(-1).sigmoid()


def _drawn_batches(module: DINOModule, prepare: Run | None) -> list[list[Tensor]]:
    side = module.hparams["stretch_to"] or module.hparams["image_size"] or 800
    batches = []
    for index, shapes in enumerate(SHAPES):
        kept = shapes if prepare is None else [shapes[0]] * len(shapes)
        sizes = [(round(height * side), round(width * side)) for height, width in kept]
        batches.append([drawn(*size, seed=10 * index + place) for place, size in enumerate(sizes)])
    return batches


def _drawn_for_canvas(static: tuple[int, int]) -> list[Tensor]:
    sizes = [(round(height * static[0]), round(width * static[1])) for height, width in IN_CANVAS]
    return [drawn(*size, seed=index) for index, size in enumerate(sizes)]


def difference(
    expected: Detections, actual: Detections, nms_iou_threshold: float | None = None
) -> tuple[int, float, float]:
    """How many detections were compared, and the largest difference of a corner and of a score.

    Each detection, of either side, is compared with the nearest of the other side that has its label, near in boxes
    and score together. Their order says nothing where scores are nearly the same; and of those that hardly made it
    into the list, the other side need not have one. Nor has it one where non-maximum suppression decided between
    boxes of nearly the same score, or with an overlap close to the threshold, in another way.
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
            if far and (float(score) <= last + SCORE_TOLERANCE or _taken_out(box, score, other, nms_iou_threshold)):
                continue
            compared += one is expected
            boxes, scores = max(boxes, box_error), max(scores, score_error)
    return compared, boxes, scores


def _taken_out(box_xyxy: Tensor, score: Tensor, others: Detections, iou_threshold: float | None) -> bool:
    """Whether non-maximum suppression may have taken the box out in favour of one of the others."""
    if iou_threshold is None:
        return False
    rivals = others.scores >= score - SCORE_TOLERANCE
    return bool((paired_iou(others.boxes_xyxy[rivals], box_xyxy) > iou_threshold - IOU_TOLERANCE).any())


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
    lines = ["batch  height x width  detections  boxes (px)   scores  pixels of 255  exchanged"]
    lines += [
        f"{row.batch:>5}  {f'{row.size[0]} x {row.size[1]}':>14}  {row.detections:>10}  {row.boxes:>10.5f}  "
        f"{row.scores:>7.1e}  {row.resized:>13.1f}  {row.exchanged:>9}"
        for row in rows
    ]
    return "\n".join(["Largest differences between the file and the checkpoint", *lines])
