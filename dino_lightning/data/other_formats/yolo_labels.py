"""The lines of YOLO label files: boxes, outlines, corners and keypoints, all as boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino_lightning.data.reading.json_file import shown_value
from dino_lightning.errors import DataError

TOLERANCE = 0.01  # shares of an image; what programs that write labels go beyond its border by
FEWEST_OF_OUTLINE = 7  # columns: class and three points


class LabelledBox(NamedTuple):
    """One line of a label file.

    Attributes:
        label: the class, 0..K-1.
        corners: x1, y1, x2, y2 as shares of the image.
        outline: x1, y1, x2, y2, ... as shares of the image; empty for a box.
    """

    label: int
    corners: tuple[float, float, float, float]
    outline: tuple[float, ...]


def parse_labels(
    text: str, path: Path, names: Sequence[str], *, keypoints: bool, counts: Counter[str]
) -> list[LabelledBox]:
    """The boxes of a label file.

    Args:
        text: its content.
        path: where it is, for messages.
        names: the names of the K classes.
        keypoints: the first four numbers after the class are the box, and keypoints follow.
        counts: what is left out or turned into boxes is added here: "outlines", "confidences", "keypoints",
            "duplicates".

    Raises:
        DataError: the first line that is wrong.
    """
    found: dict[tuple[float, ...], LabelledBox] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        values = _numbers(line, path, number)
        label = _label(values[0], path, number, names)
        kind = _kind(values, path, number, keypoints)
        numbers = values[1:5] if kind != "outlines" else values[1:]
        for value in numbers:
            if not -TOLERANCE <= value <= 1 + TOLERANCE:
                raise DataError(
                    f"{path}: line {number} has {value:g}, which is no share of the image (0 to 1). Where these are "
                    "pixels, divide x and width by the image's width, y and height by its height."
                )
        row = tuple(values)
        if row in found:
            counts["duplicates"] += 1
            continue
        counts[kind] += 1
        if kind == "outlines":
            xs, ys = numbers[0::2], numbers[1::2]
            found[row] = LabelledBox(label, (min(xs), min(ys), max(xs), max(ys)), tuple(numbers))
        else:
            x, y, width, height = numbers
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            found[row] = LabelledBox(label, corners, ())
    return list(found.values())


def _numbers(line: str, path: Path, number: int) -> list[float]:
    try:
        values = [float(word) for word in line.split()]
    except ValueError as error:
        raise DataError(
            f"{path}: line {number} is {shown_value(line.strip())}; it must be five numbers with spaces between them: "
            "class, x and y of the centre, width and height."
        ) from error
    if len(values) < 5:
        raise DataError(
            f"{path}: line {number} has {len(values)} numbers; it must have five: class, x and y of the centre, width "
            "and height."
        )
    return values


def _label(value: float, path: Path, number: int, names: Sequence[str]) -> int:
    if not 0 <= value < len(names) or value != int(value):
        raise DataError(
            f"{path}: line {number} has class {value:g}, but there are {len(names)} names, for the classes 0 to "
            f"{len(names) - 1}. Correct the line, or add the name."
        )
    return int(value)


def _kind(values: Sequence[float], path: Path, number: int, keypoints: bool) -> str:
    columns = len(values)
    if columns == 5:
        return "boxes"
    if keypoints:
        return "keypoints"
    if columns == 6:
        return "confidences"
    if columns < FEWEST_OF_OUTLINE or columns % 2 == 0:
        raise DataError(
            f"{path}: line {number} has {columns} numbers; a box has five, and an outline has the class and two for "
            "each of its points."
        )
    return "outlines"
