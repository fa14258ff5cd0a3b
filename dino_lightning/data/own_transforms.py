"""The user's own transforms, of torchvision or albumentations, run on training images before the preset's."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dino_lightning.data.class_paths import albumentations_in_use, built, transform_types
from dino_lightning.data.transforms import LabelledImage, Transform
from dino_lightning.errors import DataError

if TYPE_CHECKING:
    GivenTransforms = list[Any]
else:  # what the command line takes; of `Any` its parser would make objects by itself, and change what it keeps
    GivenTransforms = list[dict]

# Of torchvision's, these and all of its module for colours give an image of the size that they got.
KEEP_SIZE: tuple[Any, ...] = (
    v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.RandomAffine, v2.RandomPerspective, v2.ElasticTransform,
    v2.GaussianBlur, v2.GaussianNoise, v2.RandomErasing, v2.JPEG, v2.SanitizeBoundingBoxes, v2.ClampBoundingBoxes,
    v2.Identity,
)  # fmt: skip
COLOURS = "torchvision.transforms.v2._color"
CONTAINERS: tuple[Any, ...] = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)


@dataclass(frozen=True)
class OwnTransforms:
    """Own transforms one after another, and then what the preset does; made by `with_own_transforms`.

    Attributes:
        steps: the transforms; see `with_own_transforms`.
        then: augmentation and resizing of the preset.
        keep_size: whether all of them leave the size of the image as it is.
    """

    steps: tuple[Any, ...]
    then: Transform
    keep_size: bool

    def __call__(self, example: LabelledImage) -> LabelledImage:
        """The image with its boxes, in pixels of that image; boxes without area in it are dropped with their labels.

        Raises:
            DataError: a transform fails, or gives something else than an image with boxes and labels.
        """
        with _drawing_from(int(torch.randint(2**31 - 1, ()))) as (numbers, choices):
            for step in self.steps:
                example = _applied(step, example, numbers, choices)
        return self.then(example)


def with_own_transforms(given: Sequence[Any] | None, then: Transform) -> Transform:
    """A preset's transform with own ones before it.

    Args:
        given: objects, or mappings with `class_path` and `init_args`: transforms of `torchvision.transforms.v2` and of
            albumentations. They get the image as it was read (3, h, w) uint8, its boxes as corners in pixels, and
            its labels. A `Compose` of albumentations may have `bbox_params` of its own, in the format pascal_voc.
        then: what the preset does.

    Returns:
        `then` itself if none are given.

    Raises:
        ValueError: something else is given.
    """
    if not given:
        return then
    if not isinstance(given, list | tuple):
        raise ValueError(f"transforms is {given!r}; it must be a list of transforms.")
    steps = built(given)
    for step in steps:
        if isinstance(step, type) and issubclass(step, transform_types()):
            raise ValueError(f"transforms: {step.__name__} is a class; give an object of it: {step.__name__}(...).")
        if not isinstance(step, transform_types()):
            raise ValueError(
                f"transforms: {step!r} is no transform of torchvision.transforms.v2 or of albumentations. In a "
                "configuration each is given by class_path and init_args."
            )
    keep_size = all(_keeps_size(step) for step in steps)
    return OwnTransforms(tuple(_with_boxes(step) for step in steps), then, keep_size)


def check_picklable(transform: Transform | None) -> None:
    """Refuse own transforms that cannot be sent to loader workers.

    Raises:
        ValueError: where workers are started by another method than `fork`, and pickling fails.
    """
    if not isinstance(transform, OwnTransforms) or multiprocessing.get_start_method() == "fork":
        return
    for step in transform.steps:
        try:
            pickle.dumps(step)
        except Exception as error:  # objects fail to be pickled in many ways
            raise ValueError(
                f"transforms: {_name(step)} cannot be sent to loader workers ({error}). Define what it calls at the "
                "top of a module, or set num_workers=0."
            ) from error


@contextmanager
def _drawing_from(seed: int) -> Iterator[tuple[np.random.Generator, random.Random]]:
    """Two generators for albumentations; Python's and NumPy's global ones draw from the same seed meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield np.random.default_rng(seed), random.Random(seed)
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _with_boxes(step: Any) -> Any:
    """A transform of albumentations in a `Compose` that takes boxes along; others as they are."""
    albumentations = albumentations_in_use()
    if isinstance(step, v2.Transform) or albumentations is None:
        return step
    if isinstance(step, albumentations.Compose) and "bboxes" in step.processors:
        kind = step.processors["bboxes"].params.format
        if kind != "pascal_voc":
            raise ValueError(
                f"transforms: bbox_params of Compose has the format {kind}; give pascal_voc, or leave bbox_params out."
            )
        return step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Got processor for bboxes, but no transform to process it")  # true of noise
        # rounding may put a corner outside by the last digit, which is refused without clip
        return albumentations.Compose([step], bbox_params=albumentations.BboxParams(format="pascal_voc", clip=True))


