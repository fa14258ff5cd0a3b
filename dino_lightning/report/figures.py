"""The plots of a report, as SVG in data URIs: sharp at any size, and their text in the reader's own fonts."""

from __future__ import annotations

import base64
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dino_lightning.console import shown
from dino_lightning.report.tables import WORDS

FEW_CLASSES = 10  # so many have a curve each
EXTREMES = 5  # where there are more, so many of the best and of the worst have one
MATRIX_CLASSES = 12  # at most, for a confusion matrix in numbers; larger ones are drawn
NAME_LENGTH = 24
COLOURS = {
    "correct": "#0b62c4",
    "missed": "#d1001f",
    "duplicate": "#7b3fc4",
    "classification": "#c2187a",
    "localization": "#d96a00",
    "both": "#00838f",
    "background": "#7a4b1a",
}
LINES = ("#0b62c4", "#d96a00", "#2a9d4a", "#c2187a", "#7b3fc4", "#7a4b1a", "#1b998b", "#8a8a00", "#d1001f", "#555555")
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        source: a data URI.
        title: its heading.
        text: its content in words, for readers who cannot see it.
    """

    source: str
    title: str
    text: str


def precision_recall(summary: dict[str, Any], other: dict[str, Any] | None = None) -> Plot | None:
    """Precision over recall: all classes at three overlaps, the classes at IoU 0.5, and the other run."""
    curves = summary["curves"]
    if curves["precision_at_recall"]["0.50"] is None:
        return None
    figure, axes = _axes()
    for (iou, values), style in zip(curves["precision_at_recall"].items(), STYLES, strict=False):
        axes.plot(curves["recalls"], values, style, color="black", label=f"IoU {iou}", linewidth=1.6)
    if other is not None and other["curves"]["precision_at_recall"]["0.50"] is not None:
        before = other["curves"]
        axes.plot(before["recalls"], before["precision_at_recall"]["0.50"], color="#999999", label="other, IoU 0.50")
    chosen = _chosen_classes(summary)
    for number, row in enumerate(chosen):
        values = curves["classes"][row["label"]]["precision_at_recall"]
        axes.plot(curves["recalls"], values, color=_line(number), linewidth=1, label=_name(row["name"]))
    _unit_square(axes, "recall: share of ground-truth boxes found", "precision: share of correct detections")
    _legend(axes)
    names = f" Classes, at IoU 0.5: {', '.join(_name(row['name']) for row in chosen)}." if chosen else ""
    return _plot(
        figure, "Precision over recall", f"Precision over recall, all classes at IoU 0.50, 0.75 and 0.90.{names}"
    )


def f1_over_threshold(summary: dict[str, Any], other: dict[str, Any] | None = None) -> Plot | None:
    """F1, precision and recall over the score threshold, the best F1 marked."""
    at = summary["curves"]["at_threshold"]
    if at is None:
        return None
    thresholds, values = summary["curves"]["thresholds"], summary["values"]
    figure, axes = _axes()
    axes.plot(thresholds, at["f1"], color="black", linewidth=2, label="F1")
    axes.plot(thresholds, _gaps(at["precision"]), color=LINES[0], linewidth=1, label="precision")
    axes.plot(thresholds, at["recall"], color=LINES[1], linewidth=1, label="recall")
    if other is not None and other["curves"]["at_threshold"] is not None:
        axes.plot(
            other["curves"]["thresholds"], other["curves"]["at_threshold"]["f1"], color="#999999", label="F1, other"
        )
    best = f"best F1 {values['F1']:.3f} at {values['F1_threshold']:.3f}"
    axes.plot([values["F1_threshold"]], [values["F1"]], "*", color=LINES[8], markersize=13, label=best)
    axes.axvline(
        summary["threshold"],
        color="#777777",
        linestyle=":",
        linewidth=1.2,
        label=f"of the model: {summary['threshold']:.3f}",
    )
    _unit_square(axes, "score threshold", "")
    _legend(axes)
    return _plot(figure, "F1 over the score threshold", f"F1, precision and recall over the score threshold; {best}.")


def class_f1(summary: dict[str, Any]) -> Plot | None:
    """F1 over the score threshold of each class, their best points marked."""
    chosen = _chosen_classes(summary)
    if not chosen:
        return None
    figure, axes = _axes()
    for number, row in enumerate(chosen):
        values = summary["curves"]["classes"][row["label"]]["f1_at_threshold"]
        axes.plot(summary["curves"]["thresholds"], values, color=_line(number), linewidth=1, label=_name(row["name"]))
        axes.plot([row["best_threshold"]], [row["best_f1"]], "*", color=_line(number), markersize=9)
    axes.axvline(summary["threshold"], color="#777777", linestyle=":", linewidth=1.2)
    _unit_square(axes, "score threshold (dotted: that of the model)", "F1")
    _legend(axes)
    return _plot(
        figure,
        "F1 of the classes over the score threshold",
        f"F1 over the score threshold of {', '.join(_name(row['name']) for row in chosen)}.",
    )


def errors(summary: dict[str, Any], other: dict[str, Any] | None = None) -> Plot:
    """Bars with the number of errors of each kind."""
    figure, axes = _axes(height=2.9)
    counts = [row["count"] for row in summary["errors"]]
    places = np.arange(len(counts))
    if other is not None:
        counted = {row["kind"]: row["count"] for row in other["errors"]}
        before = [counted.get(row["kind"], 0) for row in summary["errors"]]
        axes.barh(places + 0.36, before, 0.3, color="#bbbbbb", label="other")
    bars = axes.barh(places, counts, 0.4, color=[COLOURS[row["kind"]] for row in summary["errors"]], label="this")
    axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks(places, [WORDS[row["kind"]] for row in summary["errors"]])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"ground-truth boxes or detections, at a score of {summary['threshold']:.3f}")
    figure.subplots_adjust(left=0.2)
    if other is not None:
        _legend(axes)
    described = ", ".join(f"{row['count']} {WORDS[row['kind']]}" for row in summary["errors"])
    return _plot(figure, "Errors by kind", f"Errors: {described}.")


def confusion(summary: dict[str, Any]) -> Plot | None:
    """The confusion matrix of many classes: a shade for each share of the ground-truth boxes of a class."""
    rows = summary["classes"]
    if len(rows) <= MATRIX_CLASSES:
        return None
    matrix = confusion_matrix(summary)
    shares = np.sqrt(matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True)))
    side = len(matrix)
    figure, axes = _axes(width=7.4, height=7.0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    step = max(1, -(-side // 45))
    labels = [_name(row["name"], 14) for row in rows]
    for axis, extra in ((axes.set_xticks, "not found"), (axes.set_yticks, "no ground truth")):
        ticks = [*range(0, side - 1, step), side - 1]
        axis(ticks, [[*labels, extra][tick] for tick in ticks], fontsize=6, parse_math=False)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("detected as")
    axes.set_ylabel("ground-truth class")
    axes.grid(False)
    figure.subplots_adjust(left=0.17, bottom=0.17)
    return _plot(
        figure,
        "Confusion of the classes",
        "Confusion matrix, a row for each ground-truth class; its largest entries are in the table.",
    )


def confusion_matrix(summary: dict[str, Any]) -> Any:
    """(K + 1, K + 1) int64, ground truth by detection; last row "no ground truth", last column "not found"."""
    size = len(summary["classes"]) + 1
    matrix = np.zeros((size, size), np.int64)
    for entry in summary["confusion"]:
        matrix[entry["true"], entry["predicted"]] = entry["count"]
    return matrix


def calibration(summary: dict[str, Any]) -> Plot | None:
    """The share of correct detections by score."""
    bins = [row for row in summary["calibration"]["bins"] if row["count"]]
    if not bins:
        return None
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=1.2, label="calibrated")
    axes.bar(
        [(row["from"] + row["to"]) / 2 for row in bins],
        [row["correct"] for row in bins],
        width=0.09,
        color="#9cc3ee",
        edgecolor=LINES[0],
        label="share correct",
    )
    axes.plot(
        [row["mean_score"] for row in bins],
        [row["correct"] for row in bins],
        "o",
        color=LINES[1],
        markersize=4,
        label="at the mean score",
    )
    for row in bins:
        axes.text((row["from"] + row["to"]) / 2, 0.01, f"{row['count']}", ha="center", va="bottom", fontsize=6)
    _unit_square(axes, "score (small numbers: detections)", "share of correct detections")
    _legend(axes)
    described = ", ".join(f"{row['from']:.1f} to {row['to']:.1f}: {row['correct']:.2f}" for row in bins)
    return _plot(figure, "Calibration of the scores", f"Share of correct detections by score: {described}.")


def counted(summary: dict[str, Any]) -> Plot | None:
    """Kept detections against ground-truth boxes, a dot for each pair of numbers."""
    pairs = Counter((row["true"], row["counted"]) for row in summary["images"])
    if not pairs:
        return None
    figure, axes = _axes()
    true, found = np.array(list(pairs)).T
    images = np.array(list(pairs.values()))
    most = max(int(true.max()), int(found.max()), 1)
    axes.plot([0, most], [0, most], color="#777777", linestyle=":", linewidth=1.2, label="exact")
    sizes = 12 + 160 * np.sqrt(images / images.max()) * (images.max() > 1)
    dots = axes.scatter(true, found, s=sizes, color=LINES[0], alpha=0.5, linewidths=0.5, edgecolors="black")
    dots.set_rasterized(len(pairs) > 1500)
    axes.set_xlabel("ground-truth boxes")
    axes.set_ylabel(f"detections with a score of at least {summary['threshold']:.3f}")
    _legend(axes)
    return _plot(
        figure,
        "Boxes counted in an image",
        "Detections against ground-truth boxes, a dot for each pair of numbers, larger for more images.",
    )


def count_errors(summary: dict[str, Any]) -> Plot | None:
    """Histogram of the boxes that are too many or too few in an image."""
    off = np.array([row["counted"] - row["true"] for row in summary["images"]])
    if not len(off):
        return None
    figure, axes = _axes()
    reach = max(2, int(np.abs(off).max()))
    step = max(1, -(-2 * reach // 60))
    edges = np.arange(-(reach // step) - 1, reach // step + 2) * step + (0.5 if step == 1 else step / 2)
    axes.hist(off, bins=edges.tolist(), color=LINES[0], edgecolor="white", linewidth=0.5)
    axes.axvline(0, color="#777777", linestyle=":", linewidth=1.2)
    axes.set_xlabel("boxes counted minus ground-truth boxes")
    axes.set_ylabel("images")
    return _plot(
        figure,
        "Boxes too many or too few",
        "Histogram of boxes counted minus ground-truth boxes in an image; the numbers are above.",
    )


def _chosen_classes(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes with a curve of their own: all of a few, else the best and the worst by AP."""
    measured = [row for row in summary["classes"] if row["AP"] is not None]
    if len(summary["classes"]) == 1:
        return []
    if len(measured) <= FEW_CLASSES:
        return measured
    by_ap = sorted(measured, key=lambda row: -row["AP"])
    return by_ap[:EXTREMES] + by_ap[-EXTREMES:]


def _line(number: int) -> str:
    return LINES[number % len(LINES)]


def _name(name: str, length: int = NAME_LENGTH) -> str:
    return shown(name, length)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(axes: Axes) -> None:
    # outside the axes, which curves may fill
    legend = axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _axes(*, width: float = 5.9, height: float = 3.6) -> tuple[Figure, Axes]:
    """Axes with room for a legend on their right; sizes in inches."""
    figure = Figure(figsize=(width, height))
    # margins by hand: matplotlib's own layout draws everything twice
    figure.subplots_adjust(left=0.6 / width, right=1 - 1.45 / width, bottom=0.55 / height, top=1 - 0.15 / height)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _plot(figure: Figure, title: str, text: str) -> Plot:
    buffer = io.BytesIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "report"}
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.filterwarnings("ignore", "Glyph")  # a script that matplotlib's font lacks
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    return Plot(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", title, text)
