"""Predictions for any number of images, as files in a folder; an interrupted call is resumed by the same call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy  # type: ignore[attr-defined]  # exported, not declared

from dino_lightning.console import say
from dino_lightning.data.loading import default_workers
from dino_lightning.detections import check_score_threshold
from dino_lightning.errors import UsageError
from dino_lightning.files import locked, sha256_of
from dino_lightning.inference.detector import load_module
from dino_lightning.inference.image_list import ListedImage, list_images
from dino_lightning.inference.loop import predict_images
from dino_lightning.inference.pictures import missing_pictures, overlay_paths
from dino_lightning.inference.results import (
    LOCK,
    Summary,
    finished,
    in_the_way,
    other_images,
    prepare,
    settings_differ,
    write_results,
)
from dino_lightning.inference.views import Views
from dino_lightning.training.module import DINOModule
from dino_lightning.training.precision import default_precision

LONGEST_WAIT = timedelta(days=7)  # of one process for another
BATCH_SIZE_ON_GPU = 4


@dataclass(frozen=True)
class PredictOptions:
    """How to predict.

    Attributes:
        images: files, folders, globs, or one COCO file.
        output: folder for the results.
        image_folder: what the file names of a COCO file are relative to; looked for near it when None.
        overwrite: delete earlier results.
        threshold: lowest score to report; that of the model when None.
        tile: side of the tiles in pixels; None for whole images only.
        overlap: share of its side that a tile has in common with the next.
        whole_image: with tiles, look at the whole image as well.
        tta_views: in how many ways each image is seen, see `DINOModule`; as the model has it when None.
        overlays: draw the detections.
        batch_size: images in a batch on each device; by the device when None.
        num_workers: loader processes for each device; by the number of cores when None.
        accelerator: as in Lightning.
        devices: as in Lightning: a number, a list such as "0,1", or "auto".
        precision: "32-true", "bf16-mixed" or "16-mixed"; what suits the device when None.
    """

    images: Sequence[str]
    output: Path
    image_folder: Path | None = None
    overwrite: bool = False
    threshold: float | None = None
    tile: int | None = None
    overlap: float = 0.2
    whole_image: bool = True
    tta_views: int | None = None
    overlays: bool = True
    batch_size: int | None = None
    num_workers: int | None = None
    accelerator: str = "auto"
    devices: str = "auto"
    precision: str | None = None


def predict_folder(
    checkpoint: Path, options: PredictOptions, *, on_start: Callable[[], None] = lambda: None
) -> Summary | None:
    """Predict on all devices and write the results.

    Args:
        checkpoint: one of ours.
        options: images, folder and how.
        on_start: called when the folder is prepared, and earlier results are deleted where that was asked for.

    Returns:
        What came out, on the first process; None on the others.

    Raises:
        UsageError: a folder with other results, or in which another process writes; devices that are not there.
        CheckpointError: not a checkpoint of ours.
        DataError: no images.
        OSError: the folder cannot be written.
    """
    images = list_images(options.images, options.image_folder, leave_out=options.output)
    module = load_module(checkpoint)
    threshold = check_score_threshold(module.score_threshold if options.threshold is None else options.threshold)
    if options.tta_views is not None:
        module.hparams["tta_views"] = options.tta_views
    settings = {
        "model": sha256_of(checkpoint),
        "threshold": threshold,
        "tile": options.tile,
        "overlap": options.overlap if options.tile else None,
        "whole_image": options.whole_image if options.tile else None,
        "tta_views": module.hparams["tta_views"],
        "overlays": options.overlays,
        "precision": options.precision or default_precision(options.accelerator),
    }
    fabric = _fabric(options, settings["precision"])
    with ExitStack() as held:
        refusal = _begin(options, held, settings, images) if fabric.is_global_zero else None
        refusal = fabric.broadcast(refusal)  # the other processes need it as well
        if refusal and fabric.is_global_zero:
            raise UsageError(refusal)
        if refusal:
            return None
        on_start()
        module = module.to(fabric.device)
        start = time.perf_counter()
        done_now = _predict_share(options, fabric, module, images, threshold)
        fabric.barrier("predicted")
        if not fabric.is_global_zero:
            return None
        summary = write_results(options.output, images, _categories(module))
        summary.threshold, summary.done_now, summary.seconds = threshold, done_now, time.perf_counter() - start
        return summary


def _begin(
    options: PredictOptions, held: ExitStack, settings: Mapping[str, Any], images: Sequence[ListedImage]
) -> str | None:
    """Lock the folder until `held` is closed and prepare it; or why that cannot be."""
    if not held.enter_context(locked(options.output / LOCK)):
        return f"{options.output}: another predict writes there now; wait for its end, or give another --output."
    blocked = in_the_way(options.output, options.images, overwrite=options.overwrite)
    if blocked:
        return blocked
    if not options.overwrite:
        advice = "give another --output, or --overwrite to start again."
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
    if options.overlays:
        moved = missing_pictures(options.output, images, overlay_paths(options.output, images))
        for path in (path for path in moved.values() if path is not None):
            path.unlink(missing_ok=True)
    return None


def _fabric(options: PredictOptions, precision: str) -> Fabric:
    """Lightning's processes and devices; with several, this starts the others."""
    arguments: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": int(options.devices) if options.devices.lstrip("-").isdigit() else options.devices,
        "precision": precision,
    }
    try:
        fabric = Fabric(**arguments)
        if fabric.world_size > 1:
            fabric = Fabric(**arguments, strategy=DDPStrategy(timeout=LONGEST_WAIT))
    except (ValueError, TypeError, RuntimeError) as error:  # devices that are not there, or no words for any
        raise UsageError(" ".join(str(error).split())) from error
    fabric.launch()
    return fabric


def _predict_share(
    options: PredictOptions, fabric: Fabric, module: DINOModule, images: Sequence[ListedImage], threshold: float
) -> int:
    """Predict this process's share of what is left; returns how many images all processes have left."""
    by_name = {image.name: image for image in images}
    pictures = overlay_paths(options.output, images) if options.overlays else {}
    done = {name for name, place in finished(options.output, images).items() if not place.failed}
    done -= missing_pictures(options.output, images, pictures).keys()
    # shares of all images, not of what is left, on which another process may be at work already
    share = list(by_name.values())[fabric.global_rank :: fabric.world_size]
    left = [image for image in share if image.name not in done]
    if fabric.is_global_zero and len(left) < len(share):
        say(f"Resuming: {len(by_name.keys() & done)} of {len(by_name)} images are finished already.")
    views = Views(
        images=left,
        transform=module.eval_transform(),
        tile=options.tile,
        overlap=options.overlap,
        whole_image=options.whole_image,
        keep_images=options.overlays,
    )
    workers = options.num_workers
    predict_images(
        module,
        views,
        fabric,
        folder=options.output,
        threshold=threshold,
        batch_size=options.batch_size or (BATCH_SIZE_ON_GPU if fabric.device.type == "cuda" else 1),
        num_workers=default_workers(len(left), fabric.world_size) if workers is None else min(workers, len(left)),
        overlays=pictures,
    )
    return len(by_name.keys() - done)


def _categories(module: DINOModule) -> dict[int, str]:
    names = module.hparams["class_names"] or [str(label) for label in range(module.hparams["num_classes"])]
    return dict(zip(module.hparams["category_ids"] or range(len(names)), names, strict=True))
