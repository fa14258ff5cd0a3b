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
from dino_lightning.data.loading import BatchesOf, Loader, collate, collate_settled, default_workers
from dino_lightning.data.mosaic import WithMosaic
from dino_lightning.data.own_transforms import check_picklable
from dino_lightning.data.sampling import TrainSampler, batches_of_one_size, image_repeat_factors, number_of_draws
from dino_lightning.data.transforms import Resize
from dino_lightning.errors import DataError
from dino_lightning.structures import Batch

MOST_EMPTY_PAGES = 64  # in a row, in place of images that cannot be read


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
        self._empty_pages = 0  # in a row

    def train_dataloader(self) -> Loader:
        """Shuffled training batches, all full; a smaller one only where there is no full one."""
        samples: Dataset[Sample] = self.train_set if self.drawn_plans is None else self.drawn_plans
        if self.mosaic:
            samples = WithMosaic(samples, self.mosaic)
        return self._training_loader(samples)

    def val_dataloader(self) -> Loader:
        """All validation images, those of one size together, so that nothing is padded."""
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> Loader:
        """The same of the test images, or of the validation images if there is no test split."""
        return self._evaluation_loader(self._test_images())

    def predict_dataloader(self) -> Loader:
        """The images of `test_dataloader` in the order of their file; a batch holds neighbours of one size."""
        return self._evaluation_loader(self._test_images(), in_order=True)

    def _test_images(self) -> CocoDetection:
        if self.test_set is None:
            rank_zero_info("No test split found: the validation split is used instead.")
            return self.val_set
        return self.test_set

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

    def _evaluation_loader(self, images: CocoDetection, *, in_order: bool = False) -> Loader:
        """Images in batches of one size, see `batches_of_one_size`."""
        self._leave_out_unreadable(images)
        transform = images.transform
        sizes = [image.size for image in images.annotations.images]
        if isinstance(transform, Resize):
            sizes = [transform.resized(size) for size in sizes]
        batches = BatchesOf(images, batches_of_one_size(sizes, self.val_batch_size, in_order=in_order))
        return Loader(batches, batch_size=1, collate_fn=collate_settled, **self._workers(images, len(images)))

    def _workers(self, images: CocoDetection, samples: int) -> dict[str, Any]:
        """The arguments of a loader of so many samples, made of these images, that are about its processes."""
        workers = self.num_workers
        if workers is None:
            workers = default_workers(samples, 1 if self.trainer is None else self.trainer.num_devices)
        if workers:
            check_picklable(images.transform)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _training_loader(self, dataset: Any) -> Loader:
        """The loader of samples that are made from the training images."""
        images, batch_size = self.train_set, self.batch_size
        self._leave_out_unreadable(images)
        processes, seed, rank = 1, torch.initial_seed(), 0
        if self.trainer is not None:
            processes = self.trainer.world_size
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
        return Loader(
            dataset,
            sampler=sampler,
            batch_size=batch_size,
            drop_last=images_per_process >= batch_size,
            collate_fn=partial(collate, pad_to=self.pad_to, pad_to_multiple=self.pad_to_multiple),
            **self._workers(images, len(dataset)),
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Say what went wrong with the images of a batch, once for each kind (a hook of Lightning's)."""
        for notice in batch.notices:
            if notice.kind not in self._notices:
                warnings.warn(notice.message, stacklevel=2)
            self._notices[notice.kind] += 1
        self._refuse_empty_pages_alone(batch)
        return batch

    def _refuse_empty_pages_alone(self, batch: Batch) -> None:
        """Stop where no image can be read any more: there is nothing to learn from empty pages.

        Raises:
            DataError: none of many images in a row, of a small split in two epochs, could be read.
        """
        unreadable = sum(notice.kind == UNREADABLE for notice in batch.notices)
        self._empty_pages = self._empty_pages + len(batch) if unreadable >= len(batch) else 0
        stage = None if self.trainer is None else self.trainer.state.stage
        evaluated = {"validate": self.val_set, "sanity_check": self.val_set, "test": self.test_set}
        split = evaluated.get(str(stage and stage.value)) or self.train_set
        processes = 1 if self.trainer is None else self.trainer.world_size
        if self._empty_pages >= max(1, min(MOST_EMPTY_PAGES, 2 * len(split) // processes)):
            raise DataError(
                f"None of the last {self._empty_pages} images of {split.annotations.path} could be read (their folder "
                f"was {split.annotations.image_path(0).parent}). Bring them back, then resume with --ckpt_path last."
            )

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
        left_out = dataset.leave_out_unreadable()
        if left_out is not None:
            rank_zero_warn(left_out)
