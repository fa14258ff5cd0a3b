"""Finding the training, validation and test files of a dataset folder, or making a validation split."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_lightning.data.annotation_file import shown_value
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.errors import DataError

FILES_TO_PROBE = 8  # to tell whether a folder is the right one
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class SplitFiles:
    """One split: its annotation file and the folder its file names are relative to."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Layout:
    """Where a convention keeps its files, relative to the root; `{split}` and `{year}` are filled in.

    Attributes:
        annotations: the annotation file.
        images: folders the images may be in; where several exist, the one that holds the first listed files.
    """

    annotations: str
    images: tuple[str, ...]


LAYOUTS = (
    Layout("{split}/annotations.json", ("{split}/images", "{split}")),
    Layout("{split}/_annotations.coco.json", ("{split}", "{split}/images")),  # Roboflow
    Layout("annotations/instances_{split}{year}.json", ("{split}{year}", "images/{split}{year}", "images")),
    Layout("annotations/instances_{split}.json", ("{split}", "images/{split}", "images")),
    Layout("annotations/{split}.json", ("images/{split}", "{split}", "images")),
    Layout("{split}.json", ("images/{split}", "{split}", "images", ".")),
)
WHOLE_LAYOUTS = (  # one file for everything: all of it is for training
    Layout("annotations.json", ("images", ".")),
    Layout("_annotations.coco.json", (".", "images")),
)


def find_split_files(root: Path) -> dict[str, SplitFiles]:
    """Find the splits of a dataset folder by the usual conventions: `LAYOUTS`, then `WHOLE_LAYOUTS`.

    Returns:
        The splits found, by name: "train", "val", "test".

    Raises:
        DataError: the folder does not exist, or none of the conventions fits.
    """
    found = _discover(Path(root))
    if not found:
        looked_for = ", ".join(layout.annotations for layout in (*LAYOUTS, *WHOLE_LAYOUTS))
        names = "; ".join(" or ".join(names) for names in SPLIT_NAMES.values())
        raise DataError(
            f"{root}: no annotation file found. Looked for {looked_for} (split: {names}). "
            "Move the files to such places, or name them with train_annotations and train_images."
        )
    return found


def resolve_split_files(root: Path, explicit: Mapping[str, tuple[str | None, str | None]]) -> dict[str, SplitFiles]:
    """The files of each split: those the user names, the others as found in the root.

    Args:
        root: the dataset folder.
        explicit: per split the annotation file and the image folder, either of them or both None. Paths are
            relative to the working directory or to `root`.

    Raises:
        DataError: no training files, or a named file or folder that does not exist.
    """
    found = find_split_files(root) if explicit["train"][0] is None else _discover(root)
    for split, (json_file, images) in explicit.items():
        if json_file is not None:
            path = _existing(root, json_file, f"{split}_annotations")
            candidates = [path.parent / "images", path.parent, root / split, root / "images", root]
            found[split] = SplitFiles(path, choose_image_folder(path, candidates))
        if images is not None:
            if split not in found:
                raise DataError(f"{split}_images: given without annotations for it. Give {split}_annotations as well.")
            found[split] = SplitFiles(found[split].annotations, _existing(root, images, f"{split}_images"))
    if "train" not in found:
        raise DataError(
            f"{root}: has {' and '.join(found)} files but no training files, which define the classes. "
            "Give train_annotations."
        )
    return found


def choose_image_folder(annotations: Path, candidates: Sequence[Path]) -> Path:
    """Of the candidates that exist, the one in which most of the first files listed in `annotations` lie.

    Ties go to the first one, so the order of the candidates matters.
    """
    folders = [folder for folder in candidates if folder.is_dir()]
    if len(folders) <= 1:
        return folders[0] if folders else candidates[0]
    names = _first_file_names(annotations)
    return max(folders, key=lambda folder: sum(is_file(folder / name) for name in names))


def is_file(path: Path) -> bool:
    """As `Path.is_file`, and False for a name too long for the file system, at which that raises."""
    try:
        return path.is_file()
    except OSError:
        return False


