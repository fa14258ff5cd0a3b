"""The command `preview`: training images as the model sees them, with their boxes, on one sheet."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import PROGRAM, CommandParser, plain_warnings, run_command, writing
from dino_lightning.errors import UsageError
from dino_lightning.files import save_figure

if TYPE_CHECKING:
    from dino_lightning.data import CocoDataModule
    from dino_lightning.structures import Batch
    from dino_lightning.visualization.panels import Panel

DESCRIPTION = """Draw training images after augmentation, resizing and padding, with their boxes and names.
All options of fit are understood, --data.root and --config among them.
"""
NAME_LENGTH = 40  # characters of a file name that fit above a picture
MOST_IMAGES = 200  # on a sheet


def run(args: Sequence[str]) -> int:
    """Draw the sheet; returns the exit code."""

    def action() -> int:
        parser = _parser()
        options, rest = parser.parse_known_args(args)
        if not 1 <= options.num_images <= MOST_IMAGES:
            parser.error(f"--num_images is {options.num_images}; it must be at least 1 and at most {MOST_IMAGES}.")
        if options.seed is not None:
            rest.append(f"--seed_everything={options.seed}")
        from dino_lightning.cli.lightning_cli import parse_fit  # takes seconds to import

        with plain_warnings():
            _preview(options, parse_fit(rest))
        return 0

    return run_command(action)


def _parser() -> CommandParser:
    parser = CommandParser(f"{PROGRAM} preview", DESCRIPTION, epilog=f"Example: {PROGRAM} preview --data.root plans")
    parser.add_argument("--num_images", type=int, default=12, help="how many images to draw, up to 200 (12)")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="val: as in evaluation")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="the file to write (preview.png)")
    parser.add_argument("--seed", type=int, help="another seed draws other images; the same as --seed_everything")
    return parser


def _preview(options: argparse.Namespace, fit: Mapping[str, Any]) -> None:
    import torch

    from dino_lightning.data import CocoDataModule
    from dino_lightning.visualization.panels import draw_panels

    torch.manual_seed(int(fit["seed_everything"]))
    try:
        data = CocoDataModule(**{**fit["data"], "num_workers": 0})
        panels = _panels(data, options.split, options.num_images)
    except ValueError as error:
        raise UsageError(str(error)) from error
    heading = _heading(fit["data"], options.split, panels)
    with writing(options.output, "--output"):
        save_figure(draw_panels(panels, heading), options.output)
    images = len(data.train_set if options.split == "train" else data.val_set)
    if images < len(panels):
        print(f"There are {images} images; each is drawn several times, with another augmentation.")
    elif len(panels) < options.num_images:
        print(f"There are only {images} images.")
    print(options.output)


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
    import torch

    from dino_lightning.boxes import normalized_cxcywh_to_xyxy
    from dino_lightning.visualization.panels import Panel

    image_id, size, original = batch.image_ids[index], batch.image_sizes[index], batch.original_sizes[index]
    assert batch.targets is not None
    number = batch.targets.num_boxes[index]
    boxes_xyxy = normalized_cxcywh_to_xyxy(batch.targets.boxes_cxcywh[index, :number].double(), size)
    # large boxes first, so that small ones lie on top of them
    order = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(-1).argsort(descending=True, stable=True)
    labels = batch.targets.labels[index, :number][order].tolist()
    canvas = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    name = names.get(image_id, "drawn")
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
