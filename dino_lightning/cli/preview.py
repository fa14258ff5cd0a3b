"""The command `preview`: training images as the model sees them, with their boxes, on one sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError

from dino_lightning.boxes import normalized_cxcywh_to_xyxy
from dino_lightning.cli.arguments import CommandParser
from dino_lightning.cli.expected_errors import explain
from dino_lightning.cli.lightning_cli import parse_fit
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import DataError
from dino_lightning.files import save_figure
from dino_lightning.structures import Batch
from dino_lightning.visualization.panels import Panel, draw_panels

NAME_LENGTH = 40  # characters of a file name that fit above a picture
MOST_IMAGES = 200  # on a sheet


def run(args: Sequence[str]) -> int:
    """Draw; returns the exit code."""
    parser = CommandParser(
        "preview",
        "Draw training images after augmentation, resizing and padding, with their boxes and names.\n"
        "All options of fit are understood, --data.root and --config among them.",
    )
    parser.add_argument("--num_images", type=int, default=12, help="how many images to draw, up to 200 (12)")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="val: as in evaluation")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="the picture to write (preview.png)")
    parser.add_argument("--seed", type=int, help="another seed draws other images; the same as --seed_everything")
    try:
        options, rest = parser.parse_known_args(args)
        if not 1 <= options.num_images <= MOST_IMAGES:
            parser.error(f"--num_images is {options.num_images}; it must be at least 1 and at most {MOST_IMAGES}.")
    except argparse.ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.seed is not None:
        rest.append(f"--seed_everything={options.seed}")
    try:
        fit = parse_fit(rest)
        torch.manual_seed(int(fit["seed_everything"]))
        data = CocoDataModule(**{**fit["data"], "num_workers": 0})
        panels = _panels(data, options.split, options.num_images)
        heading = _heading(fit["data"], options.split, panels)
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
    elif len(panels) < options.num_images:
        print(f"There are only {images} images.")
    print(options.output)
    return 0


def _heading(arguments: Mapping[str, Any], split: str, panels: Sequence[Panel]) -> str:
    how = f"augmentation {arguments['augmentation']}" if split == "train" else "as in evaluation"
    striped = "; striped: padding" if any(panel.image_size != panel.pixels.shape[:2] for panel in panels) else ""
    return f"{Path(arguments['root']).resolve().name}: {split} images, {how}; sizes are height x width{striped}"


def _panels(data: CocoDataModule, split: str, count: int) -> list[Panel]:
    dataset = data.train_set if split == "train" else data.val_set
    panels: list[Panel] = []
    for batch in _batches(data, split):
        batch = data.on_before_batch_transfer(batch, 0)
        names = {entry.id: entry.file_name for entry in dataset.annotations.images if entry.id in batch.image_ids}
        panels += [_panel(batch, index, names, data.class_names) for index in range(len(batch))]
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


def _panel(batch: Batch, index: int, names: Mapping[int, str], class_names: Sequence[str]) -> Panel:
    image_id, size, original = batch.image_ids[index], batch.image_sizes[index], batch.original_sizes[index]
    assert batch.targets is not None
    number = batch.targets.num_boxes[index]
    boxes_xyxy = normalized_cxcywh_to_xyxy(batch.targets.boxes_cxcywh[index, :number].double(), size)
    # large boxes first, so that small ones lie on top of them
    order = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(-1).argsort(descending=True, stable=True)
    labels = batch.targets.labels[index, :number][order].tolist()
    canvas = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    name = names[image_id]
    name = name if len(name) <= NAME_LENGTH else "..." + name[3 - NAME_LENGTH :]
    padded = "" if canvas == size else f", in {canvas[0]} x {canvas[1]}"
    return Panel(
        pixels=batch.images[index].permute(1, 2, 0).numpy(),
        boxes_xyxy=boxes_xyxy[order].numpy(),
        labels=labels,
        captions=[class_names[label] for label in labels],
        truth_xyxy=torch.zeros(0, 4).double().numpy(),
        title=f"image {image_id}: {number} box{'' if number == 1 else 'es'}\n{name}\n"
        f"{original[0]} x {original[1]} -> {size[0]} x {size[1]}{padded}",
        image_size=size,
    )
