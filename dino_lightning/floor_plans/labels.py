"""Text that belongs to the geometry of a plan: names in the rooms, measurements around the plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dino_lightning.floor_plans.drawing import WHITE, Ink, Pen
from dino_lightning.floor_plans.furnishing import Box
from dino_lightning.floor_plans.geometry import Point, Polygon, bounds, inside, offset
from dino_lightning.floor_plans.layout import Layout


def write_name(
    pen: Pen,
    outline: Polygon,
    name: str,
    sizes: Sequence[str],
    taken: Sequence[Box],
    size: float,
    halo: Ink | None = WHITE,
) -> None:
    """Write a room's name where it covers least; smaller, shorter or upright where space is short.

    Args:
        pen: draws in the metres of the layout.
        outline: the room.
        name: its name.
        sizes: the lines under the name that state its size.
        taken: boxes to avoid, in metres.
        size: height of the text in pixels of the finished page.
        halo: colour of the border that keeps the text legible.
    """
    full = [name, *sizes]
    x0, y0, x1, y1 = bounds(offset(outline, 0.1))
    best: tuple[float, Point, list[str], float, bool] | None = None
    for lines, factor, upright in (
        (full, 1.0, False),
        (full, 0.8, False),
        ([name], 0.9, False),
        ([name], 0.9, True),
        ([name], 0.65, False),
        ([name], 0.65, True),
    ):
        width, height = (length / pen.scale for length in pen.page.text_size(lines, size * factor))
        if upright:
            width, height = height, width
        if x1 - x0 <= width or y1 - y0 <= height:
            continue
        xs, ys = np.meshgrid(
            np.linspace(x0 + width / 2, x1 - width / 2, 9), np.linspace(y0 + height / 2, y1 - height / 2, 9)
        )
        centres = np.stack((xs.ravel(), ys.ravel()), axis=1)
        half = np.array((width, height)) / 2
        cost = 0.15 * np.abs((centres - centres.mean(0)) / ((x1 - x0), (y1 - y0))).sum(1)
        for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            cost += ~inside(outline, centres + half * np.array(corner))
        for left, top, right, bottom in taken:
            low = np.maximum(centres - half, (left, top))
            high = np.minimum(centres + half, (right, bottom))
            cost += np.clip(high - low, 0, None).prod(1) / (width * height)
        index = int(cost.argmin())
        if best is None or cost[index] < best[0] - 0.2:
            best = (
                float(cost[index]),
                (float(centres[index, 0]), float(centres[index, 1])),
                list(lines),
                factor,
                upright,
            )
        if cost[index] < 0.25:
            break
    if best is not None and size * best[3] >= 3.5:
        pen.text(best[1], best[2], size * best[3], halo=halo, upright=best[4])


def draw_measures(pen: Pen, layout: Layout, extent: Box, size: float, rng: np.random.Generator) -> None:
    """Draw dimension lines along two sides, with ticks or arrows, outside everything else."""
    x0, y0, x1, y1 = bounds([point for cell in layout.cells for point in cell.outline])
    left, top, _, _ = extent
    arrows = bool(rng.random() < 0.4)
    away = 0.3
    rows = [cell for cell in layout.cells if bounds(cell.outline)[1] < y0 + 0.05]
    columns = [cell for cell in layout.cells if bounds(cell.outline)[0] < x0 + 0.05]
    for cells, axis, level in ((rows, 0, top - away), (columns, 1, left - away)):
        if rng.random() < 0.2:
            continue
        stops = sorted({round(bounds(cell.outline)[axis + k], 3) for cell in cells for k in (0, 2)})
        if rng.random() < 0.5:
            stops = [(x0, y0)[axis], (x1, y1)[axis]]
        for start, end in pairwise(stops):
            if end - start > 0.6:
                _measure(pen, start, end, level, axis, arrows, size * 0.85)


def _measure(pen: Pen, start: float, end: float, level: float, axis: int, arrows: bool, size: float) -> None:
    """Draw one dimension line between two positions on an axis, at a position on the other axis."""

    def at(position: float, across: float) -> Point:
        return (position, level + across) if axis == 0 else (level + across, position)

    tick = min(0.12, 4 / pen.scale)
    pen.line((at(start, 0), at(end, 0)))
    for position, inwards in ((start, 1), (end, -1)):
        pen.line((at(position, -tick), at(position, tick * 1.5)))
        if arrows:
            pen.polygon(
                (
                    at(position, 0),
                    at(position + 2 * tick * inwards, -tick * 0.5),
                    at(position + 2 * tick * inwards, tick * 0.5),
                ),
                fill=pen.ink,
            )
        else:
            pen.line((at(position - tick, tick), at(position + tick, -tick)), width=1.5)
    label = f"{end - start:.2f}"
    if pen.page.text_size([label], size)[0] < (end - start) * pen.scale:
        pen.text(at((start + end) / 2, -size * 0.75 / pen.scale), [label], size, upright=axis == 1)
