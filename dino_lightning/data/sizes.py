"""Which size an image is resized to: numbers alone, without pixels and without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

CanvasMode = Literal["pad", "letterbox", "stretch"]


@dataclass(frozen=True)
class Canvas:
    """A square that every image is put into, top left.

    Attributes:
        side: its side in pixels.
        mode: "pad": images have any size, and are shrunk where they would not fit; "letterbox": the long side fills
            the square; "stretch": both sides do, and proportions are given up.

    Raises:
        ValueError: another mode.
    """

    side: int
    mode: CanvasMode = "pad"

    def __post_init__(self) -> None:
        if self.mode not in get_args(CanvasMode):
            raise ValueError(f"fixed_size_mode is {self.mode!r}; choose pad, letterbox or stretch.")

    def fitted(self, size: tuple[int, int], ruled: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that an image of `size` gets which by the rule of sizes would become `ruled`.

        Both from the size before any resizing: an image is resized once, however it is to fill the canvas.
        """
        if self.mode == "stretch":
            return self.side, self.side
        if self.mode == "pad":
            if max(ruled) <= self.side:
                return ruled
            size = ruled  # the published rule may pass its limit by a few pixels
        height, width = (max(1, round(length * self.side / max(size))) for length in size)
        return height, width


def resized_size(size: tuple[int, int], short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """The (height, width) that an image of (height, width) is resized to, by the published rule.

    The short side becomes `short_side`, or less where the long side would pass `max_size`; the long side is
    truncated to an integer. Because the short side is rounded first, the long side of an elongated image can
    still pass `max_size` by a few pixels; kept for parity.
    """
    height, width = size
    short, long = min(size), max(size)
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(1, round(max_size * short / long))
    if short == short_side:
        return size
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def fitted_size(size: tuple[int, int], ruled: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) within a canvas of an image of `size` which by the rule of sizes would become `ruled`.

    That of the rule where it fits; else shrunk with its proportions until it does.
    """
    if ruled[0] <= canvas[0] and ruled[1] <= canvas[1]:
        return ruled
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (min(side, max(1, round(length * scale))) for length, side in zip(size, canvas, strict=True))
    return height, width


def largest_sides(
    image_size: int, max_size: int, fixed_size: int | None, fixed_size_mode: CanvasMode
) -> tuple[int, int]:
    """Short side and limit of the long side in pixels, by options of the data module, within a canvas if given."""
    if fixed_size is None:
        return image_size, max_size
    if fixed_size_mode == "pad":
        return min(image_size, fixed_size), min(max_size, fixed_size)
    return fixed_size, fixed_size


def ruled_size(size: tuple[int, int], short_side: int, max_size: int, canvas: Canvas | None) -> tuple[int, int]:
    """The (height, width) by `resized_size`, and within the canvas if there is one."""
    ruled = resized_size(size, short_side, max_size)
    return ruled if canvas is None else canvas.fitted(size, ruled)
