"""The images of an annotation file with their boxes, one sample at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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


class CocoDetection(Dataset[Sample]):
    """The images of a checked annotation file.

    Args:
        annotations: the file.
        classes: the classes of the training file.
        transform: resizing and augmentation, or None for the image as it is.
        with_ground_truth: also give what evaluation compares against.

    Raises:
        DataError: the categories of the file do not fit `classes`.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        classes: Classes,
        transform: Transform | None = None,
        *,
        with_ground_truth: bool = True,
    ) -> None:
        check_classes(annotations, classes)
        self.annotations = annotations
        self.classes = classes
        self.transform = transform
        self.with_ground_truth = with_ground_truth
        self._labels = classes.labels_of(annotations)
        self._all_readable = False

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """The sample of image `index`; with a seed beside it, all random draws for this image follow from that seed.

        Raises:
            DataError: the image cannot be read, or its size is not the one the annotation file says.
        """
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self[index]
        entry, path = self.annotations.images[index], self.annotations.image_path(index)
        try:
            image = read_image(path)
        except DataError as error:
            raise DataError(
                f"Image {entry.id} of {self.annotations.path}: {error} Restore the file, take the image out "
                "of the annotations, or set on_bad_image=skip."
            ) from error
        size = (int(image.shape[1]), int(image.shape[2]))
        if size != entry.size:
            raise DataError(
                f"Image {entry.id} of {self.annotations.path}: width and height are "
                f"{entry.size[1]} x {entry.size[0]} in the annotations, but {size[1]} x {size[0]} in {path} "
                "as displayed (after EXIF rotation). Its boxes would be misplaced; fix one of the two."
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
            ground_truth=ground_truth(self.annotations, self._labels, index) if self.with_ground_truth else None,
        )

    def leave_out_unreadable(self) -> list[int]:
        """Decode every image once, and from then on leave out those that cannot be; later calls do nothing.

        Returns:
            The ids of the images left out by this call.

        Raises:
            DataError: not one image can be read.
        """
        if self._all_readable:
            return []
        with ThreadPoolExecutor() as pool:  # decoders work outside Python's global lock
            readable = list(pool.map(self._is_readable, range(len(self))))
        if not any(readable):
            raise DataError(f"{self.annotations.path}: not one of its {len(self)} images can be read.")
        left_out = [image.id for image, keep in zip(self.annotations.images, readable, strict=True) if not keep]
        self.annotations = self.annotations.subset([index for index, keep in enumerate(readable) if keep])
        self._labels = self.classes.labels_of(self.annotations)
        self._all_readable = True
        return left_out

    def _is_readable(self, index: int) -> bool:
        try:
            read_image(self.annotations.image_path(index))
        except DataError:
            return False
        return True

    def _boxes_and_labels(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) float32 pixels, clipped to the image, and labels (N,) int64 to learn from."""
        source = self.annotations
        rows = np.arange(source.offsets[index], source.offsets[index + 1])
        rows = rows[source.usable[rows] & ~source.iscrowd[rows]]
        height, width = source.images[index].size
        boxes_xyxy = np.clip(source.boxes_xyxy[rows], 0, [width, height, width, height]).astype(np.float32)
        return torch.from_numpy(boxes_xyxy), torch.from_numpy(self._labels[rows])
