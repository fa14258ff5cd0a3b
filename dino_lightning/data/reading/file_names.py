"""File names of an annotation file, matched with the files in the image folder.

Programs write names of other machines: Windows separators, absolute paths, addresses, percent signs, prefixes of their
own. Where the base name is unique in the image folder, it is that file. Nothing outside the folder is ever looked at.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from dino_lightning.data.image_files import is_image

UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the name of an uploaded file
DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class MatchedNames:
    """File names as they are in the image folder.

    Attributes:
        names: relative to the folder, with forward slashes; None for a name that leaves the folder and whose base name
            is not that of exactly one file there. A name that stays inside but has no file is kept.
        how: how many were found in which way, other than as they are.
        example: the first of them: as listed, and as found.
    """

    names: list[str | None]
    how: Counter[str]
    example: tuple[str, str] | None

    def sentence(self, folder: Path) -> str:
        """What was matched, in one sentence; empty if all names are those of files."""
        if self.example is None:
            return ""
        ways = ", ".join(f"{count} {way}" for way, count in self.how.items())
        return (
            f"{self.how.total()} file names are not those of the files in {folder} and were matched with them: {ways} "
            f"(first: {self.example[0]!r} is {self.example[1]})."
        )


def match_names(folder: Path, listed: Sequence[str]) -> MatchedNames:
    """Match the file names of an annotation file with the files in its image folder.

    Args:
        folder: the image folder; it may be absent.
        listed: the names as the annotation file has them.
    """
    files = _Files(folder)
    names: list[str | None] = []
    found: dict[int, tuple[str, str]] = {}  # position -> how, and the file
    for position, name in enumerate(listed):
        plain = _inside(name)
        names.append(plain)
        if plain is None or not files.has(plain):
            match = files.find(name)
            if match is not None:
                found[position] = match
    claimed: defaultdict[str, set[str]] = defaultdict(set)
    for position, (_, file) in found.items():
        claimed[file].add(listed[position])
    taken = {name for position, name in enumerate(names) if name is not None and position not in found}
    how: Counter[str] = Counter()
    example = None
    for position, (way, file) in found.items():
        if len(claimed[file]) > 1 or (way not in (DECODED, TAIL) and file in taken):
            continue  # two names for one file: the base name does not tell them apart
        names[position] = file
        how[way] += 1
        example = example or (listed[position], file)
    return MatchedNames(names, how, example)


DECODED, TAIL, BASE, CASE, SUFFIX, PREFIX = (
    "by decoding the name",
    "by the end of the path",
    "by the base name",
    "by the base name, letters or accents written otherwise",
    "by the name without its suffix",
    "without the prefix of an upload",
)


class _Files:
    """The files of a folder: each subfolder is listed when it is asked for, all of them when that is not enough."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[str, set[str]] = {}
        self._index: tuple[Mapping[str, list[str]], ...] | None = None

    def has(self, name: str) -> bool:
        """Whether there is a file of this relative name."""
        parent, _, base = name.rpartition("/")
        if parent not in self._listed:
            try:
                self._listed[parent] = {entry.name for entry in (self._folder / parent).iterdir()}
            except (OSError, ValueError):
                self._listed[parent] = set()
        return base in self._listed[parent]

    def find(self, name: str) -> tuple[str, str] | None:
        """How a name was found, and the file's relative name; None where no or several files fit."""
        variants = _variants(name)
        for variant in variants:
            plain = _inside(variant)
            if plain is not None and self.has(plain):
                return DECODED, plain
            tails = [] if plain is None else [plain]
            parts = _plain_parts(variant)
            tails += ["/".join(parts[first:]) for first in range(1, len(parts) - 1)]
            for tail in tails:  # of a path of another machine, what lies below the folder here too
                for name_here in (tail, unicodedata.normalize("NFC", tail), unicodedata.normalize("NFD", tail)):
                    if self.has(name_here):
                        return TAIL, name_here
        exact, folded, stems = self._by_base_name()
        bases = list(dict.fromkeys(variant.rpartition("/")[2] for variant in variants))
        for way, table, keys in (
            (BASE, exact, bases),
            (CASE, folded, [_folded(base) for base in bases]),
            (SUFFIX, stems, [_folded(_stem(base)) for base in bases]),
            (PREFIX, exact, [UPLOAD_PREFIX.sub("", base) for base in bases]),
        ):
            for key in keys:
                files = table.get(key, [])
                if key and len(files) == 1:
                    return way, files[0]
        return None

    def _by_base_name(self) -> tuple[Mapping[str, list[str]], ...]:
        if self._index is None:
            tables: tuple[defaultdict[str, list[str]], ...] = (defaultdict(list), defaultdict(list), defaultdict(list))
            for folder, inside, files in os.walk(self._folder):
                inside[:] = sorted(part for part in inside if not part.startswith("."))
                for file in files:
                    if is_image(file):
                        path = (Path(folder) / file).relative_to(self._folder).as_posix()
                        for table, key in zip(tables, (file, _folded(file), _folded(_stem(file))), strict=True):
                            table[key].append(path)
            self._index = tables
        return self._index


def _inside(name: str) -> str | None:
    """The name with forward slashes, or None for one that leaves its folder by the rules of Windows or Linux."""
    plain = name.replace("\\", "/")
    if plain.startswith("/") or DRIVE.match(plain) or "://" in plain:
        return None
    if ".." in plain.split("/"):
        return None
    return PurePosixPath(plain).as_posix() if plain else None


def _variants(name: str) -> list[str]:
    """What a listed name may stand for, with forward slashes."""
    variants = [name.replace("\\", "/")]
    if "://" in name:
        variants.append(urlsplit(name).path.lstrip("/"))
    variants += [unquote(variant) for variant in variants]
    return list(dict.fromkeys(variants))


def _plain_parts(name: str) -> list[str]:
    """The parts of a path of another machine, without its drive and what leads upwards."""
    return [part for part in DRIVE.sub("", name).split("/") if part not in ("", ".", "..") and "\0" not in part]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0] if is_image(name) else name  # noqa: PTH122 - a text, which may hold a null byte


def _folded(name: str) -> str:
    """Alike for upper and lower case, and for both ways in which Unicode writes an umlaut."""
    return unicodedata.normalize("NFC", name).lower()
