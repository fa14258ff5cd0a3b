"""What COCO annotation files hold, as arrays; `annotation_file` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dino_lightning.structures import GroundTruth

CLIP_TOLERANCE = 0.01  # pixels; coordinates rounded to two decimals overshoot the border by less
ROUNDING = 1.0  # pixels; what programs overshoot by when they round or scale


@dataclass(frozen=True)
class Problem:
    """Something wrong with an annotation file, or odd.

    Attributes:
        kind: a name that does not change, see `dino_lightning.data.findings`, which also says how bad it is.
        message: one sentence: which file, which entry, what is wrong, what to do.
        image_id: the image concerned, if it is known.
        annotation_id: the annotation concerned, if it has an id.
        file_name: the image file concerned, if it is known.
    """

    kind: str
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
    file_name: str | None = None


@dataclass(frozen=True)
class Category:
    """One entry of `categories`."""

    id: int
    name: str
    supercategory: str


@dataclass(frozen=True)
class ImageEntry:
    """One entry of `images`: its size is (height, width) in pixels, its name relative to the image folder."""

    id: int
    file_name: str
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class ImageTable(Sequence[ImageEntry]):
    """The images of a file as arrays: an `ImageEntry` is made when it is asked for.

    A hundred thousand Python objects would be copied into every loader worker as soon as it counts references to them.

    Attributes:
        ids: (images,) int64.
        sizes: (images, 2) int64, height and width in pixels.
        name_bytes: all file names in UTF-8, one after the other; uint8.
        name_ends: (images + 1,) int64, where each name begins and the last one ends.
    """

    ids: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    name_bytes: npt.NDArray[np.uint8]
    name_ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ids: Sequence[int], names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> ImageTable:
        """A table of ids, file names, and (height, width) in pixels."""
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        return cls(
            ids=np.array(ids, dtype=np.int64),
            sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
            name_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            name_ends=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> ImageEntry: ...

    @overload
    def __getitem__(self, index: slice) -> ImageTable: ...

    def __getitem__(self, index: int | slice) -> ImageEntry | ImageTable:
        """One image, or a table of some of them."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        index = range(len(self))[index]
        height, width = self.sizes[index].tolist()
        return ImageEntry(int(self.ids[index]), self.name(index), (height, width))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def name(self, index: int) -> str:
        """The file name of one image, relative to its folder."""
        content = self.name_bytes[self.name_ends[index] : self.name_ends[index + 1]].tobytes()
        return content.decode("utf-8", "surrogatepass")

    def subset(self, indices: Sequence[int]) -> ImageTable:
        """The images at `indices`, in that order."""
        rows = np.array(indices, dtype=np.int64)
        names = [self.name_bytes[self.name_ends[i] : self.name_ends[i + 1]] for i in rows.tolist()]
        return ImageTable(
            ids=self.ids[rows],
            sizes=self.sizes[rows],
            name_bytes=np.concatenate([np.zeros(0, np.uint8), *names]),
            name_ends=np.cumsum([0, *map(len, names)], dtype=np.int64),
        )


@dataclass(frozen=True)
class AnnotationSummary:
    """What an annotation file holds, and what was dropped or clipped.

    Attributes:
        images: images listed, with boxes or without.
        boxes: boxes to learn from (not crowd, not degenerate).
        crowd: crowd regions; they count in evaluation only.
        degenerate: boxes without area inside the image; dropped.
        clipped: boxes that stuck out of the image; learnt from up to its border.
        images_without_boxes: images with nothing to learn from; kept.
    """

    images: int
    boxes: int
    crowd: int
    degenerate: int
    clipped: int
    images_without_boxes: int

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.boxes} boxes, {self.crowd} crowd, "
            f"{self.degenerate} degenerate dropped, {self.clipped} clipped, "
            f"{self.images_without_boxes} images without boxes"
        )


@dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file. The annotations of image i are the rows `offsets[i]` to `offsets[i + 1]`.

    Flat arrays rather than lists of objects: they are shared with loader workers without being copied.

    Attributes:
        path: the JSON file, for messages.
        images_folder: what the file names are relative to.
        categories: all categories listed, sorted by id.
        images: all images listed, in the order of the file.
        offsets: (images + 1,) int64.
        boxes_xyxy: (A, 4) float64, corners in pixels as annotated, not clipped.
        category_indices: (A,) int64, index into `categories`.
        iscrowd: (A,) bool.
        area: (A,) float64, square pixels; the file's `area` where it has one that can be, else width times height.
        usable: (A,) bool, False for a box without area inside its image.
        clipped: (A,) bool, True for a usable box that sticks out of its image.
        annotation_ids: (A,) int64, -1 for an annotation without an id.
    """

    path: Path
    images_folder: Path
    categories: tuple[Category, ...]
    images: ImageTable
    offsets: npt.NDArray[np.int64]
    boxes_xyxy: npt.NDArray[np.float64]
    category_indices: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    area: npt.NDArray[np.float64]
    usable: npt.NDArray[np.bool_]
    clipped: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]

    def image_path(self, index: int) -> Path:
        """Where the file of image `index` lies."""
        return self.images_folder / self.images.name(index)

    def subset(self, indices: Sequence[int]) -> CocoAnnotations:
        """The same file with only the images at `indices`, in that order."""
        counts = np.diff(self.offsets)[list(indices)]
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices] or [np.zeros(0, np.int64)]
        )
        return replace(
            self,
            images=self.images.subset(indices),
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            **{name: getattr(self, name)[rows] for name in ROW_ARRAYS},
        )

    def overshoot(self) -> npt.NDArray[np.float64]:
        """(A,) by how many pixels each box sticks out of its image; 0 for one that does not."""
        limits = np.repeat(self.images.sizes, np.diff(self.offsets), axis=0)[:, [1, 0, 1, 0]]
        outside: npt.NDArray[np.float64] = np.maximum(-self.boxes_xyxy, self.boxes_xyxy - limits).max(
            axis=1, initial=0.0
        )
        return outside

    def keep_rows(self, rows: npt.NDArray[np.bool_]) -> CocoAnnotations:
        """The same file with only the annotations where `rows`, (A,), is True; all images stay."""
        before = np.concatenate(([0], np.cumsum(rows)))
        return replace(
            self,
            offsets=before[self.offsets].astype(np.int64),
            **{name: getattr(self, name)[rows] for name in ROW_ARRAYS},
        )

    @property
    def learnable(self) -> npt.NDArray[np.bool_]:
        """(A,) the boxes to learn from: with an area, and no crowd regions."""
        return self.usable & ~self.iscrowd

    def learnable_per_image(self) -> npt.NDArray[np.int64]:
        """(images,) number of boxes to learn from in each image."""
        return np.diff(np.concatenate(([0], np.cumsum(self.learnable)))[self.offsets])

    @property
    def summary(self) -> AnnotationSummary:
        """The counts of this file."""
        per_image = self.learnable_per_image()
        return AnnotationSummary(
            images=len(self.images),
            boxes=int(per_image.sum()),
            crowd=int((self.usable & self.iscrowd).sum()),
            degenerate=int((~self.usable).sum()),
            clipped=int(self.clipped.sum()),
            images_without_boxes=int((per_image == 0).sum()),
        )

    def nothing_to_learn(self) -> str:
        """Why there is no box to learn from, after the path; empty if there are some."""
        summary, total = self.summary, len(self.usable)
        if summary.boxes:
            return ""
        if not total:
            return "no box to learn from: it has no annotations. Export the dataset again, with its boxes."
        crowd = "crowd regions (iscrowd 1), as CVAT exports masks"
        hint = " --data.crowd objects reads crowd regions as objects." if summary.crowd else ""
        outside = "boxes without area inside their image"
        if summary.crowd == total or summary.degenerate == total:
            return f"no box to learn from: all {total} annotations are {crowd if summary.crowd else outside}.{hint}"
        reasons = f"{summary.crowd} are {crowd}, and {summary.degenerate} are {outside}"
        return f"no box to learn from: of {total} annotations {reasons}.{hint}"

    def used_category_ids(self) -> set[int]:
        """The ids that at least one annotation uses."""
        return {self.categories[index].id for index in np.unique(self.category_indices).tolist()}


ROW_ARRAYS = ("boxes_xyxy", "category_indices", "iscrowd", "area", "usable", "clipped", "annotation_ids")


def ground_truth(annotations: CocoAnnotations, labels: npt.NDArray[np.int64], index: int) -> GroundTruth:
    """What evaluation compares against in image `index`: everything as annotated but degenerate boxes."""
    from dino_lightning.structures import GroundTruth  # imports PyTorch, which reading a file does not need

    rows = np.arange(annotations.offsets[index], annotations.offsets[index + 1])
    rows = rows[annotations.usable[rows]]
    return GroundTruth(
        boxes_xyxy=annotations.boxes_xyxy[rows],
        labels=labels[rows],
        iscrowd=annotations.iscrowd[rows],
        area=annotations.area[rows],
    )
