"""The LightningModule around detector, criterion and metric."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dino_lightning.data.images import ImageLike, to_pixels
from dino_lightning.data.sampling import derive_seed
from dino_lightning.data.transforms import Canvas, LabelledImage, Transform, eval_transform
from dino_lightning.detections import Detections
from dino_lightning.errors import NonFiniteError
from dino_lightning.losses import Criterion, HungarianMatcher, mean_num_boxes
from dino_lightning.losses.class_losses import ClassLoss
from dino_lightning.losses.matcher import MatchingCost
from dino_lightning.metrics import ClassResult, CocoMetric, Evaluation
from dino_lightning.model import DINO, postprocess
from dino_lightning.model.postprocess import check_nms_iou_threshold
from dino_lightning.structures import Batch
from dino_lightning.training.initial_weights import rate_factor, start
from dino_lightning.training.non_finite import NonFiniteSteps
from dino_lightning.training.optim import (
    AccumulatedBoxes,
    GroupRule,
    RateSchedule,
    drop_epochs,
    freeze_parts,
    parameter_groups,
)
from dino_lightning.training.recipe import RecipeName, choose_recipe, planned_steps
from dino_lightning.training.resume import check_same_architecture, check_same_optimizer, resume_from_raw_weights
from dino_lightning.training.step_metrics import StepMetrics
from dino_lightning.weights.zoo import needed_options


class DINOModule(lightning.LightningModule):
    """DINO as a LightningModule: the published recipe by default.

    Every constructor argument of `DINO` is an argument here too. Class names, category ids and image sizes that are
    not given are taken from the Trainer's data module.

    Args:
        num_classes: K, classes with contiguous labels 0..K-1.
        class_names: the name of each label.
        category_ids: the original COCO category id of each label.
        weights: initial weights: a name that `python -m dino_lightning weights` lists, which is fetched if need be and
            sets the sizes of the detector that are not given; or a file or URL (https:// or s3://, with #sha256=... at
            the end to verify it) of a DINO checkpoint, published or ours, of detrex or mmdetection, or of a backbone
            alone; or for the backbone the name of torchvision weights, or `pretrained` for the best that torchvision or
            timm has. Class heads are matched by name.
        class_map: for classes that the weights do not have, a class of theirs to start from: {door: chair}.
        weights_for_rooms: as `weights`, which win over it, for datasets that have a class of rooms; null to leave it
            out. Rooms of any kind start from the class `room` of those weights.
        rooms_lr_factor: what all learning rates are multiplied by where a run starts from `weights_for_rooms`, which
            high rates would undo.
        backbone_weights: the same for the backbone alone; null for random ones. Not used with `weights` or when
            resuming.
        lr: learning rate of everything outside the backbone.
        backbone_lr: learning rate of the backbone.
        backbone_layer_decay: layer-wise decay: the factor between the learning rates of a backbone stage and the next.
        weight_decay: AdamW's decoupled weight decay.
        group_rule: how parameters are grouped, see `dino_lightning.training.optim.parameter_groups`.
        recipe: what decides the options below that are not given. `published`: the settings of the paper's long runs;
            `short`: what learns faster from few images, see `dino_lightning.training.recipe`; `auto`: `short` for
            fewer than 10,000 optimizer steps.
        clip_grad_norm: total gradient norm to clip to, 0 for no clipping; the Trainer's own setting wins. By the
            recipe: 0.1 as published, 1 in short runs.
        max_non_finite_steps: how many steps in a row may be skipped because their predictions or gradients are not
            finite, before training stops.
        warmup_steps: number of optimizer steps of linear learning-rate warm-up; 0 as published, a twentieth of a short
            run.
        lr_schedule: `step` drops the learning rate at given epochs, `cosine` takes it to 0 along half a cosine.
        lr_drop_epochs: epochs after which the learning rate drops; by default one, after 11/12 of the epochs, in short
            runs after 4/5.
        lr_drop_factor: the factor of each drop.
        class_loss: the loss of the class scores. `focal` is the published one, short runs have `quality_focal`; it and
            `varifocal`, `ia_bce`, `position_supervised` and `matchability` have targets that follow the IoU of the box,
            and learn faster from few images and classes, see `dino_lightning.losses.class_losses`.
        class_loss_weight: weight of the class loss in the sum; 1 as published, 2 in short runs.
        matching_cost: what decides which query shall find which box. `published`, or Stable-DINO's
            `position_modulated`, see `dino_lightning.losses.HungarianMatcher`.
        box_noise_scale: how far corners of denoising boxes move, in half box sizes; 1 as published, 0.4 in short runs.
        freeze: parts of the detector that are not trained, such as `backbone`; they stay in evaluation mode.
        compile: compile the layers of encoder and decoder, which takes minutes at the start and again for new batch
            shapes, until the compiler uses dynamic ones; best with the data's `fixed_size`. Needs a C compiler.
        max_detections: detections kept for each image.
        nms_iou_threshold: non-maximum suppression: of detections whose boxes overlap by more than this IoU, whatever
            their classes, the best is kept; null for none, as published. A detector that has seen few images finds
            objects twice, see benchmarks/RESULTS.md.
        image_size: short side in pixels to which `detect` resizes; the data's by default.
        max_size: limit of the long side in `detect`; the data's by default.
        stretch_to: side in pixels of the square that `detect` stretches images to, or None; the data's by default.
        **detector: sizes of the detector.

    Raises:
        TypeError: an argument that neither this class nor `DINO` has.
        ValueError: an impossible size, or weights that cannot be used.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        weights: str | None = None,
        class_map: dict[str, str] | None = None,
        weights_for_rooms: str | None = None,
        rooms_lr_factor: float = 1.0,
        backbone_weights: str | None = "IMAGENET1K_V1",
        lr: float = 1e-4,
        backbone_lr: float = 1e-5,
        backbone_layer_decay: float = 1.0,
        weight_decay: float = 1e-4,
        group_rule: GroupRule = "default",
        recipe: RecipeName = "published",
        clip_grad_norm: float | None = None,
        max_non_finite_steps: int = 3,
        warmup_steps: int | None = None,
        lr_schedule: Literal["step", "cosine"] = "step",
        lr_drop_epochs: list[int] | None = None,
        lr_drop_factor: float = 0.1,
        class_loss: ClassLoss | None = None,
        class_loss_weight: float | None = None,
        matching_cost: MatchingCost = "published",
        box_noise_scale: float | None = None,
        freeze: list[str] | None = None,
        compile: bool = False,
        max_detections: int = 300,
        nms_iou_threshold: float | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
        stretch_to: int | None = None,
        **detector: Any,
    ) -> None:
        super().__init__()
        valid = inspect.signature(DINO).parameters
        unknown = [name for name in detector if name not in valid]
        if unknown:
            raise TypeError(
                f"DINOModule has no argument {', '.join(unknown)}; those of the detector are {', '.join(valid)}."
            )
        detector = {**needed_options(weights), **detector}
        check_nms_iou_threshold(nms_iou_threshold)
        self.save_hyperparameters()
        self.model = DINO(num_classes=num_classes, **detector)
        self._frozen = freeze_parts(self.model, freeze or [])
        self._follow_recipe(None)
        self.metric = CocoMetric()
        self.class_results: list[ClassResult] = []
        self.evaluation: Evaluation | None = None  # of the last validate or test, on the first process
        self.score_threshold = 0.3  # the best-F1 point once a validation has found it
        self.has_weights = False  # or will have, from the checkpoint of a resumed run
        self._noise_seed: int | None = None
        self.step_metrics = StepMetrics()
        self._shown: dict[str, float] = {}  # metrics of this step, if they are logged
        self._accumulated = AccumulatedBoxes()
        self._non_finite = NonFiniteSteps(max_non_finite_steps)

    # ------------------------------------------------------------------ set-up

    def train(self, mode: bool = True) -> DINOModule:
        """As in PyTorch, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def setup(self, stage: str) -> None:
        """Take class names and sizes from the data module; load initial weights once, unless a checkpoint follows."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self._take_from_data(data)
        if stage == "fit":
            self._follow_recipe(planned_steps(self.trainer, data))
        if stage == "fit" and not self.has_weights:
            start(self.model, self.hparams, num_images=len(getattr(data, "train_set", ())))
            self.has_weights = True

    def _follow_recipe(self, steps: int | None) -> None:
        """Settle what the recipe decides, for a run of so many steps."""
        self.recipe = choose_recipe(self.hparams["recipe"], steps).with_choices(self.hparams)
        self.model.box_noise_scale = self.recipe.box_noise_scale
        self.criterion = Criterion(
            matcher=HungarianMatcher(kind=self.hparams["matching_cost"]),
            class_loss=self.recipe.class_loss,
            weight_class=self.recipe.class_loss_weight,
        )

    def _take_from_data(self, data: Any) -> None:
        count = getattr(data, "num_classes", None)
        if count is not None and count != self.hparams["num_classes"]:
            raise ValueError(
                f"The model has num_classes={self.hparams['num_classes']}, the data {count} classes; "
                "make the model with num_classes=data.num_classes."
            )
        for name in ("class_names", "category_ids", "image_size", "max_size", "stretch_to"):
            if self.hparams[name] is None and getattr(data, name, None) is not None:
                self.hparams[name] = getattr(data, name)

    def on_fit_start(self) -> None:
        """Compile the layers if asked to; the model is on its device by now."""
        if self.hparams["compile"]:
            self.model.compile_layers()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, fused into one kernel for each group, and its learning-rate schedule."""
        optimizer = torch.optim.AdamW(self._parameter_groups(), fused=self._fused)
        schedule = RateSchedule(
            optimizer,
            warmup_steps=self.recipe.warmup_steps,
            milestones=self._milestones(),
            gamma=self.hparams["lr_drop_factor"],
            cosine_steps=1 if self.hparams["lr_schedule"] == "cosine" else None,  # set in `on_train_start`
        )
        if schedule.cosine_steps and self.trainer.max_steps < 0 and (self.trainer.max_epochs or -1) < 0:
            raise ValueError("lr_schedule=cosine ends with the training: set max_epochs or max_steps.")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _fused(self) -> bool:
        """Whether AdamW is fused; not with a gradient scaler, as it would unscale only after gradient clipping."""
        device = self.trainer.strategy.root_device  # where the module will be, when its checkpoint is read
        return device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"

    def on_train_start(self) -> None:
        """Set the noise seed and the learning rates; a resumed run has those of its current options."""
        if self._noise_seed is None:
            self._noise_seed = torch.initial_seed()
        schedule = self.lr_schedulers()
        if isinstance(schedule, RateSchedule) and schedule.cosine_steps is not None:
            # Not earlier: this makes Lightning create its loaders, which would then ignore their stored state.
            schedule.cosine_steps = int(self.trainer.estimated_stepping_batches)
        self._set_rates()  # a run resumed within an epoch has no `on_train_epoch_start`

    def on_train_epoch_start(self) -> None:
        """Set the learning rates of this epoch."""
        self._set_rates()

    def _set_rates(self) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, RateSchedule):
            schedule.at(step=self.global_step, epoch=self.current_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the noise of a step from seed, epoch, batch and rank, so that resuming needs no stored state."""
        assert self._noise_seed is not None
        torch.manual_seed(derive_seed(self._noise_seed, self.current_epoch, batch_idx, self.global_rank))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        factor = rate_factor(self.hparams)
        return parameter_groups(
            self.model,
            lr=self.hparams["lr"] * factor,
            backbone_lr=self.hparams["backbone_lr"] * factor,
            weight_decay=self.hparams["weight_decay"],
            rule=self.hparams["group_rule"],
            backbone_layer_decay=self.hparams["backbone_layer_decay"],
        )

    def _milestones(self) -> list[int]:
        given = self.hparams["lr_drop_epochs"]
        return drop_epochs(self.trainer.max_epochs, self.recipe.lr_drop_share) if given is None else list(given)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the Trainer's value if it has one, else to the recipe's, and keep the norm before clipping.

        Not with Lightning's own function, which refuses fused optimizers (Lightning 2.6). Accumulated gradients, which
        are complete and summed over ranks by now, are normalised by their number of boxes here.
        """
        parameters = list(self.model.parameters())
        if self._accumulated.batches:
            factor = self._accumulated.correction() * self.trainer.accumulate_grad_batches
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        limit = self.recipe.clip_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val or 0.0)
        elif limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        self.step_metrics.grad_norm = norm
        self._non_finite.leave_out(norm, optimizer, scaled=self.trainer.precision == "16-mixed")

    # ------------------------------------------------------------------ steps

    def forward(self, batch: Batch) -> list[Detections]:
        """The detections of a batch, in pixels of the original images."""
        return self._detections(self.model(batch), batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted loss of a batch.

        Where gradients are accumulated, every batch is weighted by its boxes, so that the step is that of one large
        batch; the logged loss of each batch is divided by its own boxes.
        """
        if batch.targets is None:
            raise ValueError("The batch has no targets; training needs them.")
        num_boxes = mean_num_boxes(batch.targets, self.device)
        output = self.model(batch)
        folder = Path(self.trainer.default_root_dir) / "non_finite"
        try:
            losses: dict[str, Tensor] = self.criterion(output, batch.targets, batch.image_ids, num_boxes=num_boxes)
        except NonFiniteError as error:
            self._non_finite.check(batch, self.global_step, folder)
            return self._non_finite.note(batch, self.global_step, error, output, folder)
        self._non_finite.check(batch, self.global_step, folder)
        self.step_metrics.take(losses, images=len(batch))
        if self.trainer.accumulate_grad_batches == 1:
            return losses["loss"]
        return losses["loss"] * self._accumulated.share(num_boxes)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Log every N steps, with one copy from the device for all metrics: each copy is a device synchronisation.

        Directly to the loggers: Lightning logs only after the callbacks have saved their checkpoints, and a run killed
        in between would lack the metrics.
        """
        super().optimizer_step(*args, **kwargs)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning, not declared
        self._shown = {}
        if every and (self.global_step + 1) % every == 0:
            self._shown = self.step_metrics.of_step()
            self._send(self._shown, self.global_step)

    def _send(self, metrics: dict[str, float], step: int) -> None:
        for logger in self.loggers if metrics else ():
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Show the logged metrics in the progress bar and to callbacks."""
        for name, value in self._shown.items():
            shown = name == "train/loss_step"
            self.log(name, value, prog_bar=shown, logger=False, on_step=True, on_epoch=False, batch_size=1)
        self._shown = {}

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch."""
        loss = self.epoch_loss
        if loss is not None:
            self._send({"train/loss_epoch": loss}, self.global_step - 1)
            self.log("train/loss_epoch", loss, logger=False, batch_size=1, sync_dist=True)
        self.step_metrics.start_epoch()

    @property
    def epoch_loss(self) -> float | None:
        """The mean training loss of the epoch so far; None before its first step. Synchronises with the device."""
        return self.step_metrics.epoch_loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Detect objects, update the metric, and return the batch's `detections` for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The same as `validation_step`, for the test split."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Detections]:
        """The detections of a batch, on the host."""
        return [detections.cpu() for detections in self(batch)]

    def on_validation_epoch_end(self) -> None:
        """Log COCO's average precision and the best-threshold F1; keep that threshold."""
        results = self._log_metric("val")
        if not self.trainer.sanity_checking and results["F1"] > 0:
            self.score_threshold = results["F1_threshold"]

    def on_test_epoch_end(self) -> None:
        """Log the same metrics for the test split."""
        self._log_metric("test")

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Any]:
        output = self.model(batch)
        if batch.targets is not None:
            try:
                loss = self.criterion(output, batch.targets, batch.image_ids)["loss"]
            except NonFiniteError:  # the score will be bad; only training has to stop
                loss = torch.full((), float("nan"), device=self.device)
            self.log(f"{stage}/loss", loss, batch_size=len(batch), on_epoch=True, sync_dist=True)
        detections = [found.cpu() for found in self._detections(output, batch)]
        if batch.ground_truth is None:
            raise ValueError("The batch has no ground_truth; evaluation needs it.")
        self.metric.update(detections, batch.ground_truth, batch.image_ids)
        return {"detections": detections}

    def _log_metric(self, stage: str) -> dict[str, float]:
        results = self.metric.compute()
        self.class_results = self.metric.per_class()
        self.evaluation = self.metric.evaluated()
        self.metric.reset()
        shown = {f"{stage}/AP", f"{stage}/F1"}
        for name, value in results.items():
            # the ranks agree already; without sync_dist Lightning would warn about each name
            self.log(f"{stage}/{name}", value, prog_bar=f"{stage}/{name}" in shown, sync_dist=True)
        return results

    def _detections(self, output: Any, batch: Batch) -> list[Detections]:
        return postprocess(
            output,
            batch.original_sizes,
            max_detections=self.hparams["max_detections"],
            nms_iou_threshold=self.hparams["nms_iou_threshold"],
            class_names=self.hparams["class_names"] or (),
            category_ids=self.hparams["category_ids"] or (),
        )

    # ------------------------------------------------------------------ checkpoints and use

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the score threshold of the best F1, the noise seed and the loss of the epoch so far."""
        checkpoint["score_threshold"] = float(self.score_threshold)
        checkpoint["noise_seed"] = self._noise_seed
        checkpoint["epoch_loss"] = self.step_metrics.of_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored, and keep `setup` from loading initial weights.

        Raises:
            CheckpointError: the checkpoint has other classes, another architecture or other parameter groups.
        """
        check_same_architecture(checkpoint.get("hyper_parameters", {}), self.hparams)
        self.score_threshold = checkpoint.get("score_threshold", self.score_threshold)
        self._noise_seed = checkpoint.get("noise_seed")
        self.step_metrics.resume_from(checkpoint.get("epoch_loss", (None, 0)), self.device)
        self.has_weights = True
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            if type(self).configure_optimizers is DINOModule.configure_optimizers:
                check_same_optimizer(checkpoint, self._parameter_groups())
                for group in checkpoint["optimizer_states"][0]["param_groups"]:
                    group["fused"] = self._fused  # by the current precision
            resume_from_raw_weights(checkpoint)

    def eval_transform(self, image_size: int | None = None, max_size: int | None = None) -> Transform:
        """The transform that resizes images for the detector; without sizes, as in training."""
        stretch_to = self.hparams["stretch_to"] if image_size is None and max_size is None else None
        return eval_transform(
            image_size or self.hparams["image_size"] or 800,
            max_size or self.hparams["max_size"] or 1333,
            None if stretch_to is None else Canvas(stretch_to, "stretch"),
        )

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[ImageLike],
        *,
        threshold: float | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
    ) -> list[Detections]:
        """Detect objects in images of any kind and size, one at a time.

        Args:
            images: paths, PIL images, (H, W, 3) or (H, W) uint8 arrays, or (3, H, W) tensors, uint8 or floating 0-1.
            threshold: keep detections of at least this score; by default that of the best F1 in validation.
            image_size: short side in pixels to resize to; by default that of training.
            max_size: limit of the long side in pixels.

        Returns:
            Detections of each image, on the host, boxes in its own pixels.

        Raises:
            ValueError: an image that cannot be read.
        """
        threshold = self.score_threshold if threshold is None else threshold
        transform = self.eval_transform(image_size, max_size)
        was_training = self.training
        self.eval()
        detections = []
        try:
            for image in images:
                pixels = to_pixels(image)
                resized = transform(LabelledImage(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))).image
                batch = Batch.from_images([resized], original_sizes=[(pixels.shape[1], pixels.shape[2])])
                detections.append(self(batch.to(self.device))[0].cpu().above(threshold))
        finally:
            self.train(was_training)
        return detections
