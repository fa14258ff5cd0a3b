"""Datasets of torchvision's detection convention as annotations in memory: `dataset[i]` gives image and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from dino_lightning.console import bar_seconds
from dino_lightning.data.classes import check_classes, classes_of
from dino_lightning.data.coco import CLIP_TOLERANCE, Category, CocoAnnotations, ImageTable
from dino_lightning.data.images import to_pixels
from dino_lightning.data.label_names import SHOWN, ClassNames, label_names, names_in_words
from dino_lightning.data.read_splits import Splits, repairs_of
from dino_lightning.errors import DataError
from dino_lightning.structures import to_uint8

FEW_IMAGES = 200  # read so quickly that a progress bar is of no use


@dataclass(frozen=True)
class _Target:
    """What a dataset says of one image: its size (height, width), its id or None, and a row for each object."""

    size: tuple[int, int]
    image_id: int | None
    boxes_xyxy: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    area: npt.NDArray[np.float64]


def read_datasets(datasets: Mapping[str, Dataset[Any] | None], class_names: ClassNames | None) -> Splits:
    """Read the targets of all images once.

    Args:
        datasets: "train", "val" and "test", which may be None. `dataset[i]` gives an image (Pillow's, or a tensor
            (3, h, w), uint8 or from 0 to 1) and its target: a dict with `boxes` (N, 4), corners in pixels or
            `tv_tensors.BoundingBoxes`, and `labels` (N,), or a list of COCO annotations as of torchvision's
            `CocoDetection`.
        class_names: by value of the labels, or a list; see `CocoDataModule.from_datasets`.

    Raises:
        DataError: an entry is something else; the message says which.
    """
    read = {
        name: _targets(name, dataset) for name, dataset in datasets.items() if not (name == "test" and dataset is None)
    }
    occurring = {name: sorted({int(v) for target in found for v in target.labels}) for name, found in read.items()}
    names = label_names(class_names, occurring, datasets["train"])
    notes = [names_in_words(names)]
    found: dict[str, CocoAnnotations] = {}
    for name, targets in read.items():
        unknown = {value: f"class {value}" for value in occurring[name] if value not in names and name != "train"}
        made, numbered = _annotations(Path(f"{name} dataset"), targets, {**names, **unknown})
        if numbered:
            notes.append(f"The {name} dataset has no image_id for each image of its own: images are numbered from 0.")
        found[name] = made
    if reason := found["train"].nothing_to_learn():
        raise DataError(f"train dataset: {reason.partition(' --data')[0]}")
    classes = classes_of(found["train"])
    for split in found.values():
        check_classes(split, classes)
    repairs = [sentence for split in found.values() if (sentence := repairs_of(split)[0])]
    learnt = set(classes.labels_of(found["train"])[found["train"].usable & ~found["train"].iscrowd].tolist())
    if unused := [name for label, name in enumerate(classes.names) if label not in learnt]:
        shown = ", ".join(unused[:SHOWN])
        repairs.append(f"train dataset: {len(unused)} of {len(classes)} classes have no box to learn from: {shown}.")
    return Splits(classes, found["train"], found["val"], found.get("test"), tuple(notes), tuple(repairs))


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of a dataset: (3, h, w) uint8, by the file name that `read_datasets` gives them, their index."""

    dataset: Any
    name: str

    def __call__(self, file_name: str) -> Tensor:
        """The image.

        Raises:
            DataError: the dataset cannot give it.
        """
        where = f"{self.name} dataset[{file_name}]"
        return _pixels(_item(self.dataset, int(file_name), where)[0], where)


def _targets(name: str, dataset: Any) -> list[_Target]:
    try:
        count = len(dataset)
    except TypeError as error:
        raise DataError(
            f"{name} dataset: a {type(dataset).__name__} has no length; give a map-style dataset."
        ) from error
    if not count:
        raise DataError(f"{name} dataset: it has no images.")
    few = count < FEW_IMAGES
    indices = tqdm(range(count), f"Reading the {name} dataset", unit="image", disable=few, mininterval=bar_seconds())
    targets = []
    for index in indices:
        where = f"{name} dataset[{index}]"
        if (known := _without_decoding(dataset, index)) is None:
            image, target = _item(dataset, index, where)
            known = _size(image, where), target
        targets.append(_target(*known, _file_id(dataset, index), where))
    return targets


