"""What a dataset holds, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dino_lightning.console import aligned
from dino_lightning.data.classes import Classes
from dino_lightning.data.coco import CocoAnnotations

TABLE_ROWS = 12


def class_table(classes: Classes, train: CocoAnnotations, val: CocoAnnotations) -> str:
    """Category id, label, name, and the number of training and validation boxes of each class."""
    counts = zip(_boxes_per_label(classes, train), _boxes_per_label(classes, val), strict=True)
    rows = [["category_id", "label", "name", "train boxes", "val boxes"]]
    rows += [
        [str(category_id), str(label), name, str(training), str(validation)]
        for label, (category_id, name, (training, validation)) in enumerate(
            zip(classes.category_ids, classes.names, counts, strict=True)
        )
    ][:TABLE_ROWS]
    hidden = len(classes) - TABLE_ROWS
    return aligned(rows) + (f"\n... and {hidden} more" if hidden > 0 else "")


def summary(splits: Mapping[str, CocoAnnotations | None]) -> str:
    """One line per split: what it holds and where it comes from."""
    return "\n".join(
        f"{name}: {annotations.summary} ({annotations.path})"
        for name, annotations in splits.items()
        if annotations is not None
    )


def _boxes_per_label(classes: Classes, annotations: CocoAnnotations) -> list[int]:
    labels = classes.labels_of(annotations)[annotations.learnable]
    return [int(count) for count in np.bincount(labels, minlength=len(classes))]
