"""Why a job failed: the first error of any process on any host, and the sentence that reaches the user."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dino_lightning.files import atomic_write

# What a process says whose neighbour is gone; why the neighbour went is what the user needs.
_CAUSED_BY_ANOTHER = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by (remote )?peer|gloo/|NCCL|DistBackendError|"
    r"DistNetworkError|SIGTERM",
    re.IGNORECASE,
)
LIMIT = 1000  # characters; SageMaker shows 1,024


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong.

    Attributes:
        message: one sentence for the user.
        host: where it happened.
        rank: of the training process, or None for the launcher itself.
        time: seconds since the epoch.
        secondary: whether it only follows from something that happened elsewhere.
    """

    message: str
    host: str = ""
    rank: int | None = None
    time: float = field(default_factory=time.time)
    secondary: bool = False

    @classmethod
    def of(cls, message: str, *, host: str, rank: int | None = None) -> Failure:
        """A failure with this message, which also tells whether it only follows from another one."""
        return cls(message, host=host, rank=rank, secondary=bool(_CAUSED_BY_ANOTHER.search(message)))

    def to_json(self) -> str:
        """For another host or process."""
        return json.dumps(asdict(self))

    @property
    def sentence(self) -> str:
        """Message and place."""
        place = f"[{self.host}" + ("" if self.rank is None else f", process {self.rank}") + "] "
        return " ".join((place + self.message).split())[:LIMIT]


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """The earliest failure that does not follow from another; failing that, the earliest."""
    return min(failures, key=lambda failure: (failure.secondary, failure.time), default=None)


def write_record(failure: Failure, folder: Path) -> None:
    """Leave a failure of a training process for the launcher."""
    with atomic_write(folder / f"failure-{failure.rank}.json") as path:
        path.write_text(failure.to_json())


def read_records(folder: Path) -> list[Failure]:
    """The failures that the training processes left."""
    return [Failure(**json.loads(path.read_text())) for path in sorted(folder.glob("failure-*.json"))]


def write_failure_file(failure: Failure, path: Path) -> None:
    """Write the job's failure reason."""
    with atomic_write(path) as temporary:
        temporary.write_text(failure.sentence + "\n")
