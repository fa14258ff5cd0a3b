"""Finding the training, validation and test files of a dataset folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_lightning.data.coco import DataError

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class SplitFiles:
    """One split: its annotation file and the folder its file names are relative to."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Layout:
    """Where a convention keeps its files, relative to the root; `{split}` and `{year}` stand for what they say.

    Attributes:
        annotations: the annotation file.
        images: folders the images may be in; where several exist, the one that holds the first listed files.
    """

    annotations: str
    images: tuple[str, ...]


LAYOUTS = (
    Layout("{split}/annotations.json", ("{split}/images", "{split}")),
    Layout("{split}/_annotations.coco.json", ("{split}", "{split}/images")),  # Roboflow
    Layout(
        "annotations/instances_{split}{year}.json", ("{split}{year}", "images/{split}{year}", "images", ".")
    ),
    Layout("annotations/instances_{split}.json", ("{split}", "images/{split}", "images", ".")),
    Layout("annotations/{split}.json", ("images/{split}", "{split}", "images", ".")),
    Layout("{split}.json", ("images/{split}", "{split}", "images", ".")),
)
WHOLE_LAYOUTS = (  # one file for everything: all of it is for training
    Layout("annotations.json", ("images", ".")),
    Layout("_annotations.coco.json", (".", "images")),
)


def find_split_files(root: Path) -> dict[str, SplitFiles]:
    """Find the splits of a dataset folder by the usual conventions (`LAYOUTS`, then `WHOLE_LAYOUTS`).

    Returns:
        The splits found, by name: "train", "val", "test".

    Raises:
        DataError: the folder does not exist, or none of the conventions fits.
    """
    found = discover_split_files(root)
    if not found:
        looked_for = ", ".join(layout.annotations for layout in (*LAYOUTS, *WHOLE_LAYOUTS))
        names = "; ".join(" or ".join(names) for names in SPLIT_NAMES.values())
        raise DataError(
            f"{root}: no annotation file found. Looked for {looked_for} (split: {names}). "
            "Move the files to such places, or name them with train_annotations and train_images."
        )
    return found


def discover_split_files(root: Path) -> dict[str, SplitFiles]:
    """Like `find_split_files`, but finding nothing is no error.

    Raises:
        DataError: the folder does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: the dataset folder does not exist.")
    year = _newest_year(root)
    found = {split: _first_match(root, LAYOUTS, names, year) for split, names in SPLIT_NAMES.items()}
    if not any(found.values()):
        found["train"] = _first_match(root, WHOLE_LAYOUTS, ("",), year)
    return {split: files for split, files in found.items() if files is not None}


def choose_image_folder(annotations: Path, candidates: Sequence[Path]) -> Path:
    """The candidate in which most of the first files listed in `annotations` lie; the first one that exists if none."""
    folders = [folder for folder in candidates if folder.is_dir()]
    if len(folders) <= 1:
        return folders[0] if folders else candidates[0]
    names = _first_file_names(annotations)
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))


def _first_match(root: Path, layouts: Sequence[Layout], names: Sequence[str], year: str) -> SplitFiles | None:
    for layout in layouts:
        for name in names:
            annotations = root / layout.annotations.format(split=name, year=year)
            if annotations.is_file():
                folders = [root / folder.format(split=name, year=year) for folder in layout.images]
                return SplitFiles(annotations, choose_image_folder(annotations, folders))
    return None


def _newest_year(root: Path) -> str:
    """One year for all splits: validation images of one COCO year are training images of another."""
    years = {
        split: re.findall(
            rf"instances_{split}(\d{{4}})\.json", "\n".join(p.name for p in root.glob("annotations/*.json"))
        )
        for split in ("train", "val", "test")
    }
    return max(years["train"] or years["val"] or years["test"], default="")


def _first_file_names(annotations: Path, count: int = 3) -> list[str]:
    # Searched as text: a large file should be parsed once, by `load_coco`, which also says what is wrong with it.
    text = annotations.read_bytes()
    names = []
    for match in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text):
        try:
            names.append(str(json.loads(match.group(1))).replace("\\", "/"))
        except ValueError:
            continue
        if len(names) == count:
            break
    return names
