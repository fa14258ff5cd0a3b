"""Shapes other than plain boxes: slanted and rounded footprints, L-shapes, open plans, bays."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from dino_lightning.floor_plans.geometry import (
    Polygon,
    Segment,
    along,
    arc,
    bounds,
    clip,
    direction,
    distance,
    edges,
    inward_normal,
    merge,
    overlap_on_edge,
    rectangle,
    signed_area,
)
from dino_lightning.floor_plans.layout import Cell, divide, shared_walls


def footprint(width: float, height: float, rng: np.random.Generator) -> Polygon:
    """A rectangular footprint, sometimes with a corner cut off or rounded."""
    outline = rectangle(0.0, 0.0, width, height)
    shape = rng.random()
    if shape > 0.34:
        return outline
    right, bottom = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    corner = (width if right else 0.0, height if bottom else 0.0)
    inward = (-1.0 if right else 1.0, -1.0 if bottom else 1.0)
    if shape < 0.1:  # round, as the clip by the tangents of a circle
        radius = float(rng.uniform(0.25, 0.6)) * min(width, height)
        centre = (corner[0] + inward[0] * radius, corner[1] + inward[1] * radius)
        for t in np.linspace(0, math.pi / 2, 13)[1:-1]:
            normal = (inward[0] * math.cos(t), inward[1] * math.sin(t))
            outline = clip(outline, along(centre, normal, -radius), normal)
        return outline
    if shape < 0.22:  # one side runs at a slant
        dx, dy = width, height * float(rng.uniform(0.08, 0.2))
        if rng.random() < 0.5:
            dx, dy = width * float(rng.uniform(0.08, 0.2)), height
    else:  # a corner is cut off
        dx, dy = width * float(rng.uniform(0.2, 0.45)), height * float(rng.uniform(0.2, 0.45))
    normal = (inward[0] * dy, inward[1] * dx)
    return clip(outline, (corner[0] + inward[0] * dx, corner[1]), normal)


def join(cells: list[Cell], kinds: tuple[str, str]) -> list[Cell]:
    """Remove the wall between the first two neighbours of these kinds, which become one room of two zones."""
    for first in cells:
        for second in cells:
            if first is second or (first.kind, second.kind) != kinds:
                continue
            shared = sum(
                span[1] - span[0]
                for edge in edges(first.outline)
                for other in edges(second.outline)
                if (span := overlap_on_edge(edge, other))
            )
            union = merge(first.outline, second.outline) if shared > 1.4 else None
            if union is not None:
                joined = Cell(first.kind, union, first.parts + second.parts)
                return [joined if cell is first else cell for cell in cells if cell is not second]
    return cells


def bend(cells: list[Cell], rng: np.random.Generator) -> list[Cell]:
    """Make one room of a room and a smaller neighbour beside a part of its wall: it becomes L-shaped or T-shaped."""
    pairs = [(i, j) for (i, j), walls in shared_walls(cells)[0].items() if sum(distance(*wall) for wall in walls) > 1.0]
    for at in rng.permutation(len(pairs)):
        kept, gone = sorted(
            (cells[k] for k in pairs[at]), key=lambda cell: cell.kind not in ("hall", "landing", "living")
        )
        union = merge(kept.outline, gone.outline)
        plain = len(kept.parts) == len(gone.parts) == 1 and "garage" not in (kept.kind, gone.kind)
        if union is not None and plain and 6 <= len(union) <= 10 and abs(signed_area(gone.outline)) < 12.0:
            joined = Cell(kept.kind, union, ((kept.kind, union),))
            return [joined if cell is kept else cell for cell in cells if cell is not gone]
    return cells


def carve(cells: list[Cell], rng: np.random.Generator) -> list[Cell]:
    """Cut a small room out of the corner of a large rectangular one, which becomes L-shaped."""
    for i in rng.permutation(len(cells)):
        cell = cells[i]
        x0, y0, x1, y1 = bounds(cell.outline)
        plain = len(cell.outline) == 4 and signed_area(cell.outline) > 0.999 * (x1 - x0) * (y1 - y0)
        if not plain or len(cell.parts) > 1 or min(x1 - x0, y1 - y0) < 2.9 or cell.kind == "garage":
            continue
        width, height = float(rng.uniform(1.2, 1.9)), float(rng.uniform(1.3, 2.1))
        large: Polygon = (
            (x0, y0),
            (x1, y0),
            (x1, y1 - height),
            (x1 - width, y1 - height),
            (x1 - width, y1),
            (x0, y1),
        )
        small = rectangle(x1 - width, y1 - height, x1, y1)
        if rng.random() < 0.5:
            large, small = _mirrored(large, x0 + x1, 0), _mirrored(small, x0 + x1, 0)
        if rng.random() < 0.5:
            large, small = _mirrored(large, y0 + y1, 1), _mirrored(small, y0 + y1, 1)
        kind = str(rng.choice(("ensuite", "store", "wc") if cell.kind == "bedroom" else ("store", "wc")))
        kept = replace(cell, outline=large, parts=((cell.kind, large),))
        return [*cells[:i], kept, *cells[i + 1 :], Cell(kind, small, ((kind, small),))]
    return cells


def _mirrored(polygon: Polygon, double_centre: float, axis: int) -> Polygon:
    """The mirror image, in reverse order so that the interior stays on the same side of the edges."""
    points = [(double_centre - x, y) if axis == 0 else (x, double_centre - y) for x, y in polygon]
    return tuple(points[::-1])


def add_wing(cells: list[Cell], programme: list[tuple[str, float]], rng: np.random.Generator) -> list[Cell]:
    """Place further rooms in a block of their own before a straight side of the plan, which gets a step there.

    Where no such block with usable rooms is found, the cells come back as they were.
    """
    x0, y0, x1, y1 = bounds([point for cell in cells for point in cell.outline])
    area = sum(size for _, size in programme)
    for _ in range(12):
        vertical, far = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        near = (x0, x1)[far] if vertical else (y0, y1)[far]
        # The block lies before the stretch of outer wall that reaches furthest out on that side.
        flush = [
            sorted((a[vertical], b[vertical]))
            for cell in cells
            for a, b in edges(cell.outline)
            if abs(a[not vertical] - near) < 1e-3 and abs(b[not vertical] - near) < 1e-3
        ]
        if not flush:
            continue
        low, high = min(span[0] for span in flush), max(span[1] for span in flush)
        breadth = min(float(rng.uniform(0.35, 0.8)) * (high - low), area / 1.5)
        depth = area / breadth
        start = low + (high - low - breadth) * float(rng.choice((0.0, 1.0, rng.random())))
        end = near + depth if far else near - depth
        across, along_it = sorted((near, end)), (start, start + breadth)
        (left, right), (top, bottom) = (across, along_it) if vertical else (along_it, across)
        block = divide(rectangle(left, top, right, bottom), programme, rng)
        sides = [sorted((box[2] - box[0], box[3] - box[1])) for box in (bounds(cell.outline) for cell in block)]
        usable = all(short > 1.3 and long < 3.2 * short for short, long in sides)
        if usable and breadth > 1.6 and depth < 1.2 * (high - low):
            return [*cells, *block]
    return cells


def bulge(cells: list[Cell], rng: np.random.Generator) -> list[Cell]:
    """Push a stretch of outer wall out: a round or three-sided bay."""
    _, outer = shared_walls(cells)
    points = [point for cell in cells for point in cell.outline]
    candidates: list[tuple[int, Segment]] = []
    for i, walls in enumerate(outer):
        for wall in walls:
            nx, ny = inward_normal(*wall)
            # Only where nothing of the plan lies in front of the wall, so that the bay cannot run into it.
            free = all((x - wall[0][0]) * nx + (y - wall[0][1]) * ny > -1e-3 for x, y in points)
            if free and distance(*wall) > 2.4 and cells[i].kind in ("living", "bedroom", "dining", "family"):
                candidates.append((i, wall))
    if not candidates:
        return cells
    i, (a, b) = candidates[int(rng.integers(len(candidates)))]
    outline, step, length = cells[i].outline, direction(a, b), distance(a, b)
    nx, ny = inward_normal(a, b)
    outward = (-nx, -ny)
    breadth = min(length * float(rng.uniform(0.55, 0.85)), length - 0.9, 3.6)
    start = along(a, step, (length - breadth) / 2)
    end = along(start, step, breadth)
    three_sided = rng.random() < 0.5
    depth = min(float(rng.uniform(0.5, 1.0 if three_sided else 2.0)), breadth / 2)
    if three_sided:
        shoulder = min(depth, breadth * 0.3)
        first = along(along(start, step, shoulder), outward, depth)
        second = along(along(end, step, -shoulder), outward, depth)
        bay = [start, first, second, end]
    else:
        radius = (breadth**2 / 4 + depth**2) / (2 * depth)
        centre = along(along(start, step, breadth / 2), outward, depth - radius)
        half = math.asin(min(breadth / 2 / radius, 1.0))
        facing = math.atan2(outward[1], outward[0])
        bay = arc(centre, radius, facing - half, facing + half)
        if distance(bay[0], start) > distance(bay[-1], start):
            bay.reverse()
        bay[0], bay[-1] = start, end
    at = next(k for k, edge in enumerate(edges(outline)) if overlap_on_edge(edge, (start, end)))
    rounded = (*outline[: at + 1], *bay, *outline[at + 1 :])
    cell = cells[i]
    parts = cell.parts if len(cell.parts) > 1 else ((cell.kind, rounded),)
    return [*cells[:i], replace(cell, outline=rounded, parts=parts), *cells[i + 1 :]]
