"""What training does to its images, by preset.

The options of a preset are the fields of its class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from dino_lightning.data.random_geometry import (
    careful_crop,
    chance,
    choice,
    integer,
    mirrored_and_turned,
    random_crop,
    uniform,
)
from dino_lightning.data.scan_noise import blur, fade, save_as_jpeg, shade, speckle, thicken, thin
from dino_lightning.data.sizes import Canvas, resized_size
from dino_lightning.data.transforms import (
    LabelledImage,
    Resize,
    Transform,
    flip_horizontal,
    resize,
    resize_by_rule,
    rotate,
)

Augmentation = Literal["coco", "plans", "flips", "none"]

# The published sizes, in pixels at image_size 800 (arXiv 2203.03605 follows DETR, arXiv 2005.12872).
REFERENCE_SIZE = 800
SHORT_SIDES = tuple(range(480, 801, 32))
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)

MOST_ROTATION = 15.0  # degrees; beyond that, boxes around rotated boxes are too loose
SIZES = ("image_size", "max_size", "canvas")  # fields that are not options


def train_transform(
    preset: Augmentation,
    image_size: int = 800,
    max_size: int = 1333,
    options: Mapping[str, Any] | None = None,
    canvas: Canvas | None = None,
) -> Transform:
    """The training augmentation of a preset.

    Args:
        preset: "coco", the published augmentation; "plans", for drawings, which have no up or down and carry
            meaning in every line; "flips", mirrored and turned by quarters only; "none", the same resizing as in
            evaluation.
        image_size: largest short side in pixels; all sizes of a preset scale with it.
        max_size: limit of the long side in pixels.
        options: values for the preset's options, see its class.
        canvas: the square that all images are put into, or None.

    Raises:
        ValueError: an unknown preset or option, or a value out of its range.
    """
    presets = {"coco": CocoAugmentation, "plans": PlansAugmentation, "flips": FlipsAugmentation, "none": Resize}
    if preset not in presets:
        raise ValueError(f"Unknown augmentation {preset!r}; choose one of {', '.join(get_args(Augmentation))}.")
    valid = [field.name for field in fields(presets[preset]) if field.name not in SIZES]
    unknown = [str(name) for name in options or {} if name not in valid]
    if unknown:
        listed = f"those of {preset} are {', '.join(valid)}" if valid else f"{preset} has none"
        raise ValueError(f"There is no augmentation option {', '.join(unknown)}; {listed}.")
    transform: Transform = presets[preset](image_size=image_size, max_size=max_size, canvas=canvas, **(options or {}))
    return transform


@dataclass(frozen=True, kw_only=True)
class CocoAugmentation:
    """The published augmentation: flip, then one of many sizes, in half of the cases after a crop.

    Attributes:
        image_size: largest short side in pixels.
        max_size: limit of the long side in pixels.
        canvas: the square that all images are put into, or None.
        flip: probability of mirroring left to right.
        crop: probability of a crop before the resizing.
        min_scale: smallest short side, as a share of `image_size`; those in use go up by 1/25 of it.
    """

    image_size: int
    max_size: int
    canvas: Canvas | None = None
    flip: float = 0.5
    crop: float = 0.5
    min_scale: float = 0.6

    def __post_init__(self) -> None:
        _check_shares(self, "flip", "crop")
        _check(self, "min_scale", 0.05, 1.0)

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """The augmented image with its boxes, in pixels of that image."""
        if chance(self.flip):
            example = flip_horizontal(example)
        if chance(self.crop):
            short_side = self._scaled(choice(SHORT_SIDES_BEFORE_CROP))
            example = resize(example, resized_size(example.size, short_side))
            smallest, largest = (self._scaled(side) for side in CROP_SIDES)
            width = integer(smallest, min(example.size[1], largest))
            height = integer(smallest, min(example.size[0], largest))
            example = random_crop(example, height, width)
        step = SHORT_SIDES[1] - SHORT_SIDES[0]
        lowest = math.ceil(self.min_scale * REFERENCE_SIZE / step - 1e-6) * step
        short_side = self._scaled(choice(tuple(range(lowest, REFERENCE_SIZE + 1, step))))
        return resize_by_rule(example, short_side, self.max_size, self.canvas)

    def _scaled(self, pixels: int) -> int:
        return max(1, round(pixels * self.image_size / REFERENCE_SIZE))


@dataclass(frozen=True, kw_only=True)
class PlansAugmentation:
    """For drawings: crops that keep boxes mostly whole, scaling, flips, turns, slight rotation, ink and scanner noise.

    Colours are not changed: where a plan has any, they carry meaning. No line vanishes: at training size most lines
    are one or two pixels wide, so thinning makes the narrowest ones paler instead.

    Attributes:
        image_size: largest short side in pixels, of the image before the crop.
        max_size: limit of the long side in pixels.
        canvas: the square that all images are put into, or None. Where images fill it, `min_scale` has no effect.
        flip: probability of mirroring, in each direction.
        quarter_turns: whether to turn by 0, 90, 180 or 270 degrees.
        min_scale: smallest short side, as a share of `image_size`.
        rotate: probability of a slight rotation, as of a sheet laid askew on the scanner.
        rotation: its largest angle in degrees, up to 15.
        crop: probability of a crop that leaves no box half cut.
        min_crop: smallest side of a crop, as a share of the image's.
        min_visible: share of a box that a crop must show, if it shows any of it.
        thicken: probability of lines thicker by a pixel.
        thin: probability of lines thinner by half a pixel; never together with thicker ones.
        fade: probability of pale ink.
        shade: probability of grey paper, darker on one side.
        speckle: probability of dust and dropped-out dots.
        blur: probability of a slight blur, as of a scan at a lower resolution.
        jpeg: probability of JPEG artefacts.
    """

    image_size: int
    max_size: int
    canvas: Canvas | None = None
    flip: float = 0.5
    quarter_turns: bool = True
    min_scale: float = 0.75
    rotate: float = 0.3
    rotation: float = 2.0
    crop: float = 0.5
    min_crop: float = 0.5
    min_visible: float = 0.6
    thicken: float = 0.15
    thin: float = 0.1
    fade: float = 0.2
    shade: float = 0.2
    speckle: float = 0.2
    blur: float = 0.1
    jpeg: float = 0.1

    def __post_init__(self) -> None:
        _check_shares(self, "flip", "rotate", "crop", "min_visible", "thicken", "thin", "fade", "shade", "speckle")
        _check_shares(self, "blur", "jpeg")
        _check(self, "min_scale", 0.05, 1.0)
        _check(self, "min_crop", 0.05, 1.0)
        _check(self, "rotation", 0.0, MOST_ROTATION)
        _check_switch(self, "quarter_turns")

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """The augmented image with its boxes, in pixels of that image."""
        example = self._placed(example)
        weight = float(torch.rand(()))
        if weight < self.thicken:
            example = thicken(example)
        elif weight >= 1 - self.thin:
            example = thin(example)
        for change, probability in (
            (fade, self.fade),
            (shade, self.shade),
            (speckle, self.speckle),
            (blur, self.blur),
            (save_as_jpeg, self.jpeg),
        ):
            if chance(probability):
                example = change(example)
        return example

    def _placed(self, example: LabelledImage) -> LabelledImage:
        """The geometric part: crop first and resize once, so that a crop keeps the full resolution of the file."""
        smallest, largest = (max(1, round(scale * self.image_size)) for scale in (self.min_scale, 1.0))
        whole, scaled = example.size, resized_size(example.size, integer(smallest, largest), self.max_size)
        if chance(self.crop):
            example = careful_crop(example, min_crop=self.min_crop, min_visible=self.min_visible)
        height, width = (
            max(1, round(part * to / full)) for part, full, to in zip(example.size, whole, scaled, strict=True)
        )
        size = (height, width) if self.canvas is None else self.canvas.fitted(example.size, (height, width))
        # turned after the crop, so that the result has the orientation asked for
        example = mirrored_and_turned(resize(example, size), self.flip, self.quarter_turns)
        if chance(self.rotate) and self.rotation > 0:
            example = rotate(example, uniform(-self.rotation, self.rotation))
        return example


@dataclass(frozen=True, kw_only=True)
class FlipsAugmentation:
    """Mirrored and turned by quarters, at the size of evaluation.

    Attributes:
        image_size: short side in pixels.
        max_size: limit of the long side in pixels.
        canvas: the square that all images are put into, or None.
        flip: probability of mirroring, in each direction.
        quarter_turns: whether to turn by 0, 90, 180 or 270 degrees.
    """

    image_size: int
    max_size: int
    canvas: Canvas | None = None
    flip: float = 0.5
    quarter_turns: bool = True

    def __post_init__(self) -> None:
        _check_shares(self, "flip")
        _check_switch(self, "quarter_turns")

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """The augmented image with its boxes, in pixels of that image."""
        example = mirrored_and_turned(example, self.flip, self.quarter_turns)
        return resize_by_rule(example, self.image_size, self.max_size, self.canvas)


def _check_shares(preset: object, *names: str) -> None:
    for name in names:
        _check(preset, name, 0.0, 1.0)


def _check(preset: object, name: str, low: float, high: float) -> None:
    value = getattr(preset, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"The augmentation option {name} is {value!r}; it must lie between {low:g} and {high:g}.")


def _check_switch(preset: object, name: str) -> None:
    value = getattr(preset, name)
    if not isinstance(value, bool):
        raise ValueError(f"The augmentation option {name} is {value!r}; it must be true or false.")
