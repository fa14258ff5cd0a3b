"""From the input channels of a job to the options that tell `CocoDataModule` where the data is."""

from __future__ import annotations

from pathlib import Path

from sagemaker_entry.environment import Environment
from sagemaker_entry.manifest import MANIFEST, unpack_dataset
from sagemaker_entry.problem import Problem

WHOLE = "training"  # train and validation inside
TRAIN = "train"
VALIDATION = ("validation", "val")
ANNOTATION_NAMES = ("annotations.json", "_annotations.coco.json")


def data_options(environment: Environment, scratch: Path) -> list[str]:
    """The `--data.*` options for the data in the job's channels; unpacks shards, once on each host.

    Either channel `training` holds a whole dataset in any layout that `CocoDataModule` knows, or as
    `sagemaker_entry.launch` uploads it; or channels `train` and `validation` hold one split each.

    Args:
        environment: of the job.
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
            f"The job has no channel {WHOLE!r} (a whole dataset) and none {TRAIN!r} (its training part); channels "
            f"found: {found}. Give the dataset as channel {WHOLE!r}."
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
            f"Channel {name!r}: {folder} {state}; check that its S3 prefix names objects, with the last slash."
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
        f"Channel {name!r}: {folder} has {len(others)} JSON files, none of them called "
        f"{' or '.join(ANNOTATION_NAMES)}; put one annotation file there."
    )
