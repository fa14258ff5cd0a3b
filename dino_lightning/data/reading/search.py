"""Looking through a dataset folder for annotation files and image folders, whatever they are called."""

from __future__ import annotations

import gzip
import json
import mmap
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from dino_lightning.data.image_files import is_image
from dino_lightning.data.reading.file_names import match_names
from dino_lightning.data.split_files import is_file

DEPTH = 3  # folders below the root that are looked into
SNIFFED = 20  # JSON files of one folder that are opened; with more, there is one for each image
PROBED = 40  # file names that tell whether a folder is the right one
OTHER_TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".tfrecord", ".record", ".pkl", ".mat", ".ndjson")
PEEK = 1 << 26  # bytes of a gzipped file that are looked at
SPLIT_WORDS = {
    "train": "train", "training": "train", "trainset": "train", "val": "val", "valid": "val", "validation": "val",
    "valset": "val", "dev": "val", "test": "test", "testing": "test", "testset": "test",
}  # fmt: skip
COMPANIONS = re.compile(r"^(captions|person_keypoints|stuff|panoptic|image_info|deepfashion2_keypoints)_")
USUAL_WORDS = ("instances", "annotations", "annotation", "coco", "labels", "result", "bbox")
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
SPLIT_FIELD = re.compile(rb'"split"\s*:\s*"([A-Za-z]+)"')


