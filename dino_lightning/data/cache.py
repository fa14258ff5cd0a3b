"""Big images kept on disk at the size that training needs, so that a scan of 17 megapixels is decoded once.

A plan of 3508 x 4961 pixels takes longer to decode than to train on. Its pixels at 800 x 1131 are 2.7 MB, read in a
millisecond. They are stored as they are, without compression, hence without loss.

Several processes and several runs may share a folder: an entry is written under a temporary name, flushed, and renamed,
so that it is whole or absent whatever is killed when. Its name is a hash of the image file's content and the size, so
a changed file never meets an old entry.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dino_lightning.data.image_files import read_bytes
from dino_lightning.data.images import decode_bytes
from dino_lightning.data.sizes import resized_size
from dino_lightning.errors import DataError
from dino_lightning.files import unwritable

HEADER = struct.Struct("<8sIIII")  # magic, stored height and width, height and width of the file
MAGIC = b"DINOIMG1"
WORTHWHILE = 1.5  # an image with fewer pixels than this times the stored ones is as fast to decode
ENTRIES_BETWEEN_SCANS = 64
FORGOTTEN_SECONDS = 3600  # the writer of a temporary file older than this is gone


class ImageCache:
    """Down-scaled images in a folder of limited size.

    Entries of earlier runs are evicted when the space is needed, the least recently used first. Entries of this run are
    not: with more images than space, each epoch would evict what the next one needs.

    Args:
        folder: where the entries lie; made if missing.
        image_size: short side of the stored images in pixels.
        max_size: limit of their long side in pixels.
        stretch_to: side in pixels of the square that images are stored as in place of that; None for their own shape.
        max_bytes: limit of all entries together. Several processes may exceed it by a few dozen images.

    Attributes:
        problem: why no further images are stored, for the user; None while all is well.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(
        self, folder: Path, *, image_size: int, max_size: int, max_bytes: int, stretch_to: int | None = None
    ) -> None:
        self.folder = folder
        self.image_size = image_size
        self.max_size = max_size
        self.stretch_to = stretch_to
        self.max_bytes = max_bytes
        self.problem: str | None = None
        self._start = time.time() - 1  # file systems keep time in steps
        self._bytes = 0  # of all entries, as far as known
        self._until_scan = 0  # entries to write before the folder is looked through again
        self._digests: dict[Path, tuple[tuple[int, int, int], str]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def read(self, path: Path) -> tuple[Tensor, tuple[int, int]]:
        """The image, scaled down if that is worth while, and the (height, width) of the file as displayed.

        Returns:
            (3, h, w) uint8, RGB, in channels-last memory; with the size of the file.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """
        entry = self._known_entry(path)
        if entry is not None and (found := self._load(entry)) is not None:
            return found
        content = read_bytes(path)
        if entry is None:
            entry = self._entry_of(path, content)
            if (found := self._load(entry)) is not None:
                return found
        image = decode_bytes(content, str(path))
        size = (int(image.shape[1]), int(image.shape[2]))
        stored_size = resized_size(size, self.image_size, self.max_size)
        if self.stretch_to is not None:
            stored_size = self.stretch_to, self.stretch_to
        if size[0] * size[1] < WORTHWHILE * stored_size[0] * stored_size[1]:
            return image, size
        image = functional.resize(image, list(stored_size), antialias=True)
        if self.problem is None:
            self._store(entry, image, size)
        return image, size

    def _known_entry(self, path: Path) -> Path | None:
        """The entry of a file that this process has read before and that has not been written to since."""
        digest = self._digests.get(path)
        try:
            return self._entry(digest[1]) if digest is not None and digest[0] == _signature(path) else None
        except OSError:
            return None  # reading it will say what is wrong

    def _entry_of(self, path: Path, content: bytes) -> Path:
        sizes = f"{self.image_size},{self.max_size}" if self.stretch_to is None else f"stretched,{self.stretch_to}"
        digest = hashlib.blake2b(content, digest_size=20, key=sizes.encode()).hexdigest()
        with contextlib.suppress(OSError):  # gone since it was read: nothing to remember
            self._digests[path] = (_signature(path), digest)
        return self._entry(digest)

    def _entry(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest[2:]}.rgb"

    def _load(self, entry: Path) -> tuple[Tensor, tuple[int, int]] | None:
        """The content of an entry, or None if there is none, or not a whole one."""
        try:
            with entry.open("rb") as file:
                status = os.fstat(file.fileno())
                magic, height, width, file_height, file_width = HEADER.unpack(file.read(HEADER.size))
                if magic != MAGIC or status.st_size != HEADER.size + 3 * height * width:
                    return None
                pixels = np.fromfile(file, np.uint8, 3 * height * width).reshape(height, width, 3)
            if status.st_mtime < self._start:
                os.utime(entry)  # in use by this run
        except (OSError, ValueError, struct.error):
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1), (file_height, file_width)

    def _store(self, entry: Path, image: Tensor, size: tuple[int, int]) -> None:
        """Write an entry if there is room; an error of the disk ends the caching, not the training."""
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        length = HEADER.size + pixels.nbytes
        temporary: str | None = None
        try:
            if not self._make_room(length):
                self.problem = (
                    f"{self.folder} holds {self.max_bytes / 1e9:.1f} GB, its limit: further images are read from "
                    "their own files. Raise cache_gigabytes to keep them too."
                )
                return
            entry.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=entry.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(HEADER.pack(MAGIC, pixels.shape[0], pixels.shape[1], *size))
                file.write(pixels.data)
                file.flush()
                os.fsync(file.fileno())  # or a crash of the machine could leave a name without its content
            Path(temporary).replace(entry)
            self._bytes += length
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.problem = (
                f"{self.folder} cannot be written to ({'the disk is full' if full else error}): images that are not "
                "in it are read from their own files, as without cache_dir."
            )
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _make_room(self, length: int) -> bool:
        """Whether an entry of `length` bytes fits, after evicting entries of earlier runs where necessary."""
        if self._until_scan > 0 and self._bytes + length <= self.max_bytes:
            self._until_scan -= 1
            return True
        entries = self._scan()
        self._bytes = sum(size for _, size, _ in entries)
        self._until_scan = ENTRIES_BETWEEN_SCANS
        for last_used, size, path in sorted(entries):
            if self._bytes + length <= self.max_bytes:
                break
            if last_used >= self._start:
                return False
            path.unlink(missing_ok=True)
            self._bytes -= size
        return self._bytes + length <= self.max_bytes

    def _scan(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of each entry; forgotten temporary files are removed."""
        entries = []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
                if path.suffix == ".rgb":
                    entries.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".tmp" and status.st_mtime < time.time() - FORGOTTEN_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process was faster
        return entries


def _signature(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to: time of change in ns, bytes, inode."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def image_cache(
    folder: str | None, image_size: int, max_size: int, gigabytes: float, *, stretch_to: int | None = None
) -> ImageCache | None:
    """The cache in a folder, or None without one.

    Args:
        folder: where it lies.
        image_size: short side in pixels that images are kept at.
        max_size: limit of their long side in pixels.
        gigabytes: limit of the folder.
        stretch_to: side in pixels of the square that they are kept as instead.

    Raises:
        DataError: the folder cannot be written to.
    """
    if folder is None:
        return None
    try:
        limit = int(gigabytes * 1e9)
        return ImageCache(
            Path(folder), image_size=image_size, max_size=max_size, max_bytes=limit, stretch_to=stretch_to
        )
    except OSError as error:
        raise DataError(f"cache_dir: {unwritable(folder, error, 'folder')}") from error
