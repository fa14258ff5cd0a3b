"""The dataset as stored in S3: tar shards of the images, the annotation files, and a manifest that lists them all.

    manifest.json               written last: without it, the upload is incomplete
    train/annotations.json      the user's file, unchanged
    shards/<sha256>.tar         contains train/images/..., val/images/...

Unpacked, it is the first layout that `CocoDataModule` looks for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dino_lightning.files import sha256_of
from sagemaker_entry.protocol.problem import Problem

MANIFEST = "manifest.json"
FORMAT = "dino_lightning dataset 1"
CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """One object of the dataset: its key below the prefix, its length in bytes, and its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The list of a stored dataset's files.

    Attributes:
        annotations: the annotation file of each split.
        shards: the tar archives of the images.
        images: the number of image files in all shards.
    """

    annotations: tuple[StoredFile, ...]
    shards: tuple[StoredFile, ...]
    images: int

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files except the manifest itself."""
        return (*self.annotations, *self.shards)

    def to_json(self) -> str:
        """The content of manifest.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a manifest.

        Raises:
            Problem: the text is no manifest of this format, or a name in it leads out of the dataset's folder.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(content["format"])
            manifest = cls(
                annotations=tuple(_stored_file(entry) for entry in content["annotations"]),
                shards=tuple(_stored_file(entry) for entry in content["shards"]),
                images=content["images"],
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Problem(
                f"{where} is no manifest of {FORMAT!r}; upload the dataset with sagemaker_entry.launch."
            ) from error
        names = [file.name for file in manifest.files]
        for name in names:
            if not stays_inside(name) or names.count(name) > 1:
                what = "twice" if stays_inside(name) else "which is no name of a file in the dataset's folder"
                raise Problem(f"{where} lists {name!r} {what}; it was not made by this program and is not unpacked.")
        return manifest


def _stored_file(entry: dict[str, Any]) -> StoredFile:
    file = StoredFile(**entry)
    if not (isinstance(file.name, str) and type(file.size) is int and file.size >= 0 and isinstance(file.sha256, str)):
        raise TypeError(file)
    return file


def stays_inside(name: str) -> bool:
    """Whether a relative file name leads nowhere but into the folder that it is put in, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not {"\\", "\0"} & set(name)


def place_inside(folder: Path, name: str) -> Path | None:
    """Where a file of this name lies in a folder; None if the name or a link there leads out of the folder."""
    if not stays_inside(name):
        return None
    try:
        root = folder.resolve()
        place = (root / name).resolve()
        place.exists()
    except PermissionError:
        raise
    except (OSError, ValueError):  # a name that no file can have
        return None
    return place if place.is_relative_to(root) else None


def unpack_dataset(source: Path, target: Path, on_shard: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Unpack a stored dataset, checking every part, into a folder that `CocoDataModule` reads.

    Each file is read once and from its beginning to its end: in FastFile mode, reading is fetching from S3.

    The target folder is created when all is unpacked; one that exists already is used unchanged.

    Args:
        source: the folder of manifest.json.
        target: the folder to create.
        on_shard: called with (shards unpacked, number of shards).

    Raises:
        Problem: a file is missing, damaged or outside of the folder, or the disk is too small.
    """
    if target.is_dir():
        return
    manifest = Manifest.from_json((source / MANIFEST).read_text(errors="replace"), str(source / MANIFEST))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    needed, free = sum(file.size for file in manifest.files), shutil.disk_usage(partial).free
    if needed > free:
        raise Problem(
            f"The dataset needs {needed / 1e9:.1f} GB in {target.parent}, where {free / 1e9:.1f} GB are free; "
            "choose a larger instance."
        )
    for file in manifest.files:
        path, copy = place_inside(source, file.name), place_inside(partial, file.name)
        if path is None or copy is None:
            raise Problem(f"{source / file.name} leads out of the dataset's folder and is not unpacked.")
        if not path.is_file() or path.stat().st_size != file.size:
            raise _not_as_uploaded(path)
        if file in manifest.annotations:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            if sha256_of(copy) != file.sha256:
                raise _not_as_uploaded(path)
    for done, shard in enumerate(manifest.shards):
        _unpack_shard(source / shard.name, shard, partial)
        on_shard(done + 1, len(manifest.shards))
    unpacked = sum(path.is_file() for path in partial.glob("*/images/**/*"))
    if unpacked != manifest.images:
        raise Problem(
            f"{source} should contain {manifest.images} images, but {unpacked} were unpacked; delete the dataset's "
            "manifest in S3 and launch again to repeat the upload."
        )
    partial.rename(target)


def _not_as_uploaded(path: Path) -> Problem:
    state = "is damaged" if path.is_file() else "is missing"
    return Problem(f"{path} {state}; delete the dataset's manifest in S3 and launch again to repeat the upload.")


class _Hashed:
    """A file to read from once, which computes the SHA-256 of what was read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.sha256.update(content)
        return content


def _unpack_shard(path: Path, shard: StoredFile, target: Path) -> None:
    """Extract a shard and compute its checksum on the way.

    Raises:
        Problem: it is not the one that was uploaded, or see `extract_safely`.
    """
    refused: Problem | None = None
    with path.open("rb") as file:
        stream = _Hashed(file)
        try:
            extract_safely(path, target, stream)
        except Problem as problem:
            refused = problem
        while stream.read(CHUNK):  # the rest, behind the archive's end or where it was refused
            pass
    if stream.sha256.hexdigest() != shard.sha256:
        raise _not_as_uploaded(path) from refused
    if refused is not None:
        raise refused


def extract_safely(archive: Path, target: Path, stream: Any = None) -> None:
    """Extract a tar archive of plain files and folders, none of them outside of `target` or there already.

    Args:
        archive: the archive.
        target: the folder to extract it to.
        stream: the archive's content, to be read in one go; by default the file itself is opened.

    Raises:
        Problem: not a tar archive; or a member is a link or a device, comes twice, or leads outside of the folder.
    """
    try:
        with tarfile.open(archive) if stream is None else tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if member.isdir() and not PurePosixPath(member.name).parts:  # "." itself
                    continue
                destination = place_inside(target, member.name)
                plain = member.isdir() or (member.isfile() and not member.issparse())
                if destination is None or not plain or (member.isfile() and destination.exists()):
                    raise Problem(
                        f"{archive} contains {member.name!r}, which is a link, a device, there twice or outside of the "
                        "folder; it was not made by this program and is not unpacked."
                    )
                if member.isdir():
                    destination.mkdir(parents=True, exist_ok=True)
                    continue
                destination.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                with destination.open("xb") as file:
                    shutil.copyfileobj(content, file, CHUNK)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Problem(f"{archive} cannot be unpacked ({error}).") from error
