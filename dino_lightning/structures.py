"""The values that travel between the parts: batches, targets, model output, detections.

One legend of shape letters for the whole package: B batch, S tokens, Q queries, L levels (or decoder layers, said
where), P points, H heads, D dim, K classes, N boxes. Counts and sizes stay on the host as Python ints, so that no
part needs a device synchronisation to learn a shape. Nobody changes them; they are not frozen dataclasses because
Lightning's functions for collections (`move_data_to_device`, `convert_input`) refuse those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from dino_lightning.boxes import xyxy_to_normalized_cxcywh

PAST_THE_ENDS = 0.5  # floating pixels may pass 0 and 1 so far, as those of cubic resizing do


@dataclass
class Targets:
    """The boxes to find, padded to the largest count in the batch.

    Attributes:
        boxes_cxcywh: (B, N, 4) float32, centre x, centre y, width, height, each 0-1 of the image before padding;
            rows past an image's count are zero.
        labels: (B, N) int64, contiguous labels 0..K-1; entries past an image's count are zero.
        valid: (B, N) bool, True for a box, False for padding.
        num_boxes: the count of each image, on the host.
        highest_label: the highest label there is, on the host; -1 without boxes.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    valid: Tensor
    num_boxes: tuple[int, ...]
    highest_label: int

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on another device; see `Batch.to`."""
        return replace(
            self,
            boxes_cxcywh=_copy_to(self.boxes_cxcywh, device),
            labels=_copy_to(self.labels, device),
            valid=_copy_to(self.valid, device),
        )

    def pin_memory(self) -> Targets:
        """The same targets in page-locked memory, for an asynchronous copy to the device."""
        return replace(
            self,
            boxes_cxcywh=self.boxes_cxcywh.pin_memory(),
            labels=self.labels.pin_memory(),
            valid=self.valid.pin_memory(),
        )


@dataclass
class GroundTruth:
    """What evaluation compares against, for one image, exactly as annotated (crowd regions included).

    Attributes:
        boxes_xyxy: (N, 4) float64, corners in pixels of the original image.
        labels: (N,) int64, contiguous labels 0..K-1.
        iscrowd: (N,) bool, True for a region in which detections are neither right nor wrong.
        area: (N,) float64, square pixels; COCO's own `area` (of the mask) where the annotation gives one.
    """

    boxes_xyxy: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    area: npt.NDArray[np.float64]


class Notice(NamedTuple):
    """A problem with the data that did not stop the run; reported once for each kind, and counted.

    Attributes:
        kind: groups the notices that are reported and counted together.
        message: one sentence.
    """

    kind: str
    message: str


@dataclass
class Batch:
    """A batch of images, placed top left in a common canvas, with what is known about each.

    Attributes:
        images: (B, 3, H, W). uint8: RGB pixels 0-255, normalised later on the device. Floating point: taken as
            already normalised.
        image_sizes: (height, width) in pixels of each image before padding.
        image_ids: the ids of the images in their COCO file.
        original_sizes: (height, width) in pixels of each image file, before resizing.
        targets: the boxes to learn from, or None.
        ground_truth: the annotations to evaluate against, or None.
        notices: problems with its images that did not stop the run.
    """

    images: Tensor
    image_sizes: tuple[tuple[int, int], ...]
    image_ids: tuple[int, ...]
    original_sizes: tuple[tuple[int, int], ...]
    targets: Targets | None = None
    ground_truth: tuple[GroundTruth, ...] | None = None
    notices: tuple[Notice, ...] = ()

    def __len__(self) -> int:
        return len(self.image_sizes)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device; to a GPU the host does not wait for the copy."""
        return replace(
            self,
            images=_copy_to(self.images, device),
            targets=None if self.targets is None else self.targets.to(device),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
        )

    @classmethod
    def from_images(
        cls,
        images: Sequence[Tensor],
        *,
        image_ids: Sequence[int] | None = None,
        original_sizes: Sequence[tuple[int, int]] | None = None,
        targets: Sequence[tuple[Tensor, Tensor]] | None = None,
        ground_truth: Sequence[GroundTruth] | None = None,
        pad_to: tuple[int, int] | None = None,
        pad_to_multiple: int = 1,
    ) -> Self:
        """Pad images of different sizes into one batch.

        Args:
            images: per image (3, h, w), all uint8 or all of one floating-point type.
            image_ids: defaults to 0, 1, 2, ...
            original_sizes: (height, width) of each file; defaults to the sizes of `images`.
            targets: per image boxes_cxcywh (n, 4) float32 normalised 0-1 and labels (n,) int64.
            ground_truth: per image, the annotations to evaluate against.
            pad_to: canvas (height, width); defaults to the largest height and width in the batch.
            pad_to_multiple: round the canvas up to a multiple of this.

        Raises:
            ValueError: no images, shapes that are not (3, h, w), or a canvas smaller than an image.
        """
        if not images:
            raise ValueError("A batch needs at least one image.")
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"Image {index} has shape {tuple(image.shape)}; expected (3, height, width).")
        sizes = tuple((int(image.shape[1]), int(image.shape[2])) for image in images)
        height = max(size[0] for size in sizes)
        width = max(size[1] for size in sizes)
        if pad_to is not None:
            if pad_to[0] < height or pad_to[1] < width:
                raise ValueError(f"Canvas {pad_to} is smaller than the largest image ({height}, {width}).")
            height, width = pad_to
        height = -(-height // pad_to_multiple) * pad_to_multiple
        width = -(-width // pad_to_multiple) * pad_to_multiple
        canvas = images[0].new_zeros((len(images), 3, height, width))
        for index, image in enumerate(images):
            canvas[index, :, : image.shape[1], : image.shape[2]] = image
        return cls(
            images=canvas,
            image_sizes=sizes,
            image_ids=tuple(image_ids) if image_ids is not None else tuple(range(len(images))),
            original_sizes=tuple(original_sizes) if original_sizes is not None else sizes,
            targets=None if targets is None else pad_targets(targets),
            ground_truth=None if ground_truth is None else tuple(ground_truth),
        )

    @classmethod
    def from_torchvision(
        cls,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        *,
        first_label: int = 1,
    ) -> Self:
        """A batch from torchvision's detection convention, for users with a data module of their own.

        Args:
            images: per image (3, h, w), floating point 0-1 or uint8 0-255.
            targets: per image a mapping with `boxes` (n, 4) in pixels, x1 y1 x2 y2, and `labels` (n,); optionally
                `image_id`, `iscrowd` and `area`.
            first_label: the label of the first class. Torchvision keeps 0 for the background, so classes start
                at 1; pass 0 if yours start at 0.

        Raises:
            ValueError: a label below `first_label`, boxes that are not (n, 4), or pixels of another kind.
        """
        pixels = [to_uint8(image) for image in images]
        if targets is None:
            return cls.from_images(pixels)
        padded: list[tuple[Tensor, Tensor]] = []
        truths: list[GroundTruth] = []
        ids: list[int] = []
        for index, (image, target) in enumerate(zip(pixels, targets, strict=True)):
            boxes_xyxy = target["boxes"].float()
            if boxes_xyxy.numel() == 0:
                boxes_xyxy = boxes_xyxy.reshape(0, 4)
            if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4:
                raise ValueError(f"Target {index}: boxes have shape {tuple(boxes_xyxy.shape)}; expected (n, 4).")
            labels = target["labels"].long().reshape(-1) - first_label
            if labels.numel() and int(labels.min()) < 0:
                raise ValueError(
                    f"Target {index} has label {int(labels.min()) + first_label}, below first_label={first_label}. "
                    "Torchvision's labels start at 1 (0 is the background); pass first_label=0 if yours start at 0."
                )
            crowd = target.get("iscrowd", torch.zeros_like(labels)).bool().reshape(-1)
            corners = boxes_xyxy.double().numpy(force=True)
            area = target.get("area", (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(-1))
            size = (int(image.shape[1]), int(image.shape[2]))
            padded.append((xyxy_to_normalized_cxcywh(boxes_xyxy[~crowd], size), labels[~crowd]))
            truths.append(
                GroundTruth(
                    boxes_xyxy=corners,
                    labels=labels.numpy(force=True),
                    iscrowd=crowd.numpy(force=True),
                    area=area.double().numpy(force=True),
                )
            )
            ids.append(int(target["image_id"]) if "image_id" in target else index)
        return cls.from_images(pixels, image_ids=ids, targets=padded, ground_truth=truths)


def _copy_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy asynchronously to a GPU only: a copy to the host could be read before it is complete."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def to_uint8(image: Tensor) -> Tensor:
    """Pixels as uint8 0-255, from uint8 or from floating point 0-1.

    Raises:
        ValueError: pixels of another type, or floating ones that are not 0-1; they may pass the ends a little.
    """
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"The pixels of an image are {image.dtype}; they must be uint8 0-255, or floating 0-1.")
    if image.numel():
        low, high = (float(value) for value in torch.aminmax(image))
        if not (low >= -PAST_THE_ENDS and high <= 1 + PAST_THE_ENDS):
            raise ValueError(
                f"The pixels of an image go from {low:g} to {high:g}; floating ones must be 0-1, and not normalised."
            )
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def pad_targets(targets: Sequence[tuple[Tensor, Tensor]]) -> Targets:
    """Pad per-image (boxes_cxcywh (n, 4), labels (n,)) to `Targets` of the largest count.

    Raises:
        ValueError: a negative label.
    """
    counts = tuple(int(labels.shape[0]) for _, labels in targets)
    boxes_cxcywh = torch.zeros(len(targets), max(counts, default=0), 4)
    padded_labels = torch.zeros(len(targets), max(counts, default=0), dtype=torch.int64)
    valid = torch.zeros(len(targets), max(counts, default=0), dtype=torch.bool)
    for index, (boxes, labels) in enumerate(targets):
        boxes_cxcywh[index, : counts[index]] = boxes
        padded_labels[index, : counts[index]] = labels
        valid[index, : counts[index]] = True
    if padded_labels.numel() and int(padded_labels.min()) < 0:
        raise ValueError(f"There is a label {int(padded_labels.min())}; labels start at 0.")
    return Targets(
        boxes_cxcywh=boxes_cxcywh,
        labels=padded_labels,
        valid=valid,
        num_boxes=counts,
        highest_label=int(padded_labels.max()) if any(counts) else -1,
    )


@dataclass
class DenoisingOutput:
    """The decoder's output for the denoising queries, and how they correspond to the targets.

    Slot `(2 g + s) * max_boxes + j` holds, for group g, box j of each image: noised slightly (s = 0, positive) or
    strongly (s = 1, negative). Slots past an image's count are queries without a box.

    Attributes:
        pred_logits: (L, B, R, K) for L decoder layers and R = 2 * num_groups * max_boxes slots.
        pred_boxes: (L, B, R, 4) cxcywh, 0-1 of the image before padding.
        num_groups: groups of denoising queries.
        max_boxes: the largest box count in the batch.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    num_groups: int
    max_boxes: int


@dataclass
class ModelOutput:
    """The detector's output for a batch; all decoder layers stacked.

    Attributes:
        pred_logits: (L, B, Q, K) class logits of the L decoder layers, the last one final.
        pred_boxes: (L, B, Q, 4) cxcywh, 0-1 of the image before padding.
        encoder_logits: (B, Q, K) class logits of the selected encoder proposals.
        encoder_boxes: (B, Q, 4) boxes of the selected encoder proposals.
        denoising: outputs of the denoising queries, in training with at least one box in the batch.
        group_logits: (L * G, B, Q, K) of G more groups of queries, in training with such; layer by layer.
        group_boxes: (L * G, B, Q, 4) their boxes.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    denoising: DenoisingOutput | None = None
    group_logits: Tensor | None = None
    group_boxes: Tensor | None = None
