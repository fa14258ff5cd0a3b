"""What the laptop tells the container: the configuration and the plan, as files of a channel of their own.

Never as hyperparameters: Amazon's start script breaks on an apostrophe in one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sagemaker_entry.environment import Environment
from sagemaker_entry.problem import Problem

CONFIG_CHANNEL = "config"
WEIGHTS_CHANNEL = "weights"
CONFIG_FILE = "config.yaml"
JOB_FILE = "job.json"


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


def read_job(environment: Environment, arguments: Sequence[str]) -> Job:
    """The plan that the laptop sent along; without one, the hyperparameters as options of `fit`.

    Args:
        environment: of the job.
        arguments: of this program. The older start script gives the hyperparameters there as well.

    Raises:
        Problem: the channel is incomplete.
    """
    folder = environment.channels.get(CONFIG_CHANNEL)
    if folder is None:
        return Job(arguments=tuple(arguments or _options(environment.hyperparameters)))
    try:
        content = json.loads((folder / JOB_FILE).read_text())
        job = Job(**{**content, "arguments": (*content["arguments"], *arguments)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"Channel {CONFIG_CHANNEL!r}: {folder / JOB_FILE} cannot be read ({error}); launch again."
        ) from error
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise Problem(f"Channel {CONFIG_CHANNEL!r}: {config} is missing; launch again.")
    given = environment.channels.get(WEIGHTS_CHANNEL)
    if job.weights and given is None:
        raise Problem(
            f"The job has no channel {WEIGHTS_CHANNEL!r}, but needs {', '.join(job.weights.values())} from it."
        )
    weights = [f"--{option}={given / name}" for option, name in job.weights.items() if given is not None]
    return replace(job, config=str(config), arguments=(*job.arguments, *weights))


def _options(hyperparameters: Mapping[str, Any]) -> list[str]:
    return [
        f"--{name}={json.dumps(value) if not isinstance(value, str) else value}"
        for name, value in hyperparameters.items()
    ]
