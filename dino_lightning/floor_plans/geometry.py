"""Plane geometry for the synthetic floor plans: simple polygons as tuples of points, y pointing down.

The interior of every polygon lies on the side of the normal `(-dy, dx)` of each edge: its area by the shoelace
formula is positive. Units are the caller's: metres in the layout, pixels on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Point = tuple[float, float]
Polygon = tuple[Point, ...]
Segment = tuple[Point, Point]

TOLERANCE = 1e-6


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """The axis-aligned rectangle between two corners."""
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def edges(polygon: Polygon) -> list[Segment]:
    """The edges in order, the closing one included."""
    return list(zip(polygon, polygon[1:] + polygon[:1], strict=True))


def signed_area(polygon: Polygon) -> float:
    """Area by the shoelace formula, positive for the orientation used here."""
    return 0.5 * sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges(polygon))


def bounds(polygon: Iterable[Point]) -> tuple[float, float, float, float]:
    """The smallest `(x0, y0, x1, y1)` that holds all points."""
    xs, ys = zip(*polygon, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def distance(a: Point, b: Point) -> float:
    """Length of the segment from `a` to `b`."""
    return math.hypot(b[0] - a[0], b[1] - a[1])


def direction(a: Point, b: Point) -> Point:
    """Unit vector from `a` to `b`."""
    length = distance(a, b)
    return (b[0] - a[0]) / length, (b[1] - a[1]) / length


def along(a: Point, step: Point, length: float) -> Point:
    """The point `length` away from `a` in the direction of the unit vector `step`."""
    return a[0] + step[0] * length, a[1] + step[1] * length


def inward_normal(a: Point, b: Point) -> Point:
    """Unit normal of an edge, pointing into its polygon."""
    dx, dy = direction(a, b)
    return -dy, dx


def clean(polygon: Sequence[Point]) -> Polygon:
    """The polygon without repeated points and without points in the middle of a straight edge."""
    points = [p for i, p in enumerate(polygon) if distance(p, polygon[i - 1]) > TOLERANCE]
    kept = []
    for i, point in enumerate(points):
        before, after = points[i - 1], points[(i + 1) % len(points)]
        cross = (point[0] - before[0]) * (after[1] - point[1]) - (point[1] - before[1]) * (after[0] - point[0])
        if abs(cross) > TOLERANCE * distance(before, point):
            kept.append(point)
    return tuple(kept)


def clip(polygon: Polygon, anchor: Point, normal: Point) -> Polygon:
    """The part of a convex polygon on the side of the line through `anchor` that `normal` points to."""
    depths = [(x - anchor[0]) * normal[0] + (y - anchor[1]) * normal[1] for x, y in polygon]
    kept: list[Point] = []
    for i, (point, depth) in enumerate(zip(polygon, depths, strict=True)):
        before, depth_before = polygon[i - 1], depths[i - 1]
        if (depth > 0) != (depth_before > 0):
            t = depth_before / (depth_before - depth)
            kept.append((before[0] + t * (point[0] - before[0]), before[1] + t * (point[1] - before[1])))
        if depth > 0:
            kept.append(point)
    return clean(kept)


def offset(polygon: Polygon, inset: float) -> Polygon:
    """The polygon with every edge moved inwards by `inset` (outwards when negative), corners mitred.

    Moved outwards, a sharp corner is cut square, like that of a wall; its mitre would be a spike.
    """
    result: list[Point] = []
    corners = edges(polygon)
    for i, (a, b) in enumerate(corners):
        before = corners[i - 1]
        nx, ny = inward_normal(*before)
        mx, my = inward_normal(a, b)
        cosine = nx * mx + ny * my
        if inset < 0 and cosine < -0.3 and nx * my - ny * mx > 0:
            for normal, step, sign in (((nx, ny), direction(*before), -1), ((mx, my), direction(a, b), 1)):
                result.append(along(along(a, normal, inset), step, sign * inset))
            continue
        # The mitred corner p solves p.n = p.m = inset relative to a.
        scale = inset / max(1 + cosine, 1e-3)
        result.append((a[0] + (nx + mx) * scale, a[1] + (ny + my) * scale))
    return tuple(result)


def arc(centre: Point, radius: float, start: float, end: float, steps: int = 12) -> list[Point]:
    """Points on a circle between two angles in radians."""
    angles = (start + (end - start) * i / steps for i in range(steps + 1))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def contains(polygon: Polygon, point: Point) -> bool:
    """Whether the point lies inside (even-odd rule)."""
    x, y = point
    inside = False
    for (ax, ay), (bx, by) in edges(polygon):
        if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            inside = not inside
    return inside


def inside(polygon: Polygon, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of many points (N, 2) lie inside, (N,) bool: `contains` for arrays."""
    x, y = points[:, 0], points[:, 1]
    result = np.zeros(len(points), dtype=np.bool_)
    for (ax, ay), (bx, by) in edges(polygon):
        if ay != by:
            result ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / (by - ay) * (bx - ax))
    return result


def clearance(polygon: Polygon, point: Point) -> float:
    """Distance from a point to the nearest edge."""
    nearest = math.inf
    for a, b in edges(polygon):
        dx, dy = b[0] - a[0], b[1] - a[1]
        t = ((point[0] - a[0]) * dx + (point[1] - a[1]) * dy) / (dx * dx + dy * dy)
        t = min(max(t, 0.0), 1.0)
        nearest = min(nearest, math.hypot(a[0] + t * dx - point[0], a[1] + t * dy - point[1]))
    return nearest


def overlap_on_edge(edge: Segment, other: Segment) -> tuple[float, float] | None:
    """Where an edge of a neighbouring polygon runs along `edge`, as distances from its start, or None."""
    a, b = edge
    (dx, dy), length = direction(a, b), distance(a, b)
    positions = []
    for x, y in other:
        if abs((x - a[0]) * dy - (y - a[1]) * dx) > 1e-4:
            return None
        positions.append((x - a[0]) * dx + (y - a[1]) * dy)
    start, end = max(min(positions), 0.0), min(max(positions), length)
    return (start, end) if end - start > 1e-4 else None


def merge(first: Polygon, second: Polygon) -> Polygon | None:
    """The union of two polygons that touch along edges, or None where that is not one simple outline."""

    def key(point: Point) -> tuple[int, int]:
        return round(point[0] * 1e4), round(point[1] * 1e4)

    following: dict[tuple[int, int], Point] = {}
    pieces: set[tuple[tuple[int, int], tuple[int, int]]] = set()
    directed: list[Segment] = []
    for polygon, other in ((first, second), (second, first)):
        for a, b in edges(polygon):
            on_edge = [p for p in other if clearance((a, b), p) < 1e-4]
            stops = [a, *sorted(on_edge, key=lambda p: distance(a, p)), b]
            directed += [(p, q) for p, q in pairwise(stops) if key(p) != key(q)]
    pieces.update((key(p), key(q)) for p, q in directed)
    for p, q in directed:
        if (key(q), key(p)) in pieces:
            continue
        if key(p) in following:
            return None
        following[key(p)] = q
    if not following:
        return None
    outline = [next(iter(following.values()))]
    while len(outline) < len(following):
        step = following.get(key(outline[-1]))
        if step is None or key(step) == key(outline[0]):
            return None
        outline.append(step)
    return clean(outline)
