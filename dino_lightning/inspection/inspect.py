"""The health of a dataset: everything counted, every image decoded, all problems by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dino_lightning.data.annotation_file import AS_COCO, ReadOptions
from dino_lightning.data.classes import Classes, classes_of
from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.findings import KINDS, SEVERITIES, Case, Finding
from dino_lightning.data.read_files import read_files
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.inspection.checks import (
    Limits,
    check_boxes,
    check_categories,
    check_copies,
    check_folders,
    check_images,
)
from dino_lightning.inspection.class_shapes import check_class_shapes
from dino_lightning.inspection.image_facts import ImageFacts, facts_of_all
from dino_lightning.inspection.report import HealthReport, SplitHealth


def inspect_dataset(
    files: Mapping[str, SplitFiles],
    *,
    root: Path | None = None,
    limits: Limits | None = None,
    progress: bool = True,
    options: ReadOptions = AS_COCO,
) -> HealthReport:
    """Read all annotations, decode all images, and collect the problems.

    Args:
        files: the splits by name, including "train".
        root: the dataset folder, in which annotation files that are not used are looked for; by default not.
        limits: the limits of training and evaluation; the defaults of `fit` when None.
        progress: whether to show a progress bar.
        options: how to read what files of other programs write otherwise.

    Returns:
        The numbers of each split, and the findings, most severe first.
    """
    found: dict[tuple[str, str], list[Case]] = defaultdict(list)
    loaded: dict[str, CocoAnnotations | None] = {}
    for name, read in read_files(root, files, options).items():
        loaded[name] = read.annotations
        for problem in read.problems:
            sentence = problem.message.removeprefix(f"{files[name].annotations}: ").removeprefix(f"{root}: ")
            case = Case(sentence, problem.image_id, problem.annotation_id, problem.file_name)
            found[problem.kind, name].append(case)
    training = loaded.get("train")
    classes = None if training is None else classes_of(training)
    if training is not None and (reason := training.nothing_to_learn()):
        found["nothing-to-learn", "train"].append(Case(reason))
    splits: dict[str, SplitHealth] = {}
    for name, split in files.items():
        annotations = loaded[name]
        facts: list[ImageFacts] = []
        counts: list[int] = []
        if annotations is not None:
            paths = [annotations.image_path(index) for index in range(len(annotations.images))]
            facts = facts_of_all(paths, f"{name} images", progress=progress)
            counts = _counts(annotations, classes)
            check_images(found, name, annotations, facts)
            check_boxes(found, name, annotations, limits or Limits())
            check_categories(found, name, annotations, classes, counts)
            check_class_shapes(found, name, annotations, classes)
        splits[name] = SplitHealth(name, split, annotations, facts, counts)
    check_folders(found, splits)
    check_copies(found, splits)
    if "val" not in files:
        found["no-validation", "train"].append(Case())
        if training is not None and len(training.images) < 2:
            found["too-few-images", "train"].append(Case())
    order = list(KINDS)
    findings = [Finding(kind, split, tuple(cases)) for (kind, split), cases in found.items()]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), order.index(finding.kind), finding.split))
    return HealthReport(splits, classes, findings)


def _counts(annotations: CocoAnnotations, classes: Classes | None) -> list[int]:
    """Boxes to learn from for each training class."""
    if classes is None:
        return []
    rows = annotations.usable & ~annotations.iscrowd
    labels = classes.labels_of(annotations)[rows]
    return [int(count) for count in np.bincount(labels[labels >= 0], minlength=len(classes))]
