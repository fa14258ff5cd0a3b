"""Drawing of a floor: walls, doors, windows and writing, on a page that is larger than the finished one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFont

from dino_lightning.data.rooms_geometry import (
    Point,
    Polygon,
    along,
    bounds,
    direction,
    distance,
    edges,
    offset,
    signed_area,
)
from dino_lightning.data.rooms_layout import Layout, Opening

Ink = tuple[int, int, int]
BLACK: Ink = (0, 0, 0)
WHITE: Ink = (255, 255, 255)
LINE_SPACING = 0.25  # between lines of text, as a part of their height


@dataclass(frozen=True)
class Room:
    """One room of a plan.

    Attributes:
        polygon: its outline along the inner faces of its walls, (x, y) in pixels of the page.
        name: what the plan calls it, e.g. "BEDROOM 1".
    """

    polygon: Polygon
    name: str

    @property
    def bbox_xyxy(self) -> tuple[float, float, float, float]:
        """The smallest box around the outline: x0, y0, x1, y1 in pixels."""
        return bounds(self.polygon)

    @property
    def area(self) -> float:
        """Square pixels within the outline."""
        return abs(signed_area(self.polygon))


@dataclass(frozen=True)
class WallStyle:
    """How walls are filled.

    Attributes:
        fill: "solid", "grey" (with an outline), "hatched" or "hollow".
        shade: grey value of the lines, and of solid walls, 0-255.
    """

    fill: str = "solid"
    shade: int = 0


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
        halo: Ink | None = None,
        upright: bool = False,
    ) -> None:
        """Write lines of text around a point.

        Args:
            centre: where, in pixels of the finished page.
            lines: one string a line.
            size: height of the writing in pixels of the finished page.
            ink: colour.
            anchor: Pillow's text anchor; upright text is always centred.
            halo: colour of a border that keeps the text legible over lines.
            upright: whether the text runs from bottom to top.
        """
        scale = self.supersampling
        position = (centre[0] * scale, centre[1] * scale)
        border = round(scale * 1.2) if halo else 0
        if not upright:
            self.draw.multiline_text(
                position,
                "\n".join(lines),
                fill=ink,
                font=self._font(size),
                anchor=anchor,
                align="center",
                spacing=size * scale * LINE_SPACING,
                stroke_width=border,
                stroke_fill=halo,
            )
            return
        width, height = (math.ceil(length * scale) + 4 for length in self.text_size(lines, size))
        corner = (round(position[0] - height / 2), round(position[1] - width / 2))
        for stroke, colour in ((border, halo), (0, ink)) if halo else ((0, ink),):
            mask = Image.new("L", (width, height), 0)
            ImageDraw.Draw(mask).multiline_text(
                (width / 2, height / 2),
                "\n".join(lines),
                fill=255,
                font=self._font(size),
                anchor="mm",
                align="center",
                spacing=size * scale * LINE_SPACING,
                stroke_width=stroke,
            )
            self.image.paste(colour, corner, mask.transpose(Image.Transpose.ROTATE_90))

    def text_size(self, lines: Sequence[str], size: float) -> tuple[float, float]:
        """Width and height of lines of text in pixels of the finished page."""
        width = max(self._font(size).getlength(line) for line in lines) / self.supersampling
        return width, size * (1 + LINE_SPACING) * len(lines)

    def _font(self, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return font(max(round(size * self.supersampling), 4))

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

    def text(
        self,
        centre: Point,
        lines: Sequence[str],
        size: float,
        *,
        halo: Ink | None = None,
        upright: bool = False,
    ) -> None:
        """Text around a point; the size is in pixels of the finished page."""
        self.page.text(self.to_page([centre])[0], lines, size, self.ink, halo=halo, upright=upright)

    def hatch(self, polygon: Polygon, spacing: float, angle: float) -> None:
        """Fill a polygon with parallel lines, `spacing` metres apart, at an angle in radians."""
        step = (math.cos(angle), math.sin(angle))
        across = (-step[1], step[0])
        depths = [x * across[0] + y * across[1] for x, y in polygon]
        low, high = min(depths), max(depths)
        for k in range(1, math.ceil((high - low) / spacing)):
            depth = low + k * spacing
            crossings = []
            for (a, b), (p, q) in zip(
                edges(polygon), edges(tuple(zip(depths, depths, strict=True))), strict=True
            ):
                if (p[0] > depth) != (q[0] > depth):
                    t = (depth - p[0]) / (q[0] - p[0])
                    crossings.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
            crossings.sort(key=lambda point: point[0] * step[0] + point[1] * step[1])
            for start, end in zip(crossings[::2], crossings[1::2], strict=False):
                self.line((start, end), width=0.7)


def wall_mask(pen: Pen, layout: Layout) -> Image.Image:
    """Where there is wall: an "L" picture of the enlarged page, 255 in walls.

    Each room's outline is first filled out to the outer face of its walls, then all rooms are emptied: a wall
    between two rooms ends up with the inner thickness, any other with the outer one, whatever their shapes.
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


def draw_walls(pen: Pen, layout: Layout, style: WallStyle | None = None) -> None:
    """Walls, solid black unless said otherwise, with the doors and windows in them."""
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
