"""Test-time augmentation: images seen flipped and turned by quarters, and what is found in the views fused into one.

A drawing looks much the same from all sides, but a detector's errors in its views are not the same ones: fused, they
are fewer, for as many times the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from dino_lightning.detections import Detections
from dino_lightning.structures import Batch
from dino_lightning.training.option_checks import check_tta_views

SAME_OBJECT = 0.55  # IoU from which boxes of two views mean one object, as weighted boxes fusion has it
PIXELS_AT_ONCE = 3_000_000  # of the views that are in one batch: no more memory than a batch of training takes

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to see an image; rows and columns are exchanged first, then it is mirrored.

    Attributes:
        transposed: rows become columns.
        mirrored: left becomes right.
        upside_down: top becomes bottom.
    """

    transposed: bool = False
    mirrored: bool = False
    upside_down: bool = False

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) of an image of that (height, width) seen so."""
        return (size[1], size[0]) if self.transposed else size

    def seen(self, pixels: Tensor) -> Tensor:
        """(..., H, W), an image -> the same seen so, (..., W, H) where it is transposed."""
        pixels = pixels.transpose(-1, -2) if self.transposed else pixels
        sides = [side for side, wanted in ((-1, self.mirrored), (-2, self.upside_down)) if wanted]
        return pixels.flip(sides) if sides else pixels

    def back(self, found: Detections, size: tuple[int, int]) -> Detections:
        """Detections in pixels of the view, as such in pixels of the image, whose (height, width) is given."""
        height, width = self.size(size)
        x1, y1, x2, y2 = found.boxes_xyxy.unbind(-1)
        if self.mirrored:
            x1, x2 = width - x2, width - x1
        if self.upside_down:
            y1, y2 = height - y2, height - y1
        corners = (y1, x1, y2, x2) if self.transposed else (x1, y1, x2, y2)
        return replace(found, boxes_xyxy=torch.stack(corners, dim=-1))


ORIENTATIONS = tuple(
    Orientation(transposed, mirrored, upside_down)
    for transposed in (False, True)
    for upside_down in (False, True)
    for mirrored in (False, True)
)


def orientations(count: int) -> tuple[Orientation, ...]:
    """The first `count` of `ORIENTATIONS`.

    Raises:
        ValueError: it is none of `TTA_VIEWS`.
    """
    check_tta_views(count)
    return ORIENTATIONS[:count]


def orientation_groups(count: int, shape: Sequence[int], *, first_alone: bool = False) -> list[list[Orientation]]:
    """The first `count` of `ORIENTATIONS` in groups that the model sees at once: of one shape, and not too large.

    Args:
        count: one of `TTA_VIEWS`.
        shape: (B, 3, H, W) of the images.
        first_alone: the image as it is has a group of its own.

    Raises:
        ValueError: a number of views that there is not.
    """
    most = max(1, PIXELS_AT_ONCE // max(1, shape[0] * shape[2] * shape[3]))
    groups: list[list[Orientation]] = []
    for place, orientation in enumerate(orientations(count)):
        new = not groups or groups[-1][0].transposed != orientation.transposed or len(groups[-1]) >= most
        if new or (first_alone and place == 1):
            groups.append([])
        groups[-1].append(orientation)
    return groups


def seen_batch(batch: Batch, ways: Sequence[Orientation]) -> Batch:
    """A batch whose images are seen in other ways: all in the first, then all in the second, and so on.

    Args:
        batch: images, each top left in its canvas.
        ways: all of them transposed, or none.

    Returns:
        A batch of the same kind, of `len(ways)` times as many images, without targets and ground truth.
    """
    canvas = ways[0].size((int(batch.images.shape[2]), int(batch.images.shape[3])))
    images = batch.images.new_zeros((len(ways) * len(batch), 3, *canvas))
    for row, (way, index) in enumerate(product(ways, range(len(batch)))):
        height, width = batch.image_sizes[index]
        seen = way.seen(batch.images[index, :, :height, :width])
        images[row, :, : seen.shape[1], : seen.shape[2]] = seen
    return replace(
        batch,
        images=images,
        image_sizes=tuple(way.size(size) for way in ways for size in batch.image_sizes),
        image_ids=len(ways) * batch.image_ids,
        original_sizes=tuple(way.size(size) for way in ways for size in batch.original_sizes),
        targets=None,
        ground_truth=None,
    )


def detect_in_views(
    detect: Callable[[Batch], list[Detections]],
    batch: Batch,
    count: int,
    *,
    first: list[Detections] | None = None,
    max_detections: int = 300,
    nms_iou_threshold: float | None = None,
) -> list[Detections]:
    """What any detector finds in a batch whose images are seen in several ways, some of them in one batch.

    Args:
        detect: the detections of a batch, in pixels of its original images.
        batch: the images.
        count: how many ways, one of `TTA_VIEWS`.
        first: the detections of the images as they are, where they are there already.
        max_detections: see `fuse`.
        nms_iou_threshold: see `fuse`.

    Returns:
        Detections of each image; on the host, where there are several ways.

    Raises:
        ValueError: a number of views that there is not.
    """
    found: list[list[Detections]] = [[] for _ in batch.image_sizes]
    for group in orientation_groups(count, batch.images.shape, first_alone=first is not None):
        detections = detect(seen_batch(batch, group)) if first is None else first
        first = None
        places = product(group, zip(found, batch.original_sizes, strict=True))
        for (orientation, (of_image, size)), seen in zip(places, detections, strict=True):
            of_image.append(orientation.back(seen, size))
    return [fuse(of_image, max_detections=max_detections, nms_iou_threshold=nms_iou_threshold) for of_image in found]


def fuse(
    views: Sequence[Detections], *, max_detections: int = 300, nms_iou_threshold: float | None = None
) -> Detections:
    """The detections of several views of one image in one.

    The best box of all, and of each other view the best that overlaps it and has its label, mean one object; then the
    best of those that are left, and so on. The object's box has the median of each corner of theirs, which one bad view
    does not move; its score is the mean over all views, where one that has not found it counts as 0. After weighted
    boxes fusion (arXiv 1910.13302), which has the weighted mean of the boxes.

    Args:
        views: what was found in each, in pixels of the image.
        max_detections: keep so many at the most.
        nms_iou_threshold: of the non-maximum suppression afterwards, whatever the labels; None for none.

    Returns:
        Detections on the host, best first.
    """
    if len(views) == 1:
        return views[0]
    most = max(1, *(len(found) for found in views))
    boxes, scores = torch.zeros(len(views), most, 4), torch.zeros(len(views), most)  # of score 0: no detection
    labels = torch.full((len(views), most), -1)
    for view, found in enumerate(views):
        boxes[view, : len(found)] = found.boxes_xyxy
        scores[view, : len(found)], labels[view, : len(found)] = found.scores, found.labels
    fused_boxes, fused_scores, fused_labels = _fused(boxes, scores, labels)
    order = fused_scores.argsort(descending=True, stable=True)
    if nms_iou_threshold is not None:
        order = order[nms(fused_boxes[order], fused_scores[order], nms_iou_threshold)]
    order = order[:max_detections]
    return replace(views[0], boxes_xyxy=fused_boxes[order], scores=fused_scores[order], labels=fused_labels[order])


def _fused(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(V, N, 4), (V, N), (V, N) of V views -> (M, 4) boxes, (M,) scores and (M,) labels of the objects."""
    count, most = scores.shape
    overlap = box_iou(boxes.flatten(0, 1), boxes.flatten(0, 1)).view(count * most, count, most)
    same = (overlap >= SAME_OBJECT) & (labels.flatten()[:, None, None] == labels)
    same_object, corners, left = same.numpy(), boxes.numpy(), scores.numpy().copy()  # 0 in `left`: taken
    every, flat = np.arange(count), scores.flatten()
    found: list[tuple[Array, float, int]] = []
    for row in flat.argsort(descending=True, stable=True).tolist():
        view, place = divmod(row, most)
        if left[view, place] <= 0:
            continue
        near = np.where(same_object[row], left, 0)
        near[view] = 0
        near[view, place] = left[view, place]
        best = near.argmax(axis=1)
        agree = near[every, best] > 0
        score = float(near[every, best].sum()) / count
        found.append((np.median(corners[every, best][agree], axis=0), score, int(labels[view, place])))
        left[every[agree], best[agree]] = 0
    if not found:
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return (
        torch.from_numpy(np.stack([box for box, _, _ in found])).float(),
        torch.tensor([score for _, score, _ in found]),
        torch.tensor([label for _, _, label in found]),
    )
