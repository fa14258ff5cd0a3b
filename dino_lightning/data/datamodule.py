"""The data side of training: annotation files read and checked at once, loaders built when asked for."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from dino_lightning.console import aligned
from dino_lightning.data.annotation_file import CrowdRule, ReadOptions
from dino_lightning.data.augmentation import train_transform
from dino_lightning.data.box_formats import BoxFormat
from dino_lightning.data.cache import ImageCache
from dino_lightning.data.dataset import UNREADABLE, CocoDetection, Sample, available_cores
from dino_lightning.data.drawn_plans import MOST_DRAWN_ROOMS, WithDrawnPlans
from dino_lightning.data.loading import Loader, collate
from dino_lightning.data.mosaic import WithMosaic
from dino_lightning.data.read_splits import read_splits
from dino_lightning.data.sampling import TrainSampler
from dino_lightning.data.transforms import Canvas, CanvasMode, eval_transform
from dino_lightning.data.worst_case import blank_batch, largest_canvas, most_boxes, turns
from dino_lightning.errors import DataError
from dino_lightning.structures import Batch

MAX_WORKERS = 8
TINY_DATASET = 64  # images; starting workers takes longer than reading these
TABLE_ROWS = 12
MAX_ASPECT_RATIO = 8  # of images kept scaled down for stretching


class CocoDataModule(lightning.LightningDataModule):
    """COCO-format data for training and evaluation.

    The annotation files are read and checked when the module is made, so that the classes are known at once;
    no image is opened before the first batch.

    Args:
        root: the dataset folder. The files in it are found by the usual conventions: train/annotations.json,
            train/_annotations.coco.json (Roboflow), annotations/instances_train2017.json with train2017/,
            train.json with images/, or one annotations.json. Without a validation split, a part of the
            training images becomes it.
        train_annotations: the training JSON, where it is not found by itself; like all paths here relative to
            the working directory or to `root`.
        train_images: the folder that the file names of `train_annotations` are relative to.
        val_annotations: the validation JSON.
        val_images: its image folder.
        test_annotations: the test JSON.
        test_images: its image folder.
        crowd: what annotations with `iscrowd` 1 are: "regions", as in COCO, which are not learnt from and in which
            detections do not count as wrong; or "objects" like all others, for files of programs that write it for
            every mask, as CVAT does.
        box_format: what the four numbers of a box are. By default COCO's, x, y, width and height in pixels, and a file
            whose boxes are another's by all the evidence is refused; "xywh" takes them as they are. "xyxy" are corners,
            "cxcywh" has the centre first, and with "normalized-" before it they are shares of the image. Areas are then
            those of the boxes.
        batch_size: training images per step and process.
        val_batch_size: evaluation images per step and process; 1 pads nothing.
        num_workers: loader processes; by default chosen from the number of cores and images, at most 8.
        augmentation: "coco", the published augmentation; "plans", for drawings; "flips", mirrored and
            turned by quarters only; "none", resizing only.
        image_size: largest short side of a training image, and the short side in evaluation, in pixels.
        max_size: limit of the long side in pixels.
        augmentation_options: values for the options of the preset, by name: `{rotation: 0, crop: 0.3}`. See
            `dino_lightning.data.augmentation` for what there is.
        fixed_size: put every image into a square canvas of this many pixels, for static shapes; bounds
            `image_size` and `max_size`.
        fixed_size_mode: how images fill that canvas. "pad": any size within it, as the augmentation gives it;
            "letterbox": the long side always fills it; "stretch": all of it is filled, proportions are given up, in
            evaluation too.
        pad_to_multiple: round height and width of a batch up to a multiple of this.
        aspect_buckets: put training images of similar shape into a batch, which needs less padding and trains
            faster; where the augmentation turns images, all of a batch get the same orientation.
        cache_dir: folder in which images much larger than `image_size` are kept scaled down, so that they are decoded
            once and not in every epoch; may be shared by processes and runs. Augmentation then starts from the
            smaller image.
        cache_gigabytes: limit of that folder.
        val_fraction: share of the training images that becomes the validation split where there is none.
        on_bad_image: "error" stops at the first unreadable image file; "skip" reads all files of a split once
            before its first batch, and leaves the unreadable ones out. One that cannot be read any more later is
            an empty page that counts for nothing; how many there were is said at the end.
        seed: decides which images `val_fraction` takes.
        drawn_plans: floor plans to draw afresh for every epoch and train on beside the images, for datasets of rooms.
        mosaic: probability of making a training image out of four, each a quarter of it, 0 to 1.

    Attributes:
        classes: the classes, by label.
        train_set: the training images.
        val_set: the validation images.
        test_set: the test images, or None.
        image_size: short side in evaluation, in pixels, within `fixed_size`.
        max_size: limit of the long side in pixels, within `fixed_size`.
        stretch_to: side in pixels of the square that all images are stretched to, or None.

    Raises:
        DataError: something is wrong with the files; the message says what and where.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        root: str,
        train_annotations: str | None = None,
        train_images: str | None = None,
        val_annotations: str | None = None,
        val_images: str | None = None,
        test_annotations: str | None = None,
        test_images: str | None = None,
        crowd: CrowdRule = "regions",
        box_format: BoxFormat | None = None,
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        augmentation: Literal["coco", "plans", "flips", "none"] = "coco",
        image_size: int = 800,
        max_size: int = 1333,
        augmentation_options: dict[str, Any] | None = None,
        fixed_size: int | None = None,
        fixed_size_mode: CanvasMode = "pad",
        pad_to_multiple: int = 1,
        aspect_buckets: bool = False,
        cache_dir: str | None = None,
        cache_gigabytes: float = 20.0,
        val_fraction: float = 0.1,
        on_bad_image: Literal["error", "skip"] = "error",
        seed: int = 0,
        drawn_plans: int = 0,
        mosaic: float = 0.0,
    ) -> None:
        super().__init__()
        _check_arguments(
            at_least_one={
                "batch_size": batch_size,
                "val_batch_size": val_batch_size,
                "image_size": image_size,
                "max_size": max_size,
                "fixed_size": fixed_size,
                "pad_to_multiple": pad_to_multiple,
            },
            num_workers=num_workers,
            cache_gigabytes=cache_gigabytes,
            val_fraction=val_fraction,
        )
        if fixed_size is None and fixed_size_mode != "pad":
            raise ValueError(f"fixed_size_mode={fixed_size_mode} needs a fixed_size.")
        canvas = None if fixed_size is None else Canvas(fixed_size, fixed_size_mode)
        if crowd not in ("regions", "objects"):
            raise ValueError(f"crowd is {crowd!r}; choose regions or objects.")
        if box_format is not None and box_format not in get_args(BoxFormat):
            raise ValueError(f"box_format is {box_format!r}; choose one of {', '.join(get_args(BoxFormat))}.")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image is {on_bad_image!r}; choose error or skip.")

        if drawn_plans < 0 or (drawn_plans and aspect_buckets):
            raise ValueError("drawn_plans must not be negative, and it does not go with aspect_buckets.")

        if not 0 <= mosaic <= 1:
            raise ValueError(f"mosaic is {mosaic}; it must lie between 0 and 1.")

        self.mosaic = mosaic
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.pad_to = None if fixed_size is None else (fixed_size, fixed_size)
        self.pad_to_multiple = pad_to_multiple
        self.aspect_buckets = aspect_buckets
        self._notices: Counter[str] = Counter()

        given = {
            "root": root,
            "train_annotations": train_annotations,
            "train_images": train_images,
            "val_annotations": val_annotations,
            "val_images": val_images,
            "test_annotations": test_annotations,
            "test_images": test_images,
        }
        splits = read_splits(
            given,
            val_fraction=val_fraction,
            seed=seed,
            files_must_exist=on_bad_image == "error",
            options=ReadOptions(crowd, box_format),
        )
        for note in splits.notes:
            rank_zero_info(note)
        for repair in splits.repairs:
            rank_zero_warn(repair)
        self.classes = splits.classes

        if fixed_size is not None and fixed_size_mode == "pad":
            image_size, max_size = min(image_size, fixed_size), min(max_size, fixed_size)
        elif fixed_size is not None:
            image_size = max_size = fixed_size
        self.image_size, self.max_size = image_size, max_size
        self.stretch_to = fixed_size if fixed_size_mode == "stretch" else None
        training = train_transform(augmentation, image_size, max_size, augmentation_options, canvas)
        evaluation = eval_transform(image_size, max_size, canvas)
        # what is stretched to a square needs its short side in full
        cached_long_side = max_size if self.stretch_to is None else MAX_ASPECT_RATIO * self.stretch_to
        make = partial(
            CocoDetection,
            classes=self.classes,
            on_bad_image=on_bad_image,
            cache=_image_cache(cache_dir, image_size, cached_long_side, cache_gigabytes),
        )
        self.train_set = make(splits.train, transform=training, with_ground_truth=False)
        self.drawn_plans = None if not drawn_plans else WithDrawnPlans(self.train_set, count=drawn_plans)
        self.val_set = make(splits.val, transform=evaluation)
        self.test_set = None if splits.test is None else make(splits.test, transform=evaluation)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """The name of each label."""
        return list(self.classes.names)

    @property
    def category_ids(self) -> list[int]:
        """The `category_id` of each label in the annotation files."""
        return list(self.classes.category_ids)

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
        """Training images of an epoch, drawn plans too."""
        return len(self.train_set if self.drawn_plans is None else self.drawn_plans)

    @property
    def most_boxes(self) -> int:
        """The most boxes to learn from that any training image has."""
        drawn = 0 if self.drawn_plans is None else MOST_DRAWN_ROOMS
        return max(most_boxes(self.train_set.annotations), drawn) * (4 if self.mosaic else 1)

    def worst_case_batch(self, batch_size: int, num_boxes: int | None = None) -> Batch:
        """A training batch as large as any that the loader can give: its images black, its boxes alike.

        Computed from the annotation file and the options; no image is opened.

        Args:
            batch_size: how many images.
            num_boxes: of each image; by default as many as any training image has.
        """
        transform = self.train_set.transform
        canvas = self.pad_to or largest_canvas(
            transform,
            (image.size for image in self.train_set.annotations.images),
            alone=batch_size == 1,
            oriented=self.aspect_buckets and turns(transform),
        )
        boxes = self.most_boxes if num_boxes is None else num_boxes
        return blank_batch(canvas, batch_size=batch_size, num_boxes=boxes, pad_to_multiple=self.pad_to_multiple)

    def class_table(self) -> str:
        """Category id, label, name, and the number of training and validation boxes of each class."""
        counts = zip(_boxes_per_label(self.train_set), _boxes_per_label(self.val_set), strict=True)
        rows = [["category_id", "label", "name", "train boxes", "val boxes"]]
        rows += [
            [str(category_id), str(label), name, str(training), str(validation)]
            for label, (category_id, name, (training, validation)) in enumerate(
                zip(self.classes.category_ids, self.classes.names, counts, strict=True)
            )
        ][:TABLE_ROWS]
        hidden = self.num_classes - TABLE_ROWS
        return aligned(rows) + (f"\n... and {hidden} more" if hidden > 0 else "")

    def summary(self) -> str:
        """One line per split: what it holds and where it comes from."""
        named = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        return "\n".join(
            f"{name}: {dataset.annotations.summary} ({dataset.annotations.path})"
            for name, dataset in named.items()
            if dataset is not None
        )

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
        images_per_process = -(-len(dataset) // processes)
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
        ratios = [image.size[1] / image.size[0] for image in images.annotations.images]
        sampler = TrainSampler(
            dataset,
            processes=processes,
            rank=rank,
            seed=seed,
            batch_size=batch_size,
            aspect_ratios=ratios if self.aspect_buckets else None,
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


def default_workers(images: int, processes: int) -> int:
    """Loader processes for one dataset, where `processes` training processes share this machine's cores."""
    if images < TINY_DATASET:
        return 0
    return min(MAX_WORKERS, max(1, available_cores() // processes))


def _image_cache(folder: str | None, image_size: int, max_size: int, gigabytes: float) -> ImageCache | None:
    if folder is None:
        return None
    try:
        return ImageCache(Path(folder), image_size=image_size, max_size=max_size, max_bytes=int(gigabytes * 1e9))
    except OSError as error:
        raise DataError(f"cache_dir: {folder} cannot be written to ({error}). Give another folder.") from error


def _check_arguments(
    *, at_least_one: Mapping[str, int | None], num_workers: int | None, cache_gigabytes: float, val_fraction: float
) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: names the first one.
    """
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must not be negative.")
    if not cache_gigabytes > 0:
        raise ValueError(f"cache_gigabytes is {cache_gigabytes}; it must be more than 0.")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1.")


def _boxes_per_label(dataset: CocoDetection) -> list[int]:
    source = dataset.annotations
    labels = torch.from_numpy(dataset.classes.labels_of(source)[source.usable & ~source.iscrowd])
    return [int(count) for count in torch.bincount(labels, minlength=len(dataset.classes))]
