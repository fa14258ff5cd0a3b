"""Which images are meant: files, folders, globs, or the images of a COCO file."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from dino_lightning.data.annotation_file import raise_first_error
from dino_lightning.data.coco import Problem
from dino_lightning.data.image_files import IMAGE_SUFFIXES, is_image
from dino_lightning.data.image_places import choose_image_folder
from dino_lightning.data.reading.image_entries import read_images
from dino_lightning.data.reading.json_file import read_tables
from dino_lightning.data.reading.lossless import Conversions
from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

# Of files found in folders and by globs; a file that is named itself may have any.


class Stamp(NamedTuple):
    """What tells a file from another one, and from what it was before.

    Attributes:
        path: absolute, without links.
        bytes: its size; None if there is no file.
        mtime_ns: when it was last changed; None if there is no file.
    """

    path: str
    bytes: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class ListedImage:
    """An image file to read.

    Attributes:
        path: where it is.
        name: what it is called in results: its path as the user gave it, or the `file_name` of a COCO file.
        image_id: the id in the COCO file; otherwise 1, 2, 3, ... in the order of the names.
        stamp: what the file is when it is listed.
        size: (height, width) in pixels by the COCO file, or None.
    """

    path: Path
    name: str
    image_id: int
    stamp: Stamp
    size: tuple[int, int] | None = None


def list_images(
    sources: Sequence[str], image_folder: Path | None = None, leave_out: Path | None = None
) -> list[ListedImage]:
    """The images of files, folders (with those inside), globs, or of one COCO file.

    Args:
        sources: paths and patterns (`**` for folders at any depth), or one COCO file, which may lack annotations.
        image_folder: what the names in a COCO file are relative to; looked for near it by default.
        leave_out: a folder of which nothing is taken: that of the results, which may lie among the images.

    Raises:
        DataError: a source that is not there or holds no images, or a COCO file that breaks the format.
    """
    documents = [source for source in sources if source.lower().endswith(".json")]
    if documents:
        if len(sources) > 1:
            raise DataError(f"{documents[0]}: a COCO file must be the only thing given; {len(sources)} were.")
        return _images_of_coco(Path(documents[0]), image_folder)
    if image_folder is not None:
        raise DataError(f"{image_folder}: an image folder goes with a COCO file, and {sources[0]} is none.")
    names: set[str] = set()
    out = None if leave_out is None else leave_out.resolve()
    for source in sources:
        there = list(_found(source))
        found = [name for name in there if out is None or out not in Path(name).resolve().parents]
        if there and not found:
            raise DataError(
                f"{source}: no images but those in {leave_out}, the folder of the results, of which nothing is taken; "
                "give another --output."
            )
        if not found:
            raise DataError(
                f"{source}: no images there; looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        names.update(os.path.normpath(name) for name in found)
    return [_listed(Path(name), name, number) for number, name in enumerate(sorted(names), start=1)]


def _listed(path: Path, name: str, image_id: int, size: tuple[int, int] | None = None) -> ListedImage:
    stamp = Stamp(str(path))
    with suppress(OSError, ValueError):  # no such file; a null byte in its name
        stamp = Stamp(os.path.realpath(path))
        status = path.stat()
        stamp = Stamp(stamp.path, status.st_size, status.st_mtime_ns)
    return ListedImage(path, name, image_id, stamp, size)


def _found(source: str) -> Iterator[str]:
    if os.path.isfile(source):  # noqa: PTH113 - the name may hold a null byte, at which Path raises
        yield source
    elif os.path.isdir(source):  # noqa: PTH112 - as above
        for folder, inside, files in os.walk(source, onerror=_refuse, followlinks=True):
            inside[:] = [name for name in inside if not name.startswith(".") and not _leads_back(folder, name)]
            yield from (os.path.join(folder, name) for name in files if _is_shown(name))  # noqa: PTH118 - as above
    elif glob.has_magic(source):
        for name in glob.iglob(source, recursive=True):  # noqa: PTH207 - absolute patterns
            if _is_shown(name) and Path(name).is_file():
                yield name
    elif os.path.exists(source):  # noqa: PTH110 - as above
        raise DataError(f"{source} is neither a regular file nor a folder.")
    else:
        raise DataError(f"{source} does not exist.")


def _leads_back(folder: str, name: str) -> bool:
    """Whether an entry of a folder is a link to that folder or one that it lies in: its images would come for ever."""
    path = os.path.join(folder, name)  # noqa: PTH118 - the name may hold a null byte, at which Path raises
    if not os.path.islink(path):  # noqa: PTH114 - as above
        return False
    return (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(path) + os.sep)


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: the folder {unreadable(error)}.") from error


def _is_shown(name: str) -> bool:
    return is_image(name) and not os.path.basename(name).startswith(".")  # noqa: PTH119 - as above


def _images_of_coco(path: Path, image_folder: Path | None) -> list[ListedImage]:
    try:
        tables = read_tables(path, needed=["images"])
    except DataError as error:
        raise DataError(f"{error} Give a COCO file, images, or folders with images.") from error
    if image_folder is not None and not image_folder.is_dir():
        raise DataError(f"{image_folder}: the image folder does not exist.")
    folder = image_folder or choose_image_folder(path, _likely_folders(path))
    problems: list[Problem] = []
    images = read_images(path, folder, tables.images, Conversions(), problems.append).table
    raise_first_error(problems)
    return [_listed(folder / image.file_name, image.file_name, image.id, image.size) for image in images]


def _likely_folders(path: Path) -> list[Path]:
    """Where the images of a COCO file usually lie."""
    split = re.sub(r"^(instances|image_info)_", "", path.stem)
    near, above = path.parent, path.parent.parent
    return [near / "images", near, near / split, above / split, above / "images" / split, above / "images", above]
