"""A dataset into S3: once, under a name that is its content, and never again.

What is there already is not sent, so an interrupted upload goes on where it stopped. The manifest is written last.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from tqdm import tqdm

from dino_lightning.files import sha256_of
from sagemaker_entry.laptop.account import error_code, explained
from sagemaker_entry.laptop.dataset_pack import LocalDataset, content_key, write_shard
from sagemaker_entry.protocol.manifest import MANIFEST, StoredFile
from sagemaker_entry.protocol.problem import Problem

THREADS = 4  # shards at once; each is sent in parts, in parallel as well
ENCRYPTION = {"ServerSideEncryption": "AES256"}


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
    place = f"{prefix}/{content_key(path)}"
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
                write_shard(dataset.shards[file.name], archive)
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
