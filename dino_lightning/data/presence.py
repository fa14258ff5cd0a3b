"""Whether the image files that an annotation file lists are there, without opening one of them."""

from __future__ import annotations

from pathlib import Path

from dino_lightning.data.annotation_file import shown_value
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.splits import is_file
from dino_lightning.errors import DataError

FILES_TO_PROBE = 8


def check_images_folder(split: CocoAnnotations) -> None:
    """Raise `DataError` if the image folder is plainly a wrong one: not one of the first files is there."""
    probed = range(min(len(split.images), FILES_TO_PROBE))
    if not any(is_file(split.image_path(index)) for index in probed):
        others = f" (nor do the next {len(probed) - 1} images listed)" if len(probed) > 1 else ""
        raise DataError(
            f"{split.path}: {split.image_path(0)} does not exist{others}. Put the images there, or give the "
            "folder that the file names are relative to as train_images, val_images or test_images."
        )


def check_files_exist(split: CocoAnnotations) -> None:
    """Raise `DataError` if a listed image file is absent; each folder is looked through once."""
    present: dict[Path, set[str]] = {}
    absent = []
    for index in range(len(split.images)):
        path = split.image_path(index)
        if path.parent not in present:
            present[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        # asked twice where a name is not in the list: the file system may not tell capitals from small letters
        if path.name not in present[path.parent] and not is_file(path):
            absent.append(index)
    if absent:
        first = split.images[absent[0]]
        raise DataError(
            f"{split.path}: {len(absent)} of {len(split.images)} images listed do not exist, the first being image "
            f"{first.id}, {shown_value(first.file_name)} in {split.images_folder}. Restore the files, take the images "
            "out of the annotations, or set on_bad_image=skip."
        )
