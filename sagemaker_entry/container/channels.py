"""The input channels of a job: the job description, and the `--data.*` options for the dataset in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sagemaker_entry.container.environment import Environment
from sagemaker_entry.protocol.job import CONFIG_CHANNEL, CONFIG_FILE, JOB_FILE, WEIGHTS_CHANNEL, Job
from sagemaker_entry.protocol.manifest import MANIFEST, unpack_dataset
from sagemaker_entry.protocol.problem import Problem

WHOLE = "training"  # the training and the validation split
TRAIN = "train"
VALIDATION = ("validation", "val")
ANNOTATION_NAMES = ("annotations.json", "_annotations.coco.json")


def data_options(environment: Environment, scratch: Path) -> list[str]:
    """The `--data.*` options for the dataset in the job's channels; unpacks shards, once on each host.

    Either channel `training` holds a whole dataset in any layout that `CocoDataModule` knows, or as
    `sagemaker_entry.launch` uploads it; or channels `train` and `validation` hold one split each.

    Args:
        environment: the job's environment.
        scratch: a folder on the local disk to unpack in.

    Raises:
        Problem: a channel is missing, empty, or has no annotation file.
    """
    channels = environment.channels
    if WHOLE in channels:
        root = _filled(WHOLE, channels[WHOLE])
        if (root / MANIFEST).is_file():
            target = scratch / "dataset"
            unpack_dataset(root, target, lambda done, total: print(f"unpacked shard {done} of {total}", flush=True))
            return [f"--data.root={target}"]
        return [f"--data.root={root}"]
    if TRAIN not in channels:
        found = ", ".join(channels) or "none"
        raise Problem(
            f"The job has no channel {WHOLE!r} (the whole dataset) and no channel {TRAIN!r} (its training split); "
            f"channels found: {found}. Give the dataset as channel {WHOLE!r}."
        )
    train = _filled(TRAIN, channels[TRAIN])
    validation = next((name for name in VALIDATION if name in channels), None)
    if validation is None:
        return [f"--data.root={train}"]
    folder = _filled(validation, channels[validation])
    return [
        f"--data.root={train.parent}",
        f"--data.train_annotations={_annotations(TRAIN, train)}",
        f"--data.val_annotations={_annotations(validation, folder)}",
    ]


def _filled(name: str, folder: Path) -> Path:
    if not folder.is_dir() or not any(folder.iterdir()):
        state = "is empty" if folder.is_dir() else "does not exist"
        raise Problem(
            f"Channel {name!r}: {folder} {state}; check that its S3 prefix contains objects and ends with a slash."
        )
    return folder


def _annotations(name: str, folder: Path) -> Path:
    for candidate in ANNOTATION_NAMES:
        if (folder / candidate).is_file():
            return folder / candidate
    others = sorted(folder.glob("*.json"))
    if len(others) == 1:
        return others[0]
    raise Problem(
        f"Channel {name!r}: {folder} has {len(others)} JSON files, none of them named "
        f"{' or '.join(ANNOTATION_NAMES)}; put one annotation file there."
    )


def read_job(environment: Environment, arguments: Sequence[str]) -> Job:
    """The job description that the laptop uploaded, with the hyperparameters as further options of `fit`, if any.

    Args:
        environment: the job's environment.
        arguments: the arguments of this program; the older start script puts the hyperparameters there.

    Raises:
        Problem: a file of the channel is missing or cannot be read.
    """
    folder = environment.channels.get(CONFIG_CHANNEL)
    given = tuple(arguments or _options(environment.hyperparameters))
    if folder is None:
        return Job(arguments=given)
    try:
        content = json.loads((folder / JOB_FILE).read_text())
        job = Job(**{**content, "arguments": (*content["arguments"], *given)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"Channel {CONFIG_CHANNEL!r}: {folder / JOB_FILE} cannot be read ({error}); launch again."
        ) from error
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise Problem(f"Channel {CONFIG_CHANNEL!r}: {config} is missing; launch again.")
    files = environment.channels.get(WEIGHTS_CHANNEL)
    if job.weights and files is None:
        raise Problem(
            f"The job has no channel {WEIGHTS_CHANNEL!r}, but needs {', '.join(job.weights.values())} from it; "
            "launch again."
        )
    weights = [f"--{option}={files / name}" for option, name in job.weights.items() if files is not None]
    return replace(job, config=str(config), arguments=(*job.arguments, *weights))


def _options(hyperparameters: Mapping[str, Any]) -> list[str]:
    return [
        f"--{name}={json.dumps(value) if not isinstance(value, str) else value}"
        for name, value in hyperparameters.items()
    ]
