"""Draw the walls, doors and windows of a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from dino_lightning.floor_plans.drawing import Pen
from dino_lightning.floor_plans.geometry import Polygon, along, direction, distance, offset
from dino_lightning.floor_plans.layout import Layout, Opening


@dataclass(frozen=True)
class WallStyle:
    """How walls are filled.

    Attributes:
        fill: "solid", "grey" (with an outline), "hatched" or "hollow".
        shade: grey value of the lines, and of solid walls, 0-255.
    """

    fill: str = "solid"
    shade: int = 0


def wall_mask(pen: Pen, layout: Layout) -> Image.Image:
    """The mask of the walls: an "L" image of the enlarged page, 255 in walls.

    Each room's outline is first filled out to the outer face of its walls, then all rooms are emptied: a wall
    between two rooms ends up with the inner thickness, any other with the outer one, whatever their shapes.
    """
    mask = Image.new("L", pen.page.image.size, 0)
    draw = ImageDraw.Draw(mask)
    # Pillow also paints the pixels under a polygon's end points; half a pixel less makes the areas exact.
    half_pixel = 0.5 / (pen.scale * pen.page.supersampling)
    for cell in layout.cells:
        outside = offset(cell.outline, layout.inner_wall / 2 - layout.outer_wall + half_pixel)
        draw.polygon(pen.enlarged(outside), fill=255)
    for cell in layout.cells:
        draw.polygon(pen.enlarged(offset(cell.outline, layout.inner_wall / 2 + half_pixel)), fill=0)
    for opening in layout.openings:
        draw.polygon(pen.enlarged(gap_outline(opening, layout, 3 * half_pixel)), fill=0)
    return mask


def gap_outline(opening: Opening, layout: Layout, extra: float = 0.0) -> Polygon:
    """The rectangle that an opening cuts out of a wall, `extra` metres beyond both faces."""
    normal = opening.inward
    if opening.outer:
        front, back = layout.inner_wall / 2, layout.outer_wall - layout.inner_wall / 2
    else:
        front = back = layout.inner_wall / 2
    start, end = opening.start, opening.end
    return (
        along(start, normal, front + extra),
        along(end, normal, front + extra),
        along(end, normal, -back - extra),
        along(start, normal, -back - extra),
    )


def draw_door(pen: Pen, door: Opening, layout: Layout) -> None:
    """Draw the open leaf and the quarter circle it swings through."""
    face = gap_outline(door, layout)
    hinge, strike = face[0], face[1]
    width = distance(hinge, strike)
    step, normal = direction(hinge, strike), door.inward
    swing = [
        along(along(hinge, step, width * math.cos(t)), normal, width * math.sin(t))
        for t in (i * math.pi / 24 for i in range(13))
    ]
    pen.line(swing)
    leaf = along(hinge, normal, width)
    pen.polygon((hinge, along(hinge, step, 0.04), along(leaf, step, 0.04), leaf), width=1.0)


def draw_window(pen: Pen, window: Opening, layout: Layout) -> None:
    """Draw thin lines along the wall: both faces and the panes between them."""
    a, b, c, d = gap_outline(window, layout)
    pen.polygon((a, b, c, d))
    for t in (0.36, 0.64):
        pen.line(
            (
                (a[0] + (d[0] - a[0]) * t, a[1] + (d[1] - a[1]) * t),
                (b[0] + (c[0] - b[0]) * t, b[1] + (c[1] - b[1]) * t),
            )
        )


def draw_walls(pen: Pen, layout: Layout, style: WallStyle | None = None) -> None:
    """Draw the walls, solid black by default, with their doors and windows."""
    style = style or WallStyle()
    mask = wall_mask(pen, layout)
    line = max(round(pen.hairline * pen.page.supersampling), 1)
    if style.fill == "solid":
        pen.page.image.paste((style.shade,) * 3, (0, 0), mask)
    else:
        fill = Image.new("L", mask.size, 150 if style.fill == "grey" else 255)
        if style.fill == "hatched":
            pen_on_fill = ImageDraw.Draw(fill)
            width, height = mask.size
            for x in range(-height, width, line * 5):
                pen_on_fill.line((x, height, x + height, 0), fill=style.shade, width=line)
        pen.page.image.paste(fill.convert("RGB"), (0, 0), mask)
        inner = mask
        for dx, dy in ((line, 0), (-line, 0), (0, line), (0, -line)):
            inner = ImageChops.darker(inner, ImageChops.offset(mask, dx, dy))
        pen.page.image.paste((style.shade,) * 3, (0, 0), ImageChops.subtract(mask, inner))
    for opening in layout.openings:
        if opening.kind == "door":
            draw_door(pen, opening, layout)
        elif opening.kind == "window":
            draw_window(pen, opening, layout)
