"""The first validation images with their detections, drawn after each validation: a PNG file, and for loggers."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from dino_lightning.callbacks.run_loggers import TensorBoardIfPossible, told_if_not_written
from dino_lightning.data import CocoDataModule
from dino_lightning.data.images import read_image
from dino_lightning.detections import Detections
from dino_lightning.errors import DataError
from dino_lightning.files import save_figure
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule
from dino_lightning.visualization.panels import Panel, draw_panels, scaled_for_sheet

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Example:
    """One validated image: what the model saw and what it found.

    Attributes:
        image_id: the id in the annotation file.
        image: (3, h, w) on the host, resized for the model, without padding.
        original_size: (height, width) in pixels of the image file.
        detections: on the host, boxes in pixels of the original image.
        truth_xyxy: (M, 4) ground-truth boxes in pixels of the original image.
    """

    image_id: int
    image: Tensor
    original_size: tuple[int, int]
    detections: Detections
    truth_xyxy: npt.NDArray[np.float64]


class PredictionImages(lightning.Callback):
    """Keeps one sheet up to date: the first images of the validation set, their detections and the ground truth.

    First by their place in the annotation file, of the images that this process has seen.

    Drawn on the original image files where the Trainer has a `CocoDataModule`, and on the model's resized input
    elsewhere.

    Args:
        path: the PNG file to write.
        num_images: how many images to show.
    """

    def __init__(self, *, path: str, num_images: int = 6) -> None:
        self.path = Path(path)
        self.num_images = num_images
        self._examples: list[tuple[int, _Example]] = []  # and its place, in the file or as it came
        self._places: dict[int, int] | None = None  # of the images by id, during a validation
        self._seen = 0
        self._originals: dict[int, Pixels] = {}  # by image id, scaled for the sheet: they are the same each time

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images and their detections, on the process that draws."""
        if not trainer.is_global_zero or trainer.sanity_checking or dataloader_idx > 0:
            return
        if self._places is None:
            self._places = _places(trainer)
        for index in range(len(batch)):
            place = self._places.get(batch.image_ids[index], self._seen)
            self._seen += 1
            if len(self._examples) < self.num_images or any(place < last for last, _ in self._examples[-1:]):
                self._examples.append((place, _example(batch, index, outputs["detections"][index].cpu())))
                self._examples = sorted(self._examples, key=itemgetter(0))[: self.num_images]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the sheet, write the file, and give it to loggers that take images; not in a `fast_dev_run`."""
        unwanted = trainer.sanity_checking or getattr(trainer, "fast_dev_run", False)
        if not self._examples or not trainer.is_global_zero or unwanted:
            return
        assert isinstance(pl_module, DINOModule)
        threshold = pl_module.score_threshold
        examples = [example for _, example in self._examples]
        self._examples, self._places, self._seen = [], None, 0
        files = _image_files(trainer, {example.image_id for example in examples})
        panels = [self._panel(example, files.get(example.image_id), threshold) for example in examples]
        heading = (
            f"Epoch {trainer.current_epoch + 1}: detections with a score of at least {threshold:.3f}; "
            "ground truth dashed green"
        )
        figure = draw_panels(panels, heading)
        with told_if_not_written(self.path):
            save_figure(figure, self.path)
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        rgba: Any = canvas.buffer_rgba()  # type: ignore[no-untyped-call]  # matplotlib has no types here
        for logger in trainer.loggers:
            _log(logger, "val/detections", np.asarray(rgba)[..., :3], trainer.global_step)

    def _panel(self, example: _Example, file: tuple[str, Path] | None, threshold: float) -> Panel:
        """The panel of an image; `file` is its name in the annotations and its path, if they are known."""
        pixels = self._originals.get(example.image_id)
        if pixels is None and file is not None:
            pixels = self._originals[example.image_id] = _original(file[1], example.image)
        if pixels is None:
            pixels = _visible(example.image)
        height, width = example.original_size
        scale = np.array([pixels.shape[1] / width, pixels.shape[0] / height] * 2)
        found = example.detections.above(threshold).within(example.original_size)
        return Panel(
            pixels=pixels,
            boxes_xyxy=found.boxes_xyxy.double().numpy() * scale,
            labels=found.labels.tolist(),
            captions=[f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True)],
            truth_xyxy=example.truth_xyxy * scale,
            title=f"image {example.image_id}" if file is None else file[0],
        )


def _example(batch: Batch, index: int, detections: Detections) -> _Example:
    height, width = batch.image_sizes[index]
    return _Example(
        image_id=batch.image_ids[index],
        image=batch.images[index, :, :height, :width].cpu().clone(),  # a view would keep the whole batch
        original_size=batch.original_sizes[index],
        detections=detections,
        truth_xyxy=np.zeros((0, 4)) if batch.ground_truth is None else batch.ground_truth[index].boxes_xyxy,
    )


def _places(trainer: lightning.Trainer) -> dict[int, int]:
    """By image id: the place in the annotation file; empty for a data module of another kind."""
    data = getattr(trainer, "datamodule", None)
    images = data.val_set.annotations.images if isinstance(data, CocoDataModule) else ()
    return {image.id: place for place, image in enumerate(images)}


def _image_files(trainer: lightning.Trainer, image_ids: set[int]) -> dict[int, tuple[str, Path]]:
    """By image id: the file name in the annotations, and the path; empty for a data module of another kind."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, CocoDataModule):
        return {}
    annotations = data.val_set.annotations
    return {
        image.id: (image.file_name, annotations.image_path(index))
        for index, image in enumerate(annotations.images)
        if image.id in image_ids
    }


def _original(path: Path, resized: Tensor) -> Pixels:
    """An image file, scaled for the sheet; the model's input where the file cannot be read (any more)."""
    try:
        return scaled_for_sheet(read_image(path).permute(1, 2, 0).numpy())
    except DataError:
        return _visible(resized)


def _visible(image: Tensor) -> Pixels:
    """(3, h, w) of any type -> (h, w, 3) uint8; an image that another data module has normalised is stretched."""
    if image.dtype != torch.uint8:
        low, high = image.min(), image.max()
        image = ((image - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)
    pixels: Pixels = image.permute(1, 2, 0).numpy()
    return pixels


def _log(logger: Logger, name: str, pixels: Pixels, step: int) -> None:
    """Give an image to a logger that takes any: each of them has another method for it."""
    if isinstance(logger, TensorBoardIfPossible):
        logger.log_picture(name, pixels, step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, pixels, f"{name}/{step:07d}.png")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(pixels, name=name, step=step)
    elif hasattr(logger, "log_image"):  # Weights & Biases, and those that follow it
        logger.log_image(key=name, images=[pixels], step=step)
