"""Polygons and run-length masks of annotations: their extent and their area."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as masks

NOTHING = (float("nan"),) * 4


def outline_of(segmentation: Any) -> Sequence[float]:
    """The corners x1, y1, x2, y2 of a polygon's extent in pixels, or four NaN where there is no polygon of numbers."""
    points = _points(segmentation)
    if not points:
        return NOTHING
    every = np.concatenate(points)
    return (*every.min(axis=0).tolist(), *every.max(axis=0).tolist())


def extent_of(segmentation: Any) -> Sequence[float]:
    """The corners of the extent of a polygon or of a run-length mask in pixels, or four NaN where it has none."""
    if not isinstance(segmentation, dict):
        return outline_of(segmentation)
    mask = _compressed(segmentation)
    if mask is None:
        return NOTHING
    x, y, width, height = masks.toBbox(mask).tolist()
    return (x, y, x + width, y + height) if width > 0 and height > 0 else NOTHING


def area_of(segmentation: Any) -> float:
    """The area of a polygon (its parts summed) or of a run-length mask in square pixels; NaN where there is none."""
    if isinstance(segmentation, dict):
        mask = _compressed(segmentation)
        return float("nan") if mask is None else float(masks.area(mask))
    points = _points(segmentation)
    if not points:
        return float("nan")
    return float(sum(_shoelace(part) for part in points))


def _shoelace(points: npt.NDArray[np.float64]) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def _points(segmentation: Any) -> list[npt.NDArray[np.float64]]:
    """The corners of each part of a polygon, (points, 2); empty where there is no polygon of finite numbers."""
    if not isinstance(segmentation, list) or not segmentation:
        return []
    if all(isinstance(value, (int, float)) for value in segmentation):
        segmentation = [segmentation]  # one part, not in a list of its own
    parts = [part for part in segmentation if isinstance(part, list) and len(part) >= 6]
    try:
        points = [np.asarray(part, dtype=np.float64)[: len(part) // 2 * 2].reshape(-1, 2) for part in parts]
    except (TypeError, ValueError):
        return []
    return points if all(np.isfinite(part).all() for part in points) else []


def _compressed(segmentation: dict[str, Any]) -> Any:
    """A run-length mask as pycocotools takes it, or None for something else."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        return None
    if not all(type(side) is int and 0 < side < 1 << 16 for side in size):
        return None
    try:
        if isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
            return (
                masks.frPyObjects({"size": size, "counts": counts}, *size) if sum(counts) == size[0] * size[1] else None
            )
        if isinstance(counts, str) and _pixels(counts) == size[0] * size[1]:
            return {"size": size, "counts": counts.encode("ascii")}
    except (TypeError, ValueError, UnicodeEncodeError):
        pass
    return None


def _pixels(counts: str) -> int:
    """How many pixels a compressed mask covers with its background.

    COCO's encoding of runs: six bits a character from "0" on, the fifth of them for more to come, signed, and from
    the third run on the difference to the run before the last. pycocotools reads past the end of a mask that is wrong.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return -1
        runs.append(value)
        value = shift = 0
    return sum(runs) if shift == 0 else -1
