"""Layouts with the shapes of real homes for the `realistic` style, among them L-shaped, slanted and round rooms.

Lengths are metres, as in `layout`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from dino_lightning.floor_plans.geometry import Polygon, bounds, clip, signed_area
from dino_lightning.floor_plans.layout import Cell, Layout, cut, divide, place_openings
from dino_lightning.floor_plans.shapes import add_wing, bend, bulge, carve, footprint, join

# The rooms of a home, most needed first: kind and square metres. Rooms of one group stay neighbours.
GROUND_FLOOR = (
    (("living", 21.0), ("kitchen", 10.0)),
    (("bedroom", 13.0), ("ensuite", 4.6)),
    (("bath", 5.0),),
    (("hall", 7.0), ("wc", 2.4)),
    (("bedroom", 11.0),),
    (("dining", 12.0), ("utility", 4.8)),
    (("bedroom", 9.0), ("store", 2.4)),
    (("study", 7.5),),
    (("family", 16.0), ("bath", 5.0)),
    (("bedroom", 12.0), ("dressing", 4.5)),
    (("garage", 16.0),),
    (("bedroom", 10.0),),
)
UPPER_FLOOR = (
    (("landing", 7.0), ("bath", 5.4)),
    (("bedroom", 15.0), ("ensuite", 4.5)),
    (("bedroom", 12.0), ("store", 2.2)),
    (("bedroom", 9.0),),
    (("study", 6.5),),
    (("bedroom", 11.0), ("dressing", 5.0)),
    (("bath", 5.0), ("wc", 2.4)),
    (("bedroom", 10.0),),
)
CORRIDORS = ("hall", "landing")
NARROWEST = {
    "wc": 0.95,
    "store": 0.95,
    "hall": 1.1,
    "landing": 1.1,
    "ensuite": 1.5,
    "utility": 1.5,
    "dressing": 1.5,
}


def house_layout(
    num_rooms: int, rng: np.random.Generator, *, upper: bool = False, wings: bool = False
) -> tuple[Layout, Cell | None]:
    """One floor of a home.

    Args:
        num_rooms: number of rooms wanted, 2 or more.
        rng: random generator.
        upper: whether this is an upper floor: bedrooms around a landing.
        wings: whether some homes have wings, outlines in the shape of an L, a T, a Z or with steps, and more rooms
            that are not rectangles.

    Returns:
        The floor, and the cell of a terrace in an open corner, or None.
    """
    num_wings = int(rng.choice((0, 1, 2), p=(0.35, 0.4, 0.25))) if wings and num_rooms >= 4 else 0
    in_wings = [int(rng.integers(1, max(2, num_rooms // 3 + 1))) for _ in range(num_wings)]
    num_rooms -= sum(in_wings)
    carved = int(num_rooms >= 5 and rng.random() < 0.35)
    bends = int(rng.choice((0, 1, 2, 3), p=(0.3, 0.3, 0.25, 0.15))) if wings and num_rooms >= 5 else 0
    open_plan = not upper and num_rooms >= 3 and rng.random() < 0.45
    groups = _programme(num_rooms - carved + open_plan + bends, rng, UPPER_FLOOR if upper else GROUND_FLOOR)
    rooms = [room for group in groups for room in group]
    with_terrace = num_rooms >= 3 and not in_wings and rng.random() < 0.3
    terrace_share = float(rng.uniform(0.06, 0.14)) if with_terrace else 0.0
    area = sum(size for _, size in rooms) / (1 - terrace_share)
    slant = 0.15 if rng.random() < 0.2 else 0.0
    best: tuple[float, list[Cell]] = (math.inf, [])
    for _ in range(24):
        ratio = rng.uniform(0.55, 1.0)
        width, height = math.sqrt(area / ratio), math.sqrt(area * ratio)
        if rng.random() < 0.4:
            width, height = height, width
        outline = footprint(width, height, rng)
        order = [groups[i] for i in rng.permutation(len(groups))]
        programme = [room for group in order for room in (group if rng.random() < 0.5 else group[::-1])]
        if terrace_share:
            programme.insert(int(rng.choice((0, len(programme)))), ("terrace", area * terrace_share))
        cells = _cells(outline, programme, rng, slant)
        flaw = _flaw(cells, (width, height))
        if flaw < best[0]:
            best = (flaw, cells)
        if flaw < 0.05:
            break
    cells = best[1]
    terrace = next((cell for cell in cells if cell.kind == "terrace"), None)
    cells = [cell for cell in cells if cell.kind != "terrace"]
    for count in in_wings:
        cells = add_wing(cells, _wing_programme(count, rng), rng)
    cells = join(cells, ("living", "kitchen")) if open_plan else cells
    cells = join(cells, ("hall", "hall"))
    for _ in range(bends):
        cells = bend(cells, rng)
    for _ in range(carved):
        cells = carve(cells, rng)
    for _ in range(int(rng.choice((0, 1, 2, 3), p=(0.55, 0.25, 0.15, 0.05)))):
        cells = bulge(cells, rng)
    inner_wall = float(rng.uniform(0.08, 0.15))
    openings = place_openings(
        cells,
        inner_wall,
        rng,
        window_share=float(rng.uniform(0.6, 0.95)),
        varied=True,
        front_door=not upper,
    )
    return Layout(tuple(cells), tuple(openings), inner_wall, inner_wall * float(rng.uniform(1.8, 3.0))), terrace


def turned(layout: Layout, angle: float) -> Layout:
    """The same floor, turned by an angle in radians around the origin."""
    c, s = math.cos(angle), math.sin(angle)

    def turn(polygon: Polygon) -> Polygon:
        return tuple((c * x - s * y, s * x + c * y) for x, y in polygon)

    cells = tuple(
        Cell(cell.kind, turn(cell.outline), tuple((kind, turn(part)) for kind, part in cell.parts))
        for cell in layout.cells
    )
    openings = []
    for opening in layout.openings:
        start, end, inward = turn((opening.start, opening.end, opening.inward))
        openings.append(replace(opening, start=start, end=end, inward=inward))
    return replace(layout, cells=cells, openings=tuple(openings))


def _programme(
    num_rooms: int, rng: np.random.Generator, groups: tuple[tuple[tuple[str, float], ...], ...]
) -> list[list[tuple[str, float]]]:
    """The first `num_rooms` rooms of the list, sizes varied."""
    chosen: list[list[tuple[str, float]]] = []
    first_of_each = [(i, 0) for i in range(len(groups))]
    rest = [(i, j) for i, group in enumerate(groups) for j in range(1, len(group))]
    # A bath and a bedroom come first of all; the companions come in any order.
    wanted = [first_of_each[0], first_of_each[2], first_of_each[1], rest[0], *first_of_each[3:5]]
    others = [*first_of_each[5:], *rest[1:]]
    wanted += [others[i] for i in rng.permutation(len(others))]
    taken = set(wanted[:num_rooms])
    for i, group in enumerate(groups):
        members = [
            (kind, size * float(rng.uniform(0.8, 1.35))) for j, (kind, size) in enumerate(group) if (i, j) in taken
        ]
        if members:
            chosen.append(members)
    return chosen


def _wing_programme(num_rooms: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """The rooms of a wing: what may lie anywhere in a home."""
    kinds = (("bedroom", 11.0), ("bath", 5.0), ("family", 15.0), ("store", 3.0), ("study", 8.0), ("utility", 5.0))
    chosen = [kinds[i] for i in rng.choice(len(kinds), num_rooms, p=(0.35, 0.15, 0.15, 0.1, 0.15, 0.1))]
    return [(kind, size * float(rng.uniform(0.8, 1.35))) for kind, size in chosen]


def _cells(outline: Polygon, programme: list[tuple[str, float]], rng: np.random.Generator, slant: float) -> list[Cell]:
    """Divide a footprint into cells, sometimes with a corridor through the middle and rooms on both sides."""
    corridor = next((kind for kind, _ in programme if kind in CORRIDORS), None)
    if corridor is None or len(programme) < 6 or rng.random() < 0.35:
        return divide(outline, programme, rng, slant)
    programme = [room for room in programme if room[0] != corridor]
    middle = len(programme) // 2 + int(rng.integers(-1, 2))
    total = sum(size for _, size in programme)
    share = sum(size for _, size in programme[:middle]) / total
    x0, y0, x1, y1 = bounds(outline)
    # The corridor lies along the longer side.
    breadth = float(rng.uniform(1.1, 1.7)) / min(x1 - x0, y1 - y0)
    vertical = x1 - x0 < y1 - y0
    first, rest = _split(outline, share * (1 - breadth), vertical)
    strip, second = _split(rest, breadth / (1 - share * (1 - breadth)), vertical)
    cells = divide(first, programme[:middle], rng, slant) + divide(second, programme[middle:], rng, slant)
    if (
        len(programme) < 16 and rng.random() < 0.5
    ):  # the corridor's end becomes a room of its own and the corridor shorter
        end, strip = cut(strip, float(rng.uniform(0.2, 0.35)), 0.0)
        cells.append(Cell("store", end, (("store", end),)))
    return [*cells, Cell(corridor, strip, ((corridor, strip),))]


def _split(outline: Polygon, share: float, vertical: bool) -> tuple[Polygon, Polygon]:
    """Cut at a share of the bounding box, along y (`vertical`) or along x."""
    x0, y0, x1, y1 = bounds(outline)
    normal = (1.0, 0.0) if vertical else (0.0, 1.0)
    anchor = (x0 + share * (x1 - x0), y0 + share * (y1 - y0))
    return clip(outline, anchor, (-normal[0], -normal[1])), clip(outline, anchor, normal)


def _flaw(cells: list[Cell], size: tuple[float, float]) -> float:
    """How far the worst room is from a usable one; 0 is a layout without a fault."""
    worst = 0.0
    for cell in cells:
        x0, y0, x1, y1 = bounds(cell.outline)
        short, long = sorted((x1 - x0, y1 - y0))
        narrowest = NARROWEST.get(cell.kind, 2.0)
        stretch = 12.0 if cell.kind in CORRIDORS else 2.6
        fill = abs(signed_area(cell.outline)) / (short * long)
        worst = max(worst, narrowest / short - 1, long / short / stretch - 1, 0.55 - fill)
        if cell.kind == "terrace":
            # Left open, it must lie in a corner of the footprint, or the plan would get a hole.
            sides = sum((x0 < 1e-3, y0 < 1e-3, x1 > size[0] - 1e-3, y1 > size[1] - 1e-3))
            worst = max(worst, 0.0 if sides >= 2 else 5.0, 5.0 if len(cell.outline) != 4 else 0.0)
    return worst
