"""Drawing of a floor: walls, doors, windows and writing, on a page that is larger than the finished one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from dino_lightning.data.rooms_geometry import Point, Polygon, along, direction, distance, offset
from dino_lightning.data.rooms_layout import Layout, Opening

Ink = tuple[int, int, int]
BLACK: Ink = (0, 0, 0)
WHITE: Ink = (255, 255, 255)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font; no font file is needed on the machine."""
    return ImageFont.load_default(size=size)


class Page:
    """A page drawn `supersampling` times too large, so that thin lines come out anti-aliased.

    Attributes:
        image: the enlarged picture, RGB.
        draw: Pillow's pen on it.
        size: (width, height) of the finished page in pixels.
        supersampling: how much larger the picture is drawn.
    """

    def __init__(self, size: tuple[int, int], supersampling: int, paper: Ink = WHITE) -> None:
        self.size = size
        self.supersampling = supersampling
        self.image = Image.new("RGB", (size[0] * supersampling, size[1] * supersampling), paper)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        centre: Point,
        lines: Sequence[str],
        size: float,
        ink: Ink = BLACK,
        *,
        anchor: str = "mm",
        halo: bool = False,
    ) -> None:
        """Write lines of text around a point.

        Args:
            centre: where, in pixels of the finished page.
            lines: one string a line.
            size: height of the writing in pixels of the finished page.
            ink: colour.
            anchor: Pillow's text anchor.
            halo: whether a white border keeps the text legible over lines.
        """
        scale = self.supersampling
        self.draw.multiline_text(
            (centre[0] * scale, centre[1] * scale),
            "\n".join(lines),
            fill=ink,
            font=font(max(round(size * scale), 4)),
            anchor=anchor,
            align="center",
            spacing=size * scale * 0.2,
            stroke_width=round(scale * 0.8) if halo else 0,
            stroke_fill=WHITE if halo else None,
        )

    def finish(self) -> Image.Image:
        """The page at its final size."""
        return self.image.reduce(self.supersampling)


class Pen:
    """Draws in metres on a page.

    Attributes:
        page: the page drawn on.
        scale: pixels of the finished page per metre.
        origin: where the layout's origin lies on the finished page.
        hairline: thickness of thin lines, in pixels of the finished page.
    """

    def __init__(
        self, page: Page, scale: float, origin: Point, hairline: float = 0.8, ink: Ink = BLACK
    ) -> None:
        self.page = page
        self.scale = scale
        self.origin = origin
        self.hairline = hairline
        self.ink = ink

    def to_page(self, polygon: Sequence[Point]) -> Polygon:
        """Metres to pixels of the finished page."""
        return tuple((x * self.scale + self.origin[0], y * self.scale + self.origin[1]) for x, y in polygon)

    def _enlarged(self, points: Sequence[Point]) -> list[Point]:
        # Pillow paints the pixels that hold the end points too: half a pixel less makes areas come out exact.
        s = self.page.supersampling
        return [(x * s, y * s) for x, y in self.to_page(points)]

    def line(self, points: Sequence[Point], width: float = 1.0, ink: Ink | None = None) -> None:
        """A thin line through the points, `width` hairlines thick."""
        thickness = max(round(self.hairline * width * self.page.supersampling), 1)
        self.page.draw.line(self._enlarged(points), fill=ink or self.ink, width=thickness, joint="curve")

    def polygon(self, points: Sequence[Point], fill: Ink | None = WHITE, width: float = 1.0) -> None:
        """A polygon with a thin outline."""
        if fill is not None:
            self.page.draw.polygon(self._enlarged(points), fill=fill)
        if width > 0:
            self.line([*points, points[0]], width)

    def text(self, centre: Point, lines: Sequence[str], size: float, *, halo: bool = False) -> None:
        """Text around a point; the size is in pixels of the finished page."""
        self.page.text(self.to_page([centre])[0], lines, size, self.ink, halo=halo)


def wall_mask(pen: Pen, layout: Layout) -> Image.Image:
    """Where there is wall: an "L" picture of the enlarged page, 255 in walls.

    Each room's outline is first filled out to the outer face of its walls, then all rooms are emptied: a wall between
    two rooms ends up with the inner thickness, a wall to the outside with the outer one, whatever their shapes.
    """
    mask = Image.new("L", pen.page.image.size, 0)
    draw = ImageDraw.Draw(mask)
    # Pillow also paints the pixels under a polygon's end points; half a pixel less makes the areas exact.
    half_pixel = 0.5 / (pen.scale * pen.page.supersampling)
    for cell in layout.cells:
        outside = offset(cell.outline, layout.inner_wall / 2 - layout.outer_wall + half_pixel)
        draw.polygon(enlarged(pen, outside), fill=255)
    for cell in layout.cells:
        draw.polygon(enlarged(pen, offset(cell.outline, layout.inner_wall / 2 + half_pixel)), fill=0)
    for opening in layout.openings:
        draw.polygon(enlarged(pen, gap_outline(opening, layout, 3 * half_pixel)), fill=0)
    return mask


def enlarged(pen: Pen, polygon: Sequence[Point]) -> list[Point]:
    """Metres to pixels of the enlarged page."""
    s = pen.page.supersampling
    return [(x * s, y * s) for x, y in pen.to_page(polygon)]


def gap_outline(opening: Opening, layout: Layout, extra: float = 0.0) -> Polygon:
    """The rectangle of wall that an opening takes out, `extra` metres beyond both faces."""
    step = direction(opening.start, opening.end)
    normal = opening.inward
    if opening.outer:
        front, back = layout.inner_wall / 2, layout.outer_wall - layout.inner_wall / 2
    else:
        front = back = layout.inner_wall / 2
    del step
    start, end = opening.start, opening.end
    return (
        along(start, normal, front + extra),
        along(end, normal, front + extra),
        along(end, normal, -back - extra),
        along(start, normal, -back - extra),
    )


def draw_door(pen: Pen, door: Opening, layout: Layout) -> None:
    """The leaf, wide open, and the quarter circle it swings through."""
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
    """Thin lines along the wall: both faces and the panes between them."""
    a, b, c, d = gap_outline(window, layout)
    pen.polygon((a, b, c, d))
    for t in (0.36, 0.64):
        pen.line(
            (
                (a[0] + (d[0] - a[0]) * t, a[1] + (d[1] - a[1]) * t),
                (b[0] + (c[0] - b[0]) * t, b[1] + (c[1] - b[1]) * t),
            )
        )


def draw_walls(pen: Pen, layout: Layout) -> None:
    """Walls in solid ink, with the doors and windows in them."""
    pen.page.image.paste(pen.ink, (0, 0), wall_mask(pen, layout))
    for opening in layout.openings:
        if opening.kind == "door":
            draw_door(pen, opening, layout)
        else:
            draw_window(pen, opening, layout)
