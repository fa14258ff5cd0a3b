"""Boxes in other orders or units than COCO's: read where the user says so, recognised by evidence where not."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

BoxFormat = Literal["xywh", "xyxy", "cxcywh", "normalized-xywh", "normalized-xyxy", "normalized-cxcywh"]
NORMALIZED = "normalized-"
ORDERS: tuple[Literal["xywh", "xyxy", "cxcywh"], ...] = ("xywh", "xyxy", "cxcywh")
WORDS = {
    "xywh": "x, y, width, height",
    "xyxy": "x1, y1, x2, y2",
    "cxcywh": "centre x, centre y, width, height",
}
ROUNDING = 1.0  # pixels; what programs round or clip otherwise is no evidence
FEWEST_BOXES = 5  # below this, boxes that leave their image are no evidence of another order
SLACK = 0.1  # of an outline's longer side may lie outside its box
ENOUGH = 0.2  # of the boxes have to leave their image for that
CLEAR = 0.9  # of the outlines have to agree with another order
Boxes = npt.NDArray[np.float64]


def to_xyxy(numbers: Boxes, sizes: Boxes, box_format: BoxFormat) -> Boxes:
    """Corners in pixels.

    Args:
        numbers: (A, 4) as in the file.
        sizes: (A, 2) height and width of the image of each box.
        box_format: what the numbers are.
    """
    if box_format.startswith(NORMALIZED):
        numbers = numbers * sizes[:, [1, 0, 1, 0]]
    order = box_format.removeprefix(NORMALIZED)
    if order == "xyxy":
        return numbers
    first, extent = numbers[:, :2], numbers[:, 2:]
    if order == "cxcywh":
        first = first - extent / 2
    return np.concatenate((first, first + extent), axis=1)


def another_format(numbers: Boxes, sizes: Boxes, outlines: Boxes) -> str:
    """A sentence on boxes that are not x, y, width, height in pixels by all the evidence; empty if they may be.

    A few boxes prove nothing, nor do those that leave their image by rounding.

    Args:
        numbers: (A, 4) as in the file.
        sizes: (A, 2) height and width of the image of each box.
        outlines: (A, 4) corners of each annotation's polygon in pixels, NaN where it has none.
    """
    real = (numbers != 0).any(axis=1)  # a box of four zeros is in no format
    numbers, sizes, outlines = numbers[real], sizes[real], outlines[real]
    if not len(numbers):
        return ""
    if numbers.min() >= 0 and numbers.max() <= 1 and (numbers % 1 != 0).any() and sizes.min() > 2:
        fits = [order for order in ORDERS if _fit(numbers, np.ones_like(sizes), order, 1e-3)] or ["xywh"]
        options = " or ".join(f"--data.box_format {NORMALIZED}{order}" for order in fits)
        words = ", or ".join(WORDS[order] for order in fits)
        return f"all boxes are within 0 and 1, so not pixels but shares of the image; {options} reads them ({words})."
    if sentence := _by_outlines(numbers, sizes, outlines):
        return sentence
    outside = _overshoot(to_xyxy(numbers, sizes, "xywh"), sizes)
    leaving = int((outside > ROUNDING).sum())
    if len(numbers) < FEWEST_BOXES or leaving < ENOUGH * len(numbers):
        return ""
    for order in ORDERS[1:]:
        if _fit(numbers, sizes, order, ROUNDING):
            return (
                f"the boxes look like {WORDS[order]} ({_option(order)}): read as COCO's {WORDS['xywh']}, {leaving} of "
                f"{len(numbers)} leave their image, by up to {outside.max():.0f} pixels, and read so none does."
            )
    return ""


def _by_outlines(numbers: Boxes, sizes: Boxes, outlines: Boxes) -> str:
    """A sentence where the polygons agree with another order, and not with COCO's."""
    known = np.isfinite(outlines).all(axis=1)
    if not known.any() or outlines[known].max() <= 1:  # shares of the image say nothing about boxes in pixels
        return ""
    agree = {}
    for order in ORDERS:
        apart = np.abs(to_xyxy(numbers[known], sizes[known], order) - outlines[known]).max(axis=1)
        agree[order] = float((apart <= 2 * ROUNDING).mean())
    best = max(agree, key=lambda order: agree[order])
    if sentence := _against_outlines(to_xyxy(numbers[known], sizes[known], "xywh"), outlines[known], agree[best]):
        return sentence
    if best == "xywh" or agree[best] < CLEAR or agree["xywh"] > 1 - CLEAR:
        return ""
    count = int(known.sum())
    return (
        f"the boxes are {WORDS[best]} ({_option(best)}): so read they fit {agree[best]:.0%} of {count} outlines, "
        f"and read as COCO's {WORDS['xywh']} with {agree['xywh']:.0%}."
    )


def _against_outlines(boxes_xyxy: Boxes, outlines: Boxes, best: float) -> str:
    """A sentence where nearly all outlines leave their boxes far, and no order of the numbers explains it."""
    if len(boxes_xyxy) < FEWEST_BOXES or best >= ENOUGH:
        return ""
    allowed = 2 * ROUNDING + SLACK * (outlines[:, 2:] - outlines[:, :2]).max(axis=1)
    outside = np.maximum(boxes_xyxy[:, :2] - outlines[:, :2], outlines[:, 2:] - boxes_xyxy[:, 2:]).max(axis=1)
    contradicting = int((outside > allowed).sum())
    if contradicting < CLEAR * len(boxes_xyxy):
        return ""
    return (
        f"{contradicting} of {len(boxes_xyxy)} outlines lie outside their boxes, and no order of the four numbers fits "
        "them. Export the boxes again as x, y, width, height in pixels; or leave bbox out, and the outlines' extent is "
        "taken; --data.box_format xywh reads the boxes as they are."
    )


def _option(order: str) -> str:
    return f"--data.box_format {order} reads them so, xywh as they are"


def _overshoot(boxes_xyxy: Boxes, sizes: Boxes) -> npt.NDArray[np.float64]:
    """By how many pixels each box leaves its image."""
    limits = sizes[:, [1, 0, 1, 0]]
    outside: npt.NDArray[np.float64] = np.maximum(-boxes_xyxy, boxes_xyxy - limits).max(axis=1)
    return np.maximum(outside, 0.0, out=outside)


def _fit(numbers: Boxes, sizes: Boxes, order: Literal["xywh", "xyxy", "cxcywh"], tolerance: float) -> bool:
    """Whether all boxes, read in this order, have an area and lie within their images."""
    boxes = to_xyxy(numbers, sizes, order)
    positive = (boxes[:, 2:] > boxes[:, :2]).all()
    return bool(positive and (_overshoot(boxes, sizes) <= tolerance).all())
