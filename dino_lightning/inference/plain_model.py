"""A trained detector without Lightning, for servers: as little as the weights need to run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dino_lightning.data.images import ImageLike
from dino_lightning.detections import Detections, check_score_threshold
from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from dino_lightning.training.detection import detect_in, detections_of, detections_of_views, transform_of
from dino_lightning.weights.stored import DEFAULT_THRESHOLD
from dino_lightning.weights.zoo import needed_options

# Settings that decide on detections, with the values of a `DINOModule` where an old checkpoint lacks them.
DEFAULTS: dict[str, Any] = {
    "class_names": None,
    "category_ids": None,
    "max_detections": 300,
    "nms_iou_threshold": None,
    "image_size": None,
    "max_size": None,
    "stretch_to": None,
    "tta_views": 1,
}


class PlainModel(nn.Module):
    """The detector of a checkpoint; its entries and its detections are those of the `DINOModule` that was saved.

    Args:
        **settings: hyperparameters of a checkpoint; those that only training needs are ignored.

    Attributes:
        hparams: the hyperparameters.
        model: the detector.
        score_threshold: the lowest score that counts, unless another is given.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.hparams: Mapping[str, Any] = {**DEFAULTS, **settings}
        known = inspect.signature(DINO).parameters
        sizes = {**needed_options(settings.get("weights")), **settings}
        self.model = DINO(**{name: value for name, value in sizes.items() if name in known and value is not None})
        self.score_threshold = DEFAULT_THRESHOLD

    def forward(self, batch: Batch) -> list[Detections]:
        """The detections of a batch as it is, in pixels of the original images, whose edges boxes may pass."""
        return detections_of(self.model(batch), batch, self.hparams)

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[ImageLike],
        *,
        threshold: float | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
        tta_views: int | None = None,
    ) -> list[Detections]:
        """Detect objects in images, one at a time; arguments, results and errors of `DINOModule.detect`."""
        threshold = check_score_threshold(self.score_threshold if threshold is None else threshold)
        transform = transform_of(self.hparams, image_size, max_size)
        device = next(self.parameters()).device
        views = self.hparams["tta_views"] if tta_views is None else tta_views

        def detect(batch: Batch) -> list[Detections]:
            return self(batch) if views == 1 else detections_of_views(self.model, batch, self.hparams, views)

        return [detect_in(image, detect, transform, device, threshold) for image in images]
