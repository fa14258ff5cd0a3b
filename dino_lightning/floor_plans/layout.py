"""The rooms of a synthetic plan: a footprint divided into cells, with doors and windows between them.

All lengths are metres, y points down. A cell's outline runs along the centre lines of its inner walls; the
room itself is that outline moved inwards by half an inner wall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dino_lightning.floor_plans.geometry import (
    Point,
    Polygon,
    Segment,
    along,
    bounds,
    clip,
    direction,
    distance,
    edges,
    inward_normal,
    overlap_on_edge,
    signed_area,
)

SOCIAL = ("living", "family", "dining", "kitchen", "study", "hall", "landing")


@dataclass(frozen=True)
class Cell:
    """One room of the layout.

    Attributes:
        kind: the use of the room ("bedroom", "bath", ...), which decides its name and furniture.
        outline: the centre lines of its walls.
        parts: the zones of an open-plan room, each with its own kind; otherwise one zone, the whole room.
    """

    kind: str
    outline: Polygon
    parts: tuple[tuple[str, Polygon], ...]


@dataclass(frozen=True)
class Opening:
    """A gap in a wall: a door or a window.

    Attributes:
        kind: "door" swings into the room that `inward` points to, "arch" is a doorway without a door,
            "window" is always in an outer wall.
        start: one end of the gap on the wall's centre line.
        end: the other end; a door is hinged at `start`.
        inward: unit normal of the wall.
        outer: whether the wall is an outer one.
    """

    kind: Literal["door", "arch", "window"]
    start: Point
    end: Point
    inward: Point
    outer: bool


@dataclass(frozen=True)
class Layout:
    """One floor of a plan: its outline and its rooms.

    Attributes:
        cells: the rooms.
        openings: doors and windows.
        inner_wall: thickness of the walls between rooms.
        outer_wall: thickness of the walls around the plan.
    """

    cells: tuple[Cell, ...]
    openings: tuple[Opening, ...]
    inner_wall: float
    outer_wall: float


def cut(outline: Polygon, share: float, angle: float) -> tuple[Polygon, Polygon]:
    """Cut a convex polygon across its longer side.

    Args:
        outline: the polygon.
        share: the fraction of the area in the first piece, 0-1.
        angle: slant of the cutting line in radians; 0 is parallel to the axes.
    """
    x0, y0, x1, y1 = bounds(outline)
    turn = angle if x1 - x0 >= y1 - y0 else angle + math.pi / 2
    normal = (math.cos(turn), math.sin(turn))
    depths = [x * normal[0] + y * normal[1] for x, y in outline]
    low, high, total = min(depths), max(depths), signed_area(outline)
    position, missing = low, share * total
    for _ in range(6):  # exact after one step in rectangles, close enough after six in other shapes
        position += missing / total * (high - low)
        anchor = (normal[0] * position, normal[1] * position)
        first = clip(outline, anchor, (-normal[0], -normal[1]))
        missing = share * total - signed_area(first)
        if abs(missing) < 0.01 * total:
            break
    return first, clip(outline, anchor, normal)


def divide(
    outline: Polygon, programme: Sequence[tuple[str, float]], rng: np.random.Generator, slant: float = 0.0
) -> list[Cell]:
    """Cut a convex footprint into one cell for each `(kind, weight)`, areas in proportion to the weights.

    Args:
        outline: the footprint.
        programme: the rooms wanted; neighbours in the list become neighbours in the plan.
        rng: random generator of the cuts.
        slant: probability that a cut through a large piece is not parallel to the axes.
    """
    if len(programme) == 1:
        kind = programme[0][0]
        return [Cell(kind, outline, ((kind, outline),))]
    weights = np.array([weight for _, weight in programme])
    shares = np.cumsum(weights)[:-1] / weights.sum()
    index = int(np.argmin(np.abs(shares - rng.uniform(0.35, 0.65))))
    x0, y0, x1, y1 = bounds(outline)
    slanted = min(x1 - x0, y1 - y0) > 3.0 and rng.random() < slant
    angle = float(rng.uniform(0.12, 0.35) * rng.choice((-1, 1))) if slanted else 0.0
    first, second = cut(outline, float(shares[index]), angle)
    return divide(first, programme[: index + 1], rng, slant) + divide(second, programme[index + 1 :], rng, slant)


def narrowest(cells: Sequence[Cell]) -> float:
    """The smallest width or height of any cell."""
    return min(min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (bounds(cell.outline) for cell in cells))


def shared_walls(cells: Sequence[Cell]) -> tuple[dict[tuple[int, int], list[Segment]], list[list[Segment]]]:
    """The walls between rooms, and those that face the outside.

    Returns:
        The segments between each pair of cells `(i, j)` with i < j, running along cell i; and for each cell
        those that no other cell touches.
    """
    boxes = np.array([bounds(cell.outline) for cell in cells])
    inner: dict[tuple[int, int], list[Segment]] = {}
    outer: list[list[Segment]] = []
    for i, cell in enumerate(cells):
        touching = (boxes[:, :2] <= boxes[i, 2:] + 1e-3).all(1) & (boxes[:, 2:] >= boxes[i, :2] - 1e-3).all(1)
        free: list[Segment] = []
        for a, b in edges(cell.outline):
            step, taken = direction(a, b), []
            for j in np.flatnonzero(touching).tolist():
                if j == i:
                    continue
                for other in edges(cells[j].outline):
                    span = overlap_on_edge((a, b), other)
                    if span is not None:
                        taken.append(span)
                        if i < j:
                            segment = (along(a, step, span[0]), along(a, step, span[1]))
                            inner.setdefault((i, int(j)), []).append(segment)
            position = 0.0
            for start, end in [*sorted(taken), (distance(a, b), math.inf)]:
                if start - position > 1e-3:
                    free.append((along(a, step, position), along(a, step, start)))
                position = max(position, end)
        outer.append(free)
    return inner, outer


def _gap(wall: Segment, width: float, margin: float, rng: np.random.Generator) -> Segment | None:
    """A gap of this width in a wall, at least `margin` from its ends, or None if the wall is too short."""
    room = distance(*wall) - width - 2 * margin
    if room < 0:
        return None
    start = margin + room * float(rng.choice((0.0, 1.0, rng.random())))
    step = direction(*wall)
    return along(wall[0], step, start), along(wall[0], step, start + width)


def place_openings(
    cells: Sequence[Cell],
    inner_wall: float,
    rng: np.random.Generator,
    *,
    window_share: float = 0.75,
    varied: bool = False,
    front_door: bool = True,
) -> list[Opening]:
    """Doors that connect all rooms, starting at the hall, a front door, and windows.

    Args:
        cells: the rooms.
        inner_wall: thickness of the walls between rooms.
        rng: random generator of the positions.
        window_share: probability that a long enough outer wall has a window.
        varied: whether there are double doors and archways as well.
        front_door: whether a door leads outside.
    """
    inner, outer = shared_walls(cells)
    inner = {pair: [max(walls, key=lambda wall: distance(*wall))] for pair, walls in inner.items()}
    margin = 0.15 + inner_wall / 2
    openings: list[Opening] = []

    def add_door(wall: Segment, width: float, *, into_second: bool, outside: bool, wide_too: bool) -> bool:
        gap = _gap(wall, width, margin, rng)
        if gap is None:
            return False
        inward = inward_normal(*wall)
        if into_second:
            inward = (-inward[0], -inward[1])
        if rng.random() < 0.5:
            gap = (gap[1], gap[0])
        wide = _gap(wall, 1.4, margin + 0.3, rng) if wide_too and rng.random() < 0.15 else None
        if wide is None:
            openings.append(Opening("door", gap[0], gap[1], inward, outside))
        elif outside or rng.random() < 0.5:
            middle = along(wide[0], direction(*wide), 0.7)
            openings.append(Opening("door", wide[0], middle, inward, outside))
            openings.append(Opening("door", wide[1], middle, inward, outside))
        else:
            openings.append(Opening("arch", wide[0], wide[1], inward, outside))
        return True

    halls = [i for i, cell in enumerate(cells) if cell.kind in ("hall", "landing")]
    entrance = halls[0] if halls else max(range(len(cells)), key=lambda i: signed_area(cells[i].outline))
    front_walls = sorted(outer[entrance], key=lambda wall: distance(*wall)) if front_door else []
    front = next(
        (wall for wall in front_walls if add_door(wall, 0.9, into_second=False, outside=True, wide_too=varied)),
        None,
    )

    # Breadth first from the entrance; no room is reached through a private one if there is another way.
    reached, queue = {entrance}, [entrance]
    while queue:
        queue.sort(key=lambda i: cells[i].kind not in ("hall", "landing", "living"))
        room = queue.pop(0)
        for (i, j), (wall,) in inner.items():
            if room not in (i, j):
                continue
            other = j if room == i else i
            if other in reached:
                continue
            width = 0.7 if cells[other].kind in ("wc", "store") else 0.8
            open_wide = varied and cells[room].kind in SOCIAL and cells[other].kind in SOCIAL
            if add_door(wall, width, into_second=other == j, outside=False, wide_too=open_wide):
                reached.add(other)
                queue.append(other)
    for i, cell in enumerate(cells):
        for wall in outer[i]:
            if wall == front or cell.kind == "store" or rng.random() > window_share:
                continue
            length = distance(*wall)
            width = min(float(rng.uniform(0.4, 0.7)) * length, 2.4)
            if width >= 0.5:
                middle = along(wall[0], direction(*wall), length / 2 - width / 2)
                end = along(middle, direction(*wall), width)
                openings.append(Opening("window", middle, end, inward_normal(*wall), True))
    return openings


def simple_layout(
    width: float,
    height: float,
    num_rooms: int,
    min_side: float,
    inner_wall: float,
    outer_wall: float,
    rng: np.random.Generator,
) -> Layout:
    """A rectangular floor of plain rectangular rooms, for the `clean` style.

    Args:
        width: width of the plan, including outer walls.
        height: height of the plan, including outer walls.
        num_rooms: number of rooms wanted; there are fewer if they would be narrower than `min_side`.
        min_side: smallest width and height of a room between its walls.
        inner_wall: thickness of the walls between rooms.
        outer_wall: thickness of the walls around the plan.
        rng: random generator.
    """
    margin = outer_wall - inner_wall / 2
    footprint = (
        (margin, margin),
        (width - margin, margin),
        (width - margin, height - margin),
        (margin, height - margin),
    )
    cells: list[Cell] = []
    for attempt in range(60):
        count = max(2, num_rooms - attempt // 12)
        cells = divide(footprint, [("", float(weight)) for weight in rng.uniform(0.6, 1.6, count)], rng)
        if narrowest(cells) - inner_wall >= min_side:
            break
    # The largest cell becomes the living room, the smallest the bath and the store.
    cells.sort(key=lambda cell: -signed_area(cell.outline))
    kinds: tuple[str, ...] = ("living", "bedroom", "kitchen", "bedroom", "hall", "study", "bedroom", "bath", "store")
    kinds = (*kinds[: len(cells) - 1], "bath") if len(cells) < 9 else kinds
    cells = [Cell(kind, cell.outline, ((kind, cell.outline),)) for kind, cell in zip(kinds, cells, strict=True)]
    openings = place_openings(cells, inner_wall, rng)
    return Layout(tuple(cells), tuple(openings), inner_wall, outer_wall)
