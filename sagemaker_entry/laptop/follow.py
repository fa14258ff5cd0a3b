"""Following a job: its log, host by host, and a status line with epoch, metrics, time and cost so far."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnection

from sagemaker_entry.laptop.account import Account, error_code, explained
from sagemaker_entry.laptop.checkpoint_watch import CheckpointWatch
from sagemaker_entry.laptop.places import COMMAND
from sagemaker_entry.laptop.quota import no_room
from sagemaker_entry.protocol.instances import INSTANCES
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import read_metrics

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ENDED = ("Completed", "Failed", "Stopped")
SECONDS_BETWEEN_POLLS = 10.0
QUIET_POLLS_AT_END = 3  # lines arrive some seconds after the job has ended
TRANSIENT = (HTTPClientError, NoConnection)  # a network that may come back
WAITS_FOR_NETWORK = (1, 2, 4, 8, 16)  # times the usual pause; together about five minutes
PRICE_TAG = "dollars-per-hour"  # tag with the on-demand price of all instances together, from the plan
BATCH = re.compile(r"\bbatch (\d+) of (\d+)\b")


def describe(sagemaker: Any, job: str) -> dict[str, Any]:
    """SageMaker's description of a job.

    Raises:
        Problem: there is no such job, or AWS refused.
    """
    try:
        with explained(f"describe the job {job} (sagemaker:DescribeTrainingJob)"):
            found: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=job)
    except Problem as problem:
        error = problem.__cause__
        if isinstance(error, ClientError) and _says_not_found(error):
            raise Problem(
                f"There is no training job {job!r} in this account and region; check the name and --region."
            ) from error
        raise
    return found


def _says_not_found(error: ClientError) -> bool:
    code, message = error_code(error), error.response["Error"].get("Message", "").lower()
    return code.startswith("ResourceNotFound") or (code == "ValidationException" and "not found" in message)


def hourly_price(sagemaker: Any, job: dict[str, Any]) -> float | None:
    """Dollars an hour for all instances of a job, from the plan; None if the job's tags cannot be read."""
    try:
        tags = sagemaker.list_tags(ResourceArn=job["TrainingJobArn"])["Tags"]
    except (ClientError, BotoCoreError):
        return None
    return tagged_price(tags)


def tagged_price(tags: list[dict[str, str]]) -> float | None:
    """The price in a job's tags; None if there is no such tag."""
    try:
        return next((float(tag["Value"]) for tag in tags if tag["Key"] == PRICE_TAG), None)
    except ValueError:  # somebody else's tag
        return None


