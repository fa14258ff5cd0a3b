"""`launch --local`: the container's entry point on this machine, in a folder laid out like /opt/ml."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dino_lightning.cli.command import INTERRUPTED
from sagemaker_entry.protocol.job import CONFIG_CHANNEL, CONFIG_FILE, JOB_FILE, WEIGHTS_CHANNEL, Job


def prepare_opt_ml(
    root: Path, data: Path, config: str, job: Job, weights: Mapping[str, Path], hosts: Sequence[str] = ("algo-1",)
) -> None:
    """Fill a folder as SageMaker fills /opt/ml before it starts the container.

    Args:
        root: the folder that takes the place of /opt/ml.
        data: the dataset for channel `training`.
        config: the content of the configuration file.
        job: the job description.
        weights: files for channel `weights`, by name.
        hosts: the names of the job's hosts.
    """
    channels = [CONFIG_CHANNEL, "training"]
    for folder in ("input/config", f"input/data/{CONFIG_CHANNEL}", "output/data", "model", "checkpoints"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    inputs = root / "input" / "data"
    (inputs / CONFIG_CHANNEL / CONFIG_FILE).write_text(config)
    (inputs / CONFIG_CHANNEL / JOB_FILE).write_text(job.to_json())
    _link(inputs / "training", data)
    if weights:
        channels.append(WEIGHTS_CHANNEL)
        (inputs / WEIGHTS_CHANNEL).mkdir(exist_ok=True)
        for name, path in weights.items():
            _link(inputs / WEIGHTS_CHANNEL / name, path)
    configuration = root / "input" / "config"
    files = {
        "resourceconfig": {"current_host": hosts[0], "hosts": list(hosts), "network_interface_name": "eth0"},
        "inputdataconfig": {name: {"TrainingInputMode": "File"} for name in channels},
        "hyperparameters": {},
        "checkpointconfig": {"LocalPath": str(root / "checkpoints")},
    }
    for name, content in files.items():
        (configuration / f"{name}.json").write_text(json.dumps(content))


def run_locally(root: Path, environ: Mapping[str, str] = os.environ) -> int:
    """Run `sagemaker_entry.train` on a folder that `prepare_opt_ml` filled; returns its exit code.

    Ctrl-C stops it as SageMaker would: it saves a checkpoint first, and a second one stops it at once. Then the exit
    code is 130.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith("SM_")}
    variables = {**kept, "SM_INPUT_DIR": str(root / "input"), "TRAINING_JOB_NAME": "local"}
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))  # the child gets it as well
    try:
        code = subprocess.Popen([sys.executable, "-m", "sagemaker_entry.train"], env=variables).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return INTERRUPTED if pressed and code else code


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve())
