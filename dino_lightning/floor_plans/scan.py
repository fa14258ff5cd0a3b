"""Slight rotation and scanning of a drawn page; and pages without a plan."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from dino_lightning.floor_plans.drawing import WHITE, Page, Pen, Room
from dino_lightning.floor_plans.geometry import rectangle
from dino_lightning.floor_plans.words import AGENTS, DISCLAIMER


def rotate(picture: Image.Image, rooms: list[Room], angle: float) -> tuple[Image.Image, list[Room]]:
    """Rotate a page and the outlines on it around its centre.

    Args:
        picture: the page, RGB; uncovered corners become white.
        rooms: its rooms.
        angle: angle in radians.
    """
    c, s = math.cos(angle), math.sin(angle)
    x, y = picture.width / 2, picture.height / 2
    # Pillow takes the inverse, from the rotated page to the original one.
    back = (c, s, x - c * x - s * y, -s, c, y + s * x - c * y)
    turned = picture.transform(
        picture.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
    )
    return turned, [
        replace(
            room,
            polygon=tuple(
                (c * (px - x) - s * (py - y) + x, s * (px - x) + c * (py - y) + y) for px, py in room.polygon
            ),
        )
        for room in rooms
    ]


def scan(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The page after an office scanner: grey or yellowed paper, uneven light, speckle, noise, soft edges.

    Returns:
        The page in mode RGB, or L from a grey scanner.
    """
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.5 + picture.width / 2000))))
    grey_only = bool(rng.random() < 0.5)
    values = np.asarray(picture.convert("L") if grey_only else picture, dtype=np.float32).reshape(
        picture.height, picture.width, -1
    )
    ink = float(rng.uniform(0, 70))
    values = ink + values * ((255 - ink) / 255)
    if grey_only:
        paper = np.full(1, rng.uniform(0.82, 1.0))
    else:
        paper = rng.uniform(0.88, 1.0) * np.array((1.0, rng.uniform(0.95, 1.0), rng.uniform(0.78, 0.98)))
    values = values * paper.astype(np.float32) * _uneven_light(picture.size, rng)
    values += rng.normal(0, rng.uniform(1, 9), (picture.height, picture.width, 1)).astype(np.float32)
    specks = int(picture.width * picture.height * rng.uniform(0, 0.0012))
    rows, columns = rng.integers(0, picture.height, specks), rng.integers(0, picture.width, specks)
    values[rows, columns] = rng.choice((40.0, 90.0, 255.0), (specks, 1))
    pixels: npt.NDArray[np.uint8] = np.clip(values, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if grey_only else pixels)


