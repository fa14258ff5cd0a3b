"""A detector in a file that `export` wrote, whatever runs it: images in, detections as from the checkpoint out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dino_lightning.data.images import ImageLike, to_pixels
from dino_lightning.data.sizes import fitted_size, resized_size
from dino_lightning.data.transforms import resize_pixels
from dino_lightning.detections import Detections, check_score_threshold
from dino_lightning.errors import CheckpointError
from dino_lightning.training.test_time_augmentation import fuse, orientations

FORMAT = "dino_lightning detector 1"
OUTPUTS = ("boxes", "scores", "labels", "tokens")
STORED = (  # what of a file's metadata is used
    "class_names", "category_ids", "score_threshold", "preprocessing", "image_size", "max_size", "stretch_to", "static",
    "mean", "std", "tta_views", "max_detections", "nms_iou_threshold",
)  # fmt: skip
DESCRIPTION_FILE = "dino_lightning.json"  # within a .pt2 file

Run = Callable[..., tuple[Tensor, ...]]  # the inputs of a file in their order -> `OUTPUTS`


@dataclass(frozen=True)
class ImageRule:
    """How an exported file wants its images.

    Attributes:
        preprocessing: "inside" the file, or "outside", see `export`.
        image_size: short side in pixels that images are resized to.
        max_size: limit of the long side.
        stretch_to: side of the square that images are stretched to instead, or None.
        static: (height, width) of the canvas of a file of fixed size; None for one that leaves sizes open.
    """

    preprocessing: str
    image_size: int
    max_size: int
    stretch_to: int | None = None
    static: tuple[int, int] | None = None

    def size(
        self, size: tuple[int, int], image_size: int | None = None, max_size: int | None = None
    ) -> tuple[int, int]:
        """The (height, width) that an image of `size` is resized to before the file gets it."""
        if self.static is not None and (self.stretch_to is not None or self.preprocessing == "inside"):
            return self.static
        if self.preprocessing == "inside":
            return size
        if self.stretch_to is not None and image_size is None and max_size is None:
            return self.stretch_to, self.stretch_to
        ruled = resized_size(size, image_size or self.image_size, max_size or self.max_size)
        return ruled if self.static is None else fitted_size(size, ruled, self.static)

    @property
    def turns(self) -> bool:
        """Whether images can be turned by a quarter after resizing: not for a canvas that is no square."""
        return self.static is None or self.static[0] == self.static[1]

    def resized(self, pixels: Tensor, image_size: int | None = None, max_size: int | None = None) -> Tensor:
        """(3, h, w) uint8, any image -> (3, height, width) uint8, by `size`; without padding."""
        before = _size(pixels)
        after = self.size(before, image_size, max_size)
        return pixels if after == before else resize_pixels(pixels, after)

    def padded(self, pixels: Tensor) -> Tensor:
        """(3, height, width) in the canvas of a file of fixed size, top left, with zeros around it."""
        if self.static is None:
            return pixels
        return functional.pad(pixels, (0, self.static[1] - pixels.shape[2], 0, self.static[0] - pixels.shape[1]))


class ExportedModel:
    """A detector in a file that `python -m dino_lightning export` wrote.

    Args:
        path: the file.
        run: its function.
        stored: its metadata, all values but strings as JSON.

    Attributes:
        path: the file.
        class_names: the name of each label.
        category_ids: the original COCO category id of each label.
        score_threshold: the lowest score that counts, unless another is given.
        rule: how it wants its images.
        tta_views: in how many ways each image is seen unless another number is given, see `DINOModule`.

    Raises:
        CheckpointError: the metadata is not that of a file that `export` wrote.
    """

    def __init__(self, path: str | Path, run: Run, stored: Mapping[str, str]) -> None:
        self.path, self._run = Path(path), run
        try:
            self.class_names = tuple(json.loads(stored["class_names"]))
            self.category_ids = tuple(json.loads(stored["category_ids"]))
            self.score_threshold = check_score_threshold(float(stored["score_threshold"]))
            static = json.loads(stored.get("static", "null"))
            self._fused_by = {
                "max_detections": int(json.loads(stored.get("max_detections", "300"))),
                "nms_iou_threshold": json.loads(stored.get("nms_iou_threshold", "null")),
            }
            self.tta_views = len(orientations(json.loads(stored.get("tta_views", "1"))))
            self.rule = ImageRule(
                stored["preprocessing"],
                int(stored["image_size"]),
                int(stored["max_size"]),
                json.loads(stored["stretch_to"]),
                None if static is None else (int(static[0]), int(static[1])),
            )
            mean, std = (torch.tensor(json.loads(stored[name])) for name in ("mean", "std"))
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} was not written by `python -m dino_lightning export`: its metadata lacks the classes, the "
                "threshold or the sizes of images."
            ) from error
        self._mean, self._std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)

    @property
    def preprocessing(self) -> str:
        """`inside` the file, or `outside`, see `export`."""
        return self.rule.preprocessing

    @property
    def image_size(self) -> int:
        """Short side in pixels that images are resized to."""
        return self.rule.image_size

    @property
    def max_size(self) -> int:
        """Limit of the long side in pixels."""
        return self.rule.max_size

    @property
    def stretch_to(self) -> int | None:
        """Side of the square that images are stretched to instead, or None."""
        return self.rule.stretch_to

    def detect(
        self,
        images: Sequence[ImageLike],
        *,
        threshold: float | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
        tta_views: int | None = None,
    ) -> list[Detections]:
        """Detect objects in images of any kind and size, one at a time; as `DINOModule.detect`.

        Args:
            images: paths, PIL images, (H, W, 3) or (H, W) uint8 arrays, or (3, H, W) tensors, uint8 or floating 0-1.
            threshold: keep detections of at least this score; by default `score_threshold`.
            image_size: short side in pixels to resize to, with preprocessing outside and sizes left open.
            max_size: limit of the long side in pixels, likewise.
            tta_views: in how many ways each image is seen, 1, 2, 4 or 8; by default as the file has it.

        Returns:
            Detections of each image, boxes in its own pixels and clipped to it, see `Detections.within`.

        Raises:
            ValueError: an image that cannot be read, sizes for a file whose sizes are fixed, or a number of views that
                there is not.
        """
        if (image_size or max_size) and (self.preprocessing == "inside" or self.rule.static is not None):
            raise ValueError(
                f"The sizes of images are fixed in {self.path.name}; export with --preprocessing outside and without "
                "--static."
            )
        threshold = check_score_threshold(self.score_threshold if threshold is None else threshold)
        ways = orientations(self.tta_views if tta_views is None else tta_views)
        found = []
        for image in images:
            pixels = to_pixels(image).cpu()
            size, resized = _size(pixels), self.rule.resized(pixels, image_size, max_size)
            views = []
            for way in ways:  # turned after resizing, as `DINOModule` does, where the canvas takes it
                if self.rule.turns or not way.transposed:
                    seen = way.seen(resized)
                else:
                    seen = self.rule.resized(way.seen(pixels), image_size, max_size)
                views.append(way.back(self._detect(seen, way.size(size)), size))
            found.append(fuse(views, **self._fused_by).above(threshold).within(size))
        return found

    def inputs(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What the file is given for an image (3, H, W) uint8."""
        return self._inputs(self.rule.resized(pixels), _size(pixels))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`OUTPUTS` for `inputs`."""
        return self._run(*inputs)

    def _inputs(self, resized: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """What the file is given for a resized image; `size` is its (height, width) before."""
        image = self.rule.padded(resized)[None]
        if self.preprocessing == "inside":
            return (image,)
        prepared = ((image.float() - self._mean) / self._std).contiguous()
        return prepared, torch.tensor([_size(resized)]), torch.tensor([size])

    def _detect(self, resized: Tensor, size: tuple[int, int]) -> Detections:
        """The detections in a resized image, in pixels of its (height, width) before, `size`."""
        boxes, scores, labels = (values[0].cpu() for values in self._run(*self._inputs(resized, size))[:3])
        if self.preprocessing == "inside":  # boxes are in pixels of what the file was given
            boxes = boxes * torch.tensor([size[1] / resized.shape[2], size[0] / resized.shape[1]]).repeat(2)
        kept = scores > 0  # 0: taken out by non-maximum suppression
        return Detections(
            boxes_xyxy=boxes[kept],
            scores=scores[kept],
            labels=labels[kept],
            class_names=self.class_names,
            category_ids=self.category_ids,
        )


def _size(pixels: Tensor) -> tuple[int, int]:
    """(height, width) of (3, h, w)."""
    return int(pixels.shape[1]), int(pixels.shape[2])


def stored_text(description: Mapping[str, Any]) -> dict[str, str]:
    """A description as metadata: all values but strings as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()}
