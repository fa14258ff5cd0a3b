"""The command `to_coco`: any dataset that `fit` reads, written as clean COCO."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import PROGRAM, CommandParser, plain_warnings, run_command, writing
from dino_lightning.console import aligned, say

if TYPE_CHECKING:
    from dino_lightning.data import CocoAnnotations
    from dino_lightning.data.coco_writer import ImageMode, WrittenSplit

DESCRIPTION = """Write a dataset as clean COCO: OUTPUT/train/annotations.json with its images in OUTPUT/train/images,
and so on for val and test.

All options of fit that say what a dataset is are understood, --data.root and --config among them. Ids of images and
categories are kept; boxes without area are left out; no validation split is made where there is none.
"""


def run(args: Sequence[str]) -> int:
    """Write the dataset; returns the exit code."""

    def action() -> int:
        options, rest = _parser().parse_known_args(args)
        from dino_lightning.cli.lightning_cli import parse_fit  # takes seconds to import

        with plain_warnings():
            _to_coco(parse_fit(rest)["data"], options.output, options.images)
        return 0

    return run_command(action)


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} to_coco",
        DESCRIPTION,
        epilog=f"Example: {PROGRAM} to_coco --data.root yolo --output coco",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; must be new or empty")
    parser.add_argument(
        "--images",
        choices=("copy", "link", "none"),
        default="copy",
        help="copy the image files (the default), make symbolic links to them, or write annotations alone",
    )
    return parser


def _to_coco(data: Mapping[str, Any], output: Path, images: ImageMode) -> None:
    from dino_lightning.data.coco_writer import write_coco

    splits = _read(data)
    with writing(output, "--output"):
        written = write_coco(splits, output, images)
    say(aligned([("split", "images", "boxes", "crowd", "left out", "renamed"), *map(_row, written.items())]))
    if any(split.left_out for split in written.values()):
        say("Left out: boxes without area inside their image.")
    if any(split.renamed for split in written.values()):
        say("Renamed: images whose name another one of the split has.")
    folders = [f"--data.{name}_images {shlex.quote(str(split.images_folder))}" for name, split in splits.items()]
    more = " " + " ".join(folders) if images == "none" else ""
    say(f"\nTrain with: {PROGRAM}.fit --data.root {shlex.quote(str(output))}{more}")


def _read(data: Mapping[str, Any]) -> dict[str, CocoAnnotations]:
    """The splits of a dataset by the options of `fit`."""
    from dino_lightning.data.annotation_file import raise_first_error
    from dino_lightning.data.read_files import read_files
    from dino_lightning.data.read_splits import read_options, said_once, split_options
    from dino_lightning.data.splits import resolve_split_files

    root = Path(data["root"])
    found = {}
    for name, read in read_files(root, resolve_split_files(root, split_options(data)), read_options(data)).items():
        raise_first_error(read.problems)
        assert read.annotations is not None
        found[name] = read.annotations
        notes, repairs = said_once(read.problems)
        for sentence in (*notes, *repairs):
            say(sentence)
    return found


def _row(item: tuple[str, WrittenSplit]) -> tuple[str, ...]:
    name, split = item
    numbers = (split.images, split.boxes, split.crowd, split.left_out, split.renamed)
    return (name, *(f"{number:,}" for number in numbers))
