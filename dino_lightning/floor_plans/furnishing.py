"""The furniture of each kind of room, placed along the walls and clear of the doors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dino_lightning.floor_plans.drawing import Pen
from dino_lightning.floor_plans.furniture import (
    Frame,
    Item,
    basin,
    bath,
    bed_with_tables,
    car,
    corner_sofa,
    counter,
    cupboard,
    desk,
    dining_table,
    double_bed,
    fridge,
    plant,
    round_table,
    shower,
    single_bed,
    sink_counter,
    sofa,
    sofa_and_table,
    stairs,
    television,
    toilet,
    wardrobe,
    washing_machine,
)
from dino_lightning.floor_plans.geometry import (
    Point,
    Polygon,
    along,
    bounds,
    clearance,
    contains,
    direction,
    distance,
    edges,
    inward_normal,
    offset,
    rectangle,
)
from dino_lightning.floor_plans.layout import Cell, Layout
from dino_lightning.floor_plans.walls import gap_outline

Box = tuple[float, float, float, float]

# For each kind of room, the most typical items first: item, width range, depth, free-standing, probability.
Candidate = tuple[Item, tuple[float, float], float, bool, float]
CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "bedroom": (
        (bed_with_tables, (2.3, 2.5), 2.05, False, 0.6),
        (double_bed, (1.4, 1.7), 2.0, False, 0.75),
        (single_bed, (0.9, 1.0), 1.95, False, 0.9),
        (wardrobe, (1.2, 2.2), 0.6, False, 0.7),
        (cupboard, (0.8, 1.2), 0.5, False, 0.25),
        (desk, (1.0, 1.3), 1.0, False, 0.3),
    ),
    "living": (
        (corner_sofa, (2.3, 2.7), 2.0, False, 0.35),
        (sofa_and_table, (1.9, 2.2), 1.75, False, 0.8),
        (television, (1.2, 1.8), 0.4, False, 0.7),
        (sofa, (0.85, 0.95), 0.85, False, 0.6),
        (dining_table, (2.1, 2.9), 1.75, True, 0.5),
        (plant, (0.4, 0.5), 0.45, False, 0.3),
    ),
    "family": (
        (sofa_and_table, (1.8, 2.1), 1.7, False, 0.8),
        (sofa, (1.4, 1.6), 0.85, False, 0.5),
        (television, (1.2, 1.6), 0.4, False, 0.7),
    ),
    "dining": (
        (dining_table, (2.1, 2.7), 1.75, True, 0.75),
        (round_table, (1.8, 2.0), 1.9, True, 0.9),
        (cupboard, (1.2, 1.6), 0.45, False, 0.5),
    ),
    "kitchen": (
        (counter, (2.4, 3.4), 0.6, False, 1.0),
        (counter, (1.2, 1.9), 0.6, False, 0.5),
        (sink_counter, (1.0, 2.0), 0.6, False, 0.6),
        (fridge, (0.6, 0.65), 0.62, False, 0.8),
        (round_table, (1.7, 1.9), 1.8, True, 0.4),
        (dining_table, (1.9, 2.2), 1.7, True, 0.3),
    ),
    "bath": (
        (bath, (1.65, 1.75), 0.75, False, 0.85),
        (toilet, (0.4, 0.45), 0.7, False, 0.95),
        (basin, (0.5, 0.6), 0.45, False, 0.95),
        (shower, (0.8, 0.9), 0.85, False, 0.4),
    ),
    "ensuite": (
        (shower, (0.8, 0.95), 0.85, False, 0.85),
        (toilet, (0.4, 0.45), 0.68, False, 0.95),
        (basin, (0.45, 0.55), 0.4, False, 0.95),
    ),
    "wc": ((toilet, (0.4, 0.44), 0.66, False, 1.0), (basin, (0.35, 0.42), 0.3, False, 0.85)),
    "study": ((desk, (1.2, 1.6), 1.1, False, 0.9), (cupboard, (1.0, 1.6), 0.4, False, 0.6)),
    "utility": ((washing_machine, (0.6, 0.6), 0.6, False, 0.9), (sink_counter, (1.0, 1.5), 0.6, False, 0.8)),
    "dressing": ((wardrobe, (1.4, 2.2), 0.6, False, 0.9), (wardrobe, (1.2, 1.8), 0.6, False, 0.7)),
    "garage": ((car, (1.8, 1.9), 4.2, True, 0.6),),
    "hall": ((stairs, (2.2, 2.9), 0.9, False, 0.35), (cupboard, (0.6, 1.0), 0.4, False, 0.35)),
    "landing": ((stairs, (2.0, 2.7), 0.9, False, 0.85),),
}
BEDS = (bed_with_tables, double_bed, single_bed)


def furnish(pen: Pen, layout: Layout, cell: Cell, rng: np.random.Generator, fullness: float) -> list[Box]:
    """Draw the furniture of a room where it fits, clear of the doors.

    Args:
        pen: draws in the layout's metres.
        layout: the floor, for its doors and walls.
        cell: the room.
        rng: generator of the choice and placement of items.
        fullness: 0 leaves rooms empty, 1 places the usual number of items.

    Returns:
        The boxes occupied by doors and furniture, in metres, which text should avoid.
    """
    room = offset(cell.outline, layout.inner_wall / 2 + 0.02)
    taken: list[Box] = []
    for opening in layout.openings:
        if opening.kind == "window":
            continue
        a, b, c, d = gap_outline(opening, layout)
        reach = distance(a, b)
        for start, end, normal in ((a, b, 1.0), (d, c, -1.0)):
            zone = (*(along(p, opening.inward, normal * reach * 0.95) for p in (start, end)), start, end)
            taken.append(bounds(zone))
    for kind, part in cell.parts:
        zone_walls = part if len(cell.parts) > 1 else cell.outline
        walls = edges(offset(zone_walls, layout.inner_wall / 2 + 0.02))
        has_bed = False
        for item, (low, high), depth, free, probability in CANDIDATES.get(kind, ()):
            if rng.random() > probability * fullness or (has_bed and item in BEDS):
                continue
            width = float(rng.uniform(low, high))
            frame = _place(pen, room, walls, taken, (width, depth), free, rng)
            if frame is not None:
                item(frame, width, depth)
                has_bed = has_bed or item in BEDS
    return taken


def _place(
    pen: Pen,
    room: Polygon,
    walls: Sequence[tuple[Point, Point]],
    taken: list[Box],
    size: tuple[float, float],
    free: bool,
    rng: np.random.Generator,
) -> Frame | None:
    """Find a place for an item of this width and depth, and mark it as occupied; None if there is none."""
    width, depth = size
    for _ in range(10):
        a, b = walls[int(rng.integers(len(walls)))]
        step, normal, length = direction(a, b), inward_normal(a, b), distance(a, b)
        if free:
            x0, y0, x1, y1 = bounds([point for wall in walls for point in wall])
            middle = (
                x0 + (x1 - x0) * float(rng.uniform(0.3, 0.7)),
                y0 + (y1 - y0) * float(rng.uniform(0.3, 0.7)),
            )
            origin = along(along(middle, step, -width / 2), normal, -depth / 2)
        else:
            if length < width:
                continue
            origin = along(a, step, (length - width) * float(rng.choice((0.0, 0.5, 1.0, rng.random()))))
        frame = Frame(pen, origin, step, normal)
        corners = [frame.at(x, y) for x, y in ((0, 0), (width, 0), (width, depth), (0, depth))]
        if not all(contains(room, p) or clearance(room, p) < 1e-6 for p in corners):
            continue
        if any(contains(rectangle(*bounds(corners)), p) and clearance(tuple(corners), p) > 1e-3 for p in room):
            continue  # a corner of an L-shaped room sticks into the item
        x0, y0, x1, y1 = bounds(corners)
        if any(x0 < right and left < x1 and y0 < bottom and top < y1 for left, top, right, bottom in taken):
            continue
        taken.append((x0, y0, x1, y1))
        return frame
    return None
