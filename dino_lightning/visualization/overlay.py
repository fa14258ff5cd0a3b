"""Boxes with captions, drawn with Pillow on the image itself."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PALETTE = ("#d1495b", "#00798c", "#edae49", "#5f4bb6", "#ef7b45", "#1b998b", "#8d6a9f", "#3a506b")
GOLDEN_RATIO = 0.618034
SIDE_PER_LINE = 400  # long side of the image / width of a line
SIDE_PER_LETTER = 75  # long side of the image / height of a letter
SMALLEST_LETTER = 11  # pixels; smaller letters cannot be read
MANY_BOXES = 40  # more are drawn with thinner lines and smaller letters

Colour = tuple[int, int, int]
Place = tuple[float, float, float, float]  # left, top, right, bottom


def to_page(image: Image.Image | npt.NDArray[np.uint8] | Tensor) -> Image.Image:
    """A copy of an image as a Pillow image in RGB.

    Args:
        image: a Pillow image, an (H, W) or (H, W, 3) uint8 array, or a (3, H, W) tensor, uint8 or floating 0-1.
    """
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            pixels = (pixels * 255).round().clamp(0, 255).byte()
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if image.mode.endswith("A"):  # transparent pixels become white, as for the detector
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def draw_boxes(
    page: Image.Image, boxes_xyxy: Sequence[Sequence[float]], labels: Sequence[int], captions: Sequence[str]
) -> None:
    """Draw boxes and captions on `page`. Where there is no room for all captions, those of later boxes are left out.

    Args:
        page: an RGB image.
        boxes_xyxy: N boxes in its pixels, best first.
        labels: N labels, which determine the colours.
        captions: N short texts.
    """
    many = len(boxes_xyxy) > MANY_BOXES
    line = max(1 if many else 2, round(max(page.size) / SIDE_PER_LINE / (2 if many else 1)))
    font = caption_font(max(SMALLEST_LETTER, round(max(page.size) / SIDE_PER_LETTER / (1.4 if many else 1))))
    draw = ImageDraw.Draw(page)
    # large boxes first, so that small ones lie on top of them
    order = sorted(range(len(boxes_xyxy)), key=lambda index: -_area(boxes_xyxy[index]))
    for index in order:
        x1, y1, x2, y2 = _within(boxes_xyxy[index], page.size)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour_of(labels[index]), width=line)
    taken: list[Place] = []
    margin = max(1, line)
    for box, label, caption in zip(boxes_xyxy, labels, captions, strict=True):
        caption = caption.replace("\n", " ")
        left, top, right, bottom = font.getbbox(caption)
        size = (right - left + 2 * margin, bottom - top + 2 * margin)
        places = caption_places(_within(box, page.size), size, page.size)
        place = next((place for place in places if not overlaps(place, taken)), None)
        if not caption or place is None:
            continue
        taken.append(place)
        colour = colour_of(label)
        draw.rectangle(place, fill=colour)
        dark = np.dot(colour, (0.3, 0.59, 0.11)) > 0.6 * 255
        position = (place[0] + margin - left, place[1] + margin - top)
        draw.text(position, caption, fill="black" if dark else "white", font=font)


@lru_cache(maxsize=64)
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """The font for captions, `size` pixels high; matplotlib's own has Latin, Greek, Cyrillic and more."""
    import matplotlib  # slow to import, and needed only for drawing

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def colour_of(label: int) -> Colour:
    """The colour of a class; beyond the palette, hues in steps of the golden ratio, which never repeat."""
    if label < len(PALETTE):
        red, green, blue = bytes.fromhex(PALETTE[label][1:])
        return red, green, blue
    hue = colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1.0, 0.85, (0.55, 0.75, 0.95)[label % 3])
    return round(hue[0] * 255), round(hue[1] * 255), round(hue[2] * 255)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _within(box: Sequence[float], size: tuple[int, int]) -> Place:
    """The box clipped to an image of (width, height); at least one pixel of it stays inside."""
    x1, x2 = (min(max(0.0, x), float(size[0])) for x in (box[0], box[2]))
    y1, y2 = (min(max(0.0, y), float(size[1])) for y in (box[1], box[3]))
    return min(x1, size[0] - 1.0), min(y1, size[1] - 1.0), max(x1, x2), max(y1, y2)


def caption_places(box: Place, size: tuple[float, float], canvas: tuple[int, int]) -> Iterator[Place]:
    """Possible places for a caption of (width, height), best first, all within the canvas of (width, height)."""
    x1, y1, x2, y2 = box
    width, height = size
    inside, above, below, beside = (x1, y1), (x1, y1 - height), (x1, y2), (x2, y1)
    # inside a small box it would hide the object
    corners = [inside, above] if x2 - x1 > width and y2 - y1 > 2.5 * height else [above, below, beside, inside]
    for left, top in [*corners, (x1, y2 - height), (x2 - width, y1)]:
        left = max(0.0, min(left, canvas[0] - width))
        if 0 <= top <= canvas[1] - height:
            yield left, top, left + width, top + height


def overlaps(place: Place, taken: Sequence[Place]) -> bool:
    """Whether a place overlaps one of those that are taken."""
    left, top, right, bottom = place
    return any(left < x2 and right > x1 and top < y2 and bottom > y1 for x1, y1, x2, y2 in taken)
