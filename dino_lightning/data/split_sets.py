"""The images of the splits as training and evaluation see them: read, kept scaled down, transformed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from dino_lightning.data.cache import ImageCache
from dino_lightning.data.dataset import CocoDetection
from dino_lightning.data.map_datasets import ImageReader
from dino_lightning.data.read_splits import Splits
from dino_lightning.data.transforms import Transform
from dino_lightning.errors import DataError
from dino_lightning.files import unwritable

MAX_ASPECT_RATIO = 8  # of images kept scaled down for stretching

Caches = tuple[ImageCache | None, ImageCache | None]  # of training and evaluation


def split_sets(
    splits: Splits,
    readers: Mapping[str, ImageReader],
    *,
    training: Transform,
    evaluation: Transform,
    on_bad_image: Literal["error", "skip"],
    caches: Caches,
) -> tuple[CocoDetection, CocoDetection, CocoDetection | None]:
    """The training, validation and test images; the last are None where there is no such split.

    Args:
        splits: what was read.
        readers: who reads the images of a split, by its name, where they are not files.
        training: what becomes of a training image.
        evaluation: what becomes of one that is evaluated.
        on_bad_image: as in `CocoDataModule`.
        caches: of `image_caches`.
    """
    make = partial(CocoDetection, classes=splits.classes, on_bad_image=on_bad_image)
    train = make(
        splits.train, transform=training, with_ground_truth=False, cache=caches[0], reader=readers.get("train")
    )
    make = partial(make, transform=evaluation, cache=caches[1])
    test = None if splits.test is None else make(splits.test, reader=readers.get("test"))
    return train, make(splits.val, reader=readers.get("val")), test


def image_caches(
    folder: str | None, image_size: int, max_size: int, gigabytes: float, *, stretch_to: int | None
) -> Caches:
    """The caches in a folder, of training and evaluation; neither without one.

    Args:
        folder: where they lie.
        image_size: short side in pixels that images are kept at.
        max_size: limit of their long side in pixels.
        gigabytes: limit of the folder.
        stretch_to: side in pixels of the square that images are stretched to, or None.

    Raises:
        DataError: the folder cannot be written to.
    """
    if folder is None:
        return None, None
    # what is stretched to a square needs its short side in full
    long_side = max_size if stretch_to is None else MAX_ASPECT_RATIO * stretch_to
    make = partial(ImageCache, Path(folder), image_size=image_size, max_bytes=int(gigabytes * 1e9))
    try:
        # in evaluation an image is resized once, so it is kept as it is evaluated
        return make(max_size=long_side), make(max_size=max_size, stretch_to=stretch_to)
    except OSError as error:
        raise DataError(f"cache_dir: {unwritable(folder, error, 'folder')}") from error
