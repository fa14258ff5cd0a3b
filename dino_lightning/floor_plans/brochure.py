"""Sheets around a plan: brochures with texts, tables, pictures and frames; and plans that are cut out closely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from dino_lightning.floor_plans.drawing import Ink, Room, font
from dino_lightning.floor_plans.geometry import bounds
from dino_lightning.floor_plans.words import AGENTS, DISCLAIMER

WORDS = DISCLAIMER.split()


def shifted(rooms: list[Room], x: float, y: float) -> list[Room]:
    """The rooms moved by so many pixels."""
    return [replace(room, polygon=tuple((px + x, py + y) for px, py in room.polygon)) for room in rooms]


def cut_close(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> tuple[Image.Image, list[Room]]:
    """The plan alone, with hardly a margin around its rooms, as people cut it out of a page."""
    if not rooms:
        return page, rooms
    x0, y0, x1, y1 = bounds([point for room in rooms for point in room.polygon])
    most = 0.08 * max(x1 - x0, y1 - y0)
    left, top, right, bottom = rng.uniform(0.15, 1.0, 4) * most
    box = (
        max(int(x0 - left), 0),
        max(int(y0 - top), 0),
        min(int(x1 + right) + 1, page.width),
        min(int(y1 + bottom) + 1, page.height),
    )
    if box[2] - box[0] < 64 or box[3] - box[1] < 64:
        return page, rooms
    return page.crop(box), shifted(rooms, -box[0], -box[1])


def on_a_sheet(page: Image.Image, rooms: list[Room], rng: np.random.Generator) -> tuple[Image.Image, list[Room]]:
    """The page on a larger sheet, whose margins hold texts, tables, pictures and bands of colour."""
    width, height = page.size
    left, top, right, bottom = _margins(width, height, rng)
    sheet = Image.new("RGB", (width + left + right, height + top + bottom), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for box in (
        (0, 0, sheet.width, top),
        (0, top + height, sheet.width, sheet.height),
        (0, top, left, top + height),
        (left + width, top, sheet.width, top + height),
    ):
        _fill_margin(draw, box, rng)
    sheet.paste(page, (left, top))
    if rng.random() < 0.3:
        inset = max(round(min(sheet.size) * float(rng.uniform(0.005, 0.02))), 1)
        line = max(round(max(sheet.size) / 500), 1)
        draw.rectangle((inset, inset, sheet.width - inset, sheet.height - inset), outline=(0, 0, 0), width=line)
    return sheet, shifted(rooms, left, top)


def _margins(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels: one or two of them wide, the rest nothing."""
    shares = rng.uniform(0.08, 0.4, 4) * (rng.permutation(4) < int(rng.integers(1, 3)))
    left, top, right, bottom = (round(float(v)) for v in shares * (width, height, width, height))
    return left, top, right, bottom


def _fill_margin(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """Draw one kind of matter into a margin of at least 24 pixels each way."""
    x0, y0, x1, y1 = box
    if x1 - x0 < 24 or y1 - y0 < 24:
        return
    kind = str(rng.choice(("text", "table", "picture", "band", "nothing"), p=(0.35, 0.2, 0.15, 0.2, 0.1)))
    red, green, blue = (int(value) for value in rng.integers(40, 230, 3))
    tone: Ink = (red, green, blue)
    size = max(round(min(x1 - x0, y1 - y0) * float(rng.uniform(0.05, 0.15))), 7)
    if kind == "band":
        draw.rectangle((x0, y0, x1, y1), fill=tone)
        name = str(AGENTS[int(rng.integers(len(AGENTS)))])
        draw.text(((x0 + x1) / 2, (y0 + y1) / 2), name, fill=(255, 255, 255), font=font(size * 2), anchor="mm")
    elif kind == "text":
        y = y0 + size
        while y < y1 - size:
            words = [WORDS[int(i)] for i in rng.integers(len(WORDS), size=max((x1 - x0) // (size * 4), 1))]
            draw.text(
                (x0 + size, y), " ".join(words)[: max((x1 - x0) // size * 2 - 4, 1)], fill=(60, 60, 60), font=font(size)
            )
            y += round(size * 1.6)
    elif kind == "table":
        rows, columns = int(rng.integers(2, 8)), int(rng.integers(2, 5))
        ys, xs = np.linspace(y0 + size, y1 - size, rows + 1), np.linspace(x0 + size, x1 - size, columns + 1)
        line = max(size // 8, 1)
        for y in ys:
            draw.line((float(xs[0]), float(y), float(xs[-1]), float(y)), fill=(40, 40, 40), width=line)
        for x in xs:
            draw.line((float(x), float(ys[0]), float(x), float(ys[-1])), fill=(40, 40, 40), width=line)
        for y in ys[:-1]:
            for x in xs[:-1]:
                word = str(WORDS[int(rng.integers(len(WORDS)))])
                draw.text(
                    (float(x) + 2 * line, float(y) + line), word[:8], fill=(40, 40, 40), font=font(max(size // 2, 6))
                )
    elif kind == "picture":
        draw.rectangle((x0 + size, y0 + size, x1 - size, y1 - size), fill=tone, outline=(90, 90, 90))
        for _ in range(int(rng.integers(3, 12))):
            a, c = sorted(rng.integers(x0 + size, x1 - size + 1, 2).tolist())
            b, d = sorted(rng.integers(y0 + size, y1 - size + 1, 2).tolist())
            shade = tuple(int(value) for value in rng.integers(30, 240, 3))
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((a, b, c, d), fill=shade)
