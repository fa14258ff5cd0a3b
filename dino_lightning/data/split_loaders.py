"""The loaders of a data module's splits, and what is said about images that cannot be read."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from typing import Any, Literal

import lightning
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from dino_lightning.data.classes import Classes
from dino_lightning.data.dataset import UNREADABLE, CocoDetection, Sample
from dino_lightning.data.drawn_plans import WithDrawnPlans
from dino_lightning.data.loading import Loader, collate, default_workers
from dino_lightning.data.mosaic import WithMosaic
from dino_lightning.data.own_transforms import check_picklable
from dino_lightning.data.sampling import TrainSampler, image_repeat_factors, number_of_draws
from dino_lightning.structures import Batch


class SplitLoaders(lightning.LightningDataModule):
    """What `CocoDataModule`, which sets the attributes and describes them, does once its splits are made."""

    classes: Classes
    train_set: CocoDetection
    val_set: CocoDetection
    test_set: CocoDetection | None
    drawn_plans: WithDrawnPlans | None
    batch_size: int
    val_batch_size: int
    num_workers: int | None
    on_bad_image: Literal["error", "skip"]
    pad_to: tuple[int, int] | None
    pad_to_multiple: int
    aspect_buckets: bool
    mosaic: float
    repeat_factor_threshold: float | None

    def __init__(self) -> None:
        super().__init__()
        self._notices: Counter[str] = Counter()

    def train_dataloader(self) -> Loader:
        """Shuffled training batches, all full; a smaller one only where there is no full one."""
        samples: Dataset[Sample] = self.train_set if self.drawn_plans is None else self.drawn_plans
        if self.mosaic:
            samples = WithMosaic(samples, self.mosaic)
        return self._loader(self.train_set, self.batch_size, training=samples)

    def val_dataloader(self) -> Loader:
        """All validation batches, in the order of the file."""
        return self._loader(self.val_set, self.val_batch_size)

    def test_dataloader(self) -> Loader:
        """All test batches, in the order of the file; the validation batches if there is no test split."""
        if self.test_set is None:
            rank_zero_info("No test split found: the validation split is used instead.")
            return self.val_dataloader()
        return self._loader(self.test_set, self.val_batch_size)

    def predict_dataloader(self) -> Loader:
        """The batches of `test_dataloader`."""
        return self.test_dataloader()

    @property
    def images_per_epoch(self) -> int:
        """Training images of an epoch, each as often as it is drawn; drawn plans too."""
        factors = self._repeat_factors()
        if factors is not None:
            return number_of_draws(factors)
        return len(self.train_set if self.drawn_plans is None else self.drawn_plans)

    def _repeat_factors(self) -> npt.NDArray[np.float64] | None:
        """(images and drawn plans,) how often each is drawn in an epoch, or None for once."""
        if self.repeat_factor_threshold is None:
            return None
        source = self.train_set.annotations
        factors = image_repeat_factors(source, self.classes.labels_of(source), self.repeat_factor_threshold)
        return np.append(factors, np.ones(0 if self.drawn_plans is None else self.drawn_plans.count))

    def _loader(self, images: CocoDetection, batch_size: int, *, training: Dataset[Sample] | None = None) -> Loader:
        """The loader of some images; of the samples made from them where they are for training."""
        self._leave_out_unreadable(images)
        dataset: Any = images if training is None else training
        processes, processes_here = 1, 1
        if self.trainer is not None:
            processes, processes_here = self.trainer.world_size, self.trainer.num_devices
        workers = self.num_workers
        if workers is None:
            workers = default_workers(len(dataset), processes_here)
        if workers:
            check_picklable(images.transform)
        arguments: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": partial(collate, pad_to=self.pad_to, pad_to_multiple=self.pad_to_multiple),
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        if training is None:
            return Loader(dataset, **arguments)
        seed, rank = torch.initial_seed(), 0
        if self.trainer is not None:
            seed, rank = self.trainer.strategy.broadcast(seed), self.trainer.global_rank
        images_per_process = -(-self.images_per_epoch // processes)
        ratios = [image.size[1] / image.size[0] for image in images.annotations.images]
        sampler = TrainSampler(
            dataset,
            processes=processes,
            rank=rank,
            seed=seed,
            batch_size=batch_size,
            aspect_ratios=ratios if self.aspect_buckets else None,
            repeat_factors=self._repeat_factors(),
        )
        return Loader(dataset, sampler=sampler, drop_last=images_per_process >= batch_size, **arguments)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Say what went wrong with the images of a batch, once for each kind (a hook of Lightning's)."""
        for notice in batch.notices:
            if notice.kind not in self._notices:
                warnings.warn(notice.message, stacklevel=2)
            self._notices[notice.kind] += 1
        return batch

    def teardown(self, stage: str) -> None:
        """Say how many images could not be read (a hook of Lightning's)."""
        unreadable = self._notices.pop(UNREADABLE, 0)
        if unreadable:
            warnings.warn(
                f"{unreadable} times an image could not be read and an empty page took its place.", stacklevel=2
            )

    def _leave_out_unreadable(self, dataset: CocoDetection) -> None:
        # Before the first batch, not while training: Lightning and the other ranks rely on a loader giving as
        # many batches as it said. One that ends early makes Lightning pass over that epoch's validation.
        if self.on_bad_image == "error":
            return
        before = len(dataset)
        left_out = dataset.leave_out_unreadable()
        if left_out:
            listed = ", ".join(map(str, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
            rank_zero_warn(
                f"{dataset.annotations.path}: {len(left_out)} of {before} images cannot be read and are left "
                f"out (image ids {listed})."
            )
