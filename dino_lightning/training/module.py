"""The LightningModule around detector, criterion and metric."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dino_lightning.data.sampling import derive_seed
from dino_lightning.errors import NonFiniteError
from dino_lightning.losses import mean_num_boxes
from dino_lightning.losses.assignment import Solver
from dino_lightning.losses.class_losses import ClassLoss
from dino_lightning.losses.matcher import MatchingCost
from dino_lightning.model import DINO
from dino_lightning.model.postprocess import check_nms_iou_threshold
from dino_lightning.structures import Batch
from dino_lightning.training.compilation import Compilation, CompileOption, has_one_size
from dino_lightning.training.detection import take_from_data
from dino_lightning.training.freed_memory import keep_freed_memory
from dino_lightning.training.initial_weights import start, take_addresses
from dino_lightning.training.logged_module import LoggedModule
from dino_lightning.training.non_finite import NonFiniteSteps
from dino_lightning.training.optim import (
    AccumulatedBoxes,
    GroupRule,
    OwnOptimizer,
    clip_gradients,
    freeze_parts,
    groups_of,
    is_fused,
)
from dino_lightning.training.option_checks import check_names, check_numbers
from dino_lightning.training.precision import check_precision
from dino_lightning.training.recipe import RecipeName, choose_recipe, criterion_of, planned_steps, warn_of_other_recipe
from dino_lightning.training.resume import check_same_architecture, resume_from_raw_weights
from dino_lightning.training.schedule import RateSchedule, StoredRate, schedule_of
from dino_lightning.training.stored_state import check_callbacks, check_whole, take_over
from dino_lightning.weights.stored import (
    FORMAT,
    FORMAT_KEY,
    VERSION_KEY,
    complete_settings,
    package_version,
)
from dino_lightning.weights.zoo import needed_options


class DINOModule(LoggedModule):
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
            runs after 4/5, and before the last of two or more.
        lr_drop_factor: the factor of each drop.
        class_loss: the loss of the class scores. `focal` is the published one, short runs have `quality_focal`; it and
            `varifocal`, `ia_bce`, `position_supervised` and `matchability` have targets that follow the IoU of the box,
            and learn faster from few images and classes, see `dino_lightning.losses.class_losses`.
        class_loss_weight: weight of the class loss in the sum; 1 as published, 2 in short runs.
        bbox_loss_weight: weight of the L1 loss of the boxes.
        giou_loss_weight: weight of the GIoU loss of the boxes.
        matching_cost: what decides which query shall find which box. `published`, or Stable-DINO's
            `position_modulated`, see `dino_lightning.losses.HungarianMatcher`.
        matching_solver: what solves the assignments of least cost: `scipy` on the host, after a copy of all costs;
            `device`, a Triton kernel on a CUDA device; `auto`, that kernel where it passes a trial against scipy. On an
            H200 the kernel is faster from some 50 boxes in an image, see docs/performance.md.
        cost_class: weight of the class in the cost by which queries are matched to boxes.
        cost_bbox: weight of the L1 distance in it.
        cost_giou: weight of the GIoU in it.
        box_noise_scale: how far corners of denoising boxes move, in half box sizes; 1 as published, 0.4 in short runs.
        freeze: parts of the detector that are not trained, such as `backbone`; they stay in evaluation mode.
        compile: compile the layers of encoder and decoder, which takes about half a minute at the start, more with
            images of many sizes, and needs a C compiler. `auto`: on CUDA devices with the data's `fixed_size`, for
            3,000 batches or more, where nothing is missing for it. If it fails, a warning says why.
        cuda_graphs: record the compiled layers as CUDA graphs and replay them, which takes fewer launches (not run on
            a GPU yet); with the data's `fixed_size`, on CUDA devices. Tried on the first batch; where they fail, the
            layers are compiled without them, and a warning says why.
        max_detections: detections kept for each image.
        nms_iou_threshold: non-maximum suppression: of detections whose boxes overlap by more than this IoU, whatever
            their classes, the best is kept; null for none, as published. A detector that has seen few images finds
            objects twice, see benchmarks/RESULTS.md.
        tta_views: test-time augmentation: in how many ways an image is seen where a trained detector is evaluated or
            detects: 1, as it is; 2, mirrored as well; 4, all flips; 8, flips and quarter turns. What is found in the
            views is fused, for as many times the time. Validation while training sees images as they are.
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
        bbox_loss_weight: float = 5.0,
        giou_loss_weight: float = 2.0,
        matching_cost: MatchingCost = "published",
        matching_solver: Solver = "scipy",
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        box_noise_scale: float | None = None,
        freeze: list[str] | None = None,
        compile: CompileOption = "auto",
        cuda_graphs: bool = False,
        max_detections: int = 300,
        nms_iou_threshold: float | None = None,
        tta_views: int = 1,
        image_size: int | None = None,
        max_size: int | None = None,
        stretch_to: int | None = None,
        **detector: Any,
    ) -> None:
        super().__init__()
        check_names(detector, inspect.signature(DINO).parameters)
        detector = {**needed_options(weights), **detector}
        check_nms_iou_threshold(nms_iou_threshold)
        self.save_hyperparameters()
        self.places = take_addresses(self)  # of initial weights, with their secrets
        check_numbers(self.hparams)
        self.model = DINO(num_classes=num_classes, **detector)
        self._frozen = freeze_parts(self.model, freeze or [])
        self._follow_recipe(None)
        self.has_weights = False  # or will have, from the checkpoint of a resumed run
        self.own_optimizer: OwnOptimizer | None = None  # in place of AdamW and of the schedule
        self.own_schedule: Callable[[torch.optim.Optimizer], OptimizerLRScheduler] | None = None
        self._noise_seed: int | None = None
        self._stored_rate: StoredRate | None = None  # of the checkpoint that a run is resumed from
        self.compilation = Compilation(compile, cuda_graphs=cuda_graphs)
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
        check_precision(self.trainer.precision)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            take_from_data(self.hparams, data)
        if stage == "fit":
            self._follow_recipe(planned_steps(self.trainer, data))
        if stage == "fit" and not self.has_weights:
            start(self.model, {**self.hparams, **self.places}, num_images=len(getattr(data, "train_set", ())))
            self.has_weights = True

    def _follow_recipe(self, steps: int | None) -> None:
        """Settle what the recipe decides, for a run of so many steps."""
        self._planned_steps = steps
        self.recipe = choose_recipe(self.hparams["recipe"], steps).with_choices(self.hparams)
        self.model.box_noise_scale = self.recipe.box_noise_scale
        self.criterion = criterion_of(self.hparams, self.recipe)

    def on_fit_start(self) -> None:
        """On a CPU, keep the memory that the tensors of a step free, where the next step has tensors of those sizes."""
        if self.device.type == "cpu" and has_one_size(self.trainer):
            keep_freed_memory()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, fused into one kernel for each group, or the user's optimizer, and its learning-rate schedule."""
        groups, optimizer = groups_of(self.model, self.hparams), None
        if self.own_optimizer is not None:
            optimizer = self.own_optimizer.on_groups(groups, lr=self.hparams["lr"])
        optimizer = optimizer or torch.optim.AdamW(groups, fused=is_fused(self.trainer))
        if self.own_schedule is not None:
            return self.own_schedule(optimizer)
        schedule = schedule_of(optimizer, self.hparams, self.recipe, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _optimizer_name(self) -> str:
        return "AdamW" if self.own_optimizer is None else self.own_optimizer.name

    def on_train_start(self) -> None:
        """Set noise seed and learning rates, a resumed run's by its current options; compile if that is to be."""
        self.compilation.begin(self.model, self.trainer)
        if self._noise_seed is None:
            self._noise_seed = torch.initial_seed()
        schedule = self.lr_schedulers()
        if isinstance(schedule, RateSchedule):
            schedule.begin(self.trainer, self._stored_rate)
            self._stored_rate = None
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
        self._accumulated.normalise(parameters, batches=self.trainer.accumulate_grad_batches)
        limit = self.recipe.clip_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = clip_gradients(parameters, limit, by_value=gradient_clip_algorithm == "value")
        self.step_metrics.grad_norm = norm
        self._non_finite.leave_out(norm, optimizer, scaled=self.trainer.precision == "16-mixed")

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted loss of a batch.

        Where gradients are accumulated, every batch is weighted by its boxes, so that the step is that of one large
        batch; the logged loss of each batch is divided by its own boxes.
        """
        if batch.targets is None:
            raise ValueError("The batch has no targets; training needs them.")
        num_boxes = mean_num_boxes(batch.targets, self.device)
        self.compilation.begin_step(self.model, batch)
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

    def on_after_backward(self) -> None:
        """Copy the gradients out of memory that the next step writes to."""
        self.compilation.end_backward()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store threshold, noise seed, loss of the epoch so far, length of the run, and the format of all this."""
        checkpoint.update({FORMAT_KEY: FORMAT, VERSION_KEY: package_version()})
        checkpoint["hyper_parameters"] = complete_settings(checkpoint.get("hyper_parameters", self.hparams))
        checkpoint["planned_steps"] = self._planned_steps
        checkpoint["score_threshold"] = float(self.score_threshold)
        checkpoint["noise_seed"] = self._noise_seed
        checkpoint["epoch_loss"] = self.step_metrics.of_epoch
        checkpoint["optimizer_name"] = self._optimizer_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored, and keep `setup` from loading initial weights.

        Raises:
            CheckpointError: it is damaged, or has other classes, another architecture or other parameter groups.
        """
        if self._trainer is not None:
            check_whole(checkpoint, self._trainer.ckpt_path or "The checkpoint", self)
        check_same_architecture(checkpoint.get("hyper_parameters", {}), self.hparams)
        self.score_threshold = float(checkpoint.get("score_threshold", self.score_threshold))
        self._noise_seed = checkpoint.get("noise_seed")
        self.step_metrics.resume_from(checkpoint.get("epoch_loss", (None, 0)), self.device)
        self.has_weights = True
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            self._follow_recipe(checkpoint.get("planned_steps"))  # so that the loss is the one of its training
        else:
            warn_of_other_recipe(self.hparams["recipe"], checkpoint.get("planned_steps"), self._planned_steps)
            if type(self).configure_optimizers is DINOModule.configure_optimizers:
                groups, adamw = groups_of(self.model, self.hparams), self.own_optimizer is None
                self._stored_rate = take_over(checkpoint, groups, self.trainer, name=self._optimizer_name, adamw=adamw)
            check_callbacks(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]  # not declared
            resume_from_raw_weights(checkpoint)