@dataclass
class Progress:
    """The progress of a job, read from its log.

    Attributes:
        metrics: the latest value of each metric.
        hourly: dollars an hour for all instances together; None for the price of the table.
        first: (fraction of all epochs done, seconds) when training started in this job; not 0 in a resumed job.
        last: the latest such pair.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    hourly: float | None = None
    first: tuple[float, float] | None = None
    last: tuple[float, float] | None = None

    def read(self, line: str, at: float) -> None:
        """Read the metrics of a log line written at time `at`, in seconds."""
        found = read_metrics(line)
        self.metrics |= found
        epoch, epochs = found.get("epoch"), found.get("epochs")
        if not epoch or not epochs or epochs < 0:
            return
        batch = BATCH.search(line)
        within = int(batch[1]) / int(batch[2]) if batch else 1.0 if " finished" in line else 0.0
        now = ((epoch - 1 + within) / epochs, at)
        if self.first is None or self.last is None or now[0] < self.last[0]:  # a spot job restarted from its checkpoint
            self.first = now
        self.last = now

    def seconds_left(self) -> float | None:
        """Estimated from the speed of this job so far; None before there are two points, and when all is done."""
        if self.first is None or self.last is None:
            return None
        done, seconds = self.last[0] - self.first[0], self.last[1] - self.first[1]
        left = 1 - self.last[0]
        return seconds / done * left if done > 0 and seconds > 0 and left > 0 else None

    def line(self, job: dict[str, Any], now: datetime.datetime) -> str:
        """The status line: state, epoch, loss, AP, F1, minutes, cost, and minutes left."""
        parts = [job.get("SecondaryStatus") or job["TrainingJobStatus"]]
        epoch, epochs = self.metrics.get("epoch"), self.metrics.get("epochs")
        if epoch is not None:
            parts.append(f"epoch {epoch:.0f}" + (f"/{epochs:.0f}" if epochs else ""))
        parts += [
            f"{name} {self.metrics[word]:.3f}"
            for name, word in (("loss", "train_loss"), ("AP", "val_AP"), ("F1", "val_F1"))
            if word in self.metrics
        ]
        seconds = running_seconds(job, now)
        if seconds:
            parts.append(f"{seconds / 60:.0f} min")
            cost = dollars(job, seconds, self.hourly)
            parts.append("price unknown" if cost is None else f"${cost:.2f} so far")
        left = self.seconds_left()
        if left is not None and job["TrainingJobStatus"] not in ENDED:
            parts.append(f"about {left / 60:.0f} min left")
        return " | ".join(parts)


def running_seconds(job: dict[str, Any], now: datetime.datetime) -> float:
    """Billed seconds: SageMaker's number once the job has ended, before that the time since it started."""
    if job.get("BillableTimeInSeconds"):
        return float(job["BillableTimeInSeconds"])
    if not job.get("TrainingStartTime"):
        return 0.0
    until: datetime.datetime = job.get("TrainingEndTime") or now
    started: datetime.datetime = job["TrainingStartTime"]
    return max(0.0, (until - started).total_seconds())


def dollars(job: dict[str, Any], seconds: float, hourly: float | None = None) -> float | None:
    """The cost of some seconds at `hourly` dollars, by default the table's price; None where it has none."""
    if hourly is not None:
        return seconds / 3600 * hourly
    resources = job["ResourceConfig"]
    instance = INSTANCES.get(resources["InstanceType"])
    if instance is None or instance.price is None:
        return None
    price: float = instance.price * resources["InstanceCount"]
    return seconds / 3600 * price


class Logs:
    """The log streams of a job, one for each host; each call of `read` returns the new lines.

    Args:
        logs: a boto3 client.
        job: the job's name.
    """

    def __init__(self, logs: Any, job: str) -> None:
        self._logs, self._job = logs, job
        self._tokens: dict[str, str | None] = {}
        self._events: list[tuple[int, str, str]] = []  # read but not yet returned: a later page may fail

    def read(self) -> list[tuple[int, str, str]]:
        """(milliseconds, host, line) of all new lines, in order of time."""
        self._find_streams()
        for stream in self._tokens:
            self._read_stream(stream)
        events, self._events = self._events, []
        return sorted(events, key=lambda event: event[0])

    def _find_streams(self) -> None:
        try:
            pages = self._logs.get_paginator("describe_log_streams").paginate(
                logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self._job}/"
            )
            for page in pages:
                for stream in page["logStreams"]:
                    self._tokens.setdefault(stream["logStreamName"], None)
        except ClientError as error:
            if error_code(error) != "ResourceNotFoundException":  # the log group is created with the first line
                raise

    def _read_stream(self, stream: str) -> None:
        host = stream.removeprefix(f"{self._job}/").rpartition("-")[0] or stream
        while True:
            token = self._tokens[stream]
            place = {"nextToken": token} if token else {"startFromHead": True}
            page = self._logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, **place)
            self._events += [(event["timestamp"], host, event["message"].rstrip("\n")) for event in page["events"]]
            self._tokens[stream] = page["nextForwardToken"]
            if page["nextForwardToken"] == token:  # AWS repeats the token at the end; pages before may be empty
                return
            if token is None and not page["events"]:
                return


