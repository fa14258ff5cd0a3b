"""Finding the training, validation and test files of a dataset folder, or making a validation split."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.image_places import choose_image_folder
from dino_lightning.data.other_formats.voc import find_voc
from dino_lightning.data.other_formats.yolo import find_yolo
from dino_lightning.data.reading.search import (
    COMPANIONS,
    coco_files,
    foreign_format,
    json_files,
    looks_like_coco,
    other_tables,
    split_word,
    splits_in_entries,
)
from dino_lightning.data.split_files import SPLIT_NAMES, SplitFiles, check_can_be_entered, is_file
from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

FILES_NAMED = 8  # in one sentence
PARTS = ("annotations", "images")  # folders that hold those of all splits


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
    """Find the splits of a dataset folder.

    First by the usual conventions, `LAYOUTS` and `WHOLE_LAYOUTS`; then any JSON file that looks like COCO's, by the
    words for a split in its name and in those of its folders; then YOLO's and Pascal VOC's folders.

    Returns:
        The splits found, by name: "train", "val", "test".

    Raises:
        DataError: the folder does not exist, or nothing fits.
    """
    found = _discover(Path(root))
    if not found:
        raise DataError(_nothing_found(Path(root)))
    return found


Given = str | Sequence[str] | None


def resolve_split_files(root: Path, explicit: Mapping[str, tuple[Given, str | None]]) -> dict[str, SplitFiles]:
    """The files of each split: those the user names, the others as found in the root.

    Args:
        root: the dataset folder.
        explicit: per split the annotation file, files or pattern, and the image folder, either of them or both None.
            Paths are relative to the working directory or to `root`.

    Raises:
        DataError: no training files, or a named file or folder that does not exist.
    """
    found = find_split_files(root) if explicit["train"][0] is None else _discover(root)
    for split, (given, images) in explicit.items():
        if given is not None:
            paths = _named(root, given, f"--data.{split}_annotations")
            found[split] = replace(_together([_of_file(root, path, split) for path in paths]), named=True)
        if images is not None:
            if split not in found:
                raise DataError(
                    f"--data.{split}_images: given without annotations for it. Give --data.{split}_annotations as well."
                )
            folder = _existing(root, images, f"--data.{split}_images")
            files = found[split]
            also = tuple(replace(other, images=folder) for other in files.also)
            found[split] = replace(files, images=folder, also=also)
    if "train" not in found:
        raise DataError(
            f"{root}: has {' and '.join(found)} files but no training files, which define the classes. "
            "Give --data.train_annotations."
        )
    return _parts_of_file(found)


def unused_files(root: Path, files: Mapping[str, SplitFiles]) -> list[Path]:
    """Files in the root that look like COCO's and belong to no split; those for other tasks are left out."""
    used = {Path(os.path.realpath(each.annotations)) for split in files.values() for each in (split, *split.also)}
    if not root.is_dir() or any(split.format != "coco" for split in files.values()):
        return []
    choices = [path for splits in coco_files(root).values() for choice in splits for path in choice]
    return sorted(path for path in choices if Path(os.path.realpath(path)) not in used)


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
            f"{annotations.path}: one image is too few to hold some out for validation. Give --data.val_annotations."
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
    if root.suffix.lower() in (".yaml", ".yml") and is_file(root):  # as YOLO's own commands take it
        root = root.parent
    _check_folder(root)
    year = _newest_year(root)
    matches = {split: _first_match(root, LAYOUTS, names, year) for split, names in SPLIT_NAMES.items()}
    if not any(matches.values()):
        matches["train"] = _first_match(root, WHOLE_LAYOUTS, ("",), year)
    found = {split: files for split, files in matches.items() if files is not None}
    if "train" in found and len(found) > 1:
        return found
    others = coco_files(root)
    for split in SPLIT_NAMES:
        if split not in found and split in others:
            found[split] = _together([_of_file(root, path, split) for path in others[split][0]])
    if "train" not in found and len(others.get(None, [])) == 1:
        found["train"] = _together([_of_file(root, path, "train") for path in others[None][0]])
    if not found:
        found = {split: replace(files, format="yolo") for split, files in find_yolo(root).items()}
    if not found:
        found = {split: replace(files, format="voc") for split, files in find_voc(root).items()}
    return found


def _check_folder(root: Path) -> None:
    try:
        parts = [path for path in root.iterdir() if split_word(path.name) or path.name in PARTS]
    except FileNotFoundError as error:
        raise DataError(f"{root}: the dataset folder does not exist.") from error
    except NotADirectoryError as error:
        raise DataError(f"{root}: is a file. Give its folder, and the file as --data.train_annotations.") from error
    except OSError as error:
        raise DataError(f"{root}: the dataset folder {unreadable(error)}.") from error
    except ValueError as error:  # a null byte
        raise DataError(f"{root}: the dataset folder cannot be read ({error}).") from error
    for part in parts:
        check_can_be_entered(part)


