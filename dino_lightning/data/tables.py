"""What a dataset holds, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dino_lightning.console import aligned
from dino_lightning.data.dataset import CocoDetection

TABLE_ROWS = 12


def class_table(train: CocoDetection, val: CocoDetection) -> str:
    """Category id, label, name, and the number of training and validation boxes of each class."""
    counts = zip(_boxes_per_label(train), _boxes_per_label(val), strict=True)
    rows = [["category_id", "label", "name", "train boxes", "val boxes"]]
    rows += [
        [str(category_id), str(label), name, str(training), str(validation)]
        for label, (category_id, name, (training, validation)) in enumerate(
            zip(train.classes.category_ids, train.classes.names, counts, strict=True)
        )
    ][:TABLE_ROWS]
    hidden = len(train.classes) - TABLE_ROWS
    return aligned(rows) + (f"\n... and {hidden} more" if hidden > 0 else "")


def summary(splits: Mapping[str, CocoDetection | None]) -> str:
    """One line per split: what it holds and where it comes from."""
    return "\n".join(
        f"{name}: {dataset.annotations.summary} ({dataset.annotations.path})"
        for name, dataset in splits.items()
        if dataset is not None
    )


def _boxes_per_label(dataset: CocoDetection) -> list[int]:
    source = dataset.annotations
    labels = torch.from_numpy(dataset.classes.labels_of(source)[source.usable & ~source.iscrowd])
    return [int(count) for count in torch.bincount(labels, minlength=len(dataset.classes))]
