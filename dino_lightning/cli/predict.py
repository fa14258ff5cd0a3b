"""The command `predict`: detections of any number of images, as files; interrupted, it goes on where it stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy  # type: ignore[attr-defined]  # exported, not declared

from dino_lightning.cli.arguments import CommandParser, newest_run
from dino_lightning.cli.expected_errors import EXPECTED_ERRORS, explain
from dino_lightning.console import say
from dino_lightning.data.datamodule import default_workers
from dino_lightning.errors import UsageError
from dino_lightning.files import sha256_of
from dino_lightning.inference.detector import find_model, load_module
from dino_lightning.inference.image_list import ListedImage, list_images
from dino_lightning.inference.loop import predict_images
from dino_lightning.inference.results import (
    Summary,
    finished,
    locked,
    other_images,
    overlay_paths,
    prepare,
    settings_differ,
    write_results,
)
from dino_lightning.inference.views import Views
from dino_lightning.training.module import DINOModule
from dino_lightning.training.precision import default_precision

LONGEST_WAIT = timedelta(days=7)  # of one process for another
INTERRUPTED = 130  # exit code, as of a shell

DESCRIPTION = """Detect objects in images, and write what was found into a folder:

  predictions.json    COCO results (image_id, category_id, bbox, score) with the original ids
  predictions.csv     one row for each detection
  images.json         id, file name, size and number of detections of each image; why one could not be read
  predictions.jsonl   one line for each image; what an interrupted run goes on from
  overlays/           the images with their detections

