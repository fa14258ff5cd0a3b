"""A running job on the laptop: its log, host by host, and one line that says how far it is and what it has cost."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import ClientError

from sagemaker_entry.account import Account, error_code, explained
from sagemaker_entry.instances import INSTANCES
from sagemaker_entry.problem import Problem
from sagemaker_entry.progress import read_figures

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ENDED = ("Completed", "Failed", "Stopped")
SECONDS_BETWEEN_POLLS = 10.0
QUIET_POLLS_AT_END = 3  # lines arrive some seconds after the job has ended


def describe(sagemaker: Any, job: str) -> dict[str, Any]:
    """What SageMaker says of a job.

    Raises:
        Problem: there is no such job.
    """
    try:
        found: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=job)
    except ClientError as error:
        missing = error_code(error) in ("ResourceNotFound", "ResourceNotFoundException")
        message = error.response["Error"].get("Message", "").lower()
        if missing or (error_code(error) == "ValidationException" and "not found" in message):
            raise Problem(
                f"There is no training job {job!r} in this account and region; check the name and --region."
            ) from error
        with explained(f"look at the job {job} (sagemaker:DescribeTrainingJob)"):
            raise
    return found


@dataclass
class Progress:
    """How far a job is, read from its log.

    Attributes:
        figures: the newest value of each figure.
    """

    figures: dict[str, float] = field(default_factory=dict)

    def read(self, line: str) -> None:
        """Take the figures out of a line."""
        self.figures |= read_figures(line)

    def line(self, job: dict[str, Any], now: datetime.datetime) -> str:
        """One line: state, epoch, AP, F1, time, money, and what is left."""
        parts = [job.get("SecondaryStatus") or job["TrainingJobStatus"]]
        epoch, epochs = self.figures.get("epoch"), self.figures.get("epochs")
        if epoch is not None:
            parts.append(f"epoch {epoch:.0f}" + (f"/{epochs:.0f}" if epochs else ""))
        parts += [
            f"{name} {self.figures[word]:.3f}"
            for name, word in (("loss", "train_loss"), ("AP", "val_AP"), ("F1", "val_F1"))
            if word in self.figures
        ]
        seconds = running_seconds(job, now)
        if seconds:
            parts.append(f"{seconds / 60:.0f} min")
            cost = dollars(job, seconds)
            parts.append("price unknown" if cost is None else f"${cost:.2f} so far")
        if epoch and epochs and seconds and job["TrainingJobStatus"] not in ENDED and epoch < epochs:
            parts.append(f"about {seconds / epoch * (epochs - epoch) / 60:.0f} min left")
        return " | ".join(parts)


def running_seconds(job: dict[str, Any], now: datetime.datetime) -> float:
    """Seconds that are billed: what SageMaker says once it is over, the time since the start before."""
    if job.get("BillableTimeInSeconds"):
        return float(job["BillableTimeInSeconds"])
    if not job.get("TrainingStartTime"):
        return 0.0
    until: datetime.datetime = job.get("TrainingEndTime") or now
    started: datetime.datetime = job["TrainingStartTime"]
    return max(0.0, (until - started).total_seconds())


def dollars(job: dict[str, Any], seconds: float) -> float | None:
    """Seconds x instances x price an hour; None for a type whose price the table lacks."""
    resources = job["ResourceConfig"]
    instance = INSTANCES.get(resources["InstanceType"])
    return None if instance is None else seconds / 3600 * resources["InstanceCount"] * instance.price


class Logs:
    """The log streams of a job, one for each host, each read on from where it was.

    Args:
        logs: a boto3 client.
        job: the job's name.
    """

    def __init__(self, logs: Any, job: str) -> None:
        self._logs, self._job = logs, job
        self._tokens: dict[str, str | None] = {}

    def read(self) -> list[tuple[str, str]]:
        """(host, line) of everything that is new, in order of time."""
        self._find_streams()
        events: list[tuple[int, str, str]] = []
        for stream in self._tokens:
            host = stream.removeprefix(f"{self._job}/").rpartition("-")[0] or stream
            events += [(event["timestamp"], host, event["message"].rstrip("\n")) for event in self._new_events(stream)]
        return [(host, line) for _, host, line in sorted(events, key=lambda event: event[0])]

    def _find_streams(self) -> None:
        try:
            pages = self._logs.get_paginator("describe_log_streams").paginate(
                logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self._job}/"
            )
            for page in pages:
                for stream in page["logStreams"]:
                    self._tokens.setdefault(stream["logStreamName"], None)
        except ClientError as error:
            if error_code(error) != "ResourceNotFoundException":  # there is no log before the first line
                raise

    def _new_events(self, stream: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        while True:
            token = self._tokens[stream]
            place = {"nextToken": token} if token else {"startFromHead": True}
            page = self._logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, **place)
            events += page["events"]
            self._tokens[stream] = page["nextForwardToken"]
            if page["nextForwardToken"] == token:  # AWS repeats the token at the end; pages before may be empty
                return events
            if token is None and not page["events"]:
                return events


def follow(
    account: Account,
    job: str,
    *,
    say: Callable[[str], None] = print,
    pause: float = SECONDS_BETWEEN_POLLS,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Show a job's log and progress until it ends; returns what SageMaker says of it then.

    An interrupt from the keyboard leaves the job running and says how to come back.

    Args:
        account: in which.
        job: its name.
        say: takes the lines.
        pause: seconds between looks.
        sleep: waits.

    Raises:
        Problem: there is no such job, or AWS refused.
        KeyboardInterrupt: after having said how to come back.
    """
    sagemaker, logs = account.client("sagemaker"), Logs(account.client("logs"), job)
    progress = Progress()
    shown = ""
    quiet = 0
    try:
        while True:
            description = describe(sagemaker, job)
            ended = description["TrainingJobStatus"] in ENDED
            with explained("read the job's log (logs:DescribeLogStreams, logs:GetLogEvents)"):
                lines = logs.read()
            many = description["ResourceConfig"]["InstanceCount"] > 1
            for host, line in lines:
                say(f"[{host}] {line}" if many else line)
                progress.read(line)
            state = progress.line(description, datetime.datetime.now(datetime.timezone.utc))
            if state != shown and (lines or not shown or str(description.get("SecondaryStatus")) not in shown):
                say(f"--- {state}")
                shown = state
            quiet = quiet + 1 if ended and not lines else 0
            if ended and quiet >= QUIET_POLLS_AT_END:
                return description
            sleep(min(pause, 2.0) if ended else pause)
    except KeyboardInterrupt:
        say(f"\nThe job goes on, and so does the bill. Come back:  python -m sagemaker_entry.launch attach {job}")
        say(f"Stop it:                                         python -m sagemaker_entry.launch stop {job}")
        raise


