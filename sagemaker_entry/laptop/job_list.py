"""The jobs of this project in the account: state, time, cost and metrics."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dino_lightning.console import aligned
from sagemaker_entry.laptop.account import Account, explained
from sagemaker_entry.laptop.follow import describe, dollars, hourly_price, running_seconds
from sagemaker_entry.laptop.places import JOB_NAMES, RUNS, TRIALS

RUNNING = ("InProgress", "Stopping")  # what AWS calls them
METRICS = {"AP": ("best:AP", "val:AP"), "F1": ("best:F1", "val:F1")}  # the second of jobs before there was the first


def jobs_of_project(sagemaker: Any) -> Iterator[dict[str, Any]]:
    """The descriptions of all jobs that `launch` has started in the account and region, the newest first.

    Raises:
        Problem: AWS refused.
    """
    with explained("list the training jobs (sagemaker:ListTrainingJobs)"):
        pages = sagemaker.get_paginator("list_training_jobs").paginate(
            NameContains=JOB_NAMES, SortBy="CreationTime", SortOrder="Descending"
        )
        for page in pages:
            for entry in page["TrainingJobSummaries"]:
                if not entry["TrainingJobName"].startswith(JOB_NAMES):
                    continue
                description = describe(sagemaker, entry["TrainingJobName"])
                output = description.get("OutputDataConfig", {}).get("S3OutputPath", "")
                if RUNS in output or f"{TRIALS}/" in output:
                    yield description


def running_jobs(sagemaker: Any) -> Iterator[dict[str, Any]]:
    """The descriptions of all jobs that run in the account and region, whoever has started them.

    Raises:
        Problem: AWS refused.
    """
    for status in RUNNING:
        with explained("list the running training jobs (sagemaker:ListTrainingJobs)"):
            pages = sagemaker.get_paginator("list_training_jobs").paginate(StatusEquals=status)
            names = [entry["TrainingJobName"] for page in pages for entry in page["TrainingJobSummaries"]]
        for name in names:
            yield describe(sagemaker, name)


def list_jobs(account: Account, limit: int) -> str:
    """A table of the newest jobs, one line each.

    Args:
        account: the account to look in.
        limit: the number of jobs at most.

    Raises:
        Problem: AWS refused.
    """
    sagemaker = account.client("sagemaker")
    now = datetime.datetime.now(datetime.timezone.utc)
    found = [_row(sagemaker, job, now) for job in islice(jobs_of_project(sagemaker), limit)]
    if not found:
        return f"There are no jobs of this project in account {account.id}, {account.region}."
    heads = ("job", "state", "started (UTC)", "hours", "cost", *METRICS)
    return f"{aligned([heads, *found])}\nAP and F1 are the best of all evaluations."


def _row(sagemaker: Any, job: dict[str, Any], now: datetime.datetime) -> tuple[str, ...]:
    started = job.get("TrainingStartTime")
    seconds = running_seconds(job, now)
    cost = dollars(job, seconds, hourly_price(sagemaker, job)) if seconds else 0.0
    last = {entry["MetricName"]: entry["Value"] for entry in job.get("FinalMetricDataList", [])}
    return (
        job["TrainingJobName"],
        job["TrainingJobStatus"],
        started.astimezone(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M") if started else "-",
        f"{seconds / 3600:.1f}" if seconds else "-",
        "unknown" if cost is None else f"${cost:.2f}",
        *(next((f"{last[name]:.3f}" for name in names if name in last), "-") for names in METRICS.values()),
    )
