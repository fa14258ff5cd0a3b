"""Large annotation files, parsed once on a machine: their arrays on disk, shared by all processes that map them.

An entry is a folder of arrays, moved into place when it is whole; its name holds the size, the time and the hash of the
file and what else its content follows from. Without a cache folder that can be written, files are parsed every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from dino_lightning.data.coco import ROW_ARRAYS, Category, CocoAnnotations, ImageTable
from dino_lightning.data.reading.file_names import match_names
from dino_lightning.files import sha256_of

LAYOUT = 1  # of the entries; another one is another entry
SMALLEST = 20_000_000  # bytes of a file that is worth an entry: smaller ones are parsed in half a second
ENTRIES = 8  # that are kept, the newest
LONGEST_WAIT = 600  # seconds for another process that parses the same file
IMAGE_ARRAYS = ("ids", "sizes", "name_bytes", "name_ends")


@dataclass(frozen=True)
class Entry:
    """What is kept of a file without faults.

    Attributes:
        annotations: its content.
        parts: the `split` field of each image, or None.
    """

    annotations: CocoAnnotations
    parts: tuple[str | None, ...]


def cache_folder() -> Path:
    """Where the entries lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_lightning" / "annotations"


def cached(path: Path, images_folder: Path, options: Any, parse: Callable[[], tuple[Entry | None, Any]]) -> Any:
    """The content of a large file: from the cache, or parsed and kept there.

    Args:
        path: the annotation file.
        images_folder: what its file names are relative to.
        options: what the content depends on beside the file; by its `repr`.
        parse: reads the file; gives what to keep, or None where it has faults, and the result.

    Returns:
        An `Entry` of the cache, or the result of `parse`.
    """
    name = _name(path, images_folder, options)
    if name is None:
        return parse()[1]
    place = cache_folder() / name
    with _alone(place):  # one process parses, the others find the entry
        entry = _load(place, path, images_folder)
        if entry is not None:
            return entry
        entry, result = parse()
        if entry is not None:
            _save(place, entry)
    return result


def _name(path: Path, images_folder: Path, options: Any) -> str | None:
    """The name of the entry of a file, or None for one that is small or cannot be read."""
    try:
        status = path.stat()
        if status.st_size < SMALLEST:
            return None
        key = repr(
            (LAYOUT, status.st_size, status.st_mtime_ns, sha256_of(path), str(images_folder.absolute()), options)
        )
    except OSError:
        return None
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:24]


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Hold the lock of an entry; without one where the cache cannot be written or another process takes too long."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{place}.lock", timeout=LONGEST_WAIT)
        lock.acquire()
    except (OSError, filelock.Timeout):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _load(place: Path, path: Path, images_folder: Path) -> Entry | None:
    """An entry, or None where there is none, or where the names of the images in the folder have changed."""
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _names()}
        os.utime(place)  # the oldest entries are removed first
    except (OSError, ValueError, EOFError):
        return None
    images = ImageTable(**{name: arrays[name] for name in IMAGE_ARRAYS})
    names = [images.name(index) for index in range(len(images))]
    if match_names(images_folder, names).names != names:
        return None
    found = CocoAnnotations(
        path=path,
        images_folder=images_folder,
        categories=tuple(Category(**category) for category in about["categories"]),
        images=images,
        offsets=arrays["offsets"],
        **{name: arrays[name] for name in ROW_ARRAYS},
    )
    parts = about["parts"]
    return Entry(found, tuple(parts) if parts else (None,) * len(images))


def _save(place: Path, entry: Entry) -> None:
    found = entry.annotations
    arrays = {name: getattr(found.images, name) for name in IMAGE_ARRAYS}
    arrays |= {name: getattr(found, name) for name in ("offsets", *ROW_ARRAYS)}
    about = {
        "categories": [asdict(category) for category in found.categories],
        "parts": entry.parts if any(entry.parts) else [],
    }
    try:
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix="tmp-"))
        try:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)  # one that could not be read, or of other names
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_oldest(place.parent)
    except OSError:
        pass  # a full or read-only disk: the file is parsed again next time


def _remove_oldest(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("tmp-")]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[ENTRIES:]:
        shutil.rmtree(path, ignore_errors=True)
        Path(f"{path}.lock").unlink(missing_ok=True)


def _names() -> tuple[str, ...]:
    return (*IMAGE_ARRAYS, "offsets", *ROW_ARRAYS)