def split_images(annotations: CocoAnnotations, fraction: float, seed: int) -> tuple[CocoAnnotations, CocoAnnotations]:
    """Split whole images into training and validation.

    Images are ranked by a hash of seed and image id, so the order of the file does not matter, and adding
    images later moves few of the others to the other side.

    Args:
        annotations: what to split.
        fraction: share of the images for validation; at least one image goes to each side.
        seed: another seed gives another split.

    Returns:
        The training and the validation part, each in the order of the file.

    Raises:
        DataError: there are fewer than two images.
    """
    count = len(annotations.images)
    if count < 2:
        raise DataError(
            f"{annotations.path}: one image is too few to hold some out for validation. Give val_annotations."
        )
    ranked = sorted(range(count), key=lambda i: _rank(seed, annotations.images[i].id))
    held_out = set(ranked[: min(max(1, round(fraction * count)), count - 1)])
    return (
        annotations.subset([i for i in range(count) if i not in held_out]),
        annotations.subset([i for i in range(count) if i in held_out]),
    )


def _rank(seed: int, image_id: int) -> bytes:
    return hashlib.sha256(f"{seed}:{image_id}".encode()).digest()


def _discover(root: Path) -> dict[str, SplitFiles]:
    if not root.is_dir():
        raise DataError(f"{root}: the dataset folder does not exist.")
    year = _newest_year(root)
    found = {split: _first_match(root, LAYOUTS, names, year) for split, names in SPLIT_NAMES.items()}
    if not any(found.values()):
        found["train"] = _first_match(root, WHOLE_LAYOUTS, ("",), year)
    return {split: files for split, files in found.items() if files is not None}


def _first_match(root: Path, layouts: Sequence[Layout], names: Sequence[str], year: str) -> SplitFiles | None:
    for layout in layouts:
        for name in names:
            annotations = root / layout.annotations.format(split=name, year=year)
            if is_file(annotations):
                folders = [root / folder.format(split=name, year=year) for folder in layout.images]
                return SplitFiles(annotations, choose_image_folder(annotations, folders))
    return None


def _newest_year(root: Path) -> str:
    """One year for all splits: validation images of one COCO year are training images of another."""
    names = [path.name for path in sorted(root.glob("annotations/instances_*.json"))]
    for split in SPLIT_NAMES:
        years = [match[1] for name in names if (match := re.fullmatch(rf"instances_{split}(\d{{4}})\.json", name))]
        if years:
            return max(years)
    return ""


def _first_file_names(annotations: Path, count: int = 3) -> list[str]:
    # Searched as text: a large file should be parsed once, by `load_coco`, which also says what is wrong.
    names: list[str] = []
    for match in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', annotations.read_bytes()):
        try:
            names.append(str(json.loads(match[1])).replace("\\", "/"))
        except ValueError:
            continue
        if len(names) == count:
            break
    return names


def _existing(root: Path, given: str, argument: str) -> Path:
    for path in (Path(given), root / given):
        if path.exists():
            return path
    raise DataError(f"{argument}: {given} does not exist, neither in the working directory nor in {root}.")


def check_images_folder(split: CocoAnnotations) -> None:
    """Raise `DataError` if the image folder is obviously wrong: none of the first files listed is there."""
    probed = range(min(len(split.images), FILES_TO_PROBE))
    if not any(is_file(split.image_path(index)) for index in probed):
        others = f" (nor do the next {len(probed) - 1} images listed)" if len(probed) > 1 else ""
        raise DataError(
            f"{split.path}: {split.image_path(0)} does not exist{others}. Put the images there, or give the "
            "folder that the file names are relative to as train_images, val_images or test_images."
        )


def check_files_exist(split: CocoAnnotations) -> None:
    """Raise `DataError` if a listed image file is absent; each folder is listed once."""
    present: dict[Path, set[str]] = {}
    absent = []
    for index in range(len(split.images)):
        path = split.image_path(index)
        if path.parent not in present:
            present[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        # checked again where a name is not in the listing: the file system may be case-insensitive
        if path.name not in present[path.parent] and not is_file(path):
            absent.append(index)
    if absent:
        first = split.images[absent[0]]
        raise DataError(
            f"{split.path}: {len(absent)} of {len(split.images)} images listed do not exist, the first being image "
            f"{first.id}, {shown_value(first.file_name)} in {split.images_folder}. Restore the files, take the images "
            "out of the annotations, or set on_bad_image=skip."
        )
