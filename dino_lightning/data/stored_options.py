"""The options of a data module as checkpoints store them: plain values, from which it can be made again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dino_lightning.errors import DataError

OBJECTS = "objects in Python, which checkpoints do not hold: "
DATASETS = "datasets in Python, which checkpoints do not hold"  # in place of a folder


class _NotPlainError(Exception):
    """A value is an object that only Python code can make."""


def storable(options: Mapping[str, Any], *, from_datasets: bool) -> dict[str, Any]:
    """What a checkpoint stores of options: numbers, texts, and lists and dicts of them; objects by name only.

    Args:
        options: those of `CocoDataModule`, by name; paths become text.
        from_datasets: whether there are datasets in place of the folder.
    """
    stored = {}
    for name, value in options.items():
        try:
            stored[name] = _plain(value)
        except _NotPlainError:
            entries = value if isinstance(value, list | tuple) else [value]
            stored[name] = OBJECTS + ", ".join(type(entry).__name__ for entry in entries)
    return {**stored, "root": DATASETS} if from_datasets else stored


def check_stored(root: Any, transforms: Any) -> None:
    """Refuse what `storable` could only name.

    Raises:
        DataError: the datasets or transforms have to be given again.
    """
    if root == DATASETS:
        raise DataError(
            "The data module of this checkpoint was made of datasets in Python, which checkpoints do not hold; make it "
            "again: CocoDataModule.from_datasets(train, val)."
        )
    if isinstance(transforms, str) and transforms.startswith(OBJECTS):
        raise DataError(
            f"The transforms of this checkpoint's data module ({transforms.removeprefix(OBJECTS)}) were objects in "
            "Python, which checkpoints do not hold; give them again, or none: load_from_checkpoint(path, "
            "transforms=None)."
        )


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {_plain(name): _plain(entry) for name, entry in value.items()}
    raise _NotPlainError
