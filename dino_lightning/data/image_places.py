"""Where the images of an annotation file lie: the folder chosen, and checked to hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.reading.file_names import match_names
from dino_lightning.data.reading.json_file import shown_value
from dino_lightning.data.reading.search import (
    coco_files,
    files_in,
    image_folders,
    matching_files,
    some_file_names,
    split_of,
)
from dino_lightning.data.split_files import check_can_be_entered, is_file, why_no_file
from dino_lightning.errors import DataError

FILES_TO_PROBE = 8  # to tell whether a folder is the right one
EVERY = 1 << 62  # file names


def choose_image_folder(annotations: Path, candidates: Sequence[Path], root: Path | None = None) -> Path:
    """Of the candidates that exist, the one in which most of the first files listed in `annotations` lie.

    Ties go to the first one, so the order of the candidates matters. Where none holds half of them, and a root is
    given, all its folders with images are candidates, and names that can be matched count as well.

    Raises:
        DataError: none of the candidates holds them, and one may not be looked into.
    """
    folders = [folder for folder in candidates if folder.is_dir()]
    if len(folders) == 1 and root is None:
        return folders[0]
    names = some_file_names(annotations)
    best = max(folders, key=lambda folder: files_in(folder, names), default=None)
    if best is not None and (root is None or not names or 2 * files_in(best, names) >= len(names)):
        return best
    for folder in folders:
        check_can_be_entered(folder)
    if root is not None and root.is_dir() and names:
        choice = _likeliest_folder(annotations, [*folders, *image_folders(root)], root, names)
        if choice is not None and not _is_of_another_split(annotations, choice, root, names):
            return choice
    return best or candidates[0]


def _likeliest_folder(annotations: Path, folders: Sequence[Path], root: Path, names: Sequence[str]) -> Path | None:
    """The folder in which most of the names can be matched with files; None where several are as likely.

    Among such the folder of the split's name is taken, and the first candidate before those that lie below it.
    """
    scores = {folder: matching_files(folder, names) for folder in dict.fromkeys(folders)}
    most = max(scores.values(), default=(0, 0))
    if not most[0]:
        return None
    likely = [folder for folder, score in scores.items() if score == most]
    split = split_of(annotations, root) if annotations.is_relative_to(root) else None
    of_split = [folder for folder in likely if folder.is_relative_to(root) and split_of(folder / "x", root) == split]
    likely = of_split or likely
    # the same files seen from above are no other choice
    apart = [folder for folder in likely if not any(folder != o and folder.is_relative_to(o) for o in likely)]
    return likely[0] if len(apart) == 1 else None


def _is_of_another_split(annotations: Path, folder: Path, root: Path, names: Sequence[str]) -> bool:
    """Whether the files of these names in a folder are another split's, whose annotation file lists the same names.

    As `000001.png` does, where the images of this split are gone.
    """
    if not (annotations.is_relative_to(root) and folder.is_relative_to(root)):
        return False
    own = split_of(annotations, root)
    matched = [folder / name for name in match_names(folder, names).names if name is not None]
    places = {split_of(path, root) for path in matched if is_file(path)}
    if own is None or own in places:
        return False
    others = [choices[0][0] for split, choices in coco_files(root).items() if split is not None and split in places]
    return any(2 * len(set(names) & set(some_file_names(other, EVERY))) >= len(names) for other in others)


def check_images_folder(split: CocoAnnotations) -> None:
    """Raise `DataError` if the image folder is obviously wrong: none of the first files listed is there."""
    probed = range(min(len(split.images), FILES_TO_PROBE))
    if not any(is_file(split.image_path(index)) for index in probed):
        others = f" (nor do the next {len(probed) - 1} images listed)" if len(probed) > 1 else ""
        reason = why_no_file(split.image_path(0))
        others = others if reason == "does not exist" else ""
        raise DataError(
            f"{split.path}: {split.image_path(0)} {reason}{others}. Put the images there, or give the folder "
            "that the file names are relative to as --data.train_images, --data.val_images or --data.test_images."
        )


def check_files_exist(split: CocoAnnotations) -> None:
    """Raise `DataError` if a listed image file is absent; each folder is listed once."""
    present: dict[Path, set[str]] = {}
    absent = []
    for index in range(len(split.images)):
        path = split.image_path(index)
        if path.parent not in present:
            try:
                present[path.parent] = {entry.name for entry in path.parent.iterdir()}
            except (OSError, ValueError):  # no such folder, or it cannot be listed: each file is looked at
                present[path.parent] = set()
        # checked again where a name is not in the listing: the file system may be case-insensitive
        if path.name not in present[path.parent] and not is_file(path):
            absent.append(index)
    if absent:
        first = split.images[absent[0]]
        reason = why_no_file(split.image_path(absent[0]))
        what, why = ("do not exist", "") if reason == "does not exist" else ("cannot be opened", f", which {reason}")
        image = f"image {first.id}, {shown_value(first.file_name)} in {split.images_folder}"
        raise DataError(
            f"{split.path}: {len(absent)} of {len(split.images)} images listed {what}, the first being {image}{why}. "
            "Restore the files, take the images out of the annotations, or set on_bad_image=skip."
        )
