"""The images of an annotation file with their boxes, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dino_lightning.boxes import xyxy_to_normalized_cxcywh
from dino_lightning.console import bar_seconds
from dino_lightning.data.cache import ImageCache
from dino_lightning.data.classes import Classes, check_classes
from dino_lightning.data.coco import CocoAnnotations, ground_truth
from dino_lightning.data.image_files import FEW_IMAGES, available_cores
from dino_lightning.data.images import read_image
from dino_lightning.data.transforms import LabelledImage, Transform
from dino_lightning.errors import DataError
from dino_lightning.structures import GroundTruth, Notice

UNREADABLE = "unreadable"  # kind of notice
Draw = Sequence[int]  # index and seed, and in a batch of one orientation whether that is landscape


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
        notices: problems with the image that did not stop the run.
    """

    image: Tensor
    boxes_cxcywh: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]
    ground_truth: GroundTruth | None = None
    notices: tuple[Notice, ...] = ()


class CocoDetection(Dataset[Sample]):
    """The images of a checked annotation file.

    Args:
        annotations: the file.
        classes: the classes of the training file.
        transform: resizing and augmentation, or None for the image as it is.
        with_ground_truth: also give what evaluation compares against.
        on_bad_image: "error" refuses an image that cannot be read; "skip" gives an empty page in its place, with a
            notice, for an image that was readable when the run began.
        cache: where big images are kept scaled down, or None.
        reader: gives the image (3, h, w) uint8 of a file name in the annotations, in place of the image folder.

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
        on_bad_image: Literal["error", "skip"] = "error",
        cache: ImageCache | None = None,
        reader: Callable[[str], Tensor] | None = None,
    ) -> None:
        check_classes(annotations, classes)
        self.annotations = annotations
        self.classes = classes
        self.transform = transform
        self.with_ground_truth = with_ground_truth
        self.on_bad_image = on_bad_image
        self.cache = cache
        self.reader = reader
        self._labels = classes.labels_of(annotations)
        self._all_readable = False

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int | Draw) -> Sample:
        """The sample of image `index`; with a seed beside it, all random draws for this image follow from that seed.

        Raises:
            DataError: the image cannot be read, or its size is not the one the annotation file says.
        """
        if isinstance(index, int):
            return self._sample(index)
        index, seed, *landscape = index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._sample(index, bool(landscape[0]) if landscape else None)

    def _sample(self, index: int, landscape: bool | None = None) -> Sample:
        entry = self.annotations.images[index]
        notices: list[Notice] = []
        try:
            image, size = self._read(index)
        except DataError as error:
            message = f"Image {entry.id} of {self.annotations.path}: {error}"
            if self.on_bad_image == "error":
                raise DataError(
                    f"{message} Restore the file, take the image out of the annotations, or set on_bad_image=skip."
                ) from error
            return self._empty_page(index, landscape, message)
        if size != entry.size and self.reader is not None:
            raise DataError(
                f"{self.annotations.path}[{entry.file_name}]: the image is {size[1]} x {size[0]} now, and was "
                f"{entry.size[1]} x {entry.size[0]} when its boxes were read. What changes sizes at random "
                "does not belong into the dataset; give it as transforms."
            )
        if size != entry.size:
            raise DataError(
                f"Image {entry.id} of {self.annotations.path}: width and height are "
                f"{entry.size[1]} x {entry.size[0]} in the annotations, but {size[1]} x {size[0]} in "
                f"{self.annotations.image_path(index)} as displayed (after EXIF rotation). "
                "Its boxes would be misplaced; fix one of the two."
            )
        if self.cache is not None and self.cache.problem is not None:
            notices.append(Notice("cache", self.cache.problem))
        boxes_xyxy, labels = self._boxes_and_labels(index)
        scaled_down = image.shape[1:] != size  # by the cache
        if scaled_down:
            boxes_xyxy *= boxes_xyxy.new_tensor([image.shape[2] / size[1], image.shape[1] / size[0]] * 2)
        truth = ground_truth(self.annotations, self._labels, index) if self.with_ground_truth else None
        example = LabelledImage(image, boxes_xyxy, labels, landscape, file_size=size if scaled_down else None)
        return self._transformed(index, example, truth, notices)

    def _transformed(
        self, index: int, example: LabelledImage, truth: GroundTruth | None, notices: Sequence[Notice]
    ) -> Sample:
        if self.transform is not None:
            example = self.transform(example)
        entry = self.annotations.images[index]
        return Sample(
            image=example.image,
            boxes_cxcywh=xyxy_to_normalized_cxcywh(example.boxes_xyxy, example.size),
            labels=example.labels,
            image_id=entry.id,
            original_size=entry.size,
            ground_truth=truth,
            notices=tuple(notices),
        )

    def _read(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """The image, as it is or scaled down from the cache, and the (height, width) of its file."""
        path = self.annotations.image_path(index)
        if self.cache is not None:
            return self.cache.read(path)
        image = read_image(path) if self.reader is None else self.reader(self.annotations.images[index].file_name)
        return image, (int(image.shape[1]), int(image.shape[2]))

    def _empty_page(self, index: int, landscape: bool | None, message: str) -> Sample:
        """What stands in for an image that became unreadable during the run.

        The batches cannot become fewer: Lightning and the other processes rely on their number. In training it is a
        blank page without boxes. In evaluation all of it is a crowd region of every class, where by COCO's rules
        detections are neither right nor wrong, so it counts for nothing.
        """
        height, width = self.annotations.images[index].size
        page = LabelledImage(
            torch.full((3, height, width), 255, dtype=torch.uint8),
            torch.zeros(0, 4),
            torch.zeros(0, dtype=torch.int64),
            landscape=landscape,
        )
        everywhere = GroundTruth(
            boxes_xyxy=np.tile([0.0, 0.0, width, height], (len(self.classes), 1)),
            labels=np.arange(len(self.classes)),
            iscrowd=np.ones(len(self.classes), dtype=np.bool_),
            area=np.full(len(self.classes), float(height * width)),
        )
        return self._transformed(
            index,
            page,
            everywhere if self.with_ground_truth else None,
            [Notice(UNREADABLE, f"{message} An empty page takes its place.")],
        )

    def leave_out_unreadable(self) -> str | None:
        """Decode every image once, and from then on leave out those that cannot be; later calls do nothing.

        Returns:
            A sentence on the images left out by this call, None if there are none.

        Raises:
            DataError: no image can be read.
        """
        if self._all_readable:
            return None
        # decoders work outside Python's global lock; a dataset of the user's may not bear several threads
        with ThreadPoolExecutor(available_cores() if self.reader is None else 1) as pool:
            results = pool.map(self._is_readable, range(len(self)))
            name = f"Reading the images of {self.annotations.path.name}"
            few = len(self) < FEW_IMAGES
            readable = list(tqdm(results, name, len(self), unit="image", disable=few, mininterval=bar_seconds()))
        if not any(readable):
            raise DataError(f"{self.annotations.path}: not one of its {len(self)} images can be read.")
        left_out = [str(image.id) for image, keep in zip(self.annotations.images, readable, strict=True) if not keep]
        self.annotations = self.annotations.subset([index for index, keep in enumerate(readable) if keep])
        self._labels = self.classes.labels_of(self.annotations)
        self._all_readable = True
        if not left_out:
            return None
        listed = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        return (
            f"{self.annotations.path}: {len(left_out)} of {len(readable)} images cannot be read and are left out "
            f"(image ids {listed})."
        )

    def _is_readable(self, index: int) -> bool:
        try:
            self._read(index)
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
