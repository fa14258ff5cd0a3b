"""The validation images of the run behind a checkpoint, for commands that measure what they do to a model."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from dino_lightning.cli.stored_options import options_text
from dino_lightning.console import say
from dino_lightning.data import CocoDataModule
from dino_lightning.data.dataset import CocoDetection
from dino_lightning.errors import UsageError
from dino_lightning.training.module import DINOModule

# of any dataset
SPLIT_OPTIONS = ("val_fraction", "seed", "classes", "merge_classes", "crowd", "box_format", "on_bad_image")
FILE_OPTIONS = ("root", "train_annotations", "train_images", "val_annotations", "val_images")  # of that of the run


def validation_images(checkpoint: Path, module: DINOModule, root: str | None) -> CocoDetection:
    """The validation split as it is on disk, with ground truth.

    Args:
        checkpoint: its file; the options stored with it say how classes and boxes are read.
        module: the module in it.
        root: the folder of a dataset; by default that of the run, with the files that the run named.

    Raises:
        UsageError: there is neither, or the classes are others than those of the checkpoint.
        DataError: something is wrong with the dataset.
    """
    text = options_text(checkpoint)
    stored = {} if text is None else yaml.safe_load(text)["data"]
    if root is None and not stored.get("root"):
        raise UsageError(
            f"--precision needs validation images, and {checkpoint} does not say where those of its run are; give "
            "their dataset by --data.root DIR."
        )
    names = SPLIT_OPTIONS if root is not None else (*SPLIT_OPTIONS, *FILE_OPTIONS)
    options = {name: stored[name] for name in names if stored.get(name) is not None}
    data = CocoDataModule(**(options if root is None else {**options, "root": root}))
    trained = list(module.hparams["class_names"] or [])
    if trained and data.class_names != trained:
        raise UsageError(
            f"The classes of {data.root} ({', '.join(data.class_names)}) are not those of {checkpoint} "
            f"({', '.join(trained)}); give the dataset that it was trained on, by --data.root DIR."
        )
    images = CocoDetection(data.val_set.annotations, data.classes, on_bad_image=data.on_bad_image)
    if data.on_bad_image == "skip":
        left_out = images.leave_out_unreadable()
        if left_out is not None:
            say(f"warning: {left_out}", sys.stderr)
    return images
