"""A dataset on disk and the manifest it will have in S3: which image is in which shard, and all checksums.

The images that the annotation files list are packed into shards of about 150 MB, as AWS advises for many small files. A
shard is named by its SHA-256 and the dataset by that of its manifest, so the same data is never uploaded twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dino_lightning.data.annotation_file import raise_first_error
from dino_lightning.data.coco_writer import coco_document
from dino_lightning.data.read_files import read_files
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.errors import DataError
from dino_lightning.files import sha256_of
from sagemaker_entry.laptop.checked import DatasetOnDisk
from sagemaker_entry.laptop.dataset_checks import check_are_images, check_places, folders_of
from sagemaker_entry.protocol.manifest import MANIFEST, Manifest, StoredFile
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from dino_lightning import CocoDataModule

SHARD_BYTES = 150_000_000


def content_key(content: bytes | Path) -> str:
    """The name of some content in S3: the first 20 hexadecimal digits of its SHA-256, of bytes or of a file."""
    digest = sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    return digest[:20]


@dataclass(frozen=True)
class Member:
    """One image: its name in the shard, its path on disk, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class LocalDataset:
    """A dataset on disk, with the manifest that it will have in S3.

    Attributes:
        manifest: all files, with their checksums.
        annotations: the path of each annotation file, by its name in the manifest.
        shards: the images of each shard, by the shard's name in the manifest.
        temporary: the folder of annotation files made for the upload, which lives as long as this.
    """

    manifest: Manifest
    annotations: dict[str, Path]
    shards: dict[str, tuple[Member, ...]]
    temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def key(self) -> str:
        """The name of the dataset in S3, computed from its manifest."""
        return content_key(self.manifest.to_json().encode())

    @property
    def size(self) -> int:
        """The total size in bytes."""
        return sum(file.size for file in self.manifest.files)


def read_dataset(data: CocoDataModule | DatasetOnDisk) -> LocalDataset:
    """List a dataset's files and compute their checksums; reads every image once.

    Annotations that are not one COCO file for each split are written as such for the upload.

    Raises:
        Problem: an image of an annotation file is missing, is no image, or is a link out of the dataset.
    """
    annotations: dict[str, Path] = {}
    temporary = tempfile.TemporaryDirectory(prefix="annotations-")
    written = _written_as_coco(data, Path(temporary.name))
    members: list[Member] = []
    listed: list[Path] = []
    named = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    for split, dataset in named.items():
        if dataset is None:
            continue
        source = dataset.annotations
        if split == "val" and "val" not in data.split_files:  # stored in the training file, and held out of it again
            split = "train"
        annotations[f"{split}/annotations.json"] = written.get(split, source.path)
        listed.append(source.path)
        for index, image in enumerate(source.images):
            path = source.image_path(index)
            if not path.is_file():
                raise Problem(
                    f"Image {image.id} of {source.path}: {path} does not exist; add the file, or remove the entry."
                )
            members.append(Member(f"{split}/images/{image.file_name}", path, path.stat().st_size))
    unique = sorted({member.name: member for member in members}.values(), key=lambda member: member.name)
    folders = folders_of(Path(data.root), [place for files in data.split_files.values() for place in _places(files)])
    check_places(folders, [*listed, *(member.path for member in unique)])
    check_are_images([member.path for member in unique])
    groups = list(_groups(unique))
    total = sum(member.size for member in unique)
    bar = tqdm(total=total, desc="checking images", unit="B", unit_scale=True, disable=None, delay=1)
    with bar as progress, ThreadPoolExecutor() as pool:
        stored = list(pool.map(lambda group: _describe_shard(group, progress), groups))
    manifest = Manifest(
        annotations=tuple(
            StoredFile(name, path.stat().st_size, sha256_of(path)) for name, path in sorted(annotations.items())
        ),
        shards=tuple(stored),
        images=len(unique),
    )
    shards = dict(zip([file.name for file in stored], groups, strict=True))
    return LocalDataset(manifest, annotations, shards, temporary)


def write_dataset(dataset: LocalDataset, folder: Path) -> None:
    """Write to a folder the files that `upload_dataset` would write to S3."""
    for file in dataset.manifest.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.name in dataset.annotations:
            shutil.copyfile(dataset.annotations[file.name], path)
        else:
            with path.open("wb") as archive:
                write_shard(dataset.shards[file.name], archive)
    (folder / MANIFEST).write_text(dataset.manifest.to_json())


def _places(files: SplitFiles) -> list[Path]:
    """The folders of a split's images and annotation files."""
    return [files.images, files.annotations.parent, *(place for each in files.also for place in _places(each))]


def _written_as_coco(data: CocoDataModule | DatasetOnDisk, folder: Path) -> dict[str, Path]:
    """Annotations of the splits that are not one COCO file each: of YOLO, of several files, of a part of a file.

    They are read without the options that choose and convert, which the job applies to what it reads.
    """
    written = {}
    for split, files in data.split_files.items():
        one_file = not files.also and files.part is None and files.annotations.suffix.lower() != ".gz"
        if files.format == "coco" and one_file:
            continue
        read = read_files(None, {split: files})[split]
        try:
            raise_first_error(read.problems)
        except DataError as error:
            raise Problem(f"{error} To launch, write clean COCO first: python -m dino_lightning to_coco.") from error
        assert read.annotations is not None
        names = [image.file_name for image in read.annotations.images]
        written[split] = folder / f"{split}.json"
        with written[split].open("w", encoding="utf-8") as file:
            json.dump(coco_document(read.annotations, names), file)
    return written


def _groups(members: Sequence[Member]) -> Iterator[tuple[Member, ...]]:
    """The images of each shard, in the order of their names: about 150 MB together."""
    group: list[Member] = []
    size = 0
    for member in members:
        group.append(member)
        size += member.size
        if size >= SHARD_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


class _Digest(io.RawIOBase):
    """A file that keeps only the length and the SHA-256 of what is written to it."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        self.size += len(content)
        return len(content)


def _describe_shard(members: Sequence[Member], progress: Any) -> StoredFile:
    """Name, size and checksum of a shard, computed without writing it to disk."""
    digest = _Digest()
    write_shard(members, digest, progress.update)
    return StoredFile(f"shards/{digest.sha256.hexdigest()}.tar", digest.size, digest.sha256.hexdigest())


def write_shard(members: Sequence[Member], file: Any, advance: Any = None) -> None:
    """Write a tar archive of images without times and owners, so that the same images give the same bytes."""
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            with member.path.open("rb") as content:
                tar.addfile(info, content)
            if advance is not None:
                advance(member.size)