def follow(
    account: Account,
    job: str,
    *,
    say: Callable[[str], None] = print,
    pause: float = SECONDS_BETWEEN_POLLS,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Print a job's log and progress until it ends; returns SageMaker's final description of it.

    Ctrl-C leaves the job running and prints how to attach to it again. After a network error it retries for about five
    minutes.

    Args:
        account: the job's account.
        job: the job's name.
        say: prints a line.
        pause: seconds between two requests.
        sleep: waits for some seconds.

    Raises:
        Problem: there is no such job, or AWS refused.
        KeyboardInterrupt: after printing how to attach again.
    """
    sagemaker, logs = account.client("sagemaker"), Logs(account.client("logs"), job)
    progress = Progress()
    watch: CheckpointWatch | None = None
    shown = ""
    quiet, failures = 0, 0
    description: dict[str, Any] = {}
    try:
        while True:
            try:
                description = describe(sagemaker, job)
                with explained("read the job's log (logs:DescribeLogStreams, logs:GetLogEvents)"):
                    lines = logs.read()
            except Problem as problem:
                what = str(problem).rstrip(".")
                transient = isinstance(problem.__cause__, TRANSIENT)
                if transient and failures < len(WAITS_FOR_NETWORK):
                    say(f"--- {what}; trying again; the job is not affected")
                    sleep(pause * WAITS_FOR_NETWORK[failures])
                    failures += 1
                    continue
                if description.get("TrainingJobStatus") in ENDED or not (transient or description):
                    raise
                raise Problem(
                    f"{what}; the job keeps running and costs money; attach again: {COMMAND} attach {job}; "
                    f"stop it: {COMMAND} stop {job}"
                ) from problem
            if not shown:
                progress.hourly = hourly_price(sagemaker, description)
            failures = 0
            if watch is None:
                watch = CheckpointWatch(
                    account.client("s3"), (description.get("CheckpointConfig") or {}).get("S3Uri", "")
                )
            ended = description["TrainingJobStatus"] in ENDED
            many = description["ResourceConfig"]["InstanceCount"] > 1
            for milliseconds, host, line in lines:
                say(f"[{host}] {line}" if many else line)
                progress.read(line, milliseconds / 1000)
                watch.read(line, milliseconds / 1000)
            state = progress.line(description, datetime.datetime.now(datetime.timezone.utc))
            if state != shown and (lines or not shown or str(description.get("SecondaryStatus")) not in shown):
                say(f"--- {state}")
                shown = state
            warning = None if ended else watch.check(time.time())
            if warning is not None:
                say(f"--- {warning}")
            quiet = quiet + 1 if ended and not lines else 0
            if ended and quiet >= QUIET_POLLS_AT_END:
                return description
            sleep(min(pause, 2.0) if ended else pause)
    except KeyboardInterrupt:
        say(f"\nThe job keeps running and costs money. Attach again:  {COMMAND} attach {job}")
        say(f"Stop it:                                             {COMMAND} stop {job}")
        raise


def summary(job: dict[str, Any], hourly: float | None = None) -> str:
    """State, cost and next commands of a job; `hourly` is its price in dollars, by default the table's."""
    name, status = job["TrainingJobName"], job["TrainingJobStatus"]
    seconds = running_seconds(job, datetime.datetime.now(datetime.timezone.utc))
    cost = dollars(job, seconds, hourly)
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
        resources = job["ResourceConfig"]
        advice = no_room(
            job["FailureReason"],
            resources["InstanceType"],
            resources["InstanceCount"],
            job["TrainingJobArn"].split(":")[3],
            spot=bool(job.get("EnableManagedSpotTraining")),
        )
        lines += [] if advice is None else [advice]
    if job.get("ModelArtifacts", {}).get("S3ModelArtifacts") and status in ("Completed", "Stopped"):
        lines.append(f"get the model: {COMMAND} fetch {name}")
    if status in ("Failed", "Stopped"):
        lines.append(f"resume from the last checkpoint: {COMMAND} resume {name}")
    if status not in ENDED:
        lines.append(f"watch it: {COMMAND} attach {name}    stop it: {COMMAND} stop {name}")
    return "\n".join(lines)
