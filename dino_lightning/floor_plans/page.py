"""A `realistic` page: one or two floors, furnished, measured, with terraces, captions and a north arrow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dino_lightning.floor_plans.drawing import WHITE, Ink, Page, Pen, Room
from dino_lightning.floor_plans.furnishing import Box, furnish
from dino_lightning.floor_plans.geometry import (
    Point,
    Polygon,
    along,
    bounds,
    direction,
    distance,
    inward_normal,
    offset,
    signed_area,
)
from dino_lightning.floor_plans.house import house_layout, turned
from dino_lightning.floor_plans.labels import draw_measures, write_name
from dino_lightning.floor_plans.layout import Layout, shared_walls
from dino_lightning.floor_plans.walls import WallStyle, draw_walls
from dino_lightning.floor_plans.words import AGENTS, DISCLAIMER, NAMES, OUTDOOR_NAMES, UNITS, measured

FLOORS = (("GROUND FLOOR", "FIRST FLOOR"), ("LOWER FLOOR", "UPPER FLOOR"), ("1ST FLOOR", "2ND FLOOR"))
PALE: Ink = (250, 248, 242)
TINTS: dict[str, Ink] = {
    "bath": (214, 232, 240),
    "ensuite": (214, 232, 240),
    "wc": (214, 232, 240),
    "kitchen": (238, 232, 214),
    "bedroom": (244, 230, 220),
    "living": (246, 238, 214),
    "family": (246, 238, 214),
    "dining": (246, 238, 214),
    "garage": (226, 226, 226),
}


@dataclass(frozen=True)
class Lettering:
    """How the names on a plan are written.

    Attributes:
        language: key of the vocabulary.
        upper: whether names are in capitals.
        size: height of the text in pixels of the finished page.
        units: how room sizes are written; "" leaves them out.
    """

    language: str
    upper: bool
    size: float
    units: str


@dataclass(frozen=True)
class Floor:
    """One floor and its surroundings, in metres.

    Attributes:
        layout: its rooms.
        terraces: outlines of terraces and balconies, which are not rooms.
        extent: box around everything drawn of it.
        upright: whether its walls are parallel to the page's edges.
    """

    layout: Layout
    terraces: tuple[Polygon, ...]
    extent: Box
    upright: bool


def draw_page(long_side: int, rng: np.random.Generator, *, wings: bool = False) -> tuple[Image.Image, list[Room]]:
    """Draw a page with a plan.

    Args:
        long_side: long side of the page in pixels.
        rng: random generator.
        wings: whether some homes have wings, see `house_layout`.

    Returns:
        The page, RGB, and its rooms.
    """
    num_rooms = 2 + int(19 * rng.beta(1.5, 2.2))
    floors = _floors(num_rooms, rng, wings)
    stacked = bool(rng.random() < 0.3)
    widths = [floor.extent[2] - floor.extent[0] for floor in floors]
    heights = [floor.extent[3] - floor.extent[1] for floor in floors]
    measures = bool(rng.random() < 0.4)
    space = 0.05 * max(*widths, *heights)
    gap = space * (2.2 if measures else 1.0)
    width = max(widths) if stacked else sum(widths) + gap * (len(floors) - 1)
    height = sum(heights) + 2 * gap * (len(floors) - 1) if stacked else max(heights)
    left, right, top, bottom = (space * float(rng.uniform(1.0, 2.5)) for _ in range(4))
    title, footer = bool(rng.random() < 0.3), bool(rng.random() < 0.6)
    if measures:
        left, top = left + space, top + space
    top += space * 2 if title else 0.0
    bottom += space * (3.5 if footer else 1.2)
    page_width, page_height = width + left + right, height + top + bottom
    if rng.random() < 0.25:  # a sheet of A4 with the plan somewhere on it
        ratio = math.sqrt(2) if page_width > page_height else math.sqrt(0.5)
        extra_width = max(page_height * ratio - page_width, 0.0)
        extra_height = max(page_width / ratio - page_height, 0.0)
        left, top = (
            left + extra_width * float(rng.uniform(0.2, 0.8)),
            top + extra_height * float(rng.uniform(0.2, 0.6)),
        )
        page_width, page_height = page_width + extra_width, page_height + extra_height
    scale = long_side / max(page_width, page_height)
    page = Page((round(page_width * scale), round(page_height * scale)), 2 if long_side > 500 else 3)

    grey = int(rng.choice((0, 0, 20, 50)))
    hairline = max(long_side / 900, 0.55) * float(rng.uniform(0.8, 1.2))
    walls = WallStyle(str(rng.choice(("solid", "grey", "hatched", "hollow"), p=(0.62, 0.13, 0.18, 0.07))), grey)
    lettering = _lettering(scale, long_side, rng)
    tinted = bool(rng.random() < 0.2)
    fullness = float(rng.choice((0.0, 0.6, 1.0), p=(0.12, 0.3, 0.58)))
    names = FLOORS[int(rng.integers(len(FLOORS)))]
    rooms: list[Room] = []
    counts: dict[str, int] = {}
    x, y = left, top
    for index, floor in enumerate(floors):
        shift = (width - widths[index]) / 2 if stacked else 0.0
        down = 0.0 if stacked else (height - heights[index]) * 0.5
        origin = ((x + shift - floor.extent[0]) * scale, (y + down - floor.extent[1]) * scale)
        pen = Pen(page, scale, origin, hairline, (grey, grey, grey))
        _draw_ground(pen, floor, tinted, lettering, rng)
        draw_walls(pen, floor.layout, walls)
        rooms += _draw_rooms(pen, floor.layout, lettering, tinted, fullness, counts, rng)
        if measures and floor.upright:
            draw_measures(pen, floor.layout, floor.extent, lettering.size, rng)
        if len(floors) > 1 or rng.random() < 0.4:
            below = (x + shift + widths[index] / 2) * scale, (y + down + heights[index] + space * 0.5) * scale
            page.text(below, [names[index]], max(lettering.size * 1.2, 5.0), pen.ink)
        x, y = (x, y + heights[index] + 2 * gap) if stacked else (x + widths[index] + gap, y)
    area = sum(abs(signed_area(cell.outline)) for floor in floors for cell in floor.layout.cells)
    _draw_margins(page, space * scale, lettering, area, title, footer, rng)
    return page.finish(), rooms


def _floors(num_rooms: int, rng: np.random.Generator, wings: bool) -> list[Floor]:
    """One floor or two, with their terraces."""
    counts = [num_rooms]
    if num_rooms >= 6 and rng.random() < 0.35:
        upstairs = int(np.clip(num_rooms * rng.uniform(0.35, 0.55), 2, 9))
        counts = [num_rooms - upstairs, upstairs]
    angle = float(rng.uniform(-0.6, 0.6)) if rng.random() < 0.07 else 0.0
    floors: list[Floor] = []
    for index, count in enumerate(counts):
        layout, corner = house_layout(count, rng, upper=index > 0, wings=wings)
        if floors:  # the walls of the floor below
            below = floors[0].layout
            layout = replace(layout, inner_wall=below.inner_wall, outer_wall=below.outer_wall)
        terraces = [offset(corner.outline, 0.05)] if corner is not None and rng.random() < 0.8 else []
        layout = turned(layout, angle)
        if angle:
            terraces = []
        elif rng.random() < 0.35:
            terraces += _terrace(layout, rng)
        points = [point for cell in layout.cells for point in offset(cell.outline, -layout.outer_wall)]
        points += [point for terrace in terraces for point in terrace]
        floors.append(Floor(layout, tuple(terraces), bounds(points), angle == 0.0))
    return floors


def _terrace(layout: Layout, rng: np.random.Generator) -> list[Polygon]:
    """The outlines of at most one terrace or balcony, in front of a free outer wall."""
    points = [point for cell in layout.cells for point in cell.outline]
    walls = []
    for i, free in enumerate(shared_walls(layout.cells)[1]):
        for wall in free:
            nx, ny = inward_normal(*wall)
            clear = all((x - wall[0][0]) * nx + (y - wall[0][1]) * ny > -1e-3 for x, y in points)
            if clear and distance(*wall) > 2.2 and layout.cells[i].kind not in ("bath", "wc", "garage"):
                walls.append(wall)
    if not walls:
        return []
    a, b = walls[int(rng.integers(len(walls)))]
    breadth = distance(a, b) * float(rng.uniform(0.7, 1.0))
    step = direction(a, b)
    nx, ny = inward_normal(a, b)
    depth = -float(rng.uniform(1.0, 2.4)) - layout.outer_wall
    end = along(a, step, breadth)
    return [(end, a, along(a, (nx, ny), depth), along(end, (nx, ny), depth))]


def _lettering(scale: float, long_side: int, rng: np.random.Generator) -> Lettering:
    language = str(rng.choice(list(NAMES), p=(0.7, 0.1, 0.1, 0.1)))
    units = str(
        rng.choice(UNITS if language == "english" else ("m x m", "m2", "qm" if language == "german" else "m2", ""))
    )
    size = min(max(scale * float(rng.uniform(0.2, 0.3)), 5.0), long_side / 50 + 3)
    return Lettering(language, bool(rng.random() < 0.6), size, units)


def _draw_ground(pen: Pen, floor: Floor, tinted: bool, lettering: Lettering, rng: np.random.Generator) -> None:
    """Draw floor colours and terraces, which are hatched, paved or only dashed, and never rooms."""
    if tinted:
        for cell in floor.layout.cells:
            for kind, part in cell.parts:
                pen.polygon(part, TINTS.get(kind, PALE), width=0)
    for terrace in floor.terraces:
        pattern = str(rng.choice(("hatched", "paved", "boards", "empty")))
        pen.polygon(terrace, width=1.0)
        if pattern != "empty":
            spacing = {"hatched": 0.2, "paved": 0.45, "boards": 0.15}[pattern]
            turn = math.pi / 4 if pattern == "hatched" else 0.0
            pen.hatch(terrace, spacing, turn)
            if pattern == "paved":
                pen.hatch(terrace, spacing, turn + math.pi / 2)
        if rng.random() < 0.6:
            pen.polygon(offset(terrace, 0.08), fill=None)
        words = OUTDOOR_NAMES[lettering.language]
        name = words[int(rng.integers(len(words)))]
        x0, y0, x1, y1 = bounds(terrace)
        longest = (max(x1 - x0, y1 - y0) - 0.3) * pen.scale / (0.7 * len(name))
        size = min(lettering.size, longest)
        if size >= 4:
            middle = ((x0 + x1) / 2, (y0 + y1) / 2)
            pen.text(
                middle,
                [name.upper() if lettering.upper else name],
                size,
                halo=WHITE,
                upright=y1 - y0 > 2 * (x1 - x0),
            )


def _draw_rooms(
    pen: Pen,
    layout: Layout,
    lettering: Lettering,
    tinted: bool,
    fullness: float,
    counts: dict[str, int],
    rng: np.random.Generator,
) -> list[Room]:
    """Furnish and name every room; `counts` numbers the bedrooms across floors."""
    rooms = []
    for cell in layout.cells:
        taken = furnish(pen, layout, cell, rng, fullness)
        words = NAMES[lettering.language]["open" if len(cell.parts) > 1 and cell.kind == "living" else cell.kind]
        word = words[int(rng.integers(len(words)))]
        counts[cell.kind] = counts.get(cell.kind, 0) + 1
        if cell.kind == "bedroom":
            word += f" {counts[cell.kind]}"
        name = word.upper() if lettering.upper else word
        outline = offset(cell.outline, layout.inner_wall / 2)
        halo = TINTS.get(cell.kind, PALE) if tinted else WHITE
        write_name(pen, outline, name, measured(outline, lettering.units), taken, lettering.size, halo)
        rooms.append(Room(pen.to_page(outline), name))
    return rooms


def _draw_margins(
    page: Page,
    space: float,
    lettering: Lettering,
    area: float,
    title: bool,
    footer: bool,
    rng: np.random.Generator,
) -> None:
    """Draw what is not part of the plan: agent, area note, small print and north arrow."""
    width, height = page.size
    small = max(min(space * 0.32, lettering.size), 3.5)
    if title:
        page.text((width / 2, space * 1.2), [AGENTS[int(rng.integers(len(AGENTS)))]], max(space * 0.7, 6))
    if footer:
        lines = [f"APPROX. GROSS INTERNAL AREA {area:.0f} SQ M / {area * 10.764:.0f} SQ FT"]
        if rng.random() < 0.6:
            per_line = max(int(width * 0.9 / (small * 0.5)), 20)
            line = ""
            for word in DISCLAIMER.split():
                if len(line) + len(word) > per_line:
                    lines.append(line)
                    line = ""
                line = f"{line} {word}".strip()
            lines = [*lines, line][:4]
        page.text((width / 2, height - space * 0.4), lines, small, anchor="md")
    if rng.random() < 0.4:
        _draw_north(page, (width - space * 1.2, height - space * 1.3), space * 0.55, rng)


def _draw_north(page: Page, centre: Point, radius: float, rng: np.random.Generator) -> None:
    """Draw a north arrow in a circle."""
    pen = Pen(page, 1.0, centre, hairline=max(radius / 15, 0.6))
    turn = float(rng.uniform(0, 2 * math.pi))

    def at(forward: float, sideways: float) -> Point:
        c, s = math.cos(turn), math.sin(turn)
        return radius * (forward * s + sideways * c), radius * (-forward * c + sideways * s)

    if rng.random() < 0.6:
        pen.polygon([(radius * math.cos(t / 12 * math.pi), radius * math.sin(t / 12 * math.pi)) for t in range(24)])
    pen.polygon((at(0.8, 0), at(-0.5, 0.35), at(-0.25, 0)), fill=(0, 0, 0))
    pen.polygon((at(0.8, 0), at(-0.5, -0.35), at(-0.25, 0)))
    pen.text(at(1.35, 0), ["N"], max(radius * 0.6, 4))
