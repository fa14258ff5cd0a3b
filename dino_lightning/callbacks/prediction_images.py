"""Pictures of the first validation images with their detections, each epoch, as a file and in loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dino_lightning.detections import Detections
from dino_lightning.files import save_figure
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule
from dino_lightning.visualization.panels import Panel, draw_panels


class PredictionImages(lightning.Callback):
    """Keeps one picture up to date: the first images of the validation set, their detections and their true boxes.

    Args:
        path: the PNG file to write.
        num_images: how many images to show.
    """

    def __init__(self, *, path: str, num_images: int = 6) -> None:
        self.path = Path(path)
        self.num_images = num_images
        self._seen: list[tuple[Batch, int, Detections]] = []

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember the first images, on the process that draws."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        for index in range(min(len(batch), self.num_images - len(self._seen))):
            self._seen.append((batch.to("cpu"), index, outputs["detections"][index]))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw."""
        if not self._seen or not trainer.is_global_zero or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DINOModule)
        threshold = pl_module.score_threshold
        panels = [_panel(batch, index, found.above(threshold)) for batch, index, found in self._seen]
        self._seen = []
        heading = (
            f"Epoch {trainer.current_epoch + 1}: detections with a score of at least {threshold:.2f}; "
            "true boxes dashed green"
        )
        figure = draw_panels(panels, heading)
        save_figure(figure, self.path)
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        rgba: Any = canvas.buffer_rgba()  # type: ignore[no-untyped-call]  # matplotlib has no types here
        for logger in trainer.loggers:
            _log(logger, "val/detections", np.asarray(rgba)[..., :3], trainer.global_step)


def _log(logger: Logger, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
    """Give a picture to a logger that takes any: each of them has another name for it."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, pixels, f"{name}/{step:07d}.png")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(pixels, name=name, step=step)
    elif hasattr(logger, "log_image"):  # Weights & Biases, and those that follow it
        logger.log_image(key=name, images=[pixels], step=step)


def _panel(batch: Batch, index: int, detections: Detections) -> Panel:
    height, width = batch.image_sizes[index]
    image = batch.images[index, :, :height, :width]
    if image.dtype != torch.uint8:  # already normalised by somebody else's data module: stretch it to be visible
        low, high = image.min(), image.max()
        image = ((image - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)
    original_height, original_width = batch.original_sizes[index]
    scale = np.array([width / original_width, height / original_height] * 2)
    truth = np.zeros((0, 4)) if batch.ground_truth is None else batch.ground_truth[index].boxes_xyxy
    return Panel(
        pixels=image.permute(1, 2, 0).numpy(),
        boxes_xyxy=detections.boxes_xyxy.double().numpy() * scale,
        labels=detections.labels.tolist(),
        captions=[
            f"{name} {score:.2f}" for name, score in zip(detections.names, detections.scores.tolist(), strict=True)
        ],
        truth_xyxy=truth * scale,
        title=f"image {batch.image_ids[index]}",
    )
