"""Pages, drawn enlarged so that thin lines come out smooth, the pen that draws on them, and their rooms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from dino_lightning.floor_plans.geometry import Point, Polygon, bounds, edges, signed_area

Ink = tuple[int, int, int]
BLACK: Ink = (0, 0, 0)
WHITE: Ink = (255, 255, 255)
LINE_SPACING = 0.25  # between lines of text, as a fraction of their height


@dataclass(frozen=True)
class Room:
    """One room of a plan.

    Attributes:
        polygon: its outline along the inner faces of its walls, (x, y) in pixels of the page.
        name: its name on the plan, e.g. "BEDROOM 1".
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


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in scalable font of a size; no font file is needed."""
    return ImageFont.load_default(size=size)


class Page:
    """A page drawn `supersampling` times larger than its final size, so that thin lines come out anti-aliased.

    Attributes:
        image: the enlarged image, RGB.
        draw: Pillow's drawing context of it.
        size: (width, height) of the finished page in pixels.
        supersampling: the factor of the enlargement.
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
            centre: position in pixels of the finished page.
            lines: one string for each line.
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

    def __init__(self, page: Page, scale: float, origin: Point, hairline: float = 0.8, ink: Ink = BLACK) -> None:
        self.page = page
        self.scale = scale
        self.origin = origin
        self.hairline = hairline
        self.ink = ink

    def to_page(self, polygon: Sequence[Point]) -> Polygon:
        """Metres to pixels of the finished page."""
        return tuple((x * self.scale + self.origin[0], y * self.scale + self.origin[1]) for x, y in polygon)

    def enlarged(self, points: Sequence[Point]) -> list[Point]:
        """Metres to pixels of the enlarged page."""
        s = self.page.supersampling
        return [(x * s, y * s) for x, y in self.to_page(points)]

    def line(self, points: Sequence[Point], width: float = 1.0, ink: Ink | None = None) -> None:
        """A thin line through the points, `width` hairlines thick."""
        thickness = max(round(self.hairline * width * self.page.supersampling), 1)
        self.page.draw.line(self.enlarged(points), fill=ink or self.ink, width=thickness, joint="curve")

    def polygon(self, points: Sequence[Point], fill: Ink | None = WHITE, width: float = 1.0) -> None:
        """A polygon with a thin outline."""
        if fill is not None:
            self.page.draw.polygon(self.enlarged(points), fill=fill)
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
            for (a, b), (p, q) in zip(edges(polygon), edges(tuple(zip(depths, depths, strict=True))), strict=True):
                if (p[0] > depth) != (q[0] > depth):
                    t = (depth - p[0]) / (q[0] - p[0])
                    crossings.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
            crossings.sort(key=lambda point: point[0] * step[0] + point[1] * step[1])
            for start, end in zip(crossings[::2], crossings[1::2], strict=False):
                self.line((start, end), width=0.7)
