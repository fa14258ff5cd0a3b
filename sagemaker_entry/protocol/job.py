"""What the laptop tells the container: the configuration and the job description, as files of their own channel.

They are not passed as hyperparameters because Amazon's start script breaks on an apostrophe in one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

CONFIG_CHANNEL = "config"
WEIGHTS_CHANNEL = "weights"
PACKAGES_CHANNEL = "packages"  # wheels, for a job without a network
CONFIG_FILE = "config.yaml"
JOB_FILE = "job.json"
REQUIREMENTS = "requirements.txt"  # beside the code: the packages to install


@dataclass(frozen=True)
class Job:
    """The description of a job.

    Attributes:
        arguments: options of `fit` beside the configuration file.
        config: the configuration file, or None.
        hosts: the planned number of hosts, or None for a job that was not planned by `launch`.
        gpus_per_host: the planned number of GPUs on each host, or None likewise.
        trial: whether to run a few dozen steps and write what they take, instead of training a model.
        weights: file names in the channel `weights`, by the option of `fit` that takes the file.
    """

    arguments: tuple[str, ...] = ()
    config: str | None = None
    hosts: int | None = None
    gpus_per_host: int | None = None
    trial: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of job.json."""
        return json.dumps(asdict(self), indent=1)
