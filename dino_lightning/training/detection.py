"""From an image to its detections, by the settings of a trained model; plain functions that need no Lightning.

`DINOModule.detect` and `inference.plain_model.PlainModel`, which serves a model without Lightning, both call them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dino_lightning.data.images import ImageLike, to_pixels
from dino_lightning.data.sizes import Canvas
from dino_lightning.data.transforms import LabelledImage, Transform, eval_transform
from dino_lightning.detections import Detections
from dino_lightning.model import postprocess
from dino_lightning.structures import Batch, ModelOutput
from dino_lightning.training.test_time_augmentation import detect_in_views

FROM_DATA = ("class_names", "category_ids", "image_size", "max_size", "stretch_to")


def take_from_data(settings: MutableMapping[str, Any], data: Any) -> None:
    """Give the settings that are None the values of the data module that a model is trained on.

    Args:
        settings: hyperparameters of a `DINOModule`, changed in place.
        data: a `CocoDataModule`; another counts for what it has of that.

    Raises:
        ValueError: the data has another number of classes.
    """
    count = getattr(data, "num_classes", None)
    if count is not None and count != settings["num_classes"]:
        raise ValueError(
            f"The model has num_classes={settings['num_classes']}, the data {count} classes; "
            "make the model with num_classes=data.num_classes."
        )
    for name in FROM_DATA:
        if settings[name] is None and getattr(data, name, None) is not None:
            settings[name] = getattr(data, name)


def transform_of(settings: Mapping[str, Any], image_size: int | None = None, max_size: int | None = None) -> Transform:
    """The transform that resizes images for the detector.

    Args:
        settings: hyperparameters of a `DINOModule`.
        image_size: short side in pixels; by default that of training.
        max_size: limit of the long side in pixels.
    """
    stretch_to = settings["stretch_to"] if image_size is None and max_size is None else None
    return eval_transform(
        image_size or settings["image_size"] or 800,
        max_size or settings["max_size"] or 1333,
        None if stretch_to is None else Canvas(stretch_to, "stretch"),
    )


def detections_of(output: ModelOutput, batch: Batch, settings: Mapping[str, Any]) -> list[Detections]:
    """The detections of a batch, in pixels of the original images, whose edges boxes may pass."""
    return postprocess(
        output,
        batch.original_sizes,
        max_detections=settings["max_detections"],
        nms_iou_threshold=settings["nms_iou_threshold"],
        class_names=settings["class_names"] or (),
        category_ids=settings["category_ids"] or (),
    )


def detections_of_views(
    model: Callable[[Batch], ModelOutput],
    batch: Batch,
    settings: Mapping[str, Any],
    views: int,
    output: ModelOutput | None = None,
) -> list[Detections]:
    """The detections of a batch whose images are seen in several ways, see `test_time_augmentation`.

    Args:
        model: in evaluation mode.
        batch: the images.
        settings: hyperparameters of a `DINOModule`.
        views: how many ways, some of them in one batch; of 1, detections are those of `detections_of`.
        output: of the model for the batch as it is, where that is there already.

    Raises:
        ValueError: a number of views that there is not.
    """
    if views == 1:
        return detections_of(model(batch) if output is None else output, batch, settings)
    return detect_in_views(
        lambda seen: detections_of(model(seen), seen, settings),
        batch,
        views,
        first=None if output is None else detections_of(output, batch, settings),
        max_detections=settings["max_detections"],
        nms_iou_threshold=settings["nms_iou_threshold"],
    )


def on_host(detections: Sequence[Detections], image_ids: Sequence[int]) -> list[Detections]:
    """The detections of a batch on the host, each with the id of its image."""
    return [replace(found.cpu(), image_id=image_id) for found, image_id in zip(detections, image_ids, strict=True)]


def detect_in(
    image: ImageLike,
    detect: Callable[[Batch], list[Detections]],
    transform: Transform,
    device: torch.device,
    threshold: float,
) -> Detections:
    """The detections of one image, on the host, boxes in its own pixels and clipped to it.

    Args:
        image: a path, a PIL image, an (H, W, 3) or (H, W) uint8 array, or a (3, H, W) tensor, uint8 or floating 0-1.
        detect: the model in evaluation mode.
        transform: of `transform_of`.
        device: where the model computes.
        threshold: keep detections of at least this score.

    Raises:
        ValueError: an image that cannot be read.
    """
    pixels = to_pixels(image)
    resized = transform(LabelledImage(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))).image
    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    batch = Batch.from_images([resized], original_sizes=[size])
    return detect(batch.to(device))[0].cpu().above(threshold).within(size)
