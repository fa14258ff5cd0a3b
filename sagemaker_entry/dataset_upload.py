"""A dataset into S3: once, under a name that is its content, and never again.

The images that the annotation files name are packed into shards of about 150 MB. A shard is called by its SHA-256, the
place of the dataset by that of its manifest, so the same data is always found again and an interrupted upload goes on
where it stopped. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from tqdm import tqdm

from dino_lightning import CocoDataModule
from sagemaker_entry.account import error_code, explained
from sagemaker_entry.manifest import MANIFEST, Manifest, StoredFile, sha256_of, sha256_of_bytes
from sagemaker_entry.problem import Problem

SHARD_BYTES = 150_000_000
THREADS = 4  # shards at once; each is sent in parts, in parallel as well
ENCRYPTION = {"ServerSideEncryption": "AES256"}


@dataclass(frozen=True)
class Member:
    """One image: its place in the dataset and on disk."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class LocalDataset:
    """A dataset on disk, with the manifest that it will have in S3.

    Attributes:
        manifest: all parts, with their checksums.
        annotations: where the annotation files are, by their name in the manifest.
        shards: the images of each shard, by its name in the manifest.
    """

    manifest: Manifest
    annotations: dict[str, Path]
    shards: dict[str, tuple[Member, ...]]

    @property
    def key(self) -> str:
        """The name of this content."""
        return sha256_of_bytes(self.manifest.to_json().encode())[:20]

    @property
    def size(self) -> int:
        """All bytes of it."""
        return sum(file.size for file in self.manifest.files)


def read_dataset(data: CocoDataModule) -> LocalDataset:
    """Find out what a dataset consists of; reads every image once, for its checksum.

    Raises:
        Problem: an image that the annotations name is missing.
    """
    annotations: dict[str, Path] = {}
    members: list[Member] = []
    named = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    for split, dataset in named.items():
        if dataset is None:
            continue
        source = dataset.annotations
        if source.path in annotations.values():  # a part of the training file that is held out; it goes with it
            split = "train"
        annotations[f"{split}/annotations.json"] = source.path
        for index, image in enumerate(source.images):
            path = source.image_path(index)
            if not path.is_file():
                raise Problem(
                    f"Image {image.id} of {source.path}: {path} does not exist; put it there, or take it out."
                )
            members.append(Member(f"{split}/images/{image.file_name}", path, path.stat().st_size))
    unique = sorted({member.name: member for member in members}.values(), key=lambda member: member.name)
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
    return LocalDataset(manifest, annotations, dict(zip([file.name for file in stored], groups, strict=True)))


@dataclass(frozen=True)
class UploadResult:
    """Where a dataset lies, and how much of it had to be sent now."""

    uri: str
    bytes_sent: int


def upload_dataset(s3: Any, dataset: LocalDataset, bucket: str, prefix: str, owner: str) -> UploadResult:
    """Send what is not there yet; the manifest last.

    Args:
        s3: a boto3 client.
        dataset: what to send.
        bucket: to where.
        prefix: the folder of all datasets; a folder of this one is made below it.
        owner: the account that the bucket must belong to.

    Raises:
        Problem: AWS refused, or a part arrived damaged.
    """
    place = f"{prefix}/{dataset.key}"
    uri = f"s3://{bucket}/{place}/"
    with explained(f"list s3://{bucket}/{place} (s3:ListBucket)"):
        there = _sizes(s3, bucket, place, owner)
    missing = [file for file in dataset.manifest.files if there.get(f"{place}/{file.name}") != file.size]
    if not missing and f"{place}/{MANIFEST}" in there:
        return UploadResult(uri, 0)
    total = sum(file.size for file in missing)
    with tqdm(total=total, desc="uploading", unit="B", unit_scale=True, disable=None, delay=1) as progress:
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                progress.update(count)

        def send(file: StoredFile) -> None:
            _send(s3, dataset, file, bucket, place, owner, advance)

        pool = ThreadPoolExecutor(THREADS)
        try:
            with explained(f"write to {uri} (s3:PutObject)"):
                list(pool.map(send, missing))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C, begin no further shard
    manifest = dataset.manifest.to_json().encode()
    with explained(f"write to {uri} (s3:PutObject)"):
        s3.put_object(Bucket=bucket, Key=f"{place}/{MANIFEST}", Body=manifest, ExpectedBucketOwner=owner, **ENCRYPTION)
    return UploadResult(uri, total)


