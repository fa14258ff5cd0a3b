"""Where a Pascal VOC dataset keeps its XML files, its lists of splits and its images.

All places are paths relative to the dataset's folder, with forward slashes; "" is that folder itself.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from dino_lightning.data.other_formats.image_folder import is_inside, names_in, read_text, require_inside
from dino_lightning.data.split_files import SPLIT_NAMES, is_file
from dino_lightning.errors import DataError

XML_FOLDERS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images")
LISTS = "ImageSets/Main"
BOTH = "trainval"  # the list of training and validation images together
FILES_TO_PROBE = 3  # to tell whether XML files are those of Pascal VOC
BEGINNING = 4096  # bytes in which the outermost element begins
OF_VOC = re.compile(rb"<annotation[\s>]")
PRESENCE = re.compile(r"\s+-?[01]$")  # what lists of one class have after the name


def xml_names(root: Path, folder: str) -> list[str]:
    """The XML files of a folder, sorted; empty where they are not those of Pascal VOC."""
    if not (root / folder).is_dir():
        return []
    paths = sorted(path for path in (root / folder).glob("*.xml") if not path.name.startswith("."))[:FILES_TO_PROBE]
    if not any(is_inside(path, root) and _is_voc(path) for path in paths):
        return []
    return sorted(name for name in names_in(root / folder, root) if name.endswith(".xml") and name[0] != ".")


def _is_voc(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return bool(OF_VOC.search(file.read(BEGINNING)))
    except OSError:
        return False


def xml_folder(root: Path) -> str | None:
    """The folder of the XML files of all splits, as in `Annotations`; None where each split has its own."""
    return next((folder for folder in XML_FOLDERS if xml_names(root, folder)), None)


def split_folders(root: Path) -> dict[str, str]:
    """The folder of XML files of each split: `train`, `valid`, or `train/Annotations`; or the root for training."""
    found = {}
    for split, synonyms in SPLIT_NAMES.items():
        places = [posixpath.join(name, folder) for name in synonyms for folder in ("", *XML_FOLDERS)]
        place = next((place.rstrip("/") for place in places if xml_names(root, place.rstrip("/"))), None)
        if place is not None:
            found[split] = place
    return found or ({"train": ""} if xml_names(root, "") else {})


def split_lists(root: Path) -> dict[str, str]:
    """The list of names of each split; `trainval` is for training where there is no list for it alone."""
    found = {}
    for split, synonyms in SPLIT_NAMES.items():
        names = (*synonyms, BOTH) if split == "train" else synonyms
        place = next((f"{LISTS}/{name}.txt" for name in names if is_file(root / LISTS / f"{name}.txt")), None)
        if place is not None:
            found[split] = place
    return found


def image_folders(root: Path, folder: str) -> list[str]:
    """Where the images of a folder of XML files may lie, the likeliest first."""
    beside = posixpath.dirname(folder) if posixpath.basename(folder) in XML_FOLDERS else folder
    places = [*(posixpath.join(beside, name) for name in IMAGE_FOLDERS), folder, beside]
    return list(dict.fromkeys(place for place in places if (root / place).is_dir()))


def files_of_list(path: Path, root: Path, xml_files: set[str]) -> list[str]:
    """The XML files that a list names, in its order, each once.

    Raises:
        DataError: some of them do not exist.
    """
    require_inside(path, root)
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    found: dict[str, None] = {}
    absent = []
    for line in lines:
        name = PRESENCE.sub("", line)
        candidates = [f"{text}.xml" for text in (line, name, posixpath.splitext(name)[0])]
        if match := next((candidate for candidate in candidates if candidate in xml_files), None):
            found[match] = None
        else:
            absent.append(name)
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of {len(lines)} images listed have no XML file, the first being {absent[0]!r}. "
            "Add the files, or take the images out of the list."
        )
    return list(found)
