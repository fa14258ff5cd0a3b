"""Checks of the data module's options that need no file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

from dino_lightning.data.box_formats import BoxFormat
from dino_lightning.data.sizes import Canvas

AT_LEAST_ONE = ("batch_size", "val_batch_size", "image_size", "max_size", "fixed_size", "pad_to_multiple")
OF_FILES = (  # what `from_datasets` has no use for
    "root", "train_annotations", "train_images", "val_annotations", "val_images", "test_annotations", "test_images",
    "crowd", "box_format", "classes", "merge_classes", "drop_empty", "cache_dir", "cache_gigabytes", "val_fraction",
)  # fmt: skip


def check_options(**options: Any) -> None:
    """Refuse values out of range, and options that do not go together.

    Args:
        options: those of `CocoDataModule` that are checked here, by name.

    Raises:
        ValueError: names the first one.
    """
    for name in AT_LEAST_ONE:
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{name} is {options[name]}; it must be at least 1.")
    if options["num_workers"] is not None and options["num_workers"] < 0:
        raise ValueError(f"num_workers is {options['num_workers']}; it must not be negative.")
    if not 0 < options["cache_gigabytes"] < math.inf:
        raise ValueError(f"cache_gigabytes is {options['cache_gigabytes']}; it must be more than 0 and finite.")
    if not 0 < options["val_fraction"] < 1:
        raise ValueError(f"val_fraction is {options['val_fraction']}; it must lie between 0 and 1.")
    if options["fixed_size"] is None and options["fixed_size_mode"] != "pad":
        raise ValueError(f"fixed_size_mode={options['fixed_size_mode']} needs a fixed_size.")
    if options["fixed_size"] is not None:
        Canvas(options["fixed_size"], options["fixed_size_mode"])  # refuses other modes
    if options["crowd"] not in ("regions", "objects"):
        raise ValueError(f"crowd is {options['crowd']!r}; choose regions or objects.")
    if options["box_format"] is not None and options["box_format"] not in get_args(BoxFormat):
        raise ValueError(f"box_format is {options['box_format']!r}; choose one of {', '.join(get_args(BoxFormat))}.")
    if options["on_bad_image"] not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {options['on_bad_image']!r}; choose error or skip.")
    if options["drawn_plans"] < 0 or (options["drawn_plans"] and options["aspect_buckets"]):
        raise ValueError("drawn_plans must not be negative, and it does not go with aspect_buckets.")
    if not 0 <= options["mosaic"] <= 1:
        raise ValueError(f"mosaic is {options['mosaic']}; it must lie between 0 and 1.")
    threshold = options["repeat_factor_threshold"]
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"repeat_factor_threshold is {threshold}; it must be more than 0 and at most 1.")


def refuse_options_of_files(options: Iterable[str]) -> None:
    """Refuse options that are about files on disk, where there are datasets in their place.

    Args:
        options: their names.

    Raises:
        ValueError: names the first one.
    """
    about_files = [name for name in options if name in OF_FILES]
    if about_files:
        raise ValueError(f"{about_files[0]} is about files on disk, and there are none behind from_datasets.")
