"""Why a job failed: the first error of any process on any host, and the failure reason that the user reads."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dino_lightning.files import atomic_write

# Messages of a process that lost its connection to another one: the user needs the other one's error instead.
_CAUSED_BY_ANOTHER = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by (remote )?peer|gloo/|NCCL|DistBackendError|"
    r"DistNetworkError|SIGTERM",
    re.IGNORECASE,
)
LIMIT = 1000  # characters; SageMaker shows 1,024


@dataclass(frozen=True)
class Failure:
    """An error of one process.

    Attributes:
        message: one sentence for the user.
        host: where it happened.
        rank: of the training process, or None for the launcher itself.
        time: seconds since the epoch.
        secondary: whether it is only the consequence of an error of another process.
    """

    message: str
    host: str = ""
    rank: int | None = None
    time: float = field(default_factory=time.time)
    secondary: bool = False

    @classmethod
    def of(cls, message: str, *, host: str, rank: int | None = None) -> Failure:
        """A failure with this message; `secondary` is set where the message is that of a lost connection."""
        return cls(message, host=host, rank=rank, secondary=bool(_CAUSED_BY_ANOTHER.search(message)))

    def to_json(self) -> str:
        """The JSON text that another host or process reads."""
        return json.dumps(asdict(self))

    @property
    def sentence(self) -> str:
        """Host, process and message on one line, cut to what SageMaker shows."""
        place = f"[{self.host}" + ("" if self.rank is None else f", process {self.rank}") + "] "
        return " ".join((place + self.message).split())[:LIMIT]


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """The earliest primary failure, else the earliest secondary one; None if there are none."""
    return min(failures, key=lambda failure: (failure.secondary, failure.time), default=None)


def write_record(failure: Failure, folder: Path) -> None:
    """Write the failure of a training process to a file that the launcher reads."""
    with atomic_write(folder / f"failure-{failure.rank}.json") as path:
        path.write_text(failure.to_json())


def read_records(folder: Path) -> list[Failure]:
    """The failures that the training processes have written."""
    return [Failure(**json.loads(path.read_text())) for path in sorted(folder.glob("failure-*.json"))]


def write_failure_file(failure: Failure, path: Path) -> None:
    """Write the file that SageMaker reads as the job's failure reason."""
    with atomic_write(path) as temporary:
        temporary.write_text(failure.sentence + "\n")
