"""What the laptop tells the container: the configuration and the plan, as files of a channel of their own.

Never as hyperparameters: Amazon's start script breaks on an apostrophe in one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

CONFIG_CHANNEL = "config"
WEIGHTS_CHANNEL = "weights"
CONFIG_FILE = "config.yaml"
JOB_FILE = "job.json"
REQUIREMENTS = "requirements.txt"  # beside the code: what the package needs


@dataclass(frozen=True)
class Job:
    """The plan of a job.

    Attributes:
        arguments: options of `fit` beside the configuration file.
        config: the configuration file, or None.
        hosts: how many were planned, or None where nobody planned.
        gpus_per_host: how many were planned.
        weights: files of the channel `weights`, by the option of `fit` that they are for.
    """

    arguments: tuple[str, ...] = ()
    config: str | None = None
    hosts: int | None = None
    gpus_per_host: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of job.json."""
        return json.dumps(asdict(self), indent=1)
