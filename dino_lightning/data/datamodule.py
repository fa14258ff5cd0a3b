"""The data side of training: annotation files read and checked at once, loaders built when asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from dino_lightning.data.coco import CocoAnnotations, DataError, classes_of, load_coco
from dino_lightning.data.collate import collate
from dino_lightning.data.dataset import CocoDetection, Sample
from dino_lightning.data.splits import SplitFiles, choose_image_folder, discover_split_files, find_split_files
from dino_lightning.data.transforms import FitInto, eval_transform, train_transform
from dino_lightning.structures import Batch

MAX_WORKERS = 8
TINY_DATASET = 64  # images; starting workers takes longer than reading these
TABLE_ROWS = 12
FILES_TO_PROBE = 8


class CocoDataModule(lightning.LightningDataModule):
    """COCO-format data for training and evaluation.

    The annotation files are read and checked when the module is made, so that the classes are known at once; no
    image is opened before the first batch.

    Args:
        root: the dataset folder. The files in it are found by the usual conventions: train/annotations.json,
            train/_annotations.coco.json (Roboflow), annotations/instances_train2017.json with train2017/,
            train.json with images/, and a single annotations.json, of which a part becomes the validation split.
        train_annotations: the training JSON, where it is not found by itself; like all paths here relative to
            `root` or to the working directory.
        train_images: the folder that the file names of `train_annotations` are relative to.
        val_annotations: the validation JSON.
        val_images: its image folder.
        test_annotations: the test JSON.
        test_images: its image folder.
        batch_size: training images per step and process.
        val_batch_size: evaluation images per step and process. 1 pads nothing.
        num_workers: loader processes; by default chosen from the number of cores and images, at most 8.
        augmentation: "coco", the published augmentation; "plans", for drawings; "none", resizing only.
        image_size: largest short side of a training image, and the short side in evaluation, in pixels.
        max_size: limit of the long side in pixels.
        fixed_size: put every image into a square canvas of this many pixels, for static shapes; bounds
            `image_size` and `max_size`.
        pad_to_multiple: round height and width of the batch up to a multiple of this.
        val_fraction: share of the training images that becomes the validation split where there is none.
        on_bad_image: "error" stops at an unreadable image file; "skip" leaves it out and counts it.
        seed: decides which images `val_fraction` takes.

    Attributes:
        classes: the classes, by label.
        train_set: the training images.
        val_set: the validation images.
        test_set: the test images, or None.

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
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        augmentation: Literal["coco", "plans", "none"] = "coco",
        image_size: int = 800,
        max_size: int = 1333,
        fixed_size: int | None = None,
        pad_to_multiple: int = 1,
        val_fraction: float = 0.1,
        on_bad_image: Literal["error", "skip"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least_one = {
            "batch_size": batch_size,
            "val_batch_size": val_batch_size,
            "image_size": image_size,
            "max_size": max_size,
            "fixed_size": fixed_size,
            "pad_to_multiple": pad_to_multiple,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must not be negative.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1.")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image is {on_bad_image!r}; choose error or skip.")

        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.pad_to = None if fixed_size is None else (fixed_size, fixed_size)
        self.pad_to_multiple = pad_to_multiple

        explicit = {
            "train": (train_annotations, train_images),
            "val": (val_annotations, val_images),
            "test": (test_annotations, test_images),
        }
        splits = {
            name: load_coco(files.annotations, files.images) for name, files in _files(root, explicit).items()
        }
        for annotations in splits.values():
            _probe_images(annotations)
        self.classes = classes_of(splits["train"])
        if self.classes.left_out is not None:
            rank_zero_info(
                f"Category {self.classes.left_out.id} ({self.classes.left_out.name!r}) is the root of the others and "
                "has no annotations: it is not a class."
            )
        if "val" not in splits:
            source = splits["train"]
            splits["train"], splits["val"] = split_images(source, val_fraction, seed)
            rank_zero_info(
                f"No validation split found: {len(splits['val'].images)} of the {len(source.images)} images of "
                f"{source.path} are set aside for validation (val_fraction {val_fraction}, seed {seed})."
            )
        for annotations in splits.values():
            _warn_of_repairs(annotations)

        if fixed_size is not None:
            image_size, max_size = min(image_size, fixed_size), min(max_size, fixed_size)
        training = train_transform(augmentation, image_size, max_size)
        evaluation = eval_transform(image_size, max_size)
        if fixed_size is not None:
            training, evaluation = FitInto(training, fixed_size), FitInto(evaluation, fixed_size)
        self.train_set = CocoDetection(
            splits["train"], self.classes, training, with_ground_truth=False, on_bad_image=on_bad_image
        )
        self.val_set = CocoDetection(splits["val"], self.classes, evaluation, on_bad_image=on_bad_image)
        self.test_set = (
            CocoDetection(splits["test"], self.classes, evaluation, on_bad_image=on_bad_image)
            if "test" in splits
            else None
        )

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

    def train_dataloader(self) -> DataLoader[Sample | None]:
        """Shuffled training batches of one size; a smaller last batch only if it is the only one."""
        return self._loader(
            self.train_set, self.batch_size, shuffle=True, drop_last=len(self.train_set) >= self.batch_size
        )

    def val_dataloader(self) -> DataLoader[Sample | None]:
        """All validation batches, in the order of the file."""
        return self._loader(self.val_set, self.val_batch_size)

    def test_dataloader(self) -> DataLoader[Sample | None]:
        """All test batches, in the order of the file; the validation batches if there is no test split."""
        if self.test_set is None:
            rank_zero_info("No test split found: testing on the validation split.")
            return self.val_dataloader()
        return self._loader(self.test_set, self.val_batch_size)

    def predict_dataloader(self) -> DataLoader[Sample | None]:
        """The batches of `test_dataloader`."""
        return self.test_dataloader()

    def teardown(self, stage: str) -> None:
        """Report the images skipped in the last epoch."""
        for dataset in (self.train_set, self.val_set, self.test_set):
            if dataset is not None:
                _report_skipped(dataset)

    def class_table(self) -> str:
        """A table of category id, label, name, and boxes in the training and validation splits."""
        training, validation = _boxes_per_label(self.train_set), _boxes_per_label(self.val_set)
        rows = [("category_id", "label", "name", "train boxes", "val boxes")]
        for label in range(min(self.num_classes, TABLE_ROWS)):
            rows.append(
                (
                    str(self.category_ids[label]),
                    str(label),
                    self.class_names[label],
                    str(training[label]),
                    str(validation[label]),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if self.num_classes > TABLE_ROWS:
            lines.append(f"... and {self.num_classes - TABLE_ROWS} more")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line per split: where it comes from and what it holds."""
        named = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        return "\n".join(
            f"{name}: {dataset.annotations.summary} ({dataset.annotations.path})"
            for name, dataset in named.items()
            if dataset is not None
        )

    def _loader(
        self, dataset: CocoDetection, batch_size: int, *, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Sample | None]:
        trainer = getattr(self, "trainer", None)
        workers = self.num_workers
        if workers is None:
            workers = default_workers(len(dataset), trainer.num_devices if trainer is not None else 1)
        collate_batch = partial(collate, pad_to=self.pad_to, pad_to_multiple=self.pad_to_multiple)
        # No worker_init_fn: torch already gives each worker one thread, and Lightning adds its own seeding of
        # workers (different on each rank) only where there is none.
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        return DataLoader(dataset, collate_fn=collate_batch, **options)


def split_images(
    annotations: CocoAnnotations, fraction: float, seed: int
) -> tuple[CocoAnnotations, CocoAnnotations]:
    """Split whole images into training and validation.

    An image's place follows from its id and the seed alone: neither the order of the file nor images added later
    move it from one side to the other, except at the boundary.

    Args:
        annotations: what to split.
        fraction: share of the images for validation; at least one image goes to each side.
        seed: another seed gives another split.

    Raises:
        DataError: there are fewer than two images.
    """
    count = len(annotations.images)
    if count < 2:
        raise DataError(
            f"{annotations.path}: has one image, too few to set some aside for validation. Give val_annotations."
        )
    held_out = min(max(1, round(fraction * count)), count - 1)
    ranked = sorted(
        range(count), key=lambda i: hashlib.sha256(f"{seed}:{annotations.images[i].id}".encode()).digest()
    )
    validation = set(ranked[:held_out])
    return (
        annotations.subset([i for i in range(count) if i not in validation]),
        annotations.subset([i for i in range(count) if i in validation]),
    )


def default_workers(images: int, processes: int) -> int:
    """Loader processes for a dataset, where `processes` training processes share the cores of this machine."""
    if images < TINY_DATASET:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(1, cores // max(1, processes)))


def _files(root: str, explicit: dict[str, tuple[str | None, str | None]]) -> dict[str, SplitFiles]:
    """The files of each split: those named explicitly, the others as found in the root.

    Raises:
        DataError: no training files, or a named file or folder that does not exist.
    """
    folder = Path(root)
    named = explicit["train"][0] is not None
    found = discover_split_files(folder) if named else find_split_files(folder)
    for split, (annotations, images) in explicit.items():
        if annotations is not None:
            path = _existing(folder, annotations, f"{split}_annotations")
            candidates = [path.parent / "images", path.parent, folder / split, folder / "images", folder]
            found[split] = SplitFiles(path, choose_image_folder(path, candidates))
        if images is not None:
            if split not in found:
                raise DataError(
                    f"{split}_images is given, but there is no annotation file. Give {split}_annotations."
                )
            found[split] = SplitFiles(found[split].annotations, _existing(folder, images, f"{split}_images"))
    if "train" not in found:
        raise DataError(
            f"{folder}: has {' and '.join(found)} files but no training files, which define the classes. "
            "Give train_annotations."
        )
    return found


def _existing(root: Path, given: str, argument: str) -> Path:
    for path in (Path(given), root / given):
        if path.exists():
            return path
    raise DataError(f"{argument}: {given} does not exist, neither in the working directory nor in {root}.")


def _probe_images(annotations: CocoAnnotations) -> None:
    """Raise `DataError` if the image folder is plainly the wrong one: not one of the first files is there."""
    probed = range(min(len(annotations.images), FILES_TO_PROBE))
    if not any(annotations.image_path(index).is_file() for index in probed):
        raise DataError(
            f"{annotations.path}: {annotations.image_path(0)} does not exist, nor do the next images listed. "
            "Name the folder that the file names are relative to with train_images, val_images or test_images."
        )


def _warn_of_repairs(annotations: CocoAnnotations) -> None:
    summary = annotations.summary
    if summary.degenerate or summary.clipped:
        rank_zero_warn(
            f"{annotations.path}: {summary.degenerate} boxes without area inside their image are dropped, "
            f"{summary.clipped} boxes that stick out are clipped to it."
        )


def _boxes_per_label(dataset: CocoDetection) -> list[int]:
    source = dataset.annotations
    labels = torch.from_numpy(dataset.classes.labels_of(source)[source.usable & ~source.iscrowd])
    return torch.bincount(labels, minlength=len(dataset.classes)).tolist()


def _report_skipped(dataset: CocoDetection) -> None:
    ids = dataset.take_skipped_ids()
    if ids:
        listed = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        rank_zero_warn(
            f"{dataset.annotations.path}: {len(ids)} of {len(dataset)} images could not be read and were left out "
            f"of this epoch (image ids {listed})."
        )
