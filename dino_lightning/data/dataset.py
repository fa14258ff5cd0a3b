"""The images of an annotation file with their boxes, one sample at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino_lightning.boxes import xyxy_to_normalized_cxcywh
from dino_lightning.data.classes import Classes, check_classes
from dino_lightning.data.coco import CocoAnnotations, DataError, ground_truth
from dino_lightning.data.images import read_image
from dino_lightning.data.transforms import LabelledImage, Transform
from dino_lightning.structures import GroundTruth

OnBadImage = Literal["error", "skip"]


@dataclass(frozen=True)
class Sample:
    """One image, ready to be put into a batch.

    Attributes:
        image: (3, h, w) uint8, RGB.
        boxes_cxcywh: (N, 4) float32, centre x, centre y, width, height, each 0-1 of `image`.
        labels: (N,) int64, contiguous labels 0..K-1.
        image_id: the id in the annotation file.
        original_size: (height, width) in pixels of the image file as displayed.
        ground_truth: the annotations to evaluate against, or None.
    """

    image: Tensor
    boxes_cxcywh: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]
    ground_truth: GroundTruth | None = None


class CocoDetection(Dataset["Sample | None"]):
    """The images of a checked annotation file.

    Args:
        annotations: the file.
        classes: the classes of the training file.
        transform: resizing and augmentation, or None for the image as it is.
        with_ground_truth: also give what evaluation compares against.
        on_bad_image: what to do about a file that is missing or cannot be decoded: "error" raises, "skip"
            gives None in place of a sample and remembers the image for `take_skipped_ids`.

    Raises:
        DataError: the categories of the file do not fit `classes`.
        ValueError: an unknown `on_bad_image`.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        classes: Classes,
        transform: Transform | None = None,
        *,
        with_ground_truth: bool = True,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        if on_bad_image not in get_args(OnBadImage):
            raise ValueError(f"on_bad_image is {on_bad_image!r}; choose {' or '.join(get_args(OnBadImage))}.")
        check_classes(annotations, classes)
        self.annotations = annotations
        self.classes = classes
        self.transform = transform
        self.with_ground_truth = with_ground_truth
        self.on_bad_image = on_bad_image
        self._labels = classes.labels_of(annotations)
        # Shared with the loader workers, which do the reading; an entry per image, so none is counted twice.
        self._skipped = torch.zeros(len(annotations.images), dtype=torch.bool)
        self._skipped.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> Sample | None:
        """The sample of image `index`, or None for an unreadable image under `on_bad_image="skip"`.

        Raises:
            DataError: the image cannot be read, or its size is not the one the annotation file says.
        """
        entry = self.annotations.images[index]
        try:
            image = read_image(self.annotations.image_path(index))
        except DataError as error:
            if self.on_bad_image == "skip":
                self._skipped[index] = True
                return None
            raise DataError(
                f"Image {entry.id} of {self.annotations.path}: {error} Restore the file, take the image out "
                "of the annotations, or set on_bad_image=skip."
            ) from error
        size = (int(image.shape[1]), int(image.shape[2]))
        if size != entry.size:
            raise DataError(
                f"Image {entry.id} of {self.annotations.path}: width and height are "
                f"{entry.size[1]} x {entry.size[0]} in the annotations, but {size[1]} x {size[0]} in "
                f"{self.annotations.image_path(index)} as displayed (after EXIF rotation). "
                "Its boxes would be misplaced; fix the annotations or the file."
            )
        example = LabelledImage(image, *self._boxes_and_labels(index))
        if self.transform is not None:
            example = self.transform(example)
        return Sample(
            image=example.image,
            boxes_cxcywh=xyxy_to_normalized_cxcywh(example.boxes_xyxy, example.size),
            labels=example.labels,
            image_id=entry.id,
            original_size=size,
            ground_truth=ground_truth(self.annotations, self._labels, index)
            if self.with_ground_truth
            else None,
        )

    def take_skipped_ids(self) -> list[int]:
        """The ids of the images skipped since the last call."""
        indices = self._skipped.nonzero().flatten().tolist()
        self._skipped.zero_()
        return [self.annotations.images[index].id for index in indices]

    def _boxes_and_labels(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) float32 pixels, clipped to the image, and labels (N,) int64 to learn from."""
        source = self.annotations
        rows = np.arange(source.offsets[index], source.offsets[index + 1])
        rows = rows[source.usable[rows] & ~source.iscrowd[rows]]
        height, width = source.images[index].size
        boxes_xyxy = np.clip(source.boxes_xyxy[rows], 0, [width, height, width, height]).astype(np.float32)
        return torch.from_numpy(boxes_xyxy), torch.from_numpy(self._labels[rows])
