"""Where a YOLO dataset keeps its files: what its yaml file says, or the folders beside its list of class names.

All places are paths relative to the dataset's folder, with forward slashes; "" is that folder itself.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from dino_lightning.data.image_files import is_image
from dino_lightning.data.other_formats.image_folder import (
    exists,
    is_inside,
    names_in,
    read_text,
    require_inside,
)
from dino_lightning.data.reading.json_file import shown_value
from dino_lightning.data.split_files import SPLIT_NAMES, is_file
from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
MAX_YAML = 1_000_000  # bytes; the yaml of a thousand classes has a fiftieth of it
NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels")
SPLIT_FOLDERS = ("images/{split}", "{split}/images", "{split}", "obj_{split}_data")  # the last one: CVAT
WHOLE_FOLDERS = ("images", "")


@dataclass(frozen=True)
class Description:
    """What a YOLO dataset says of itself.

    Attributes:
        names: class k is `names[k]`.
        parts: the folders and lists of images of each split, as they are named.
        base: the folder that these are relative to.
        keypoints: labels have keypoints after the box.
    """

    names: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    base: str
    keypoints: bool


def find_description(root: Path) -> Path | None:
    """The yaml file that describes a dataset folder, or None.

    Raises:
        DataError: there are several and none has one of the usual names.
    """
    for name in DESCRIPTIONS:
        if is_file(root / name) and "train" in read_yaml(root / name):
            return root / name
    found = []
    for path in sorted((*root.glob("*.yaml"), *root.glob("*.yml"))):
        try:
            text = read_text(path, MAX_YAML) if is_inside(path, root) else ""
            content = read_yaml(path) if "names" in text and "train" in text else {}
        except DataError:
            continue  # none of the usual names: not a file of ours
        if "names" in content and "train" in content:
            found.append(path)
    if len(found) > 1:
        raise DataError(f"{found[1]}: describes a YOLO dataset, as does {found[0].name}. Call the right one data.yaml.")
    return found[0] if found else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a yaml file; empty if it is no mapping.

    Raises:
        DataError: it cannot be read or is no yaml.
    """
    require_inside(path, path.parent)
    text = read_text(path, MAX_YAML)
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1}: {error.problem})"
        raise DataError(f"{path}: is no valid yaml{line}. Correct it.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no valid yaml ({shown_value(str(error))}). Correct it.") from error
    return content if isinstance(content, dict) else {}


def read_description(path: Path) -> Description:
    """What the yaml file of a dataset says.

    Raises:
        DataError: something in it is missing, of another kind or contradicts itself.
    """
    content = read_yaml(path)
    names = _class_names(path, content.get("names"))
    count = content.get("nc")
    if count is not None and count != len(names):
        raise DataError(f"{path}: nc is {_shown(count)}, but names has {len(names)} classes. Correct one of them.")
    parts = {}
    for split, keys in SPLIT_NAMES.items():
        entries = next((content[key] for key in keys if content.get(key)), None)
        if entries is not None:
            parts[split] = _entries(path, split, entries)
    base = content.get("path")
    if base is not None and not isinstance(base, str):
        raise DataError(f"{path}: path is {_shown(base)}; it must be the name of a folder.")
    return Description(names, parts, _base(path.parent, base), bool(content.get("kpt_shape")))


def _entries(path: Path, split: str, given: object) -> tuple[str, ...]:
    entries = given if isinstance(given, list) else [given]
    places = []
    for entry in entries:
        if not isinstance(entry, str) or not entry.strip():
            raise DataError(f"{path}: {split} is {_shown(entry)}; it must name a folder, a list (.txt) or several.")
        places.append(entry.strip())
    return tuple(places)


def _class_names(path: Path, given: object) -> tuple[str, ...]:
    if not isinstance(given, (list, dict)) or not given:
        raise DataError(f"{path}: has no names. List the names of the classes there, as in names: [room, wall].")
    if isinstance(given, dict):
        if any(type(key) is not int for key in given) or sorted(given) != list(range(len(given))):
            raise DataError(f"{path}: names must number its {len(given)} classes from 0 on, without gaps.")
        given = [given[index] for index in range(len(given))]
    for index, name in enumerate(given):
        if isinstance(name, bool) or not isinstance(name, (str, int, float)) or not str(name).strip():
            raise DataError(f"{path}: the name of class {index} is {_shown(name)}. Put a name there, in quotes.")
    return tuple(str(name).strip() for name in given)


def _shown(value: object) -> str:
    """A value of a yaml file as a message repeats it; one of many parts could be endless by its aliases."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict, set, tuple)) else shown_value(value)


def _base(root: Path, given: str | None) -> str:
    """The folder that `path` names if it is in the dataset's folder, which stands for any other machine's."""
    text = (given or "").strip().replace("\\", "/")
    if not text or not is_inside(root / text, root) or not exists(root / text):
        return ""
    return _relative(root, text)


def _relative(root: Path, text: str) -> str:
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive:
        text = (root / text).resolve().relative_to(root.resolve()).as_posix()
    normal = posixpath.normpath(text)
    return "" if normal == "." else normal


def place_of(root: Path, base: str, given: str) -> str | None:
    """Where a folder or file lies that is named in a yaml file or list; None if it is not in the dataset's folder.

    Paths of other machines are taken by their end, and `../train/images` is `train/images`, as Roboflow means it.
    """
    return next((place for place in places_of(root, base, given) if exists(root / place)), None)


def places_of(root: Path, base: str, given: str) -> Iterator[str]:
    """Where something may lie, the likeliest place first; never outside of the dataset's folder."""
    text = given.strip().replace("\\", "/")
    absolute = PurePosixPath(text).is_absolute() or bool(PureWindowsPath(text).drive)
    if absolute and is_inside(Path(text), root):
        yield _relative(root, text)
    if not absolute:
        place = posixpath.normpath(posixpath.join(base, text))
        if place.split("/")[0] != "..":
            yield "" if place == "." else place
    if absolute or text.startswith("../"):
        parts = [part for part in text.split("/") if part not in ("", ".", "..") and not part.endswith(":")]
        for begin in range(len(parts)):
            if begin and parts[begin:] == ["images"]:
                return  # several splits would share it, which is not what longer paths say
            yield "/".join([*([base] if base else []), *parts[begin:]])
            if base:
                yield "/".join(parts[begin:])


