"""What is looked at before a dataset leaves the machine: that every file lies in it, and that images are images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from dino_lightning.data.image_files import open_image, open_regular
from dino_lightning.errors import DataError
from sagemaker_entry.protocol.problem import Problem


class DatasetFolder:
    """The folder of a dataset, which no link may lead out of.

    A folder that the user named outside of it, such as `--data.train_images`, is a dataset's folder of its own.

    Args:
        root: `--data.root`, or a folder outside of it that the user named.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._resolved = root.resolve()
        self._parents: dict[Path, Path] = {}
        self._outside: list[tuple[Path, Path]] = []

    def holds(self, path: Path) -> bool:
        """Whether the path is written as one below this folder, wherever links lead."""
        return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(self._root))  # noqa: PTH100 - follows no link

    def look_at(self, path: Path) -> None:
        """Note a file that a link leads to, outside of the folder."""
        if path.parent not in self._parents:
            self._parents[path.parent] = path.parent.resolve()
        place = path.resolve() if path.is_symlink() else self._parents[path.parent] / path.name
        if not place.is_relative_to(self._resolved):
            self._outside.append((path, place))

    def check(self) -> None:
        """Refuse the files that were noted.

        Raises:
            Problem: names the first of them.
        """
        if not self._outside:
            return
        path, place = self._outside[0]
        more = f" (And {len(self._outside) - 1:,} more files.)" if len(self._outside) > 1 else ""
        raise Problem(
            f"{path}: a link leads to {place}, outside of the dataset {self._root}, and what lies there is not "
            f"uploaded; put a copy in the place of the link, or name the folder by an option such as "
            f"--data.train_images.{more}"
        )


def folders_of(root: Path, named: Sequence[Path]) -> list[DatasetFolder]:
    """The dataset's folder, and those of `named` that are written as ones outside of it."""
    folders = [DatasetFolder(root)]
    for folder in named:
        if not any(each.holds(folder) for each in folders):
            folders.append(DatasetFolder(folder))
    return folders


def check_places(folders: Sequence[DatasetFolder], paths: Sequence[Path]) -> None:
    """Refuse files that a link leads to, out of the folder that they are listed in.

    Raises:
        Problem: names the first of them.
    """
    for path in paths:
        for folder in folders:
            if folder.holds(path):
                folder.look_at(path)
                break
    for folder in folders:
        folder.check()


def check_are_images(paths: Sequence[Path]) -> None:
    """Read the header of every image file.

    Raises:
        Problem: some are no images; names the first and says how many.
    """
    with ThreadPoolExecutor() as pool:
        reasons = [reason for reason in pool.map(_why_no_image, paths) if reason]
    if reasons:
        more = f" (And {len(reasons) - 1:,} more files.)" if len(reasons) > 1 else ""
        raise Problem(f"{reasons[0]} Restore or remove it; nothing was uploaded.{more}")


def _why_no_image(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return _why_no_header(path, file)
    except DataError as error:
        return str(error)


def _why_no_header(path: Path, file: BinaryIO) -> str:
    try:
        with open_image(file):
            return ""
    except MemoryError:
        raise
    except Exception as error:  # as many kinds as there are decoders
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        return f"{path} is not an image that can be read{reason}."
