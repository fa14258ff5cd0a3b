"""Whether a job's checkpoints arrive in S3: SageMaker's copying can stall, and nothing but their times shows it."""

from __future__ import annotations

import datetime
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from sagemaker_entry.laptop.account import error_code
from sagemaker_entry.protocol.progress import PREFIX

PATIENCE = 15 * 60.0  # seconds that copying a checkpoint may take
AHEAD = 120.0  # seconds by which a checkpoint may be older than the line that tells the end of its epoch
SECONDS_BETWEEN_LISTINGS = 60.0


class CheckpointWatch:
    """Compares the ends of epochs in the log, at each of which a checkpoint is saved, with the newest one in S3.

    Args:
        s3: a boto3 client.
        uri: the S3 folder that SageMaker copies the checkpoints to; "" for a job that keeps none.
    """

    def __init__(self, s3: Any, uri: str) -> None:
        self._s3, self._uri = s3, uri
        self._ends: list[float] = []  # of epochs, in seconds since 1970, that no checkpoint in S3 is known for
        self._listed = 0.0
        self._stalled = False

    def read(self, line: str, at: float) -> None:
        """Read a log line written at time `at`, in seconds since 1970."""
        if PREFIX in line and " finished" in line:
            self._ends.append(at)

    def check(self, now: float) -> str | None:
        """A sentence when checkpoints have stopped arriving, and one when they arrive again; each is said once.

        Args:
            now: the time, in seconds since 1970.
        """
        due = max((end for end in self._ends if now - end >= PATIENCE), default=None)
        if not self._uri or due is None or now - self._listed < SECONDS_BETWEEN_LISTINGS:
            return None
        self._listed = now
        try:
            newest = self._newest()
        except ClientError as error:
            unseen, self._uri = self._uri, ""
            return f"It is not seen whether checkpoints arrive at {unseen} (s3:ListBucket: {error_code(error)})."
        except BotoCoreError:  # the network; the next time
            return None
        self._ends = [end for end in self._ends if newest is None or end - AHEAD > newest]
        stalled, before = due in self._ends, self._stalled
        self._stalled = stalled
        if stalled and not before:
            since = "No checkpoint has" if newest is None else f"Since {_clock(newest)} no checkpoint has"
            rest = "starts from the beginning" if newest is None else "repeats what was trained since then"
            return (
                f"{since} arrived in S3, though an epoch ended at {_clock(due)}: SageMaker's copying has stalled. "
                f"Check that the job's role may write to {self._uri} (s3:PutObject, and the KMS key). The model is "
                "uploaded on its own at the end, so let the job run; if it is stopped, interrupted or fails before, a "
                f"resumed job {rest}."
            )
        return "Checkpoints arrive in S3 again." if before and not stalled else None

    def _newest(self) -> float | None:
        """When the newest complete checkpoint arrived; a file that is being sent has a marker, not the name itself."""
        bucket, _, prefix = self._uri.removeprefix("s3://").partition("/")
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        entries = [entry for page in pages for entry in page.get("Contents", []) if entry["Key"].endswith(".ckpt")]
        return max((entry["LastModified"].timestamp() for entry in entries), default=None)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%H:%M UTC")
