"""What the checks of a training find out, and a dataset as the plan and the upload need it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_lightning.data.classes import Classes
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.option_checks import check_options
from dino_lightning.data.read_splits import splits_of
from dino_lightning.data.sizes import largest_sides, resized_size
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.data.tables import class_table, summary

if TYPE_CHECKING:
    from dino_lightning.data.datamodule import CocoDataModule


@dataclass(frozen=True)
class ImageSet:
    """The images of a split, as their annotation file lists them."""

    annotations: CocoAnnotations

    def __len__(self) -> int:
        return len(self.annotations.images)


@dataclass(frozen=True)
class DatasetOnDisk:
    """A dataset whose annotation files were read and checked as `CocoDataModule` does, without PyTorch.

    Attributes:
        root: its folder.
        classes: the classes, by label.
        train_set: the training images.
        val_set: the validation images.
        test_set: the test images, or None.
        split_files: where the splits lie; without "val" where it is held out of "train".
        image_size: short side in evaluation, in pixels.
        max_size: limit of the long side in pixels.
    """

    root: str
    classes: Classes
    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet | None
    split_files: Mapping[str, SplitFiles]
    image_size: int
    max_size: int

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """The name of each label."""
        return list(self.classes.names)

    @property
    def images_per_epoch(self) -> int:
        """Training images of an epoch."""
        return len(self.train_set)

    def class_table(self) -> str:
        """Category id, label, name, and the number of training and validation boxes of each class."""
        return class_table(self.classes, self.train_set.annotations, self.val_set.annotations)

    def summary(self) -> str:
        """One line per split: what it holds and where it comes from."""
        test = None if self.test_set is None else self.test_set.annotations
        return summary({"train": self.train_set.annotations, "val": self.val_set.annotations, "test": test})


@dataclass(frozen=True)
class Checked:
    """A training that `fit` would start.

    Attributes:
        options: of `fit`, as parsed.
        data: the dataset.
        image_size: mean (height, width) of the training images as the model gets them.
        teraflops: floating-point operations of one forward pass of one image, in 10^12.
        parameters: trainable parameters.
    """

    options: Mapping[str, Any]
    data: CocoDataModule | DatasetOnDisk
    image_size: tuple[int, int]
    teraflops: float
    parameters: int


def read_dataset_on_disk(options: Mapping[str, Any]) -> DatasetOnDisk:
    """Read the annotation files that options of the data module name; opens no image. What was decided is printed.

    Args:
        options: of `CocoDataModule`, all of them by name, without any that draws images or repeats them.

    Raises:
        DataError: something is wrong with the files; the message says what and where.
        ValueError: an option is out of range.
    """
    check_options(**options)
    splits = splits_of(options)
    for note in splits.notes:
        print(note, file=sys.stderr)
    image_size, max_size = largest_sides(
        options["image_size"], options["max_size"], options["fixed_size"], options["fixed_size_mode"]
    )
    return DatasetOnDisk(
        root=options["root"],
        classes=splits.classes,
        train_set=ImageSet(splits.train),
        val_set=ImageSet(splits.val),
        test_set=None if splits.test is None else ImageSet(splits.test),
        split_files=splits.files,
        image_size=image_size,
        max_size=max_size,
    )


def mean_size(data: CocoDataModule | DatasetOnDisk) -> tuple[int, int]:
    """Mean (height, width) of the training images as the model gets them, in pixels."""
    sizes = np.array(
        [resized_size(image.size, data.image_size, data.max_size) for image in data.train_set.annotations.images]
    )
    height, width = (max(32, round(float(side))) for side in sizes.mean(axis=0))
    return height, width
