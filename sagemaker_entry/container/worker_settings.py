"""What the launcher of a host tells its training processes; read without importing anything heavy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

LAST = "checkpoints/last.ckpt"  # below the run folder, as `fit` lays it out
BEST = "checkpoints/best.ckpt"


@dataclass(frozen=True)
class WorkerSettings:
    """What the launcher tells its training processes.

    Attributes:
        arguments: options of `fit`: the user's, then where the data is.
        config: the user's configuration file, or None.
        run_dir: the folder of the run, kept in S3.
        scratch: a local folder of this host for flags and failures.
        host: its name.
        processes: training processes on each host.
        hosts: how many there are.
        resume: whether to go on from the last checkpoint in `run_dir`.
    """

    arguments: tuple[str, ...]
    config: str | None
    run_dir: str
    scratch: str
    host: str
    processes: int
    hosts: int
    resume: bool

    @property
    def flag(self) -> Path:
        """The file that asks the processes to save and stop."""
        return Path(self.scratch) / "stop"

    @property
    def saved(self) -> Path:
        """The file that says that they have."""
        return Path(self.scratch) / "saved"

    def to_json(self) -> str:
        """For the file that the processes read."""
        return json.dumps(asdict(self))