def images_of_entry(root: Path, base: str, entry: str) -> tuple[list[str], bool] | None:
    """The images that an entry of a yaml file means, and whether they are all of a folder; None if it is not there."""
    place = place_of(root, base, entry)
    if place is None:
        return None
    if place.endswith(".txt") and is_file(root / place):
        return listed_images(root, base, place), False
    return images_below(root, place), True


def images_below(root: Path, folder: str) -> list[str]:
    """The image files in a folder and the folders in it, sorted.

    Raises:
        DataError: a link leads out of the dataset's folder, or to another folder.
    """
    require_inside(root / folder, root)
    found, waiting = [], [folder]
    while waiting:
        place = waiting.pop()
        prefix = f"{place}/" if place else ""
        try:
            entries = list(os.scandir(root / place))
        except OSError as error:
            raise DataError(f"{root / place}: the folder {unreadable(error)}.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue  # "._plan.jpg" beside "plan.jpg" is no image, but macOS's notes on it
            if entry.is_symlink():
                require_inside(root / place / entry.name, root)
                if entry.is_dir():
                    raise DataError(f"{root / place / entry.name}: is a link to a folder. Put the folder itself there.")
            if entry.is_dir():
                waiting.append(prefix + entry.name)
            elif is_image(entry.name) and entry.is_file():
                found.append(prefix + entry.name)
    return sorted(found)


def listed_images(root: Path, base: str, list_file: str) -> list[str]:
    """The images named in a list, one a line.

    Raises:
        DataError: some of them are not in the dataset's folder.
    """
    require_inside(root / list_file, root)
    lines = [line.strip().replace("\\", "/") for line in read_text(root / list_file).splitlines() if line.strip()]
    folders: dict[str, str] = {}
    present: dict[str, set[str]] = {}
    found, absent = [], []
    for line in lines:
        parent, _, name = line.rpartition("/")
        if parent not in folders:  # files of a folder lie together: it is searched for once
            folders[parent] = _folder_of(root, (base, posixpath.dirname(list_file)), line)
        folder = folders[parent]
        if folder not in present:
            present[folder] = names_in(root / folder, root)
        if name in present[folder]:
            found.append(f"{folder}/{name}" if folder else name)
        else:
            absent.append(line)
    if absent:
        raise DataError(
            f"{root / list_file}: {len(absent)} of {len(lines)} images listed are not in {root}, the first being "
            f"{shown_value(absent[0])}. Put them there, or take them out of the list."
        )
    return sorted(set(found))


def _folder_of(root: Path, bases: tuple[str, ...], line: str) -> str:
    for base in bases:
        for place in places_of(root, base, line):
            if is_file(root / place):
                return posixpath.dirname(place)
    return posixpath.dirname(next(places_of(root, bases[0], line), ""))


def label_folder(root: Path, folder: str) -> str:
    """Where the labels of the images in `folder` lie: the last `images` of it being `labels`, or beside them."""
    parts = folder.split("/")
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        place = "/".join([*parts[:last], "labels", *parts[last + 1 :]])
        if exists(root / place):
            return place
    return folder


def find_named(root: Path) -> dict[str, tuple[str, str]]:
    """The splits of a folder without yaml: for each the list of class names, and the folder of its images."""
    found = {}
    for split, synonyms in SPLIT_NAMES.items():
        folders = [folder.format(split=name) for folder in SPLIT_FOLDERS for name in synonyms]
        if place := _first_named(root, folders):
            found[split] = place
    if not found and (place := _first_named(root, WHOLE_FOLDERS)):
        found["train"] = place
    return found


def _first_named(root: Path, folders: tuple[str, ...] | list[str]) -> tuple[str, str] | None:
    for folder in folders:
        if not exists(root / folder):
            continue
        labels = label_folder(root, folder)
        lists = [posixpath.join(place, name) for place in (folder, "", labels, "labels") for name in NAME_LISTS]
        names = next((name for name in lists if is_file(root / name)), None)
        if names is None:
            continue
        text_files = {posixpath.splitext(name)[0] for name in names_in(root / labels, root) if name.endswith(".txt")}
        images = {posixpath.splitext(posixpath.basename(name))[0] for name in _images_in(root, folder)}
        if text_files & images or (labels != folder and images):
            return names, folder
    return None


def _images_in(root: Path, folder: str) -> list[str]:
    """The images of a folder of labels without yaml; those of the root itself are not searched for deeper."""
    return images_below(root, folder) if folder else sorted(filter(is_image, names_in(root, root)))


def images_of_named(root: Path, folder: str) -> list[str]:
    """The images of a split found by `find_named`."""
    return _images_in(root, folder)


def names_of_list(path: Path) -> tuple[str, ...]:
    """The class names of a list, one a line.

    Raises:
        DataError: it has no names, or an empty line between them.
    """
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not lines:
        raise DataError(f"{path}: has no names. List the names of the classes there, one a line.")
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} is empty. Put the name of class {lines.index('')} there.")
    return tuple(lines)
