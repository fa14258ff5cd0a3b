"""Pictures of images with boxes, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dino_lightning.files import written_whole

TRUTH_COLOUR = "#2a9d4a"
PALETTE = ("#d1495b", "#00798c", "#edae49", "#5f4bb6", "#ef7b45", "#1b998b", "#8d6a9f", "#3a506b")


@dataclass(frozen=True)
class Panel:
    """One image with what was found in it and what is there.

    Attributes:
        pixels: (h, w, 3) uint8.
        boxes_xyxy: (N, 4) detections, in pixels of `pixels`.
        labels: (N,) their labels.
        captions: N short texts.
        truth_xyxy: (M, 4) true boxes.
        title: what stands above.
    """

    pixels: npt.NDArray[np.uint8]
    boxes_xyxy: npt.NDArray[np.float64]
    labels: Sequence[int]
    captions: Sequence[str]
    truth_xyxy: npt.NDArray[np.float64]
    title: str


def draw_panels(panels: Sequence[Panel], heading: str) -> Figure:
    """A contact sheet: detections in colour with their captions, true boxes as thin dashed green lines."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    tallest = max(panel.pixels.shape[0] / panel.pixels.shape[1] for panel in panels)
    figure = Figure(figsize=(4.6 * columns, (4.6 * min(tallest, 2.0) + 0.3) * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=11)
    for index in range(rows * columns):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_axis_off()
        if index >= len(panels):
            continue
        panel = panels[index]
        axes.imshow(panel.pixels)
        axes.set_title(panel.title, fontsize=8)
        for x1, y1, x2, y2 in panel.truth_xyxy:
            axes.add_patch(
                Rectangle(
                    (x1, y1),
                    x2 - x1,
                    y2 - y1,
                    fill=False,
                    edgecolor=TRUTH_COLOUR,
                    linewidth=1.2,
                    linestyle="--",
                )
            )
        for (x1, y1, x2, y2), label, caption in zip(panel.boxes_xyxy, panel.labels, panel.captions, strict=True):
            colour = PALETTE[label % len(PALETTE)]
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.6))
            axes.text(
                x1 + 1,
                y1 + 1,
                caption,
                fontsize=6,
                color="white",
                va="top",
                clip_on=True,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )
        height, width = panel.pixels.shape[:2]
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; a half-written picture is never seen."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