def _item(dataset: Any, index: int, where: str) -> tuple[Any, Any]:
    try:
        item = dataset[index]
    except Exception as error:  # the dataset is the user's
        raise DataError(f"{where} cannot be read ({type(error).__name__}: {error}).") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"{where} gives a {type(item).__name__}; it must give a pair: image, target.")
    return item[0], item[1]


def _size(image: Any, where: str) -> tuple[int, int]:
    """(height, width) in pixels of an image that can be used."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    shown = type(image).__name__
    if isinstance(image, Tensor):
        shown = f"{tuple(image.shape)} of {image.dtype}"
        if image.ndim == 3 and image.shape[0] in (1, 3) and image.numel():
            in_range = image.is_floating_point() and bool(image.min() >= 0) and bool(image.max() <= 1)
            if image.dtype == torch.uint8 or in_range:
                return int(image.shape[1]), int(image.shape[2])
            shown += f" with values from {float(image.min()):.4g} to {float(image.max()):.4g}"
    raise DataError(
        f"{where}: the image is {shown}; it must be a Pillow image, or a tensor 3 x h x w of torch.uint8 or of values "
        "from 0 to 1. Leave out what normalises it."
    )


def _pixels(image: Any, where: str) -> Tensor:
    """(3, h, w) uint8."""
    _size(image, where)
    if isinstance(image, Tensor):
        return to_uint8(image.as_subclass(Tensor)).expand(3, -1, -1)
    return to_pixels(image)


def _behind(dataset: Any, index: int) -> tuple[Any, int]:
    """The dataset that subsets are of, and the index there."""
    while isinstance(dataset, Subset):
        index, dataset = int(dataset.indices[index]), dataset.dataset
    return dataset, index


def _file_id(dataset: Any, index: int) -> int | None:
    """The image id of a torchvision `CocoDetection`, through subsets of it; None for other datasets."""
    dataset, index = _behind(dataset, index)
    ids = getattr(dataset, "ids", None)
    return int(ids[index]) if isinstance(ids, list) and hasattr(dataset, "coco") else None


def _without_decoding(dataset: Any, index: int) -> tuple[tuple[int, int], Any] | None:
    """Size and target of an image of a torchvision `CocoDetection`, which has both in memory; None for others."""
    dataset, index = _behind(dataset, index)
    if type(dataset) is not CocoDetection or dataset.transforms is not None:
        return None
    image_id = dataset.ids[index]
    entry = dataset.coco.imgs[image_id]
    if not all(isinstance(entry.get(side), int) for side in ("height", "width")):
        return None
    return (entry["height"], entry["width"]), dataset.coco.loadAnns(dataset.coco.getAnnIds(imgIds=[image_id]))


def _target(size: tuple[int, int], target: Any, image_id: int | None, where: str) -> _Target:
    if isinstance(target, Mapping) and "boxes" not in target and isinstance(target.get("annotations"), list):
        target = target["annotations"]
    if isinstance(target, list | tuple):
        target = _of_coco(target, where)
    if not isinstance(target, Mapping) or "boxes" not in target or "labels" not in target:
        has = f"a dict with {', '.join(map(str, target))}" if isinstance(target, Mapping) else type(target).__name__
        raise DataError(f"{where}: the target is {has}; it must be a dict with boxes and labels, or COCO annotations.")
    boxes_xyxy = _boxes(target["boxes"], where)
    count = len(boxes_xyxy)
    labels = _column(target, "labels", count, where)
    if not np.equal(labels, np.round(labels)).all():
        raise DataError(f"{where}: labels are {labels.tolist()}; they must be whole numbers.")
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    given_id = target.get("image_id")
    if given_id is not None:
        try:
            image_id = int(given_id)
        except (TypeError, ValueError):
            image_id = None  # a name, say: images are numbered then
    return _Target(
        size=size,
        image_id=image_id,
        boxes_xyxy=boxes_xyxy,
        labels=labels.astype(np.int64),
        iscrowd=_column(target, "iscrowd", count, where) != 0 if "iscrowd" in target else np.zeros(count, np.bool_),
        area=_column(target, "area", count, where) if "area" in target else sides.prod(axis=1),
    )


def _of_coco(annotations: Sequence[Any], where: str) -> dict[str, Any]:
    """A list of COCO annotations as a dict of torchvision's convention."""
    for entry in annotations:
        if not isinstance(entry, Mapping) or "bbox" not in entry or "category_id" not in entry:
            raise DataError(
                f"{where}: the target is a list with something else than annotations with bbox and category_id."
            )
    numbers = _numbers([entry["bbox"] for entry in annotations], "bbox", where).reshape(-1, 4)
    target = {
        "boxes": np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1),
        "labels": [entry["category_id"] for entry in annotations],
        "iscrowd": [entry.get("iscrowd") or 0 for entry in annotations],
    }
    if annotations and all("area" in entry for entry in annotations):
        target["area"] = [entry["area"] for entry in annotations]
    if annotations and "image_id" in annotations[0]:
        target["image_id"] = annotations[0]["image_id"]
    return target


