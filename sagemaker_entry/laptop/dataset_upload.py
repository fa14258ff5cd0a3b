"""Uploading a dataset to S3, once, under a name computed from its content.

Files that are there already are not sent, so an interrupted upload resumes where it stopped. The manifest is written
last.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from tqdm import tqdm

from dino_lightning.files import sha256_of
from sagemaker_entry.laptop.account import DENIED, error_code, explained
from sagemaker_entry.laptop.dataset_pack import LocalDataset, content_key, write_shard
from sagemaker_entry.protocol.manifest import MANIFEST, StoredFile
from sagemaker_entry.protocol.problem import Problem

THREADS = 4  # shards uploaded at once; the parts of each are sent in parallel as well
AGAIN = "the same command sends the rest."


class _Ending(Exception):
    """The upload ends before its end, after an error or Ctrl-C."""


@dataclass(frozen=True)
class UploadResult:
    """The address of a dataset in S3, and the number of bytes that this upload sent."""

    uri: str
    bytes_sent: int


def upload_dataset(
    s3: Any, dataset: LocalDataset, bucket: str, prefix: str, owner: str, kms_key: str | None = None
) -> UploadResult:
    """Upload the files that are not in S3 yet, the manifest last.

    Args:
        s3: a boto3 client.
        dataset: the dataset to upload.
        bucket: the bucket to upload to.
        prefix: the folder of all datasets; this one gets a folder below it.
        owner: the account that must own the bucket.
        kms_key: id or ARN of the key to encrypt with; None for the keys of S3 itself.

    Raises:
        Problem: AWS refused the upload, or a file arrived damaged or changed meanwhile.
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
        lock, ending = threading.Lock(), threading.Event()

        def advance(count: int) -> None:
            if ending.is_set():
                raise _Ending  # ends the transfer at its next part, instead of waiting for the whole shard
            with lock:
                progress.update(count)

        def send(file: StoredFile) -> None:
            _send(s3, dataset, file, bucket, place, _extra(owner, kms_key), advance)

        pool = ThreadPoolExecutor(THREADS)
        try:
            with explained_upload(uri):
                list(pool.map(send, missing))
        finally:
            ending.set()
            pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C, start no further shard
    manifest = dataset.manifest.to_json().encode()
    with explained_upload(uri):
        s3.put_object(Bucket=bucket, Key=f"{place}/{MANIFEST}", Body=manifest, **_extra(owner, kms_key))
    return UploadResult(uri, total)


@contextmanager
def explained_upload(uri: str) -> Iterator[None]:
    """Turn an error of an upload into a sentence, with what a refusal of the bucket may mean and that nothing is lost.

    Raises:
        Problem: AWS refused, could not be reached, or the credentials expired meanwhile.
    """
    try:
        with explained(f"write to {uri} (s3:PutObject)"):
            yield
    except Problem as problem:
        cause = problem.__cause__
        if not isinstance(cause, Exception):  # a sentence of our own
            raise
        denied = isinstance(cause, ClientError) and error_code(cause) in DENIED
        hint = " A bucket policy that demands encryption with a KMS key refuses it too: give the key with --kms-key."
        raise type(problem)(f"{problem}{hint if denied else ''} What was sent is kept: {AGAIN}") from cause


def upload_bytes(s3: Any, content: bytes, bucket: str, key: str, owner: str, kms_key: str | None = None) -> str:
    """Upload some bytes unless the key exists with this size; returns the address. Arguments as `upload_dataset`."""
    with explained_upload(f"s3://{bucket}/{key}"):
        if _sizes(s3, bucket, key, owner).get(key) != len(content):
            s3.put_object(Bucket=bucket, Key=key, Body=content, **_extra(owner, kms_key))
    return f"s3://{bucket}/{key}"


def upload_file(s3: Any, path: Path, bucket: str, prefix: str, owner: str, kms_key: str | None = None) -> str:
    """Upload a file, e.g. initial weights, to a folder named by its content; returns the folder, with a last slash.

    Arguments as `upload_dataset`.
    """
    place = f"{prefix}/{content_key(path)}"
    key = f"{place}/{path.name}"
    size = path.stat().st_size
    with explained_upload(f"s3://{bucket}/{key}"):
        if _sizes(s3, bucket, key, owner).get(key) != size:
            with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None, delay=1) as progress:
                s3.upload_file(str(path), bucket, key, ExtraArgs=_extra(owner, kms_key), Callback=progress.update)
    return f"s3://{bucket}/{place}/"


def upload_folder(s3: Any, folder: Path, bucket: str, prefix: str, owner: str, kms_key: str | None = None) -> str:
    """Upload a small folder, without compiled code, to a place named by its content; returns the address.

    Arguments as `upload_dataset`.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{sha256_of(path)}\0".encode())
    place = f"{prefix}/{digest.hexdigest()[:16]}"
    with explained_upload(f"s3://{bucket}/{place}"):
        there = _sizes(s3, bucket, place, owner)
        for name, path in files.items():
            content = path.read_bytes()
            if there.get(f"{place}/{name}") != len(content):
                s3.put_object(Bucket=bucket, Key=f"{place}/{name}", Body=content, **_extra(owner, kms_key))
    return f"s3://{bucket}/{place}"


def _send(
    s3: Any, dataset: LocalDataset, file: StoredFile, bucket: str, place: str, extra: dict[str, str], advance: Any
) -> None:
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
            raise Problem(f"{what} changed during the upload; launch again.")
        s3.upload_file(
            str(path), bucket, key, ExtraArgs=extra, Callback=advance, Config=TransferConfig(max_concurrency=4)
        )
    # S3 has checked the checksum of each part; check here that no part is missing.
    arrived = s3.head_object(Bucket=bucket, Key=key, ExpectedBucketOwner=extra["ExpectedBucketOwner"])["ContentLength"]
    if arrived != file.size:
        raise Problem(f"s3://{bucket}/{key} has {arrived} bytes instead of {file.size}; launch again.")


def _extra(owner: str, kms_key: str | None) -> dict[str, str]:
    own = {"ServerSideEncryption": "AES256"}
    kms = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key or ""}
    return {"ChecksumAlgorithm": "SHA256", "ExpectedBucketOwner": owner, **(own if kms_key is None else kms)}


def _sizes(s3: Any, bucket: str, prefix: str, owner: str) -> dict[str, int]:
    """Key -> size in bytes of the objects below a prefix; empty if there is no such bucket."""
    found: dict[str, int] = {}
    try:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, ExpectedBucketOwner=owner)
        for page in pages:
            found |= {entry["Key"]: entry["Size"] for entry in page.get("Contents", [])}
    except ClientError as error:
        if error_code(error) != "NoSuchBucket":
            raise
    return found