Interrupted, the same command goes on where it stopped, with images that were added or changed since as well; other
images need another --output. An image that cannot be read does not stop the others: it is reported, and tried again by
the next run of the same command. Exit code: 0, 1 if images could not be read or nothing could be done, 2 for an option
that does not exist, 130 when interrupted.
"""


def run(args: Sequence[str]) -> int:
    """Predict; returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(args)
        _check(options)
    except (argparse.ArgumentError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return _predict(options)
    except KeyboardInterrupt:
        print(f"\nInterrupted; {_how_to_go_on(options)}.", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED_ERRORS as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(
            f"error: the GPU's memory is full; lower --batch_size. What is finished is kept: {_how_to_go_on(options)}.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"error: {options.output}: cannot be written ({error.strerror or error}).", file=sys.stderr)
        return 1


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.began_anew:
        return "to go on from here, repeat it without --overwrite"
    return "the same command goes on from here"


def _parser() -> CommandParser:
    parser = CommandParser(
        "predict",
        DESCRIPTION,
        epilog="Example: python -m dino_lightning predict --ckpt_path runs/.../best.ckpt --images plans scans/*.tif",
    )
    add = parser.add_argument
    add(
        "--ckpt_path",
        required=True,
        help="a checkpoint, the folder of a run or of a model, or 'last': the best of the newest run",
    )
    add("--images", required=True, nargs="+", help="files, folders, globs; or one COCO file, for its ids")
    add("--image_folder", type=Path, help="what the names in a COCO file are relative to (looked for near it)")
    add("--output", type=Path, default=Path("predictions"), help="folder for the results (predictions)")
    add("--overwrite", action="store_true", help="start anew, whatever results the folder holds")
    add("--threshold", type=float, help="lowest score to report (that of the best F1, stored in the checkpoint)")
    add("--tile", type=int, help="cut images into tiles of so many pixels, for scans much larger than in training")
    add("--overlap", type=float, default=0.2, help="share of its side that a tile shares with the next (0.2)")
    add("--whole_image", type=_boolean, default=True, help="with tiles: look at the whole image too (true)")
    add("--overlays", type=_boolean, default=True, help="draw pictures (true)")
    add("--batch_size", type=int, help="images in a batch, on each device (4 on a GPU, else 1)")
    add("--num_workers", type=int, help="processes that read images, for each device (by cores)")
    add("--trainer.accelerator", dest="accelerator", default="auto", help="auto, gpu, cpu, mps")
    add("--trainer.devices", dest="devices", default="auto", help="how many, or which: 2, or 0,1 (auto: all GPUs)")
    add("--trainer.precision", dest="precision", help="32-true, bf16-mixed or 16-mixed (by the device)")
    parser.set_defaults(began_anew=False)  # until earlier results were deleted
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _check(options: argparse.Namespace) -> None:
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold is {options.threshold}; it must lie between 0 and 1.")
    if options.tile is not None and options.tile < 32:
        raise UsageError(f"--tile is {options.tile}; it must be at least 32 pixels.")
    if not 0 <= options.overlap <= 0.9:
        raise UsageError(f"--overlap is {options.overlap}; it must lie between 0 and 0.9.")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch_size is {options.batch_size}; it must be at least 1.")
    if options.num_workers is not None and options.num_workers < 0:
        raise UsageError(f"--num_workers is {options.num_workers}; it must not be negative.")
    if options.precision not in (None, "32-true", "bf16-mixed", "16-mixed"):
        raise UsageError(f"--trainer.precision is {options.precision}; choose 32-true, bf16-mixed or 16-mixed.")


def _predict(options: argparse.Namespace) -> int:
    images = list_images(options.images, options.image_folder, leave_out=options.output)
    checkpoint = find_model(newest_run() if options.ckpt_path == "last" else options.ckpt_path)
    if checkpoint.suffix.lower() == ".onnx":
        raise UsageError(f"{checkpoint}: predict takes a checkpoint; use an ONNX file by load_detector in Python.")
    module = load_module(checkpoint)
    threshold = module.score_threshold if options.threshold is None else options.threshold
    settings = {
        "model": sha256_of(checkpoint),
        "threshold": threshold,
        "tile": options.tile,
        "overlap": options.overlap if options.tile else None,
        "whole_image": options.whole_image if options.tile else None,
        "overlays": options.overlays,
    }
    fabric = _fabric(options)
    with ExitStack() as held:
        refusal = _begin(options, held, settings, images) if fabric.is_global_zero else None
        refusal = fabric.broadcast(refusal)  # for which the others wait
        if refusal and fabric.is_global_zero:
            raise UsageError(refusal)
        if refusal:
            return 0
        options.began_anew = options.overwrite
        _predict_share(options, fabric, module.to(fabric.device), images, threshold)
        fabric.barrier("predicted")
        if not fabric.is_global_zero:
            return 0
        summary = write_results(options.output, images, _categories(module))
    _report(options.output, summary, threshold)
    return 1 if summary.failed else 0


def _begin(
    options: argparse.Namespace, held: ExitStack, settings: Mapping[str, Any], images: Sequence[ListedImage]
) -> str | None:
    """Lock the folder until `held` is closed and prepare it; or why that cannot be."""
    if not held.enter_context(locked(options.output)):
        return f"{options.output}: another predict writes there now; wait for its end, or give another --output."
    if not options.overwrite:
        advice = "give another --output, or --overwrite to start anew."
        different = settings_differ(options.output, settings)
        if different:
            return f"{options.output} holds results with other settings ({', '.join(different)}); {advice}"
        others = other_images(options.output, images)
        if others:
            return (
                f"{options.output} holds results of {len(others)} images that are not asked for now ({others[0]!r}"
                f"{', ...' if len(others) > 1 else ''}); {advice}"
            )
    prepare(options.output, settings, overwrite=options.overwrite)
    return None


def _fabric(options: argparse.Namespace) -> Fabric:
    """Lightning's processes and devices; with several, this starts the others."""
    arguments: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": int(options.devices) if options.devices.lstrip("-").isdigit() else options.devices,
        "precision": options.precision or default_precision(options.accelerator),
    }
    try:
        fabric = Fabric(**arguments)
        if fabric.world_size > 1:
            fabric = Fabric(**arguments, strategy=DDPStrategy(timeout=LONGEST_WAIT))
    except (ValueError, TypeError) as error:  # devices that are not there, or no words for any
        raise UsageError(" ".join(str(error).split())) from error
    fabric.launch()
    return fabric


def _predict_share(
    options: argparse.Namespace, fabric: Fabric, module: DINOModule, images: Sequence[ListedImage], threshold: float
) -> None:
    """Predict this process's share of what is left."""
    by_name = {image.name: image for image in images}
    done = {name for name, place in finished(options.output, images).items() if not place.failed}
    # shares of all images, not of what is left, on which another process may be at work already
    share = list(by_name.values())[fabric.global_rank :: fabric.world_size]
    left = [image for image in share if image.name not in done]
    if fabric.is_global_zero and len(left) < len(share):
        say(f"Going on: {len(by_name.keys() & done)} of {len(by_name)} images are finished already.")
    views = Views(
        images=left,
        transform=module.eval_transform(),
        tile=options.tile,
        overlap=options.overlap,
        whole_image=options.whole_image,
    )
    workers = options.num_workers
    predict_images(
        module,
        views,
        fabric,
        folder=options.output,
        threshold=threshold,
        batch_size=options.batch_size or (4 if fabric.device.type == "cuda" else 1),
        num_workers=default_workers(len(left), fabric.world_size) if workers is None else min(workers, len(left)),
        overlays=overlay_paths(options.output, images) if options.overlays else {},
    )


def _categories(module: DINOModule) -> dict[int, str]:
    names = module.hparams["class_names"] or [str(label) for label in range(module.hparams["num_classes"])]
    return dict(zip(module.hparams["category_ids"] or range(len(names)), names, strict=True))


def _report(folder: Path, summary: Summary, threshold: float) -> None:
    say(f"{summary.images:,} images: {summary.detections:,} detections with a score of at least {threshold:.2f}")
    if summary.other_size:
        say(
            f"warning: {summary.other_size} images have another size than the COCO file says: its boxes and the "
            "results do not fit each other."
        )
    say("\n".join(str(folder / name) for name in ("predictions.json", "predictions.csv", "images.json")))
    if (folder / "overlays").is_dir():
        say(str(folder / "overlays"))
    if summary.failed:
        more = summary.failed - len(summary.failures)
        lines = [*summary.failures, *([f"... and {more} more, in {folder / 'images.json'}"] if more else [])]
        say(f"error: {summary.failed} images could not be read:\n  " + "\n  ".join(lines), sys.stderr)
