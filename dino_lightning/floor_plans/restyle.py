"""What brochures, printers, screens and cameras make of a drawn page: coloured rooms, other inks, photographs, copies.

Plans that are drawn on the fly go through it (`dino_lightning.data.drawn_plans`), so that a detector made from them
knows more styles than the generator draws.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageOps

from dino_lightning.floor_plans.brochure import cut_close, on_a_sheet
from dino_lightning.floor_plans.drawing import Ink, Room, font
from dino_lightning.floor_plans.materials import colour_furniture, lay_floors, paint_walls, soft_light

Floats = npt.NDArray[np.float64]

DARK_INKS: tuple[Ink, ...] = ((20, 30, 90), (70, 45, 25), (25, 70, 45), (90, 90, 90), (120, 20, 30), (0, 0, 0))
PAPERS: tuple[Ink, ...] = ((255, 255, 255), (248, 244, 232), (236, 242, 248), (240, 240, 240), (255, 250, 220))
BLUEPRINTS: tuple[Ink, ...] = ((25, 60, 130), (15, 40, 90), (30, 90, 110), (35, 35, 40))
MOST_TILT = 0.07  # how far the corners of a photographed page move inwards, as a share of its sides


def restyle(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> tuple[Image.Image, list[Room]]:
    """A page in another style, or as it was: each change has a chance of its own.

    Args:
        page: RGB or L.
        rooms: on it.
        rng: random generator.

    Returns:
        The page, RGB, and its rooms, whose outlines move with it.
    """
    page = page.convert("RGB")
    if rng.random() < 0.25:
        page, rooms = cut_close(page, rooms, rng)
    if rng.random() < 0.25:
        page = colour_furniture(page, rooms, rng)
    floors = rng.random()
    if floors < 0.2:
        page = fill_rooms(page, rooms, rng)
    elif floors < 0.4:
        page = lay_floors(page, rooms, rng)
    if rng.random() < 0.4:
        page = paint_walls(page, rng)
    if rng.random() < 0.08:
        page = by_hand(page, rng)
    if rng.random() < 0.08:
        page = soft_light(page, rng)
    if rng.random() < 0.2:
        page, rooms = on_a_sheet(page, rooms, rng)
    if rng.random() < 0.05:
        page = watermark(page, rng)
    if rng.random() < 0.25:
        page = recolour(page, rng)
    if rng.random() < 0.12:
        page, rooms = photograph(page, rooms, rng)
    if rng.random() < 0.2:
        page = other_colours(page, rng)
    if rng.random() < 0.15:
        page = small_copy(page, float(rng.uniform(0.4, 0.8)))
    if rng.random() < 0.06:
        page = black_and_white(page, rng)
    return page, rooms


def fill_rooms(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> Image.Image:
    """Tint the rooms, all alike or each in a pale colour of its own, under their furniture and names."""
    tints = Image.new("RGB", page.size, (255, 255, 255))
    draw = ImageDraw.Draw(tints)
    alike = rng.random() < 0.4
    colour = _pale(rng)
    for room in rooms:
        if len(room.polygon) > 2 and (alike or rng.random() < 0.8):
            draw.polygon([(float(x), float(y)) for x, y in room.polygon], fill=colour if alike else _pale(rng))
    return ImageChops.multiply(page, tints)


def _pale(rng: np.random.Generator) -> Ink:
    red, green, blue = (int(value) for value in 255 - rng.integers(0, 90, 3))
    return red, green, blue


def recolour(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another ink on another paper; seldom white lines on blue."""
    if rng.random() < 0.2:
        ink, paper = np.array((240, 245, 255)), np.array(BLUEPRINTS[int(rng.integers(len(BLUEPRINTS)))])
    else:
        ink = np.array(DARK_INKS[int(rng.integers(len(DARK_INKS)))])
        paper = np.array(PAPERS[int(rng.integers(len(PAPERS)))])
    table = [round(float(ink[c] + (paper[c] - ink[c]) * value / 255)) for c in range(3) for value in range(256)]
    return page.point(table)