def write_dataset(dataset: LocalDataset, folder: Path) -> None:
    """Put into a folder what `upload_dataset` would put into S3."""
    for file in dataset.manifest.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.name in dataset.annotations:
            shutil.copyfile(dataset.annotations[file.name], path)
        else:
            with path.open("wb") as archive:
                _write_shard(dataset.shards[file.name], archive)
    (folder / MANIFEST).write_text(dataset.manifest.to_json())


def upload_bytes(s3: Any, content: bytes, bucket: str, key: str, owner: str) -> str:
    """Send something small unless it is there; returns its address. `key` should name the content."""
    with explained(f"write to s3://{bucket}/{key} (s3:PutObject)"):
        if _sizes(s3, bucket, key, owner).get(key) != len(content):
            s3.put_object(
                Bucket=bucket,
                Key=key,
                Body=content,
                ChecksumAlgorithm="SHA256",
                ExpectedBucketOwner=owner,
                **ENCRYPTION,
            )
    return f"s3://{bucket}/{key}"


def upload_file(s3: Any, path: Path, bucket: str, prefix: str, owner: str) -> str:
    """Send a file, such as starting weights, to a place named by its content; returns that place, with a slash."""
    place = f"{prefix}/{sha256_of(path)[:20]}"
    key = f"{place}/{path.name}"
    size = path.stat().st_size
    with explained(f"write to s3://{bucket}/{key} (s3:PutObject)"):
        if _sizes(s3, bucket, key, owner).get(key) != size:
            with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None, delay=1) as progress:
                s3.upload_file(str(path), bucket, key, ExtraArgs=_extra(owner), Callback=progress.update)
    return f"s3://{bucket}/{place}/"


def _send(s3: Any, dataset: LocalDataset, file: StoredFile, bucket: str, place: str, owner: str, advance: Any) -> None:
    key = f"{place}/{file.name}"
    with tempfile.TemporaryDirectory(prefix="dino-shard-") as folder:
        if file.name in dataset.annotations:
            path = dataset.annotations[file.name]
        else:
            path = Path(folder) / "shard.tar"
            with path.open("wb") as archive:
                _write_shard(dataset.shards[file.name], archive)
        if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            what = path if file.name in dataset.annotations else f"An image of {file.name}"
            raise Problem(f"{what} changed during the upload; start again.")
        s3.upload_file(
            str(path), bucket, key, ExtraArgs=_extra(owner), Callback=advance, Config=TransferConfig(max_concurrency=4)
        )
    # S3 has compared a checksum of each part with what it received; here, that all parts together are the whole.
    arrived = s3.head_object(Bucket=bucket, Key=key, ExpectedBucketOwner=owner)["ContentLength"]
    if arrived != file.size:
        raise Problem(f"s3://{bucket}/{key} has {arrived} bytes instead of {file.size}; start again.")


def _extra(owner: str) -> dict[str, str]:
    return {"ChecksumAlgorithm": "SHA256", "ExpectedBucketOwner": owner, **ENCRYPTION}


def _sizes(s3: Any, bucket: str, prefix: str, owner: str) -> dict[str, int]:
    """Key -> size of the objects whose keys begin so."""
    found: dict[str, int] = {}
    try:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, ExpectedBucketOwner=owner)
        for page in pages:
            found |= {entry["Key"]: entry["Size"] for entry in page.get("Contents", [])}
    except ClientError as error:
        if error_code(error) != "NoSuchBucket":
            raise
    return found


def _groups(members: Sequence[Member]) -> Iterator[tuple[Member, ...]]:
    """Images in the order of their names, about 150 MB together."""
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
    """A file that keeps only length and checksum of what is written to it."""

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
    digest = _Digest()
    _write_shard(members, digest, progress.update)
    return StoredFile(f"shards/{digest.sha256.hexdigest()}.tar", digest.size, digest.sha256.hexdigest())


def _write_shard(members: Sequence[Member], file: Any, advance: Any = None) -> None:
    """The same bytes for the same images: names and contents alone, no times or owners."""
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            with member.path.open("rb") as content:
                tar.addfile(info, content)
            if advance is not None:
                advance(member.size)
