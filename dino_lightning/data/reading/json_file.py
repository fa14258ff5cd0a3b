"""JSON files as people's tools write them: UTF-8 or UTF-16, gzipped or not, of any size.

A large file is mapped into memory, and its lists are cut into entries that are parsed one by one (msgspec), so that the
whole of it never exists as Python objects. What msgspec refuses is read again by Python's own parser: that knows `NaN`,
and says line and column where the text is no JSON.
"""

from __future__ import annotations

import gzip
import json
import mmap
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from dino_lightning.errors import DataError
from dino_lightning.files import unreadable

GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
UTF8_MARK = b"\xef\xbb\xbf"
CHUNK = 1 << 22  # bytes that are checked at once
MOST_UNPACKED = 1 << 33  # bytes; a small gzip file can hold any number of them
LONGEST_VALUE = 100  # characters of a faulty value that a message repeats

Entry = Any  # a `msgspec.Raw`, which is parsed when it is needed, or the object itself
Buffer = bytes | memoryview


class _Tables(msgspec.Struct):
    """The lists of a COCO file, not parsed yet; empty where the file has none."""

    images: msgspec.Raw = msgspec.Raw()
    annotations: msgspec.Raw = msgspec.Raw()
    categories: msgspec.Raw = msgspec.Raw()


class Tables(msgspec.Struct):
    """The lists of a COCO file, entry by entry.

    Attributes:
        images: its images.
        annotations: its annotations.
        categories: its categories.
        source: what unparsed entries are views of.
    """

    images: Sequence[Entry]
    annotations: Sequence[Entry]
    categories: Sequence[Entry]
    source: Any = None

    def drop_pages(self) -> None:
        """Give the memory of a mapped file back; what is read again later comes from the system's cache."""
        if isinstance(self.source, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.source.madvise(mmap.MADV_DONTNEED)


def read_tables(path: Path, needed: Sequence[str] = ("images", "annotations", "categories")) -> Tables:
    """The lists of a COCO file; those not needed are empty where the file lacks them.

    Raises:
        DataError: the file cannot be read, is no JSON, or lacks a list.
    """
    content = _content(path)
    try:
        raw = msgspec.json.decode(content, type=_Tables)
        document = {
            name: msgspec.json.decode(entries, type=list[msgspec.Raw])
            for name in ("images", "annotations", "categories")
            if len(memoryview(entries := getattr(raw, name)))
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        document = _parsed(path, content)
    for name in needed:
        if name not in document:
            raise DataError(f"{path}: has no {name!r}. A COCO detection file needs images, annotations and categories.")
    for name in ("images", "annotations", "categories"):
        if not isinstance(document.setdefault(name, []), list):
            raise DataError(f"{path}: {name!r} must be a list, not {kind_of(document[name])}.")
    source = content.obj if isinstance(content, memoryview) else None
    return Tables(document["images"], document["annotations"], document["categories"], source)


def parsed(entry: Entry) -> Any:
    """An entry as Python objects."""
    return json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry


def kind_of(value: object) -> str:
    """The JSON type of a value, as a message names it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown_value(value: object) -> str:
    """A faulty value as a message repeats it."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _parsed(path: Path, content: Buffer) -> dict[str, Any]:
    try:
        document = json.loads(bytes(content))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Repair or export the file again."
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{path}: is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply to be a COCO file.") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: must hold a JSON object, not {kind_of(document)}.")
    return document


def _content(path: Path) -> Buffer:
    """The text of a file as UTF-8 without a byte order mark: mapped into memory, or converted."""
    mapped = _mapped(path)
    head = bytes(mapped[:4])
    if head.startswith(GZIP):
        mapped = memoryview(_unpacked(path))
        head = bytes(mapped[:4])
    if head.startswith(ZIP):
        raise DataError(f"{path}: is a ZIP archive. Unpack it, and give the JSON file in it.")
    encoding = json.detect_encoding(head)
    if encoding.startswith(("utf-16", "utf-32")):
        try:
            return bytes(mapped).decode(encoding).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is damaged {encoding.upper()} text (byte {error.start}).") from error
    content = mapped[len(UTF8_MARK) :] if head.startswith(UTF8_MARK) else mapped
    _check_utf8(path, content)
    return content


def _mapped(path: Path) -> memoryview:
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: is not a regular file. Give the annotation file.")
            if status.st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the annotation file does not exist.") from error
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}.") from error


def _unpacked(path: Path) -> bytes:
    pieces, size = [], 0
    try:
        with gzip.open(path) as file:
            while piece := file.read(CHUNK):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_UNPACKED:
                    raise DataError(f"{path}: unpacks to more than {MOST_UNPACKED >> 30} GB.")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: is a damaged gzip file ({error}). Copy or export it again.") from error
    return b"".join(pieces)


def _check_utf8(path: Path, content: Buffer) -> None:
    """Refuse text in another encoding: its names would be other names.

    Raises:
        DataError: names the byte, and the likely encoding.
    """
    start = 0
    while start < len(content):
        piece = bytes(content[start : start + CHUNK])
        if not piece.isascii():
            try:
                piece.decode("utf-8")
            except UnicodeDecodeError as error:
                rest = len(piece) - error.start
                if error.reason == "unexpected end of data" and rest < 4 and start + len(piece) < len(content):
                    start += error.start  # a character that the piece cuts in two
                    continue
                byte = start + error.start
                line = bytes(content[:byte]).count(b"\n") + 1
                raise DataError(
                    f"{path}: is not UTF-8 text (byte {byte}, line {line}); it looks like Latin-1 or Windows-1252. "
                    f"Save it as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8.json"
                ) from error
        start += len(piece)
