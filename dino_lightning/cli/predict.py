"""The command `predict`: detections of any number of images, as files; the same command resumes an interrupted one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dino_lightning.cli.checkpoints import HELP, model_file, refuse_exported
from dino_lightning.cli.command import PROGRAM, CommandParser, boolean, run_command, writing
from dino_lightning.console import say
from dino_lightning.errors import OutOfMemory
from dino_lightning.training.option_checks import check_tta_views

if TYPE_CHECKING:
    from dino_lightning.inference.results import Summary

DESCRIPTION = """Detect objects in images, and write what was found into a folder:

  predictions.json    COCO results (image_id, category_id, bbox, score) with the original ids
  predictions.csv     one row for each detection
  images.json         id, file name, size and number of detections of each image; why one could not be read
  predictions.jsonl   one line for each image; what an interrupted command resumes from
  overlays/           the images with their detections

Interrupted, the same command resumes where it stopped, and includes images that were added or changed since; other
images need another --output. An image that cannot be read does not stop the others: it is reported, and tried again by
the next run of the same command. Exit code: 0, 1 if images could not be read or nothing could be done, 2 for an option
that does not exist, 130 when interrupted.
"""


def run(args: Sequence[str]) -> int:
    """Predict; returns the exit code."""
    state = {"deleted": False}  # earlier results, by --overwrite

    def how_to_resume() -> str:
        return "repeat it without --overwrite to resume" if state["deleted"] else "the same command resumes from here"

    def action() -> int:
        parser = _parser()
        options = parser.parse_args(args)
        _check(parser, options)
        import torch  # takes seconds, as does the rest

        from dino_lightning.inference.predict_folder import PredictOptions, predict_folder

        checkpoint = model_file(options.ckpt_path)
        refuse_exported(checkpoint, "predict takes a checkpoint; use an exported file by load_detector in Python.")
        given = {field.name: getattr(options, field.name) for field in fields(PredictOptions)}
        tiles = {name: given.pop(name) for name in ("overlap", "whole_image")}  # None: as PredictOptions has them
        tiles = {name: value for name, value in tiles.items() if value is not None}
        wanted = PredictOptions(**given, **tiles)
        try:
            with writing(options.output, "--output"):
                summary = predict_folder(checkpoint, wanted, on_start=lambda: state.update(deleted=options.overwrite))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"The GPU's memory is full; lower --batch_size. What is finished is kept: {how_to_resume()}."
            ) from error
        if summary is None:
            return 0
        _report(options.output, summary)
        return 1 if summary.failed else 0

    return run_command(action, interrupted=lambda: f"Interrupted; {how_to_resume()}.")


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} predict",
        DESCRIPTION,
        epilog="Example: python -m dino_lightning predict --ckpt_path last --images plans",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, help=HELP)
    add("--images", required=True, nargs="+", help="files, folders, globs; or one COCO file, for its ids")
    add("--image_folder", type=Path, help="what the names in a COCO file are relative to (looked for near it)")
    add("--output", type=Path, default=Path("predictions"), help="folder for the results (predictions)")
    add("--overwrite", action="store_true", help="start again, whatever results the folder holds")
    add("--threshold", type=float, help="lowest score to report (that of the best F1, stored in the checkpoint)")
    add("--tile", type=int, help="cut images into tiles of so many pixels, for scans much larger than in training")
    add("--overlap", type=float, help="with tiles: share of its side that a tile shares with the next (0.2)")
    add("--whole_image", type=boolean, help="with tiles: look at the whole image too (true)")
    add("--tta_views", type=int, help="ways to see each image, whose detections are fused: 1, 2, 4, 8 (of the model)")
    add("--overlays", type=boolean, default=True, help="draw the detections on the images (true)")
    add("--batch_size", type=int, help="images in a batch, on each device (4 on a GPU, else 1)")
    add("--num_workers", type=int, help="processes that read images, for each device (by cores)")
    add("--trainer.accelerator", dest="accelerator", default="auto", help="auto, gpu, cpu, mps")
    add("--trainer.devices", dest="devices", default="auto", help="how many, or which: 2, or 0,1 (auto: all GPUs)")
    add(
        "--trainer.precision",
        dest="precision",
        choices=("32-true", "bf16-mixed", "16-mixed"),
        help="how to compute (by the device)",
    )
    return parser


def _check(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuse values out of range.

    Raises:
        argparse.ArgumentError: there is one.
    """
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        parser.error(f"--threshold is {options.threshold}; it must lie between 0 and 1.")
    if options.tile is not None and options.tile < 32:
        parser.error(f"--tile is {options.tile}; it must be at least 32 pixels.")
    for name in ("overlap", "whole_image"):
        if options.tile is None and getattr(options, name) is not None:
            parser.error(f"--{name} is for tiles, and there are none without --tile.")
    if options.overlap is not None and not 0 <= options.overlap <= 0.9:
        parser.error(f"--overlap is {options.overlap}; it must lie between 0 and 0.9.")
    if options.tta_views is not None:
        try:
            check_tta_views(options.tta_views)
        except ValueError as error:
            parser.error(f"--{error}")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch_size is {options.batch_size}; it must be at least 1.")
    if options.num_workers is not None and options.num_workers < 0:
        parser.error(f"--num_workers is {options.num_workers}; it must not be negative.")


def _report(folder: Path, summary: Summary) -> None:
    say(
        f"{summary.images:,} images: {summary.detections:,} detections with a score of at least {summary.threshold:.3f}"
    )
    predicted = summary.done_now - summary.failed  # all that failed were tried now
    if predicted > 0:
        say(
            f"Predicted {predicted:,} in {summary.seconds:.1f} s: "
            f"{predicted / summary.seconds:.1f} images per second, reading and writing included"
        )
    if summary.other_size:
        say(
            f"warning: {summary.other_size} images have another size than the COCO file says: its boxes and the "
            "results do not fit each other."
        )
    if summary.further_pages:
        say(f"warning: {summary.further_pages} files have several pages; only the first of each was looked at.")
    say("\n".join(str(folder / name) for name in ("predictions.json", "predictions.csv", "images.json")))
    if (folder / "overlays").is_dir():
        say(str(folder / "overlays"))
    if summary.failed:
        more = summary.failed - len(summary.failures)
        lines = [*summary.failures, *([f"... and {more} more, in {folder / 'images.json'}"] if more else [])]
        if summary.images == 0 and all(line.endswith("does not exist.") for line in summary.failures):
            lines.append("The images of a COCO file may lie elsewhere: give their folder with --image_folder.")
        say(f"error: {summary.failed} images could not be read:\n  " + "\n  ".join(lines), sys.stderr)