def summary(job: dict[str, Any]) -> str:
    """How a job ended, what it cost, and what to do next."""
    name, status = job["TrainingJobName"], job["TrainingJobStatus"]
    seconds = running_seconds(job, datetime.datetime.now(datetime.timezone.utc))
    cost = dollars(job, seconds)
    lines = [
        f"{name}: {status}"
        + (f" ({job['SecondaryStatus']})" if job.get("SecondaryStatus") not in (None, status) else "")
    ]
    if seconds:
        money = "" if cost is None else f", about ${cost:.2f}"
        spot = " (spot already counted)" if job.get("EnableManagedSpotTraining") else ""
        lines.append(f"billed for {seconds / 60:.0f} minutes of {job['ResourceConfig']['InstanceCount']} x "
                     f"{job['ResourceConfig']['InstanceType']}{money}{spot}")  # fmt: skip
    if job.get("FailureReason"):
        lines.append(f"reason: {job['FailureReason']}")
    command = "python -m sagemaker_entry.launch"
    if job.get("ModelArtifacts", {}).get("S3ModelArtifacts") and status in ("Completed", "Stopped"):
        lines.append(f"get the model: {command} fetch {name}")
    if status in ("Failed", "Stopped"):
        lines.append(f"go on from the last checkpoint: {command} resume {name}")
    if status not in ENDED:
        lines.append(f"watch it: {command} attach {name}    stop it: {command} stop {name}")
    return "\n".join(lines)
