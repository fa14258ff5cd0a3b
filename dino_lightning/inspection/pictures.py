"""Images with boxes drawn on them, small enough for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dino_lightning.console import shown
from dino_lightning.data.findings import Case
from dino_lightning.data.images import read_image
from dino_lightning.errors import DataError
from dino_lightning.inspection.report import SplitHealth

PICTURE_SIDE = 320  # pixels
LARGEST_SCALE = 4.0
SURROUNDINGS = 10  # times the longer side of a box
LEGIBLE = 14.0  # pixels; where the longest box of a class would be shorter, a part of the image is shown
CAPTION_LENGTH = 400  # characters
MOST_BOXES = 300  # drawn on one image
BOX_COLOUR, CASE_COLOUR, HALO = (0, 121, 140, 255), (209, 36, 74, 255), (255, 255, 255, 190)
FAINT_COLOUR = (0, 121, 140, 110)
TINT = (209, 36, 74, 26)  # inside boxes of a class, or rooms could not be told from the walls around them


@dataclass(frozen=True)
class Picture:
    """An image with boxes drawn on it.

    Attributes:
        source: a data URI.
        caption: its file, size and what is shown.
    """

    source: str
    caption: str


def picture_of_case(split: SplitHealth, index: int, case: Case) -> Picture | None:
    """Image `index` with its boxes, that of the case highlighted and its surroundings enlarged if it is small."""
    source = split.annotations
    assert source is not None
    rows = range(int(source.offsets[index]), int(source.offsets[index + 1]))
    marked = [row for row in rows if source.annotation_ids[row] == case.annotation_id]
    others = [row for row in rows if row not in marked]
    focus, largest_scale = (marked[0], LARGEST_SCALE) if marked else (None, 1.0)
    return _draw(split, index, others, marked, focus, largest_scale, case.detail, faint=False)


def picture_of_class(split: SplitHealth, index: int, rows: Sequence[int]) -> Picture | None:
    """Image `index` with the boxes at `rows`, all of one class, drawn strongly and those of other classes faintly.

    Where all of them would be too small to be seen, only a part of the image around the largest one is shown.
    """
    source = split.annotations
    assert source is not None
    chosen = set(rows)
    others = [row for row in range(int(source.offsets[index]), int(source.offsets[index + 1])) if row not in chosen]
    boxes = source.boxes_xyxy[list(rows)]
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    longest = max(split.facts[index].size)  # of the file, which the annotations may have wrong
    tiny = sides.max() * PICTURE_SIDE < LEGIBLE * longest
    focus = rows[int(sides.argmax())] if tiny else None
    detail = f"{split.name}, {len(rows)} {'box' if len(rows) == 1 else 'boxes'}{', a part' if tiny else ''}"
    largest_scale = LARGEST_SCALE if tiny or 2 * longest < PICTURE_SIDE else 1.0
    return _draw(split, index, others, list(rows), focus, largest_scale, detail, faint=True)


def _draw(
    split: SplitHealth,
    index: int,
    others: Sequence[int],
    marked: Sequence[int],
    focus: int | None,
    largest_scale: float,
    detail: str,
    *,
    faint: bool,
) -> Picture | None:
    """An image, or the surroundings of the row `focus`, with its boxes; None if it cannot be read."""
    source = split.annotations
    assert source is not None
    entry = source.images[index]
    try:
        pixels = read_image(source.image_path(index)).permute(1, 2, 0).numpy()
    except (DataError, MemoryError):  # readable a moment ago
        return None
    image = Image.fromarray(pixels)
    left, top, right, bottom = (0, 0, *image.size) if focus is None else _view(image.size, source.boxes_xyxy[focus])
    scale = min(largest_scale, PICTURE_SIDE / max(right - left, bottom - top))
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    image = image.resize(size, box=(left, top, right, bottom))
    canvas = ImageDraw.Draw(image, "RGBA")

    def draw_box(
        row: int, colour: tuple[int, int, int, int], width: int, grown: int = 0, fill: tuple[int, ...] | None = None
    ) -> None:
        corners = (source.boxes_xyxy[row] - [left, top, left, top]) * scale
        x1, y1, x2, y2 = corners.clip(-10, 10 + max(size)).tolist()
        box = (min(x1, x2) - grown, min(y1, y2) - grown, max(x1, x2) + grown, max(y1, y2) + grown)
        canvas.rectangle(box, outline=colour, width=width, fill=fill)

    for row in others[:MOST_BOXES]:
        draw_box(row, FAINT_COLOUR if faint else BOX_COLOUR, 1)
    for row in marked[:MOST_BOXES]:  # all halos first, or they would cover the boxes of neighbours
        draw_box(row, HALO, 1, grown=1)
    for row in marked[:MOST_BOXES]:
        draw_box(row, CASE_COLOUR, 2, fill=TINT if faint else None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    caption = f"image {entry.id}: {entry.file_name}, {entry.size[1]} x {entry.size[0]}"
    return Picture(
        data_uri("jpeg", buffer.getvalue()), shown(f"{caption}. {detail}" if detail else caption, CAPTION_LENGTH)
    )


def _view(size: tuple[int, int], box_xyxy: npt.NDArray[np.float64]) -> tuple[int, int, int, int]:
    """The part of a (width, height) image to show: around the box if that is small, else all of it."""
    width, height = size
    x1, y1, x2, y2 = box_xyxy.clip(0, [width, height, width, height]).tolist()
    side = round(max(abs(x2 - x1), abs(y2 - y1), 8.0)) * SURROUNDINGS
    if side >= max(width, height):
        return 0, 0, width, height
    window_width, window_height = min(side, width), min(side, height)
    left = min(max(0, round((x1 + x2 - window_width) / 2)), width - window_width)
    top = min(max(0, round((y1 + y2 - window_height) / 2)), height - window_height)
    return left, top, left + window_width, top + window_height


def data_uri(kind: str, content: bytes) -> str:
    """An image of the given kind, "jpeg" or "png", as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
