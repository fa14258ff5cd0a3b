"""What lies in S3 below the launcher's folder, and deleting what no job needs any more."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dino_lightning.console import aligned
from sagemaker_entry.laptop.account import Account, explained
from sagemaker_entry.laptop.follow import ENDED
from sagemaker_entry.laptop.job_list import jobs_of_project, running_jobs
from sagemaker_entry.laptop.places import PREFIX
from sagemaker_entry.protocol.manifest import MANIFEST
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.trial import TRIAL_FILE

SHARED = ("datasets", "code", "weights", "packages", "drivers")  # used by many runs; each is a folder by content
OF_A_RUN = {"config": "configurations", "checkpoints": "checkpoints", "output": "models"}
TRIAL = "trials"  # a folder for each trial, with its measurements
ANSWERS = "answers"  # of batch transforms: never deleted
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
    if len(parts) > 4 and parts[1] == TRIAL:
        return TRIAL, "/".join(parts[:4]) + "/"
    if len(parts) > 3 and parts[1] in SHARED:
        return parts[1], "/".join(parts[:3]) + "/"
    if len(parts) > 4 and parts[1] == "runs" and parts[3] in OF_A_RUN:
        if len(parts) > 6 and parts[3:5] == ["output", "transform"]:
            return ANSWERS, "/".join(parts[:6]) + "/"
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
    trials: bool = False,
    served: Iterable[str] = (),
) -> list[Stored]:
    """Say of everything that is kept why it is.

    Args:
        stored: what lies in the bucket.
        jobs: the descriptions of all jobs, first those that run, whoever has started them; the newest first.
        bucket: the bucket.
        now: the time.
        older_than: days; what was written later is kept, because a launch on another machine may be using it.
        resumable: whether also what stopped and failed jobs need to be resumed may be deleted.
        models: whether also models may be deleted.
        trials: whether also the measurements of trials may be deleted that plans use.
        served: S3 addresses of models that SageMaker serves.
    """
    stored = list(stored)
    with_checkpoint = {each.prefix for each in stored if any(key.endswith(".ckpt") for key in each.keys)}
    needed: dict[str, str] = {}  # folder -> why
    read: dict[str, str] = {}  # folder -> why; all that lies below it is needed
    seen: set[str | None] = set()
    for job in jobs:
        checkpoints = _key((job.get("CheckpointConfig") or {}).get("S3Uri") or "", bucket)
        name, status = job["TrainingJobName"], job["TrainingJobStatus"]
        continued = checkpoints in seen  # by a newer job
        seen.add(checkpoints)
        if status not in ENDED:
            why = f"{name} is running"
        elif status in ("Failed", "Stopped") and not continued and checkpoints in with_checkpoint and not resumable:
            why = f"{name} can be resumed"
        else:
            continue
        for uris, folders in ((_inputs(job), read), (_outputs(job), needed)):
            for key in (_key(uri, bucket) for uri in uris):
                if key is not None:
                    folders.setdefault(key, why)
    needed |= {key: "SageMaker serves it" for uri in served if (key := _key(uri, bucket)) is not None}
    choosable = {"models": "a model; --models deletes it"} if not models else {}
    reasons = {each.prefix: choosable.get(each.kind) for each in stored}
    if not trials:
        reasons |= dict.fromkeys(_measurements(stored), "measured for plans; --trials deletes it")
    return [replace(each, kept=_why_kept(each, needed, read, now, older_than, reasons[each.prefix])) for each in stored]


def _measurements(stored: Iterable[Stored]) -> list[str]:
    """The folders of the trials that plans use: the newest with measurements of those that have measured the same."""
    newest: dict[str, Stored] = {}
    for each in stored:
        if each.kind == TRIAL and any(key.endswith(f"/{TRIAL_FILE}") for key in each.keys):
            measured = each.prefix.rsplit("/", 2)[0]
            newest[measured] = max(newest.get(measured, each), each, key=lambda trial: trial.newest)
    return [each.prefix for each in newest.values()]


def _inputs(job: Mapping[str, Any]) -> list[str]:
    """The S3 addresses that a job reads; others may have file systems."""
    sources = [channel.get("DataSource", {}).get("S3DataSource") or {} for channel in job.get("InputDataConfig", [])]
    return [source["S3Uri"] for source in sources if source.get("S3Uri")]


def _outputs(job: Mapping[str, Any]) -> list[str]:
    own = [job.get("OutputDataConfig", {}).get("S3OutputPath"), (job.get("CheckpointConfig") or {}).get("S3Uri")]
    return [uri for uri in own if uri]


def _key(uri: str, bucket: str) -> str | None:
    """A place in the bucket as a folder, with a last slash; "" for all of it, None for a place elsewhere."""
    start, folder = f"s3://{bucket}/", f"{uri.rstrip('/')}/"
    return folder.removeprefix(start) if folder.startswith(start) else None


def _why_kept(
    each: Stored,
    needed: Mapping[str, str],
    read: Mapping[str, str],
    now: datetime.datetime,
    older_than: float,
    otherwise: str | None,
) -> str | None:
    if each.kind in (OTHER, ANSWERS):
        return "not of this program" if each.kind == OTHER else "answers of a transform"
    using = next((why for key, why in (*read.items(), *needed.items()) if key.startswith(each.prefix)), None)
    using = using or next((why for key, why in read.items() if each.prefix.startswith(key)), None)
    if using is not None:
        return using
    if now - each.newest < datetime.timedelta(days=older_than):
        return f"newer than {older_than:g} days"
    return otherwise


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


def read_and_decide(
    account: Account, bucket: str, *, older_than: float, resumable: bool, models: bool, trials: bool
) -> list[Stored]:
    """What lies in the bucket, and of each part whether and why it is kept. Arguments as `decide`.

    Raises:
        Problem: AWS refused; then nothing may be deleted, since what is in use is not known.
    """
    sagemaker = account.client("sagemaker")
    stored = find_stored(account, bucket)  # before the jobs: what is uploaded meanwhile is not in the list
    return decide(
        stored,
        [*running_jobs(sagemaker), *jobs_of_project(sagemaker)] if stored else [],
        bucket,
        datetime.datetime.now(datetime.timezone.utc),
        older_than=older_than,
        resumable=resumable,
        models=models,
        trials=trials,
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