def _boxes(given: Any, where: str) -> npt.NDArray[np.float64]:
    if isinstance(given, tv_tensors.BoundingBoxes):
        # in float64: a conversion of whole numbers would round halves away
        double = tv_tensors.wrap(given.as_subclass(Tensor).double(), like=given)
        given = functional.convert_bounding_box_format(double, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    boxes = _numbers(given, "boxes", where)
    if not boxes.size:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"{where}: boxes have the shape {boxes.shape}; it must be N x 4.")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        first = boxes[(boxes[:, 2:] < boxes[:, :2]).any(axis=1)][0].tolist()
        raise DataError(
            f"{where}: the box {first} ends before it begins; boxes are x1, y1, x2, y2 in pixels, or "
            "tv_tensors.BoundingBoxes of any format."
        )
    return boxes


def _column(target: Mapping[str, Any], key: str, count: int, where: str) -> npt.NDArray[np.float64]:
    values = _numbers(target[key], key, where)
    if values.size != count or values.ndim > 1:
        raise DataError(f"{where}: {key} has the shape {values.shape} beside {count} boxes; it must have one for each.")
    return values


def _numbers(given: Any, key: str, where: str) -> npt.NDArray[np.float64]:
    try:
        found = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {key} cannot be read as numbers ({error}).") from error
    if not np.isfinite(found).all():
        raise DataError(f"{where}: {key} has values that are not finite.")
    return found


def _annotations(path: Path, targets: Sequence[_Target], names: Mapping[int, str]) -> tuple[CocoAnnotations, bool]:
    """The annotations in memory, and whether images had to be numbered."""
    ids = [target.image_id for target in targets]
    numbered = None in ids or len(set(ids)) < len(ids)
    images = ImageTable.of(
        [index if numbered or image_id is None else image_id for index, image_id in enumerate(ids)],
        [str(index) for index in range(len(targets))],
        [target.size for target in targets],
    )
    values = sorted(names)
    counts = np.array([len(target.labels) for target in targets])
    boxes_xyxy = np.concatenate([target.boxes_xyxy for target in targets])
    limits = np.repeat(np.array([target.size for target in targets], np.float64)[:, [1, 0, 1, 0]], counts, axis=0)
    inside = np.clip(boxes_xyxy, 0, limits).astype(np.float32)  # checked in the precision that training uses
    usable = (inside[:, 2:] > inside[:, :2]).all(axis=1)
    sticks_out = ((boxes_xyxy < -CLIP_TOLERANCE) | (boxes_xyxy > limits + CLIP_TOLERANCE)).any(axis=1)
    labels = np.concatenate([target.labels for target in targets])
    made = CocoAnnotations(
        path=path,
        images_folder=path,
        categories=tuple(Category(value, names[value], "") for value in values),
        images=images,
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=boxes_xyxy,
        category_indices=np.searchsorted(values, labels).astype(np.int64),
        iscrowd=np.concatenate([target.iscrowd for target in targets]).astype(np.bool_),
        area=np.concatenate([target.area for target in targets]),
        usable=usable,
        clipped=usable & sticks_out,
        annotation_ids=np.full(len(labels), -1, dtype=np.int64),
    )
    return made, numbered
