"""What a host's launcher passes to its training processes; standard library only, for the launcher imports it too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

LAST = "checkpoints/last.ckpt"  # below the run folder, where `fit` saves it
BEST = "checkpoints/best.ckpt"


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of the training processes of one host.

    Attributes:
        arguments: options of `fit`: the user's, then those of the dataset.
        config: the user's configuration file, or None.
        run_dir: the run folder, synchronised with S3.
        scratch: a local folder of this host for flag files and failure records.
        host: the name of this host.
        processes: training processes on each host.
        hosts: the number of hosts.
        resume: whether to resume from the last checkpoint in `run_dir`.
        trial: the file for the measurements of a trial; None for a training.
        job: the name of the training job.
        started: `time.monotonic` at the start of the container's entry.
    """

    arguments: tuple[str, ...]
    config: str | None
    run_dir: str
    scratch: str
    host: str
    processes: int
    hosts: int
    resume: bool
    trial: str | None = None
    job: str = ""
    started: float = 0.0

    @property
    def flag(self) -> Path:
        """The flag file that asks the processes to save a checkpoint and stop."""
        return Path(self.scratch) / "stop"

    @property
    def saved(self) -> Path:
        """The file that holds the step of the checkpoint they saved before stopping."""
        return Path(self.scratch) / "saved"

    @property
    def met(self) -> Path:
        """The file that tells the launcher that all training processes have found each other."""
        return Path(self.scratch) / "met"

    def to_json(self) -> str:
        """The content of the settings file that the processes read."""
        return json.dumps(asdict(self))