def _nothing_found(root: Path) -> str:
    """What lies in a folder in which no split was found, and the command to name it."""
    files = json_files(root)
    if not files:
        others = other_tables(root)
        listed = ", ".join(path.relative_to(root).as_posix() for path in others[:FILES_NAMED])
        hint = (
            f"What lies there, {listed}, is not read; export it as COCO."
            if others
            else "Is it the folder of the dataset?"
        )
        return (
            f"{root}: no annotation file found: there is no JSON file in it, no data.yaml of YOLO and no XML of Pascal "
            f"VOC. {hint}"
        )
    likely = [path for path in files if not COMPANIONS.match(path.name) and looks_like_coco(path)]
    shown = [path.relative_to(root).as_posix() for path in (likely or files)[:FILES_NAMED]]
    more = f" and {len(likely or files) - len(shown)} more" if len(likely or files) > len(shown) else ""
    if not likely:
        format_ = foreign_format(files[0])
        what = f" {shown[0]} has {format_}." if format_ else ""
        return (
            f"{root}: none of its JSON files ({', '.join(shown)}{more}) is a COCO file, with images, annotations and "
            f"categories.{what}"
        )
    verb = (
        "looks like a COCO file, but its name does" if len(likely) == 1 else "look like COCO files, but their names do"
    )
    return (
        f"{root}: {', '.join(shown)}{more} {verb} not tell which is for training. "
        f"Name one or all of them: --data.root {shlex.quote(str(root))} --data.train_annotations "
        f"{shlex.quote(shown[0] if len(shown) == 1 else '[' + ', '.join(shown[:2]) + ']')}"
    )


def _of_file(root: Path, path: Path, split: str) -> SplitFiles:
    """A COCO file of which only the path is known, with the folder that its images are in."""
    stem = path.name.split(".")[0]
    word = next((name for name in (path.parent.name, stem) if split_word(name) == split), split)
    near, above = path.parent, path.parent.parent
    candidates = [
        near / "images", near, root / split, root / word, root / "images" / word, above / "images" / word, above / word,
        root / "images", above / "images", root / "data", root,
    ]  # fmt: skip
    inside = [folder for folder in candidates if folder == near or folder.is_relative_to(root) or folder.parent == near]
    return SplitFiles(path, choose_image_folder(path, list(dict.fromkeys(inside)), root))


def _together(files: Sequence[SplitFiles]) -> SplitFiles:
    return replace(files[0], also=tuple(files[1:]))


def _parts_of_file(found: dict[str, SplitFiles]) -> dict[str, SplitFiles]:
    """One file for everything, whose images have a `split` field, is as many splits as it names."""
    train = found["train"]
    if "val" in found or train.also or train.format != "coco" or train.annotations.suffix.lower() != ".json":
        return found
    declared = splits_in_entries(train.annotations)
    if "train" not in declared or len(declared) == 1:
        return found
    return {split: replace(train, part=split) for split in SPLIT_NAMES if split in declared} | {
        split: files for split, files in found.items() if split != "train"
    }


def _first_match(root: Path, layouts: Sequence[Layout], names: Sequence[str], year: str) -> SplitFiles | None:
    for layout in layouts:
        for name in names:
            annotations = root / layout.annotations.format(split=name, year=year)
            if is_file(annotations):
                folders = [root / folder.format(split=name, year=year) for folder in layout.images]
                return SplitFiles(annotations, choose_image_folder(annotations, folders, root))
    return None


def _newest_year(root: Path) -> str:
    """One year for all splits: validation images of one COCO year are training images of another."""
    names = [path.name for path in sorted(root.glob("annotations/instances_*.json"))]
    for split in SPLIT_NAMES:
        years = [match[1] for name in names if (match := re.fullmatch(rf"instances_{split}(\d{{4}})\.json", name))]
        if years:
            return max(years)
    return ""


def _named(root: Path, given: str | Sequence[str], argument: str) -> list[Path]:
    """The files that an option names: one, a list, or a pattern."""
    paths: list[Path] = []
    for name in [given] if isinstance(given, str) else given:
        if glob.has_magic(name) and not any(is_file(folder / name) for folder in (Path(), root)):
            found = [glob.glob(str(folder / name)) for folder in (Path(), root)]  # noqa: PTH207 - absolute patterns
            matches = sorted({Path(match) for of_folder in found for match in of_folder})
            if not matches:
                raise DataError(f"{argument}: no file fits {name}, neither in the working directory nor in {root}.")
            paths += matches
        else:
            paths.append(_existing(root, name, argument))
    if not paths:
        raise DataError(f"{argument}: the list is empty. Name at least one file.")
    return list(dict.fromkeys(paths))


def _existing(root: Path, given: str, argument: str) -> Path:
    for path in (Path(given), root / given):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError(f"{argument}: {path} {unreadable(error)}.") from error
        except ValueError as error:  # a null byte
            raise DataError(f"{argument}: {path} cannot be read ({error}).") from error
        return path
    raise DataError(f"{argument}: {given} does not exist, neither in the working directory nor in {root}.")
