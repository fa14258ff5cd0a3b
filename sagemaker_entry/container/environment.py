"""The environment of a SageMaker job: variables and files of the container, as one typed object.

Both generations of Amazon's start scripts set SM_* variables from the JSON files in /opt/ml/input/config; a container
started by its own entry point has only the files. A variable takes precedence over the file.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagemaker_entry.protocol.problem import Problem

NO_OPTIONS = ("sagemaker_", "_tuning_")  # beginnings of hyperparameters that SageMaker and its tuner add
CODE_CHANNELS = ("code", "sm_drivers")  # added by the SDK, not by the user
# Variables of another launcher, which would give the training processes a wrong rank.
STRAY = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DINO_LIGHTNING_RUN_DIR",
)  # fmt: skip
STRAY_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_")
KERNELS = "kernels"  # below the run folder: what a resumed job need not compile again
KERNEL_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


@dataclass(frozen=True)
class Environment:
    """A training job as seen from one of its hosts.

    Attributes:
        job_name: the training job.
        hosts: the names of all hosts, sorted; the first one writes the model.
        current_host: the name of this one.
        instance_type: such as "ml.g5.2xlarge", or "" if unknown.
        network_interface: the network interface to the other hosts, or "".
        channels: the user's input channels, name to folder.
        hyperparameters: the job's, decoded from JSON.
        model_dir: SageMaker packs it as model.tar.gz at the end.
        checkpoint_dir: synchronised with S3; holds the checkpoints of the job that this one resumes.
        failure_file: its content becomes the job's failure reason.
    """

    job_name: str
    hosts: tuple[str, ...]
    current_host: str
    instance_type: str
    network_interface: str
    channels: Mapping[str, Path]
    hyperparameters: Mapping[str, Any]
    model_dir: Path
    checkpoint_dir: Path
    failure_file: Path

    @property
    def rank(self) -> int:
        """The index of this host among all hosts."""
        return self.hosts.index(self.current_host)

    @property
    def leads(self) -> bool:
        """Whether this is the first host, which writes the model."""
        return self.rank == 0


def failure_file(environ: Mapping[str, str]) -> Path:
    """The path of the file whose content becomes the job's failure reason."""
    return Path(environ.get("SM_OUTPUT_FAILURE") or _root(environ) / "output" / "failure")


def read_environment(environ: Mapping[str, str]) -> Environment:
    """Read the variables and files of the container.

    Args:
        environ: the environment variables of the process.

    Raises:
        Problem: a file or variable has not the content that SageMaker writes.
    """
    root = _root(environ)
    config = Path(environ.get("SM_INPUT_CONFIG_DIR") or root / "input" / "config")
    resources = _read_object(config / "resourceconfig.json")
    hosts = _variable(environ, "SM_HOSTS", list) or resources.get("hosts") or ["algo-1"]
    current = environ.get("SM_CURRENT_HOST") or resources.get("current_host") or hosts[0]
    if current not in hosts:
        raise Problem(f"This host is called {current!r}, but the hosts of the job are {', '.join(hosts)}.")
    names = _variable(environ, "SM_CHANNELS", list) or list(_read_object(config / "inputdataconfig.json"))
    data = Path(environ.get("SM_INPUT_DATA_DIR") or root / "input" / "data")
    checkpoints = _read_object(config / "checkpointconfig.json").get("LocalPath") or root / "checkpoints"
    hyperparameters = _variable(environ, "SM_HPS", dict)
    if hyperparameters is None:
        hyperparameters = {k: _decoded(v) for k, v in _read_object(config / "hyperparameters.json").items()}
    return Environment(
        job_name=environ.get("TRAINING_JOB_NAME") or environ.get("SM_JOB_NAME") or "local",
        hosts=tuple(sorted(hosts)),
        current_host=current,
        instance_type=environ.get("SM_CURRENT_INSTANCE_TYPE") or resources.get("current_instance_type") or "",
        network_interface=environ.get("SM_NETWORK_INTERFACE_NAME") or resources.get("network_interface_name") or "",
        channels={
            name: Path(environ.get(f"SM_CHANNEL_{name.upper()}") or data / name)
            for name in names
            if name not in CODE_CHANNELS
        },
        hyperparameters={k: v for k, v in hyperparameters.items() if not k.startswith(NO_OPTIONS)},
        model_dir=Path(environ.get("SM_MODEL_DIR") or root / "model"),
        checkpoint_dir=Path(checkpoints),
        failure_file=failure_file(environ),
    )


def child_environment(environ: Mapping[str, str], environment: Environment, run_dir: str) -> dict[str, str]:
    """The environment variables of the training processes, without those that would give them a wrong rank.

    Args:
        environ: the environment variables of this process.
        environment: the job, as seen from this host.
        run_dir: the folder of the run, where compiled kernels are kept unless `environ` names another place.
    """
    kept = {k: v for k, v in environ.items() if k not in STRAY and not k.startswith(STRAY_PREFIXES)}
    interface = environment.network_interface
    if len(environment.hosts) > 1:
        kept["NCCL_HOSTID"] = environment.current_host  # by their host names, all "aws", NCCL may take them for one
    if len(environment.hosts) > 1 and interface in (name for _, name in socket.if_nameindex()):
        kept |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    for variable, folder in KERNEL_CACHES.items():
        # Of each host its own, since SageMaker copies the folders of all hosts to one place; the processes of a host
        # share theirs, as Triton and PyTorch replace files whole.
        kept.setdefault(variable, str(Path(run_dir) / KERNELS / environment.current_host / folder))
    kept["PYTHONUNBUFFERED"] = "1"
    kept["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    return kept


def _root(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("SM_INPUT_DIR") or "/opt/ml/input").parent


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if the file does not exist."""
    if not path.is_file():
        return {}
    return _object_of(path.read_text(), str(path), dict)  # type: ignore[no-any-return]  # checked in there


def _variable(environ: Mapping[str, str], name: str, kind: type) -> Any:
    return _object_of(environ[name], name, kind) if environ.get(name) else None


def _object_of(text: str, where: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Problem(f"{where} is not valid JSON ({error}).") from error
    if not isinstance(value, kind):
        raise Problem(f"{where} should hold a JSON {'object' if kind is dict else 'list'}.")
    return value


def _decoded(value: Any) -> Any:
    """A hyperparameter's value: all are strings, decoded where they are valid JSON."""
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value
