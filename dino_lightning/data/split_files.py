"""Where the files of a split lie."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class SplitFiles:
    """Where one split lies.

    Attributes:
        annotations: the annotation file. For YOLO its `data.yaml` (or `classes.txt`); for Pascal VOC the list of names
            in `ImageSets/Main` or the folder of XML files.
        images: the folder that file names are relative to.
        part: the split to take, where one file describes several: "train", "val" or "test"; None for all of it.
        also: further annotation files of the split, each with its own folder.
        format: what the annotation file is of.
        named: whether the user named the annotation file, rather than its folder.
    """

    annotations: Path
    images: Path
    part: str | None = None
    also: tuple[SplitFiles, ...] = ()
    format: Literal["coco", "yolo", "voc"] = "coco"
    named: bool = False


def why_no_file(path: Path) -> str:
    """Why a path is not that of a file that can be opened, after the path: "does not exist", or what is in the way."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"


def check_can_be_entered(folder: Path) -> None:
    """Refuse a folder whose files would pass for absent, as nobody may look at them here.

    Raises:
        DataError: it is such a folder.
    """
    try:
        Path(folder, "x").stat()
    except PermissionError as error:
        raise DataError(f"{folder}: the folder {unreadable(error)}.") from error
    except (OSError, ValueError):  # no such file, or no folder
        return


def is_file(path: Path) -> bool:
    """As `Path.is_file`, and False for a name that the file system refuses, at which that may raise."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
