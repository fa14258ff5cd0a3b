"""`launch --local`: the container's entry point on this machine, in a folder laid out like /opt/ml."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dino_lightning.cli.command import CommandParser
from dino_lightning.interrupts import ctrl_c_left_to_this_process
from sagemaker_entry.protocol.job import CONFIG_CHANNEL, CONFIG_FILE, JOB_FILE, WEIGHTS_CHANNEL, Job

# what arrives here -> what the job gets; a terminal that is closed sends SIGHUP, which Windows lacks
PASSED_ON = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
if hasattr(signal, "SIGHUP"):
    PASSED_ON[signal.SIGHUP] = signal.SIGTERM


def without_effect(parser: CommandParser, options: argparse.Namespace, used: Collection[str]) -> str | None:
    """A sentence with the options that were given although they mean nothing on this machine; None without any.

    Args:
        parser: of the command.
        options: what it has parsed.
        used: the options that mean something, by their names in `options`.
    """
    given = [
        action.option_strings[0]
        for action in parser._actions
        if action.option_strings and action.dest not in used
        if getattr(options, action.dest, action.default) != action.default
    ]
    if not given:
        return None
    names = f"{', '.join(given[:-1])} and {given[-1]} have" if len(given) > 1 else f"{given[0]} has"
    return f"With --local, {names} no effect: everything runs on this machine, as it is, without AWS."


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


def run_locally(root: Path, environ: Mapping[str, str] = os.environ) -> tuple[int, int | None]:
    """Run `sagemaker_entry.train` on a folder that `prepare_opt_ml` filled.

    Ctrl-C, SIGTERM and the end of the terminal stop it as SageMaker would: it saves a checkpoint first, and a second
    Ctrl-C stops it at once. Signals that are ignored, as SIGHUP is under `nohup`, stay so.

    Returns:
        Its exit code, which is 0 if it had only the model left to write; and the signal that asked it to stop, or None.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith("SM_")}
    variables = {**kept, "SM_INPUT_DIR": str(root / "input"), "TRAINING_JOB_NAME": "local"}
    received: list[int] = []
    heard = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in heard}
    try:
        with ctrl_c_left_to_this_process():  # `train` lets it in again, once it has handlers
            # In its own session: a terminal would send Ctrl-C to it as well, or, while it starts, not to it.
            child = subprocess.Popen(
                [sys.executable, "-m", "sagemaker_entry.train"], env=variables, start_new_session=True
            )
        code = _wait(child, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


def _wait(child: subprocess.Popen[bytes], received: Sequence[int]) -> int:
    """Wait for a process, and pass on to it what arrives in `received` meanwhile; returns its exit code."""
    passed_on = 0
    while True:
        for number in received[passed_on:]:
            child.send_signal(PASSED_ON[signal.Signals(number)])
            passed_on += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.1)


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve())