def other_colours(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Other brightness, contrast and saturation, as cameras and screens make them; seldom the negative."""
    for enhancer in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        page = enhancer(page).enhance(float(rng.uniform(0.6, 1.4)))
    return ImageOps.invert(page) if rng.random() < 0.1 else page


def by_hand(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lines that waver by a pixel or two, as drawn without a ruler."""
    columns, rows = (int(value) for value in rng.integers(10, 30, 2))
    xs, ys = np.linspace(0, page.width, columns + 1), np.linspace(0, page.height, rows + 1)
    most = max(page.size) / float(rng.uniform(300, 600))
    grid = np.stack(np.meshgrid(xs, ys), axis=-1) + rng.uniform(-most, most, (rows + 1, columns + 1, 2))
    mesh = []
    for row in range(rows):
        for column in range(columns):
            place = (int(xs[column]), int(ys[row]), int(xs[column + 1]), int(ys[row + 1]))
            corners = grid[[row, row + 1, row + 1, row], [column, column, column + 1, column + 1]]
            mesh.append((place, tuple(float(value) for value in corners.flatten())))
    return page.transform(page.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))


def black_and_white(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Only black and white, as by fax: what is darker than a threshold is ink, or grey becomes dots."""
    grey = page.convert("L")
    if rng.random() < 0.3:
        return grey.convert("1").convert("RGB")
    threshold = float(np.asarray(grey).mean()) * float(rng.uniform(0.6, 0.95))
    return grey.point([255 * (value > threshold) for value in range(256)]).convert("RGB")


def watermark(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A pale word across the page."""
    layer = Image.new("L", page.size, 255)
    word = str(rng.choice(("SAMPLE", "DRAFT", "COPY", "PREVIEW", "NOT TO SCALE")))
    size = max(int(page.width * float(rng.uniform(0.08, 0.2))), 8)
    ImageDraw.Draw(layer).text((page.width / 2, page.height / 2), word, fill=205, font=font(size), anchor="mm")
    turned = layer.rotate(float(rng.uniform(-40, 40)), Image.Resampling.BILINEAR, fillcolor=255)
    return ImageChops.multiply(page, turned.convert("RGB"))


def small_copy(page: Image.Image, share: float) -> Image.Image:
    """The page after a copy of a share of its size."""
    size = (max(round(page.width * share), 32), max(round(page.height * share), 32))
    return page.resize(size, Image.Resampling.BILINEAR).resize(page.size, Image.Resampling.BILINEAR)


def photograph(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> tuple[Image.Image, list[Room]]:
    """The page seen aslant on a table, darker towards one side."""
    width, height = page.size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    inwards = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * rng.uniform(0, MOST_TILT, (4, 2)) * (width, height)
    forward = _homography(corners, corners + inwards)
    back = _homography(corners + inwards, corners)
    table = int(rng.integers(40, 190))
    seen = page.transform(
        page.size,
        Image.Transform.PERSPECTIVE,
        [float(value) for value in back.flatten()[:8]],
        Image.Resampling.BILINEAR,
        fillcolor=(table, int(table * 0.9), int(table * 0.8)),
    )
    light = np.linspace(float(rng.uniform(0.65, 1.0)), 1.0, 256)
    if rng.random() < 0.5:
        light = light[::-1]
    shade = Image.fromarray(np.broadcast_to((light * 255).astype(np.uint8), (256, 256)).copy()).resize(page.size)
    if rng.random() < 0.5:
        shade = shade.transpose(Image.Transpose.ROTATE_180)
    moved = [replace(room, polygon=tuple(_moved(forward, room.polygon))) for room in rooms]
    return ImageChops.multiply(seen, shade.convert("RGB")), moved


def _homography(source: Floats, target: Floats) -> Floats:
    """(4, 2) points and where they go -> the (3, 3) matrix of that, with a last entry of 1."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solved = np.linalg.solve(np.array(rows), target.flatten())
    return np.append(solved, 1.0).reshape(3, 3)


def _moved(matrix: Floats, points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    moved = np.column_stack((np.array(points, dtype=np.float64).reshape(-1, 2), np.ones(len(points)))) @ matrix.T
    return [(float(x / w), float(y / w)) for x, y, w in moved]
