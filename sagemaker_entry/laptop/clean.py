"""What lies in S3 below the launcher's folder, and deleting what no job needs any more."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dino_lightning.console import aligned
from sagemaker_entry.laptop.account import Account, explained
from sagemaker_entry.laptop.follow import ENDED
from sagemaker_entry.laptop.job_list import jobs_of_project
from sagemaker_entry.laptop.places import PREFIX
from sagemaker_entry.protocol.manifest import MANIFEST
from sagemaker_entry.protocol.problem import Problem

SHARED = ("datasets", "code", "weights", "packages", "drivers")  # used by many runs; each is a folder by content
OF_A_RUN = {"config": "configurations", "checkpoints": "checkpoints", "output": "models"}
OTHER = "other"  # not made by `launch`, or by another version of it: never deleted
MOST_AT_ONCE = 1000  # keys in one request of S3


@dataclass(frozen=True)
class Stored:
    """Objects that are kept or deleted together.

    Attributes:
        kind: such as "datasets".
        prefix: the folder in the bucket, with a last slash.
        keys: the objects.
        size: their bytes together.
        newest: when the newest of them was written.
        kept: why it is kept; None if it may be deleted.
    """

    kind: str
    prefix: str
    keys: tuple[str, ...]
    size: int
    newest: datetime.datetime
    kept: str | None = None


def find_stored(account: Account, bucket: str) -> list[Stored]:
    """What lies in the bucket below the launcher's folder.

    Raises:
        Problem: AWS refused.
    """
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    with explained(f"list s3://{bucket}/{PREFIX}/ (s3:ListBucket)"):
        pages = account.client("s3").get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{PREFIX}/", ExpectedBucketOwner=account.id):
            for entry in page.get("Contents", []):
                grouped.setdefault(_group(entry["Key"]), []).append(entry)
    return [
        Stored(
            kind=kind,
            prefix=prefix,
            keys=tuple(entry["Key"] for entry in entries),
            size=sum(entry["Size"] for entry in entries),
            newest=max(entry["LastModified"] for entry in entries),
        )
        for (kind, prefix), entries in sorted(grouped.items())
    ]


def _group(key: str) -> tuple[str, str]:
    """The kind of an object, and the folder with which it is kept or deleted."""
    parts = key.split("/")
    if len(parts) > 3 and parts[1] in SHARED:
        return parts[1], "/".join(parts[:3]) + "/"
    if len(parts) > 4 and parts[1] == "runs" and parts[3] in OF_A_RUN:
        return OF_A_RUN[parts[3]], "/".join(parts[:4]) + "/"
    return OTHER, key.rpartition("/")[0] + "/"


def decide(
    stored: Iterable[Stored],
    jobs: Iterable[Mapping[str, Any]],
    bucket: str,
    now: datetime.datetime,
    *,
    older_than: float,
    resumable: bool,
    models: bool,
    served: Iterable[str] = (),
) -> list[Stored]:
    """Say of everything that is kept why it is.

    Args:
        stored: what lies in the bucket.
        jobs: the descriptions of all jobs, the newest first.
        bucket: the bucket.
        now: the time.
        older_than: days; what was written later is kept, because a launch on another machine may be using it.
        resumable: whether also what stopped and failed jobs need to be resumed may be deleted.
        models: whether also models may be deleted.
        served: S3 addresses of models that SageMaker serves.
    """
    stored = list(stored)
    with_checkpoint = {each.prefix for each in stored if any(key.endswith(".ckpt") for key in each.keys)}
    needed: dict[str, str] = {}  # key -> why
    seen: set[str] = set()
    for job in jobs:
        checkpoints = _key((job.get("CheckpointConfig") or {}).get("S3Uri", ""), bucket)
        name, status = job["TrainingJobName"], job["TrainingJobStatus"]
        continued = checkpoints in seen  # by a newer job
        seen.add(checkpoints)
        if status not in ENDED:
            why = f"{name} is running"
        elif status in ("Failed", "Stopped") and not continued and checkpoints in with_checkpoint and not resumable:
            why = f"{name} can be resumed"
        else:
            continue
        for key in _used_by(job, bucket):
            needed.setdefault(key, why)
    needed |= {_key(uri, bucket): "SageMaker serves it" for uri in served}
    return [replace(each, kept=_why_kept(each, needed, now, older_than, models)) for each in stored]


def _used_by(job: Mapping[str, Any], bucket: str) -> list[str]:
    channels = [channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in job.get("InputDataConfig", [])]
    own = [job.get("OutputDataConfig", {}).get("S3OutputPath"), (job.get("CheckpointConfig") or {}).get("S3Uri")]
    return [_key(uri, bucket) for uri in (*channels, *own) if uri]


def _key(uri: str, bucket: str) -> str:
    """A place in the bucket as a folder, with a last slash; "" for a place elsewhere."""
    start = f"s3://{bucket}/"
    return uri.removeprefix(start).rstrip("/") + "/" if uri.startswith(start) else ""


def _why_kept(
    each: Stored, needed: Mapping[str, str], now: datetime.datetime, older_than: float, models: bool
) -> str | None:
    if each.kind == OTHER:
        return "not of this program"
    using = next((why for key, why in needed.items() if key.startswith(each.prefix)), None)
    if using is not None:
        return using
    if now - each.newest < datetime.timedelta(days=older_than):
        return f"newer than {older_than:g} days"
    return "a model; --models deletes it" if each.kind == "models" and not models else None


def served_models(sagemaker: Any) -> list[str]:
    """The S3 addresses of the data of all models that SageMaker knows in the account and region.

    Raises:
        Problem: AWS refused.
    """
    places = []
    with explained("list the models that are served (sagemaker:ListModels, sagemaker:DescribeModel)"):
        for page in sagemaker.get_paginator("list_models").paginate():
            for entry in page["Models"]:
                model = sagemaker.describe_model(ModelName=entry["ModelName"])
                for container in [model.get("PrimaryContainer") or {}, *model.get("Containers", [])]:
                    source = (container.get("ModelDataSource") or {}).get("S3DataSource") or {}
                    places += [uri for uri in (container.get("ModelDataUrl"), source.get("S3Uri")) if uri]
    return places


def read_and_decide(account: Account, bucket: str, *, older_than: float, resumable: bool, models: bool) -> list[Stored]:
    """What lies in the bucket, and of each part whether and why it is kept. Arguments as `decide`.

    Raises:
        Problem: AWS refused; then nothing may be deleted, since what is in use is not known.
    """
    sagemaker = account.client("sagemaker")
    stored = find_stored(account, bucket)  # before the jobs: what is uploaded meanwhile is not in the list
    return decide(
        stored,
        list(jobs_of_project(sagemaker)) if stored else [],
        bucket,
        datetime.datetime.now(datetime.timezone.utc),
        older_than=older_than,
        resumable=resumable,
        models=models,
        served=served_models(sagemaker) if stored and models else [],
    )


def table(stored: Iterable[Stored], now: datetime.datetime) -> str:
    """A line for each kind, with what is kept and why, and what would be deleted."""
    by_kind: dict[tuple[str, str], list[Stored]] = {}
    for each in stored:
        by_kind.setdefault((each.kind, each.kept or "to be deleted"), []).append(each)
    rows = [
        (
            kind,
            str(len(group)),
            f"{sum(each.size for each in group) / 1e6:,.1f} MB",
            f"{min((now - each.newest).days for each in group)} to {max((now - each.newest).days for each in group)}",
            why,
        )
        for (kind, why), group in sorted(by_kind.items())
    ]
    return aligned([("kind", "number", "size", "days old", "kept because, or not"), *rows])


def delete(account: Account, bucket: str, stored: Iterable[Stored]) -> None:
    """Delete objects, the manifest of a dataset first, so that what an interruption leaves of it is never used.

    Raises:
        Problem: AWS refused to delete some of them.
    """
    keys = [key for each in stored for key in sorted(each.keys, key=lambda key: not key.endswith(f"/{MANIFEST}"))]
    s3 = account.client("s3")
    for first in range(0, len(keys), MOST_AT_ONCE):
        objects = [{"Key": key} for key in keys[first : first + MOST_AT_ONCE]]
        with explained(f"delete from s3://{bucket}/{PREFIX}/ (s3:DeleteObject)"):
            answer = s3.delete_objects(
                Bucket=bucket, Delete={"Objects": objects, "Quiet": True}, ExpectedBucketOwner=account.id
            )
        if answer.get("Errors"):
            error = answer["Errors"][0]
            raise Problem(
                f"AWS did not delete {len(answer['Errors'])} objects, the first of them s3://{bucket}/{error['Key']}: "
                f"{error.get('Code')}: {error.get('Message')}; the policy in docs/sagemaker.md allows s3:DeleteObject."
            )