def split_word(name: str) -> str | None:
    """The split that a file's or folder's name says: "train", "val" or "test"; None for none, or for several."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    splits = {SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def split_of(path: Path, root: Path) -> str | None:
    """The split that a file belongs to by its name, or by those of its folders below the root, nearest first."""
    relative = path.relative_to(root)
    names = [relative.name.split(".")[0], *reversed(relative.parts[:-1])]
    return next((split for name in names if (split := split_word(name))), None)


def json_files(root: Path) -> list[Path]:
    """The JSON files of a folder, gzipped ones too, not too deep; sorted."""
    return [
        folder / name
        for folder, names in _walk(root)
        for name in names
        if name.lower().endswith((".json", ".json.gz")) and not name.startswith(".") and is_file(folder / name)
    ]


def other_tables(root: Path) -> list[Path]:
    """Files in which other programs keep annotations, and which are not read; sorted."""
    return [folder / name for folder, names in _walk(root) for name in names if name.lower().endswith(OTHER_TABLES)]


def coco_files(root: Path) -> dict[str | None, list[list[Path]]]:
    """The files of a folder that look like COCO's, by split, None where their names tell none.

    Returns:
        Per split the choices, the likeliest first: each one file, or all files of a folder that has one JSON for each
        image.
    """
    by_folder: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in json_files(root):
        if not COMPANIONS.match(path.name):
            by_folder[path.parent].append(path)
    found: defaultdict[str | None, list[list[Path]]] = defaultdict(list)
    for folder, paths in by_folder.items():
        if _one_for_each_image(root, folder, paths):
            if all(map(looks_like_coco, paths[:SNIFFED])):
                found[split_of(folder / "x", root)].append(paths)
            continue
        for path in paths[:SNIFFED]:
            if looks_like_coco(path):
                found[split_of(path, root)].append([path])
    return {split: sorted(choices, key=lambda choice: _rank(choice[0], root)) for split, choices in found.items()}


def looks_like_coco(path: Path) -> bool:
    """Whether a JSON file has what a COCO detection file has: images, annotations and categories."""
    keys = (b'"images"', b'"annotations"', b'"categories"')
    if not is_file(path):
        return False  # a pipe would wait for a writer
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as packed:
                head = packed.read(PEEK)
            return all(key in head for key in keys) or (len(head) == PEEK and keys[0] in head)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16
                content_bytes = content[:PEEK].replace(b"\0", b"")
                return all(key in content_bytes for key in keys)
            return all(content.find(key) >= 0 for key in keys) or content[:2] == b"\x1f\x8b"
    except (OSError, ValueError, EOFError, zlib.error):  # ValueError: an empty file
        return False


def image_folders(root: Path) -> list[Path]:
    """The folders that hold images, in them or below, the root among them, not too deep; sorted."""
    found: set[Path] = set()
    for folder, names in _walk(root):
        if any(is_image(name) for name in names):
            found |= {folder, *(above for above in folder.parents if above == root or above.is_relative_to(root))}
    return sorted(found)


def some_file_names(annotations: Path, count: int = PROBED) -> list[str]:
    """Some file names of an annotation file, from all of it or, of a large one, from its beginning.

    They are found as text: a large file is parsed once, by the reader.
    """
    if not is_file(annotations):
        return []
    try:
        with annotations.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            head = content[:4]
            if head.startswith(b"\x1f\x8b"):
                with gzip.open(annotations) as packed:
                    return _names(packed.read(PEEK), count)
            encoding = json.detect_encoding(head)
            if encoding.startswith(("utf-16", "utf-32")):
                return _names(content[:].decode(encoding, "replace").encode(), count)
            return _names(content[:PEEK], count)
    except (OSError, ValueError, EOFError, zlib.error):
        return []


def splits_in_entries(annotations: Path) -> set[str]:
    """The splits that the `split` fields of a file's images name, in this package's words."""
    if not is_file(annotations):
        return set()
    try:
        with annotations.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            words = {match[1].decode() for match in SPLIT_FIELD.finditer(content)}
    except (OSError, ValueError):
        return set()
    return {split for word in words if (split := split_word(word))}


def files_in(folder: Path, names: Sequence[str]) -> int:
    """How many of some listed file names, as they are, are those of files in a folder."""
    plain = [name.replace("\\", "/") for name in names]
    return sum(is_file(folder / name) for name in plain if not name.startswith("/") and ".." not in name.split("/"))


def matching_files(folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """How many of some listed file names can be matched with files in a folder, and how many are theirs as they are."""
    matched = match_names(folder, names)
    as_they_are = files_in(folder, names)
    return as_they_are + matched.how.total(), as_they_are


def foreign_format(path: Path) -> str:
    """Which other program wrote a JSON file, in a few words; empty where that is not known."""
    try:
        with path.open("rb") as file:  # found by `json_files`, so a regular one
            head = file.read(1 << 16)
    except OSError:
        return ""
    for keys, words in (
        ((b'"shapes"', b'"imagePath"'), "LabelMe's own format, one file for each image; labelme2coco converts it"),
        ((b'"regions"', b'"filename"'), "VIA's own format; VIA exports COCO too"),
        ((b'"objects"', b'"classTitle"'), "Supervisely's own format; its app exports COCO too"),
        ((b'"result"', b'"from_name"'), "Label Studio's own format; it exports COCO too"),
        ((b'"slots"', b'"item"'), "Darwin's own format; V7 exports COCO too"),
        ((b'"coordinates"', b'"image"'), "CreateML's format; Roboflow converts it"),
    ):
        if all(key in head for key in keys):
            return words
    return ""


def _names(content: bytes, count: int) -> list[str]:
    """`count` file names at equal distances."""
    found = [match[1] for match in FILE_NAME.finditer(content)]
    names = []
    for encoded in found[:: max(1, len(found) // count)][:count]:
        try:
            names.append(str(json.loads(encoded)))
        except ValueError:
            continue
    return names


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders, not too deep, hidden ones left out, with their files' names; sorted."""
    for folder, inside, names in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        inside[:] = sorted(name for name in inside if not name.startswith(".")) if depth < DEPTH else []
        yield Path(folder), sorted(names)


def _one_for_each_image(root: Path, folder: Path, paths: Sequence[Path]) -> bool:
    """Whether the JSON files of a folder are named like images, here or in a folder beside it."""
    if len(paths) < 2:
        return False
    near = (folder, folder / "images", folder.parent / "images", folder.parent)
    stems = {
        file.stem
        for place in near
        if place.is_dir() and place.is_relative_to(root)
        for file in place.iterdir()
        if is_image(file.name)
    }
    return sum(_stem(path) in stems for path in paths) >= 0.9 * len(paths)


def _stem(path: Path) -> str:
    """The name without .json or .json.gz, and without the suffix of an image before it (`1.png.json`)."""
    name = re.sub(r"\.json(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    return Path(name).stem if is_image(name) else name


def _rank(path: Path, root: Path) -> tuple[int, int, int, str]:
    """Smaller for a likelier annotation file: near the root, named as usual, with a short name."""
    stem = _stem(path).lower()
    usual = split_word(stem) == stem or any(word in stem for word in USUAL_WORDS)
    return len(path.relative_to(root).parts), 0 if usual else 1, len(stem), str(path)