def _applied(step: Any, example: LabelledImage, numbers: np.random.Generator, choices: random.Random) -> LabelledImage:
    name = _name(step)
    try:
        if isinstance(step, v2.Transform):
            image, boxes_xyxy, labels = _by_torchvision(step, example)
        else:
            step.set_random_state(numbers, choices)
            image, boxes_xyxy, labels = _by_albumentations(step, example)
    except DataError:
        raise
    except Exception as error:  # whatever the code of others raises
        height, width = example.size
        raise DataError(
            f"transforms: {name} fails on an image of {width} x {height} pixels with {len(example.labels)} boxes "
            f"({type(error).__name__}: {error})."
        ) from error
    _check_image(name, image)
    if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4 or labels.shape != boxes_xyxy.shape[:1]:
        raise DataError(
            f"transforms: {name} gives boxes of shape {tuple(boxes_xyxy.shape)} with labels of shape "
            f"{tuple(labels.shape)}; it must give N x 4 and N of them."
        )
    height, width = int(image.shape[1]), int(image.shape[2])
    boxes_xyxy = boxes_xyxy.float().clamp(min=0).minimum(torch.tensor([width, height, width, height]).float())
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(-1)  # False for NaN, too
    return replace(example, image=image, boxes_xyxy=boxes_xyxy[keep], labels=labels[keep].long())


def _by_torchvision(step: Callable[..., Any], example: LabelledImage) -> tuple[Any, Tensor, Tensor]:
    boxes = tv_tensors.BoundingBoxes(
        example.boxes_xyxy, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=example.size
    )
    image, target = step(tv_tensors.Image(example.image), {"boxes": boxes, "labels": example.labels})
    boxes = target["boxes"]
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = functional.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    plain = image.as_subclass(Tensor) if isinstance(image, Tensor) else image
    return plain, boxes.as_subclass(Tensor), target["labels"]


def _by_albumentations(step: Any, example: LabelledImage) -> tuple[Any, Tensor, Tensor]:
    # labels as a fifth column come back in step with the boxes, whatever label fields the Compose asks for
    columns = np.column_stack([example.boxes_xyxy.numpy(), example.labels.numpy()]).astype(np.float32)
    fields = step.processors["bboxes"].params.label_fields or ()
    pixels = np.ascontiguousarray(example.image.permute(1, 2, 0).numpy())
    found = step(image=pixels, bboxes=columns, **dict.fromkeys(fields, example.labels.tolist()))
    rows = torch.from_numpy(np.asarray(found["bboxes"], dtype=np.float32).reshape(-1, 5))
    image = found["image"]
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return image, rows[:, :4], rows[:, 4].round()


def _check_image(name: str, image: Any) -> None:
    if not isinstance(image, Tensor):
        kind = f"an array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"transforms: {name} gives {kind} as the image; leave it out: images are 3 x h x w of uint8.")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise DataError(
            f"transforms: {name} gives an image of shape {tuple(image.shape)} and {image.dtype}; it must give "
            "3 x h x w of torch.uint8, as it gets. The model normalises images itself."
        )


def _name(step: Any) -> str:
    """The name of a transform; of the one inside where `_with_boxes` wrapped it or a Compose has just one."""
    inner: Any = getattr(step, "transforms", ())
    if type(step).__name__ == "Compose" and len(inner) == 1:
        return _name(inner[0])
    return type(step).__name__


def _keeps_size(step: Any) -> bool:
    """Whether a transform is known to give an image of the size that it gets."""
    if isinstance(step, CONTAINERS):
        return all(_keeps_size(inner) for inner in step.transforms)
    if isinstance(step, v2.Transform):
        # by class, not by base class: what inherits may do more
        return type(step) in KEEP_SIZE or type(step).__module__ == COLOURS
    albumentations = albumentations_in_use()
    if albumentations is None:
        return False
    if isinstance(step, albumentations.BaseCompose):
        return all(_keeps_size(inner) for inner in step.transforms)
    return isinstance(step, albumentations.ImageOnlyTransform)
