"""The evaluation of a detector in Lightning: its steps, its metrics, and detection in single images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn

from dino_lightning.data.images import ImageLike
from dino_lightning.data.transforms import Transform
from dino_lightning.detections import Detections, check_score_threshold
from dino_lightning.losses import Criterion
from dino_lightning.metrics import ClassResult, CocoMetric, Evaluation
from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from dino_lightning.training.detection import detect_in, detections_of, detections_of_views, on_host, transform_of
from dino_lightning.training.evaluation_loss import EvaluationLoss, of_loader, summed_loss
from dino_lightning.weights.stored import DEFAULT_THRESHOLD


class EvaluatedModule(lightning.LightningModule):
    """What `DINOModule` does beside training. It sets model and criterion, and has the hyperparameters.

    Attributes:
        model: the detector.
        criterion: the loss of its training.
        metric: of the first loader.
        class_results: of the last evaluation.
        evaluation: the last one, on the first process.
        score_threshold: the best-F1 point once a validation has found it.
    """

    model: DINO
    criterion: Criterion

    def __init__(self) -> None:
        super().__init__()
        self.metric = CocoMetric()
        self._further_metrics: dict[int, CocoMetric] = {}  # of further loaders, by their number
        self.class_results: list[ClassResult] = []
        self.evaluation: Evaluation | None = None
        self.score_threshold = DEFAULT_THRESHOLD
        self._evaluation_losses: defaultdict[int, EvaluationLoss] = defaultdict(EvaluationLoss)  # by loader

    def forward(self, batch: Batch) -> list[Detections]:
        """The detections of a batch as it is, in pixels of the original images, whose edges boxes may pass."""
        return detections_of(self.model(batch), batch, self.hparams)

    def detect_batch(self, batch: Batch, *, tta_views: int | None = None) -> list[Detections]:
        """The same with test-time augmentation, of `tta_views` ways to see an image; by default the module's."""
        views = self.hparams["tta_views"] if tta_views is None else tta_views
        if views == 1:
            found: list[Detections] = self(batch)
            return found
        return detections_of_views(self.model, batch, self.hparams, views)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Detect objects, update the metric, and return the batch's `detections` for callbacks.

        Of several loaders, the first has the metrics' plain names and decides on the threshold; those of a further one
        end in `/dataloader_idx_1` and so on.
        """
        return self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """The same as `validation_step`, for the test split."""
        return self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Detections]:
        """The detections of a batch, on the host, boxes clipped to their images, each with the id of its image."""
        found = on_host(self.detect_batch(batch), batch.image_ids)
        return [each.within(size) for each, size in zip(found, batch.original_sizes, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Log COCO's average precision and the best-threshold F1; in training, keep that threshold.

        `validate` does not move it: the threshold is the model's, whatever it is evaluated on.
        """
        results = self._log_metrics("val", len(self.trainer.num_val_batches))
        if self.trainer.sanity_checking:
            self.evaluation, self.class_results = None, []  # they are of a few images
        elif self.trainer.state.fn == TrainerFn.FITTING and results["F1"] > 0:
            self.score_threshold = results["F1_threshold"]

    def on_test_epoch_end(self) -> None:
        """Log the same metrics for the test split."""
        self._log_metrics("test", len(self.trainer.num_test_batches))

    def _evaluate(self, batch: Batch, loader: int) -> dict[str, Any]:
        output = self.model(batch)
        if batch.targets is not None:
            loss = summed_loss(self.criterion, output, batch)
            self._evaluation_losses[loader].add(batch.image_ids, loss, sum(batch.targets.num_boxes))
        training = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        views = 1 if training else self.hparams["tta_views"]  # not while training, where it would take much of the time
        found = detections_of_views(self.model, batch, self.hparams, views, output)
        detections = on_host(found, batch.image_ids)
        if batch.ground_truth is None:
            raise ValueError("The batch has no ground_truth; evaluation needs it.")
        self._metric_of(loader).update(detections, batch.ground_truth, batch.image_ids)
        return {"detections": detections}

    def _metric_of(self, loader: int) -> CocoMetric:
        return self.metric if loader == 0 else self._further_metrics.setdefault(loader, CocoMetric())

    def _log_metrics(self, stage: str, loaders: int) -> dict[str, float]:
        """Log the metrics of all loaders, each computed on all processes; gives those of the first."""
        shown = {f"{stage}/AP", f"{stage}/F1"}
        first: dict[str, float] = {}
        for loader in range(loaders):
            loss = self._evaluation_losses[loader].compute()
            if loss is not None:
                self.log(f"{stage}/loss{of_loader(loader)}", loss, sync_dist=True, add_dataloader_idx=False)
            metric = self._metric_of(loader)
            results = metric.compute()
            if loader == 0:
                first, self.class_results, self.evaluation = results, metric.per_class(), metric.evaluated()
            metric.reset()
            for name, value in results.items():
                name = f"{stage}/{name}{of_loader(loader)}"
                # the ranks agree already; without sync_dist Lightning would warn about each name
                self.log(name, value, prog_bar=name in shown, sync_dist=True, add_dataloader_idx=False)
        return first

    def eval_transform(self, image_size: int | None = None, max_size: int | None = None) -> Transform:
        """The transform that resizes images for the detector; without sizes, as in training."""
        return transform_of(self.hparams, image_size, max_size)

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
        """Detect objects in images of any kind and size, one at a time.

        Args:
            images: paths, PIL images, (H, W, 3) or (H, W) uint8 arrays, or (3, H, W) tensors, uint8 or floating 0-1.
            threshold: keep detections of at least this score; by default that of the best F1 in validation.
            image_size: short side in pixels to resize to; by default that of training.
            max_size: limit of the long side in pixels.
            tta_views: in how many ways each image is seen, 1, 2, 4 or 8; by default as the module has it.

        Returns:
            Detections of each image, on the host, boxes in its own pixels and clipped to it, see `Detections.within`.

        Raises:
            ValueError: an image that cannot be read, a threshold that is none, or a number of views that there is not.
        """
        threshold = check_score_threshold(self.score_threshold if threshold is None else threshold)
        transform = self.eval_transform(image_size, max_size)
        was_training = self.training
        self.eval()
        try:
            detect = partial(self.detect_batch, tta_views=tta_views)
            return [detect_in(image, detect, transform, self.device, threshold) for image in images]
        finally:
            self.train(was_training)