def _uneven_light(size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(height, width, 1) factors around 1 that change slowly over the page."""
    coarse = Image.fromarray(rng.uniform(1 - rng.uniform(0, 0.22), 1.0, (3, 3)).astype(np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))[:, :, None]


def page_without_plan(long_side: int, rng: np.random.Generator) -> Image.Image:
    """A title page, a page of text or a site map, as found among real plans."""
    short_side = round(long_side * float(rng.uniform(0.65, 0.8)))
    size = (short_side, long_side) if rng.random() < 0.6 else (long_side, short_side)
    page = Page(size, 2)
    kind = str(rng.choice(("title", "text", "map")))
    if kind == "title":
        _title_page(page, rng)
    elif kind == "text":
        _text_page(page, rng)
    else:
        _site_map(page, rng)
    return page.finish()


def _title_page(page: Page, rng: np.random.Generator) -> None:
    """A page with the agent's name, a grey photograph of a house and an address."""
    width, height = page.size
    unit = min(width, height) / 20
    page.text((width / 2, height * 0.14), [AGENTS[int(rng.integers(len(AGENTS)))]], unit * 1.4)
    left, right, top, bottom = width * 0.15, width * 0.85, height * 0.24, height * 0.68
    s = page.supersampling
    sky, wall, roof, grass = (int(v) for v in rng.integers((190, 140, 60, 100), (230, 200, 110, 150)))
    page.draw.rectangle((left * s, top * s, right * s, bottom * s), fill=(sky, sky, sky))
    ground = bottom - (bottom - top) * 0.25
    page.draw.rectangle((left * s, ground * s, right * s, bottom * s), fill=(grass, grass, grass))
    pen = Pen(page, 1.0, (0.0, 0.0), hairline=0.8)
    x0, x1, eaves = width * 0.3, width * 0.7, top + (bottom - top) * 0.42
    pen.polygon(rectangle(x0, eaves, x1, ground), fill=(wall, wall, wall))
    pen.polygon(((x0 - unit, eaves), ((x0 + x1) / 2, top + unit), (x1 + unit, eaves)), fill=(roof, roof, roof))
    for t in (0.15, 0.65):
        x = x0 + (x1 - x0) * t
        pen.polygon(rectangle(x, eaves + unit, x + unit * 1.6, eaves + unit * 2.4), fill=(60, 70, 80))
    page.text((width / 2, height * 0.78), ["Particulars of sale", "Floor plans overleaf"], unit * 0.8)
    page.text((width / 2, height * 0.92), ["Viewing strictly by appointment"], unit * 0.5)


def _text_page(page: Page, rng: np.random.Generator) -> None:
    """A page of headings and paragraphs."""
    width, height = page.size
    size = max(min(width, height) / 45, 4.0)
    words = DISCLAIMER.lower().replace(",", "").replace(".", "").split()
    y = height * 0.08
    while y < height * 0.9:
        if rng.random() < 0.3:
            y += size
            page.text((width * 0.1, y), [" ".join(rng.choice(words, 3)).title()], size * 1.4, anchor="lm")
            y += size * 2
        line = ""
        stop = width * float(rng.choice((0.8, 0.8, 0.8, 0.4)))
        while page.text_size([line], size)[0] < stop:
            line += f" {rng.choice(words)}"
        page.text((width * 0.1, y), [line.strip()], size, anchor="lm")
        y += size * 1.5


def _site_map(page: Page, rng: np.random.Generator) -> None:
    """A site map: streets, plots and houses from above, one of them marked as for sale."""
    width, height = page.size
    pen = Pen(page, 1.0, (0.0, 0.0), hairline=max(page.size) / 900)
    plot = max(width, height) / float(rng.uniform(9, 14))
    for_sale = (width * float(rng.uniform(0.3, 0.7)), height * float(rng.uniform(0.3, 0.7)))
    slope = float(rng.uniform(-0.2, 0.2))
    y = -plot * float(rng.uniform(1, 2.5))
    while y < height + plot:
        for kerb in (0.0, 0.5):
            pen.line(((0, y + kerb * plot), (width, y + kerb * plot + slope * width)))
        x = -plot * float(rng.random())
        while x < width:
            breadth = plot * float(rng.uniform(0.4, 1.1))
            shift = y + slope * x
            for low, high in (
                (shift + plot * 0.6, shift + plot * 1.5),
                (shift + plot * 1.5, shift + plot * 2.4),
            ):
                pen.polygon(rectangle(x, low, x + breadth, high), fill=None, width=0.7)
                if rng.random() < 0.15:
                    continue
                x0, x1 = (
                    x + breadth * float(rng.uniform(0.05, 0.25)),
                    x + breadth * float(rng.uniform(0.7, 0.95)),
                )
                middle = (low + high) / 2 + plot * float(rng.uniform(-0.15, 0.15))
                half = plot * float(rng.uniform(0.12, 0.25))
                here = x <= for_sale[0] <= x + breadth and low <= for_sale[1] <= high
                shade = 60 if here else 190
                pen.polygon(rectangle(x0, middle - half, x1, middle + half), fill=(shade, shade, shade))
            x += breadth
        y += plot * 2.5
    page.text((width / 2, height * 0.95), ["SITE PLAN  1:1250"], max(width, height) / 40, halo=WHITE)
