"""Drawings of furniture, kitchen and bathroom symbols, and stairs for `realistic` plans.

Each item is drawn in its own frame, in metres: x along the wall behind it, y into the room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dino_lightning.floor_plans.drawing import Pen
from dino_lightning.floor_plans.geometry import Point, along, rectangle


@dataclass(frozen=True)
class Frame:
    """The position of an item: its origin and axes in the layout's metres."""

    pen: Pen
    origin: Point
    x_axis: Point
    y_axis: Point

    def at(self, x: float, y: float) -> Point:
        """A point of the item in the layout's metres."""
        return along(along(self.origin, self.x_axis, x), self.y_axis, y)

    def box(self, x0: float, y0: float, x1: float, y1: float, radius: float = 0.0, width: float = 1.0) -> None:
        """Draw a rectangle, with rounded corners if `radius` is given."""
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
        """Draw an ellipse around (x, y)."""
        angles = (i * math.pi / 10 for i in range(20))
        self.pen.polygon([self.at(x + rx * math.cos(t), y + ry * math.sin(t)) for t in angles], width=width)

    def line(self, *points: Point, width: float = 1.0) -> None:
        """Draw a line through the points."""
        self.pen.line([self.at(*point) for point in points], width)


Item = Callable[[Frame, float, float], None]


def double_bed(frame: Frame, w: float, d: float) -> None:
    """A mattress with two pillows and a turned-down blanket."""
    frame.box(0, 0, w, d, 0.05)
    for x in (0.08, w / 2 + 0.04):
        frame.box(x, 0.1, x + w / 2 - 0.12, 0.48, 0.08)
    frame.line((0, 0.62), (w, 0.62))
    frame.line((0, 0.62), (w * 0.45, d * 0.62), (w, 0.62))


def single_bed(frame: Frame, w: float, d: float) -> None:
    """A mattress with one pillow and a blanket."""
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
    """A cupboard from above: a box with a cross."""
    frame.box(0, 0, w, d)
    frame.line((0, 0), (w, d))
    frame.line((w, 0), (0, d))


def sofa(frame: Frame, w: float, d: float) -> None:
    """A sofa with back, arms and cushions."""
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
    """A low board with a screen on it."""
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
    """A hob with four burners."""
    frame.box(0.04, 0.05, w - 0.04, d - 0.05)
    for x, y, r in ((0.27, 0.3, 0.1), (0.73, 0.3, 0.08), (0.27, 0.7, 0.08), (0.73, 0.7, 0.1)):
        frame.ellipse(w * x, d * y, r, r)


def sink(frame: Frame, w: float, d: float) -> None:
    """A sink with its draining board."""
    frame.box(0.05, 0.07, w - 0.05, d - 0.07, 0.04)
    frame.box(0.1, 0.14, w * 0.48, d - 0.14, 0.06)
    for i in range(4):
        y = 0.16 + (d - 0.32) * i / 3
        frame.line((w * 0.56, y), (w - 0.12, y))
    frame.ellipse(w * 0.29, 0.1, 0.03, 0.03)


def counter(frame: Frame, w: float, d: float) -> None:
    """A kitchen worktop with a hob and a sink, if they fit."""
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
    """A fridge: a square with a door line and a cross."""
    frame.box(0, 0, w, d)
    frame.line((0, d - 0.06), (w, d - 0.06))
    frame.line((0, 0), (w, d - 0.06))


def washing_machine(frame: Frame, w: float, d: float) -> None:
    """A washing machine: a square with its drum."""
    frame.box(0, 0, w, d)
    frame.ellipse(w / 2, d / 2, w * 0.32, d * 0.32)


def toilet(frame: Frame, w: float, d: float) -> None:
    """A toilet: cistern and bowl."""
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
    """A shower tray with its slopes and the drain."""
    frame.box(0, 0, w, d)
    frame.line((0, 0), (w, d))
    frame.line((w, 0), (0, d))
    frame.ellipse(w / 2, d / 2, 0.06, 0.06)


def stairs(frame: Frame, w: float, d: float) -> None:
    """A flight of stairs with an arrow that points up."""
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
