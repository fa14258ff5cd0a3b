"""What brochures do to a drawn plan: walls of other colours, floors of wood and tiles, coloured furniture, shadows.

A finished page is taken apart by what its pixels are: thick dark strokes are walls, small white islands within a room
are furniture. So every style of walls and furniture is coloured alike, and nothing moves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from scipy import ndimage

from dino_lightning.floor_plans.drawing import Ink, Room

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

WALL_COLOURS: tuple[Ink, ...] = ((60, 60, 60), (110, 110, 110), (150, 150, 150), (190, 190, 190), (95, 70, 50))
WALL_COLOURS += ((40, 60, 95), (130, 60, 50), (205, 195, 180), (70, 90, 80), (235, 235, 235))
WOODS: tuple[Ink, ...] = ((222, 196, 160), (200, 164, 120), (176, 134, 94), (236, 222, 200), (150, 112, 80))
STONES: tuple[Ink, ...] = ((232, 232, 232), (214, 222, 228), (228, 220, 206), (198, 204, 206), (244, 240, 232))
CARPETS: tuple[Ink, ...] = ((226, 214, 196), (206, 206, 212), (214, 198, 190), (196, 210, 198), (240, 232, 214))
DARK = 110  # grey value below which a pixel is ink
WHITE_FROM = 200  # and from which it is paper
SMALLEST_FURNITURE = 2e-5  # of the page
LARGEST_FURNITURE = 0.25  # of its room


def wall_mask(page: Image.Image) -> Mask:
    """The thick dark strokes of a page, (height, width): what an opening with a square of 1/160 of its sides leaves."""
    side = max(round(max(page.size) / 160) | 1, 3)
    dark = np.asarray(page.convert("L")) < DARK
    core = ndimage.minimum_filter(dark, side)
    return np.asarray(ndimage.maximum_filter(core, side + 2) & dark)


def paint_walls(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Thick walls in another colour or pattern: plain, hatched or hollow, with dark faces or none, with a shadow."""
    walls = wall_mask(page)
    if not walls.any():
        return page
    pixels = np.asarray(page).copy()
    if rng.random() < 0.2:
        reach = max(max(page.size) / float(rng.uniform(80, 200)), 1.0)
        moved = ndimage.shift(walls.astype(np.float32), rng.uniform(0, reach, 2), order=0)
        blurred = ndimage.gaussian_filter(moved, reach / 2)
        pixels = (pixels * (1 - float(rng.uniform(0.2, 0.5)) * blurred[..., None])).astype(np.uint8)
    how = str(rng.choice(("plain", "faced", "hatched", "hollow"), p=(0.35, 0.2, 0.25, 0.2)))
    colour = WALL_COLOURS[int(rng.integers(len(WALL_COLOURS)))] if how in ("plain", "faced") else (255, 255, 255)
    face = int(rng.choice((0, 30, 90, 150)))
    inner = walls if how == "plain" else ndimage.minimum_filter(walls, int(rng.choice((3, 3, 5))))
    pixels[walls] = face
    pixels[inner] = colour
    if how == "hatched":
        pixels[inner & pattern(page.height, page.width, rng)] = face
    return Image.fromarray(pixels)


def pattern(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Where a hatched wall of a page has ink, (height, width): slanted lines one or both ways, bricks or dots."""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    step = int(max(max(height, width) / float(rng.uniform(90, 250)), 3))
    line = max(step // 5, 1)
    kind = str(rng.choice(("lines", "crossed", "bricks", "dots"), p=(0.55, 0.2, 0.15, 0.1)))
    rising = (x + y) % step < line
    if kind == "crossed":
        return np.asarray(rising | ((x - y) % step < line))
    if kind == "bricks":
        return np.asarray((y % step < line) | ((x + y // step % 2 * step) % (2 * step) < line))
    if kind == "dots":
        return np.asarray(rng.random((height, width)) < 0.2)
    return np.asarray(rising if rng.random() < 0.5 else (x - y) % step < line)


def lay_floors(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> Image.Image:
    """Floors of boards, tiles or carpet in most of the rooms, under their furniture and names."""
    width, height = page.size
    kinds = [floor(width, height, rng) for _ in range(int(rng.integers(1, 4)))]
    ground = Image.new("RGB", page.size, (255, 255, 255))
    for room in rooms:
        if len(room.polygon) > 2 and rng.random() < 0.9:
            mask = Image.new("1", page.size, 0)
            ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in room.polygon], fill=1)
            ground.paste(kinds[int(rng.integers(len(kinds)))], (0, 0), mask)
    return ImageChops.multiply(page, ground)


def floor(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A floor as large as a page: boards, tiles or carpet."""
    kind = str(rng.choice(("boards", "tiles", "carpet"), p=(0.45, 0.35, 0.2)))
    colours = {"boards": WOODS, "tiles": STONES, "carpet": CARPETS}[kind]
    base = np.array(colours[int(rng.integers(len(colours)))], dtype=np.float32)
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    shade = np.zeros((height, width), dtype=np.float32)
    side = max(max(width, height) / float(rng.uniform(40, 120)), 3.0)
    if kind == "boards":
        row = (y / side).astype(np.int64)
        column = ((x + (row * 2654435761 % 97) * side / 9) / (side * float(rng.uniform(4, 9)))).astype(np.int64)
        shade += ((row * 73 + column * 151) % 17 - 8) * float(rng.uniform(0.3, 1.6))
        shade -= 18.0 * (y % side < 1)
    elif kind == "tiles":
        tone = float(rng.uniform(15, 70))
        shade -= tone * ((y % side < 1) | (x % side < 1))
    else:
        small = rng.normal(0, 6, (height // 2 + 1, width // 2 + 1)).astype(np.float32)
        shade += small.repeat(2, 0).repeat(2, 1)[:height, :width]
    if kind == "boards" and rng.random() < 0.5:
        shade = np.ascontiguousarray(np.resize(shade.T, (height, width)))
    return Image.fromarray(np.clip(base + shade[..., None], 0, 255).astype(np.uint8))


def colour_furniture(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> Image.Image:
    """Fill the small white islands within the rooms, which are furniture and fittings, with a few colours."""
    grey = np.asarray(page.convert("L"))
    islands, count = ndimage.label(grey >= WHITE_FROM)
    if count == 0:
        return page
    areas = np.bincount(islands.ravel(), minlength=count + 1)
    largest = np.full(count + 1, -1.0)
    for room in rooms:
        x0, y0, x1, y1 = (round(value) for value in room.bbox_xyxy)
        inside = np.unique(islands[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)])
        largest[inside] = np.maximum(largest[inside], LARGEST_FURNITURE * room.area)
    chosen = (areas < largest) & (areas > SMALLEST_FURNITURE * grey.size) & (rng.random(count + 1) < 0.8)
    chosen[0] = False
    palette = rng.integers(90, 250, (4, 3))
    table = np.full((count + 1, 3), 255, dtype=np.uint8)
    table[chosen] = palette[rng.integers(4, size=int(chosen.sum()))]
    return ImageChops.multiply(page, Image.fromarray(table[islands]))


def soft_light(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A rendered look: edges softened and shaded, as from a lamp above."""
    reach = max(page.size) / float(rng.uniform(60, 150))
    soft = page.convert("L").filter(ImageFilter.GaussianBlur(reach))
    shade = 255 - (255 - np.asarray(soft, dtype=np.float32)) * float(rng.uniform(0.3, 0.7))
    return ImageChops.multiply(page, Image.fromarray(shade.astype(np.uint8)).convert("RGB"))
