"""Furniture, kitchen and bathroom signs, and stairs: what fills the rooms of a `realistic` plan.

Each item is drawn in a frame of its own, in metres: x along the wall it stands against, y into the room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dino_lightning.data.rooms_drawing import Pen, gap_outline
from dino_lightning.data.rooms_geometry import (
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
from dino_lightning.data.rooms_layout import Cell, Layout

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """Where an item stands: its own origin and axes, in the metres of the layout."""

    pen: Pen
    origin: Point
    x_axis: Point
    y_axis: Point

    def at(self, x: float, y: float) -> Point:
        """A point of the item in the layout."""
        return along(along(self.origin, self.x_axis, x), self.y_axis, y)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, radius: float = 0.0, width: float = 1.0
    ) -> None:
        """A rectangle, its corners rounded where `radius` is given."""
        if radius <= 0:
            self.pen.polygon([self.at(x, y) for x, y in rectangle(x0, y0, x1, y1)], width=width)
            return
        points = []
        for k, (cx, cy) in enumerate(
            (
                (x1 - radius, y1 - radius),
                (x0 + radius, y1 - radius),
                (x0 + radius, y0 + radius),
                (x1 - radius, y0 + radius),
            )
        ):
            for t in range(5):
                angle = (k + t / 4) * math.pi / 2
                points.append(self.at(cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
        self.pen.polygon(points, width=width)

    def ellipse(self, x: float, y: float, rx: float, ry: float, width: float = 1.0) -> None:
        """An ellipse around (x, y)."""
        angles = (i * math.pi / 10 for i in range(20))
        self.pen.polygon([self.at(x + rx * math.cos(t), y + ry * math.sin(t)) for t in angles], width=width)

    def line(self, *points: Point, width: float = 1.0) -> None:
        """A line through the points."""
        self.pen.line([self.at(*point) for point in points], width)


Item = Callable[[Frame, float, float], None]


def double_bed(frame: Frame, w: float, d: float) -> None:
    """Mattress, two pillows, the blanket turned down."""
    frame.box(0, 0, w, d, 0.05)
    for x in (0.08, w / 2 + 0.04):
        frame.box(x, 0.1, x + w / 2 - 0.12, 0.48, 0.08)
    frame.line((0, 0.62), (w, 0.62))
    frame.line((0, 0.62), (w * 0.45, d * 0.62), (w, 0.62))


def single_bed(frame: Frame, w: float, d: float) -> None:
    """Mattress, one pillow, a blanket."""
    frame.box(0, 0, w, d, 0.05)
    frame.box(0.12, 0.08, w - 0.12, 0.42, 0.08)
    frame.line((0, 0.58), (w, 0.58))


def bed_with_tables(frame: Frame, w: float, d: float) -> None:
    """A double bed between two bedside tables with lamps."""
    for x in (0.0, w - 0.42):
        frame.box(x, 0, x + 0.42, 0.4)
        frame.ellipse(x + 0.21, 0.2, 0.12, 0.12)
    moved = Frame(frame.pen, frame.at(0.45, 0), frame.x_axis, frame.y_axis)
    double_bed(moved, w - 0.9, d)


def wardrobe(frame: Frame, w: float, d: float) -> None:
    """A cupboard with its rail and hangers."""
    frame.box(0, 0, w, d)
    frame.line((0, d / 2), (w, d / 2))
    for i in range(1, max(int(w / 0.22), 2)):
        frame.line((0.22 * i - 0.05, d * 0.2), (0.22 * i + 0.05, d * 0.8))


def cupboard(frame: Frame, w: float, d: float) -> None:
    """A cupboard from above: a crossed box."""
    frame.box(0, 0, w, d)
    frame.line((0, 0), (w, d))
    frame.line((w, 0), (0, d))


def sofa(frame: Frame, w: float, d: float) -> None:
    """Back, arms and cushions."""
    frame.box(0, 0, w, d, 0.1)
    seats = 3 if w > 1.7 else 2 if w > 1.2 else 1
    for i in range(seats):
        step = (w - 0.36) / seats
        frame.box(0.18 + i * step, 0.2, 0.18 + (i + 1) * step, d, 0.06)


def sofa_and_table(frame: Frame, w: float, d: float) -> None:
    """A sofa with a low table in front of it."""
    sofa(frame, w, 0.9)
    frame.box(w * 0.25, 1.2, w * 0.75, d, 0.04)


def corner_sofa(frame: Frame, w: float, d: float) -> None:
    """An L-shaped sofa."""
    frame.box(0, 0, 0.9, d, 0.1)
    frame.box(0, 0, w, 0.9, 0.1)
    frame.box(0.2, 0.2, 0.9, d - 0.15, 0.05)
    frame.box(0.9, 0.2, w - 0.18, 0.9, 0.05)
    frame.ellipse(1.6, 1.55, 0.35, 0.35)


def television(frame: Frame, w: float, d: float) -> None:
    """A low board and the screen on it."""
    frame.box(0, 0, w, d)
    frame.box(w * 0.15, d * 0.35, w * 0.85, d * 0.55)


def _chair(frame: Frame, x: float, y: float, dx: float, dy: float) -> None:
    frame.box(x - 0.21, y - 0.21, x + 0.21, y + 0.21, 0.07)
    if dx:
        frame.line((x + dx * 0.15, y - 0.18), (x + dx * 0.15, y + 0.18))
    else:
        frame.line((x - 0.18, y + dy * 0.15), (x + 0.18, y + dy * 0.15))


def dining_table(frame: Frame, w: float, d: float) -> None:
    """A table with chairs along its long sides and at its ends."""
    across = max(int((w - 0.9) / 0.6), 1)
    for i in range(across):
        x = 0.45 + (w - 0.9) * (i + 0.5) / across
        _chair(frame, x, 0.32, 0, -1)
        _chair(frame, x, d - 0.32, 0, 1)
    if w > 1.9:
        _chair(frame, 0.32, d / 2, -1, 0)
        _chair(frame, w - 0.32, d / 2, 1, 0)
    frame.box(0.45, 0.45, w - 0.45, d - 0.45, 0.03)


def round_table(frame: Frame, w: float, d: float) -> None:
    """A round table with four chairs."""
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        _chair(frame, w / 2 + dx * (w / 2 - 0.25), d / 2 + dy * (d / 2 - 0.25), dx, dy)
    frame.ellipse(w / 2, d / 2, w / 2 - 0.4, d / 2 - 0.4)


def desk(frame: Frame, w: float, d: float) -> None:
    """A desk and its chair."""
    frame.ellipse(w / 2, d - 0.28, 0.24, 0.24)
    frame.box(0, 0, w, d - 0.4)


def hob(frame: Frame, w: float, d: float) -> None:
    """Four burners."""
    frame.box(0.04, 0.05, w - 0.04, d - 0.05)
    for x, y, r in ((0.27, 0.3, 0.1), (0.73, 0.3, 0.08), (0.27, 0.7, 0.08), (0.73, 0.7, 0.1)):
        frame.ellipse(w * x, d * y, r, r)


def sink(frame: Frame, w: float, d: float) -> None:
    """A basin and its draining board."""
    frame.box(0.05, 0.07, w - 0.05, d - 0.07, 0.04)
    frame.box(0.1, 0.14, w * 0.48, d - 0.14, 0.06)
    for i in range(4):
        y = 0.16 + (d - 0.32) * i / 3
        frame.line((w * 0.56, y), (w - 0.12, y))
    frame.ellipse(w * 0.29, 0.1, 0.03, 0.03)


def counter(frame: Frame, w: float, d: float) -> None:
    """A kitchen worktop with hob and sink, as far as they fit."""
    frame.box(0, 0, w, d)
    if w >= 0.7:
        hob(Frame(frame.pen, frame.at(w * 0.12, 0), frame.x_axis, frame.y_axis), 0.6, d)
    if w >= 1.9:
        sink(Frame(frame.pen, frame.at(w * 0.88 - 0.95, 0), frame.x_axis, frame.y_axis), 0.95, d)


def sink_counter(frame: Frame, w: float, d: float) -> None:
    """A worktop with a sink only."""
    frame.box(0, 0, w, d)
    sink(Frame(frame.pen, frame.at((w - 0.9) / 2, 0), frame.x_axis, frame.y_axis), 0.9, d)


def fridge(frame: Frame, w: float, d: float) -> None:
    """A square with its door line and a cross."""
    frame.box(0, 0, w, d)
    frame.line((0, d - 0.06), (w, d - 0.06))
    frame.line((0, 0), (w, d - 0.06))


def washing_machine(frame: Frame, w: float, d: float) -> None:
    """A square with its drum."""
    frame.box(0, 0, w, d)
    frame.ellipse(w / 2, d / 2, w * 0.32, d * 0.32)


def toilet(frame: Frame, w: float, d: float) -> None:
    """Cistern and bowl."""
    frame.box(0, 0, w, 0.2, 0.03)
    frame.ellipse(w / 2, 0.22 + (d - 0.22) / 2, w * 0.4, (d - 0.2) / 2)
    frame.ellipse(w / 2, 0.24 + (d - 0.22) / 2, w * 0.26, (d - 0.2) * 0.32)


def basin(frame: Frame, w: float, d: float) -> None:
    """A wash basin with its tap."""
    frame.box(0, 0, w, d, 0.06)
    frame.ellipse(w / 2, d * 0.55, w * 0.36, d * 0.32)
    frame.line((w / 2, 0.03), (w / 2, d * 0.35))


def bath(frame: Frame, w: float, d: float) -> None:
    """A bath tub."""
    frame.box(0, 0, w, d)
    frame.box(0.07, 0.07, w - 0.07, d - 0.07, min(d * 0.3, 0.25))
    frame.ellipse(0.22, d / 2, 0.035, 0.035)


def shower(frame: Frame, w: float, d: float) -> None:
    """A tray with its falls and the drain."""
    frame.box(0, 0, w, d)
    frame.line((0, 0), (w, d))
    frame.line((w, 0), (0, d))
    frame.ellipse(w / 2, d / 2, 0.06, 0.06)


def stairs(frame: Frame, w: float, d: float) -> None:
    """A flight of stairs with the arrow that points up."""
    frame.box(0, 0, w, d)
    for i in range(1, int(w / 0.24)):
        frame.line((0.24 * i, 0), (0.24 * i, d))
    frame.line((0.15, d / 2), (w - 0.2, d / 2))
    frame.line((w - 0.4, d / 2 - 0.12), (w - 0.2, d / 2), (w - 0.4, d / 2 + 0.12))
    if w > 2.2:
        frame.line((w * 0.55, 0), (w * 0.62, d), width=1.6)


def car(frame: Frame, w: float, d: float) -> None:
    """A car from above."""
    frame.box(0, 0, w, d, 0.4)
    frame.box(0.15, d * 0.28, w - 0.15, d * 0.42, 0.12)
    frame.box(0.2, d * 0.72, w - 0.2, d * 0.83, 0.1)
    frame.line((0.2, d * 0.42), (0.2, d * 0.72))
    frame.line((w - 0.2, d * 0.42), (w - 0.2, d * 0.72))


def plant(frame: Frame, w: float, d: float) -> None:
    """A pot plant."""
    frame.ellipse(w / 2, d / 2, w / 2, d / 2)
    for i in range(6):
        t = i * math.pi / 3
        frame.line((w / 2, d / 2), (w / 2 + w * 0.45 * math.cos(t), d / 2 + d * 0.45 * math.sin(t)))


# For each kind of room, the typical things first: item, width range, depth, free-standing, probability.
Wish = tuple[Item, tuple[float, float], float, bool, float]
WISHES: dict[str, tuple[Wish, ...]] = {
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
        pen: draws in the metres of the layout.
        layout: the floor, for its doors and walls.
        cell: the room.
        rng: source of what stands where.
        fullness: 0 leaves rooms empty, 1 places all that is usual.

    Returns:
        The boxes taken by doors and furniture, in metres, for the writing to avoid.
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
        for item, (low, high), depth, free, probability in WISHES.get(kind, ()):
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
    """Find a place for an item of this width and depth, and mark it as taken."""
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
        if any(
            contains(rectangle(*bounds(corners)), p) and clearance(tuple(corners), p) > 1e-3 for p in room
        ):
            continue  # a corner of an L-shaped room sticks into the item
        x0, y0, x1, y1 = bounds(corners)
        if any(x0 < right and left < x1 and y0 < bottom and top < y1 for left, top, right, bottom in taken):
            continue
        taken.append((x0, y0, x1, y1))
        return frame
    return None
