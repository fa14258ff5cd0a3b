"""Images cut into overlapping tiles, and the detections of the tiles put together again.

An object no larger than the overlap lies whole within at least one tile. A larger one may be cut by every tile: its
parts are joined where two tiles agree on it in what both see, and a view of the whole image, scaled down, may see it
in one piece. Within one view nothing is suppressed: DINO needs no non-maximum suppression there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from dino_lightning.detections import Detections

SAME_OBJECT = 0.5  # IoU from which two boxes of one label, from two views, mean one object
PART_OF_OBJECT = 0.8  # share of a cut box inside a whole one from which it is a part of that
EDGE = 0.01  # of a tile's side: a box that comes so close to an inner edge may be cut by it
EDGE_PIXELS = 2.0  # at least

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        """Corners x1, y1, x2, y2 in pixels of the whole image."""
        return self.left, self.top, self.left + self.width, self.top + self.height


def tiles(size: tuple[int, int], side: int, overlap: float) -> list[Window]:
    """Windows of one size that cover an image of (height, width), row by row.

    Args:
        size: of the image.
        side: of a tile, in pixels; an image that is smaller in one direction has one tile in it.
        overlap: share of a tile's side that neighbours have in common, at least.

    Raises:
        ValueError: a side below 1 pixel, or an overlap that is not in [0, 0.9].
    """
    if side < 1:
        raise ValueError(f"tile is {side}; it must be at least 1 pixel.")
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"overlap is {overlap}; it must lie between 0 and 0.9.")
    height, width = min(side, size[0]), min(side, size[1])
    rows, columns = (_starts(length, side, overlap) for length in size)
    return [Window(top, left, height, width) for top, left in product(rows, columns)]


def views(size: tuple[int, int], side: int | None, overlap: float, *, whole: bool) -> list[Window]:
    """What the detector is to see of an image of (height, width): its tiles, and all of it.

    Without a `side`, or where one tile holds all of the image, that is the image and nothing else.
    """
    everything = Window(0, 0, *size)
    cut = [everything] if side is None else tiles(size, side, overlap)
    return [*cut, everything] if whole and len(cut) > 1 else cut


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    stride = max(1, int(side * (1 - overlap)))
    gaps = -(-(length - side) // stride)
    return [index * (length - side) // gaps for index in range(gaps + 1)]


def merge(parts: Sequence[tuple[Window, Detections]], size: tuple[int, int]) -> Detections:
    """The detections of an image of (height, width) from those of its views.

    Args:
        parts: each view, and what was found in it, in pixels of the view.
        size: of the image.

    Returns:
        Detections in pixels of the image, best first.

    Raises:
        ValueError: no views.
    """
    if not parts:
        raise ValueError("There are no views to merge.")
    if len(parts) == 1 and parts[0][0] == Window(0, 0, *size):
        return parts[0][1]
    windows = np.array([window.xyxy for window, _ in parts], dtype=np.float64)
    counts = [len(found) for _, found in parts]
    view = np.repeat(np.arange(len(parts)), counts)
    boxes = torch.cat([found.boxes_xyxy for _, found in parts]).double().numpy(force=True)
    labels = torch.cat([found.labels for _, found in parts]).numpy(force=True)
    scores = torch.cat([found.scores for _, found in parts]).numpy(force=True)
    boxes = _clipped(boxes + windows[view][:, [0, 1, 0, 1]], windows[view])
    kept: list[tuple[Array, npt.NDArray[np.float32], int]] = []
    for label in np.unique(labels):
        rows = (labels == label) & (_area(boxes) > 0)
        merged_boxes, merged_scores = _merge_label(boxes[rows], scores[rows], view[rows], windows, size)
        kept.append((merged_boxes, merged_scores, int(label)))
    all_boxes = np.concatenate([boxes for boxes, _, _ in kept] or [np.zeros((0, 4))])
    all_scores = np.concatenate([scores for _, scores, _ in kept] or [np.zeros(0, np.float32)])
    all_labels = np.concatenate([np.full(len(scores), label) for _, scores, label in kept] or [np.zeros(0, np.int64)])
    order = np.argsort(-all_scores, kind="stable")
    return replace(
        parts[0][1],
        boxes_xyxy=torch.from_numpy(all_boxes[order]).float(),
        scores=torch.from_numpy(all_scores[order]),
        labels=torch.from_numpy(all_labels[order]).long(),
    )


def _merge_label(
    boxes: Array,
    scores: npt.NDArray[np.float32],
    view: npt.NDArray[np.int64],
    windows: Array,
    size: tuple[int, int],
) -> tuple[Array, npt.NDArray[np.float32]]:
    """As `merge`, of one label: boxes (N, 4) in pixels of the image, and the view each comes from."""
    cut = _touches_inner_edge(boxes, windows[view], size)
    keep = np.ones(len(boxes), dtype=bool)
    for row in np.flatnonzero(cut):  # what another view sees whole needs no parts
        others = np.flatnonzero(~cut & (view != view[row]))
        to_be_seen = _clipped(boxes[others], windows[view[row]])
        inside = _area(_clipped(boxes[others], boxes[row])) / _area(boxes[row])
        keep[row] = not ((_iou(boxes[row], to_be_seen) >= SAME_OBJECT) | (inside >= PART_OF_OBJECT)).any()
    boxes, scores, view, cut = boxes[keep], scores[keep], view[keep], cut[keep]
    boxes, scores, view = _join_parts(boxes, scores, view, cut, windows)
    order = np.argsort(-scores, kind="stable")
    boxes, scores, view = boxes[order], scores[order], view[order]
    keep = np.ones(len(boxes), dtype=bool)
    for place in range(len(boxes)):  # seen whole by several views: the best of them
        if keep[place]:
            rest = slice(place + 1, None)
            keep[rest] &= (view[rest] == view[place]) | (_iou(boxes[place], boxes[rest]) < SAME_OBJECT)
    return boxes[keep], scores[keep]


def _join_parts(
    boxes: Array,
    scores: npt.NDArray[np.float32],
    view: npt.NDArray[np.int64],
    cut: npt.NDArray[np.bool_],
    windows: Array,
) -> tuple[Array, npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """One box round the parts of each object that several views cut; it belongs to a view of its own."""
    group = np.arange(len(boxes))
    rows = np.flatnonzero(cut)
    for position, row in enumerate(rows):
        others = rows[position + 1 :]
        others = others[view[others] != view[row]]
        common = _clipped(windows[view[others]], windows[view[row]])
        agree = _iou(_clipped(boxes[row], common), _clipped(boxes[others], common)) >= SAME_OBJECT
        for other in others[agree]:
            group[group == group[other]] = group[row]
    starts, members = np.unique(group, return_inverse=True)
    joined, best, views_of = boxes[starts].copy(), scores[starts].copy(), view[starts].copy()
    np.minimum.at(joined[:, :2], members, boxes[:, :2])
    np.maximum.at(joined[:, 2:], members, boxes[:, 2:])
    np.maximum.at(best, members, scores)
    several = np.bincount(members, minlength=len(starts)) > 1
    views_of[several] = len(windows) + np.arange(int(several.sum()))
    return joined, best, views_of


def _touches_inner_edge(boxes: Array, windows: Array, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(N,) whether a box ends at an edge of its window that is no edge of the image."""
    height, width = size
    border = np.array([0, 0, width, height], dtype=np.float64)
    sides = windows[:, 2:] - windows[:, :2]
    margin = np.tile(np.maximum(EDGE_PIXELS, EDGE * sides), 2)
    touches: npt.NDArray[np.bool_] = ((np.abs(boxes - windows) <= margin) & (windows != border)).any(axis=1)
    return touches


def _clipped(boxes: Array, to: Array) -> Array:
    """Boxes cut to others, pairwise by broadcasting; (..., 4) corners, both zero-sized where nothing is left."""
    low, high = np.maximum(boxes[..., :2], to[..., :2]), np.minimum(boxes[..., 2:], to[..., 2:])
    return np.concatenate((low, np.maximum(low, high)), axis=-1)


def _area(boxes: Array) -> Array:
    area: Array = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
    return area


def _iou(boxes: Array, others: Array) -> Array:
    """Overlap of boxes pairwise by broadcasting; 0 where both are empty."""
    common = _area(_clipped(boxes, others))
    union = _area(boxes) + _area(others) - common
    overlap: Array = common / np.maximum(union, 1e-9)
    return overlap
