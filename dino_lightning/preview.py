"""The command `preview`: training images as the model sees them, with their boxes, on one sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentError

from dino_lightning.callbacks.drawing import Panel, draw_panels, save_figure
from dino_lightning.cli import explain, parse_fit
from dino_lightning.data import CocoDataModule, DataError
from dino_lightning.structures import Batch

NAME_LENGTH = 34  # characters of a file name that fit above a picture
MOST_CAPTIONS = 40  # on one picture; more of them would hide it


def run(args: Sequence[str]) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_lightning preview",
        description="Draw training images after augmentation, resizing and padding, with their boxes and names. "
        "All options of fit are understood, --data.root and --config among them.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_images", type=int, default=12, help="how many images to draw (12)")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="val: as in evaluation")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="the picture to write (preview.png)")
    options, rest = parser.parse_known_args(args)
    if options.num_images < 1:
        print(f"error: --num_images is {options.num_images}; it must be at least 1.", file=sys.stderr)
        return 2
    try:
        fit = parse_fit(rest)
        torch.manual_seed(int(fit["seed_everything"]))
        data = CocoDataModule(**{**fit["data"], "num_workers": 0})
        panels = _panels(data, options.split, options.num_images)
        preset = fit["data"]["augmentation"] if options.split == "train" else "as in evaluation"
        heading = f"{fit['data']['root']}: {options.split} images, {preset}; sizes are height x width in pixels"
        save_figure(draw_panels(panels, heading), options.output)
    except (ArgumentError, DataError, ValueError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except OSError as error:
        print(f"error: {options.output}: the picture cannot be written ({error.strerror}).", file=sys.stderr)
        return 1
    images = len(data.train_set if options.split == "train" else data.val_set)
    if images < len(panels):
        print(f"There are {images} images; each is drawn several times, augmented anew.")
    print(options.output)
    return 0


def _panels(data: CocoDataModule, split: str, count: int) -> list[Panel]:
    panels: list[Panel] = []
    for batch in _batches(data, split):
        batch = data.on_before_batch_transfer(batch, 0)
        panels += [_panel(data, split, batch, index) for index in range(len(batch))]
        if len(panels) >= count:
            break
    return panels[:count]


def _batches(data: CocoDataModule, split: str) -> Iterator[Batch]:
    """The batches of as many epochs as it takes; of evaluation, one."""
    if split == "val":
        yield from data.val_dataloader()
        return
    loader = data.train_dataloader()
    while True:
        yield from loader


def _panel(data: CocoDataModule, split: str, batch: Batch, index: int) -> Panel:
    dataset = data.train_set if split == "train" else data.val_set
    names = {entry.id: entry.file_name for entry in dataset.annotations.images}
    image_id, size, original = batch.image_ids[index], batch.image_sizes[index], batch.original_sizes[index]
    assert batch.targets is not None
    number = batch.targets.num_boxes[index]
    boxes: Any = batch.targets.boxes_cxcywh[index, :number].double().numpy()
    labels = batch.targets.labels[index, :number].tolist()
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    scale = np.array([size[1], size[0]] * 2)
    canvas = tuple(batch.images.shape[-2:])
    name = names[image_id]
    name = name if len(name) <= NAME_LENGTH else "..." + name[3 - NAME_LENGTH :]
    padded = "" if canvas == size else f", padded to {canvas[0]} x {canvas[1]}"
    return Panel(
        pixels=batch.images[index].permute(1, 2, 0).numpy(),
        boxes_xyxy=np.concatenate((centre - half, centre + half), axis=1) * scale,
        labels=labels,
        captions=[data.class_names[label] if place < MOST_CAPTIONS else "" for place, label in enumerate(labels)],
        truth_xyxy=np.zeros((0, 4)),
        title=f"image {image_id}: {name}\n{original[0]} x {original[1]} -> {size[0]} x {size[1]}{padded}",
    )
