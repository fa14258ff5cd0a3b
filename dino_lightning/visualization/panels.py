"""Sheets of images with boxes, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image

from dino_lightning.visualization.overlay import Place, caption_places, colour_of, overlaps

TRUTH_COLOUR = "#2a9d4a"
STRIPES = (215, 240)  # greys of padding; plain grey could be mistaken for paper
STRIPE = 0.06  # inches
DOTS_PER_INCH = 110  # at which `save_figure` draws

# In inches.
CELL = 4.4  # mean width of a panel
GAP = 0.12
HEADING = 0.45
LINE = 0.145  # of a title
TALLEST = 7.0
NARROWEST, WIDEST = 0.55, 3.0  # width / height of the place for a panel; what exceeds them is drawn smaller
FONT_SIZE = 6  # of captions, in points
TITLE_SIZE = 8
CAPTION = 0.115  # height of a caption
MARGIN = 0.015  # around it
MANY_BOXES = 25  # more are drawn with thinner lines


@dataclass(frozen=True)
class Panel:
    """One image with its detections and its ground truth.

    Attributes:
        pixels: (h, w, 3) uint8.
        boxes_xyxy: (N, 4) detections, in pixels of `pixels`.
        labels: (N,) their labels.
        captions: N short texts; where there is no room for all, those of later boxes are left out.
        truth_xyxy: (M, 4) ground-truth boxes, in the same pixels.
        title: the text above; one line or several. Of a line that is too long, the end is shown.
        image_size: (height, width) of `pixels` without padding, which is drawn as stripes; None: no padding.
    """

    pixels: npt.NDArray[np.uint8]
    boxes_xyxy: npt.NDArray[np.float64]
    labels: Sequence[int]
    captions: Sequence[str]
    truth_xyxy: npt.NDArray[np.float64]
    title: str
    image_size: tuple[int, int] | None = None

    @property
    def ratio(self) -> float:
        """Width / height."""
        height, width, _ = self.pixels.shape
        return float(width) / float(height)


def scaled_for_sheet(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image (h, w, 3), scaled down where it has more pixels than any panel of a sheet shows."""
    height, width, _ = pixels.shape
    factor = min(1.0, DOTS_PER_INCH * TALLEST / height, DOTS_PER_INCH * TALLEST * WIDEST / width)
    if factor == 1.0:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def draw_panels(panels: Sequence[Panel], heading: str) -> Figure:
    """A contact sheet: detections in colour with their captions, ground truth as thin dashed green lines.

    The panels of a row have the same height and fill its width, so that little of the sheet stays empty.
    """
    columns = min(len(panels), max(3, round(len(panels) ** 0.5)))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    width = columns * (CELL + GAP) + GAP
    heights = [_row_height(row, columns) for row in rows]
    titles = [LINE * max(panel.title.count("\n") + 1 for panel in row) + GAP for row in rows]
    height = HEADING + sum(heights) + sum(titles) + GAP
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.5 * HEADING / height, heading, fontsize=11, ha="center", va="center", parse_math=False)
    top = HEADING
    for row, row_height, title in zip(rows, heights, titles, strict=True):
        top += title
        left = GAP
        for panel in row:
            drawn_width = min(_slot_ratio(panel), panel.ratio) * row_height
            drawn_height = drawn_width / panel.ratio
            axes = figure.add_axes(
                (left / width, 1 - (top + drawn_height) / height, drawn_width / width, drawn_height / height)
            )
            axes.set_axis_off()
            slot_width = _slot_ratio(panel) * row_height
            text = "\n".join(_end_of(line, slot_width) for line in panel.title.split("\n"))
            figure.text(
                left / width, 1 - (top - 0.04) / height, text, fontsize=TITLE_SIZE, va="bottom", parse_math=False
            )
            _draw(axes, panel, drawn_width / panel.pixels.shape[1])
            left += slot_width + GAP
        top += row_height
    return figure


def _slot_ratio(panel: Panel) -> float:
    """Width / height of the place for a panel."""
    return min(max(panel.ratio, NARROWEST), WIDEST)


def _row_height(row: Sequence[Panel], columns: int) -> float:
    """The height in inches at which the panels fill the width; panels of a shorter last row become no larger."""
    filled = sum(_slot_ratio(panel) for panel in row) * columns / len(row)
    return min(CELL * columns / filled, TALLEST)


def _draw(axes: Axes, panel: Panel, inches: float) -> None:
    """Draw one panel, at so many inches for each pixel."""
    pixels = panel.pixels
    if panel.image_size is not None:
        rows, columns, _ = np.indices((*pixels.shape[:2], 1), sparse=True)
        striped = np.array(STRIPES, dtype=np.uint8)[(rows + columns) // max(1, round(STRIPE / inches)) % 2]
        height, width = panel.image_size
        pixels = np.repeat(striped, 3, axis=2)
        pixels[:height, :width] = panel.pixels[:height, :width]
    axes.imshow(pixels, aspect="auto")
    line_width = 1.6 if len(panel.boxes_xyxy) <= MANY_BOXES else 1.0
    for x1, y1, x2, y2 in panel.truth_xyxy:
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=TRUTH_COLOUR, linewidth=1.2, linestyle="--")
        )
    for (x1, y1, x2, y2), label in zip(panel.boxes_xyxy, panel.labels, strict=True):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_colour(label), linewidth=line_width)
        )
    taken: list[Place] = []
    canvas = (pixels.shape[1], pixels.shape[0])
    for box, label, caption in zip(panel.boxes_xyxy, panel.labels, panel.captions, strict=True):
        size = ((_text_width(caption, FONT_SIZE) + 2 * MARGIN) / inches, CAPTION / inches)
        room = next((place for place in caption_places(box.tolist(), size, canvas) if not overlaps(place, taken)), None)
        if not caption or room is None:
            continue
        taken.append(room)
        colour = _colour(label)
        axes.text(
            room[0] + MARGIN / inches,
            room[1] + MARGIN / inches,
            caption,
            fontsize=FONT_SIZE,
            color="black" if np.dot(colour, (0.3, 0.59, 0.11)) > 0.6 else "white",
            va="top",
            clip_on=True,
            parse_math=False,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    height, width = pixels.shape[:2]
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


@lru_cache(maxsize=4096)
def _text_width(text: str, points: float) -> float:
    """The width in inches of one line of text in letters of so many points."""
    resolution = 72  # dots per inch
    renderer = RendererAgg(1, 1, resolution)  # type: ignore[no-untyped-call]  # matplotlib has no types here
    font = FontProperties(size=points)
    width, _, _ = renderer.get_text_width_height_descent(text, font, ismath=False)  # type: ignore[no-untyped-call]  # as above
    return float(width) / resolution


def _end_of(line: str, inches: float) -> str:
    """As much of the end of a title's line as fits: where names are long, their ends tell them apart."""
    if _text_width(line, TITLE_SIZE) <= inches:
        return line
    longest = next(
        (start for start in range(1, len(line)) if _text_width(f"...{line[start:]}", TITLE_SIZE) <= inches), len(line)
    )
    return f"...{line[longest:]}"


def _colour(label: int) -> tuple[float, float, float]:
    red, green, blue = colour_of(label)
    return red / 255, green / 255, blue / 255
