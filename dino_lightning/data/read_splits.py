"""The splits of a dataset, read and checked once: annotations, classes, and what had to be repaired or held out."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino_lightning.data.annotation_file import AS_COCO, ReadOptions, raise_first_error
from dino_lightning.data.class_choice import class_choice
from dino_lightning.data.classes import Classes, check_classes, classes_of
from dino_lightning.data.coco import ROUNDING, CocoAnnotations, Problem
from dino_lightning.data.findings import KINDS
from dino_lightning.data.image_places import check_files_exist, check_images_folder
from dino_lightning.data.read_files import read_files
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.data.splits import Given, resolve_split_files, split_images
from dino_lightning.errors import DataError

MOST_ALIKE = 3  # sentences of one kind about one file; more are one sentence with their number
NAMES_SHOWN = 5  # of classes, in one sentence
FILES = (  # the options that name files
    "root", "train_annotations", "train_images", "val_annotations", "val_images", "test_annotations", "test_images",
)  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """What a dataset consists of.

    Attributes:
        classes: the classes, from the training annotations.
        train: the training annotations.
        val: the validation annotations; held out from the training images where the dataset has no validation split.
        test: the test annotations, if there are any.
        notes: sentences about what was decided.
        repairs: sentences about what was dropped or clipped.
        files: where the splits lie, those on disk.
    """

    classes: Classes
    train: CocoAnnotations
    val: CocoAnnotations
    test: CocoAnnotations | None
    notes: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    files: Mapping[str, SplitFiles] = field(default_factory=dict)


def read_splits(
    given: Mapping[str, Given],
    *,
    val_fraction: float,
    seed: int,
    files_must_exist: bool,
    options: ReadOptions = AS_COCO,
) -> Splits:
    """Find, read and check the annotation files of all splits; opens no image.

    Args:
        given: `root`, and `{train,val,test}_{annotations,images}` where they are not searched for by convention.
        val_fraction: share of the training images that becomes the validation split where there is none.
        seed: decides which ones.
        files_must_exist: whether every image file listed has to be there.
        options: how to read what files of other programs write otherwise.

    Raises:
        DataError: something is wrong with the files; the message says what, where, and how to see everything.
    """
    root = Path(str(given["root"] or ""))
    files = resolve_split_files(root, split_options(given))
    try:
        found, classes, problems = _read(root, files, files_must_exist=files_must_exist, options=options)
    except DataError as error:
        given_here = " ".join(
            f"--data.{name} {shlex.quote(value if isinstance(value, str) else str(list(value)))}"
            for name, value in given.items()
            if value is not None
        )
        inspect = f"python -m dino_lightning inspect {given_here}"
        raise DataError(f"{error} All that is wrong with the dataset: {inspect}") from error
    notes, repairs = said_once(problems)
    if classes.left_out is not None:
        notes.append(
            f"Category {classes.left_out.id} ({classes.left_out.name!r}) has no annotations and is the "
            "supercategory of all others: it is not a class."
        )
    for split in found.values():
        names = Counter(image.file_name for image in split.images)
        if len(names) < len(split.images):
            twice, first = len(split.images) - len(names), next(name for name, count in names.items() if count > 1)
            repairs.append(
                f"{split.path}: {twice} image files are listed again under another id (first: {first}): what one of "
                "them lacks is background there. Merge their annotations under one id."
            )
        sentence, more_than_rounding = repairs_of(split)
        (repairs if more_than_rounding else notes).extend([sentence] if sentence else [])
    train, val = found["train"], found.get("val")
    if sentence := _classes_without_boxes(train, classes):
        repairs.append(sentence)
    if val is not None and not val.summary.boxes:
        repairs.append(f"{val.path}: no box to evaluate against, so AP and F1 say nothing.")
    if val is None:
        source = train
        train, val = split_images(source, val_fraction, seed)
        notes.append(
            f"No validation split found: {len(val.images)} of the {len(source.images)} images of {source.path} are "
            f"held out for validation (val_fraction {val_fraction}, seed {seed})."
        )
    return Splits(classes, train, val, found.get("test"), tuple(notes), tuple(repairs), files)


def splits_of(options: Mapping[str, Any]) -> Splits:
    """The splits that options of the data module name, all of them given by name.

    Raises:
        DataError: something is wrong with the files; the message says what, where, and how to see everything.
        ValueError: the choice of classes contradicts itself.
    """
    if not options["root"]:
        raise DataError("root is empty; give the folder of the dataset, or . for the working directory.")
    return read_splits(
        {name: options[name] for name in FILES},
        val_fraction=options["val_fraction"],
        seed=options["seed"],
        files_must_exist=options["on_bad_image"] == "error",
        options=read_options(options),
    )


def split_options(given: Mapping[str, Given]) -> dict[str, tuple[Given, str | None]]:
    """Annotations and images of each split as `resolve_split_files` takes them, from the data module's options."""
    named = {}
    for name in ("train", "val", "test"):
        images = given[f"{name}_images"]
        assert images is None or isinstance(images, str)
        named[name] = (given[f"{name}_annotations"], images)
    return named


def read_options(options: Mapping[str, Any]) -> ReadOptions:
    """How to read the annotations, from the data module's options by name.

    Raises:
        ValueError: the choice of classes contradicts itself.
    """
    return ReadOptions(
        crowd=options["crowd"],
        box_format=options["box_format"],
        choice=class_choice(options["classes"], options["merge_classes"]),
        drop_empty=options["drop_empty"],
    )


def _read(
    root: Path, files: Mapping[str, SplitFiles], *, files_must_exist: bool, options: ReadOptions
) -> tuple[dict[str, CocoAnnotations], Classes, list[Problem]]:
    found: dict[str, CocoAnnotations] = {}
    problems: list[Problem] = []
    for name, read in read_files(root, files, options).items():
        raise_first_error(read.problems)
        assert read.annotations is not None
        found[name] = read.annotations
        problems += read.problems
    if reason := found["train"].nothing_to_learn():
        raise DataError(f"{found['train'].path}: {reason}")
    for split in found.values():
        check_images_folder(split)
        if files_must_exist:
            check_files_exist(split)
    classes = classes_of(found["train"])
    for split in found.values():
        check_classes(split, classes)
        if classes.by_name(split):
            problems.append(classes_by_name(split))
    return found, classes, problems


def classes_by_name(annotations: CocoAnnotations) -> Problem:
    """That the ids of a file's categories are not those of the training file."""
    message = "category ids differ from those of the training file, names agree; classes are matched by name."
    return Problem("classes-by-name", f"{annotations.path}: {message}")


def said_once(problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    """What was converted, guessed or dropped while reading: notes and warnings, a sentence for each kind and file."""
    grouped: dict[tuple[str, str], list[Problem]] = {}
    for problem in {problem.message: problem for problem in problems}.values():  # splits may share a file
        grouped.setdefault((problem.kind, problem.message.split(": ")[0]), []).append(problem)
    notes: list[str] = []
    repairs: list[str] = []
    for (kind, path), cases in grouped.items():
        sentences = [case.message for case in cases]
        if len(cases) > MOST_ALIKE:
            first = sentences[0].removeprefix(f"{path}: ")
            sentences = [f"{path}: {len(cases)} {KINDS[kind].title}. {KINDS[kind].advice} The first: {first}"]
        if KINDS[kind].severity == "note":
            notes += sentences
        else:
            repairs += sentences
    return notes, repairs


def _classes_without_boxes(train: CocoAnnotations, classes: Classes) -> str:
    """Which classes cannot be learnt, in a sentence; empty if there are none."""
    labels = classes.labels_of(train)[train.usable & ~train.iscrowd]
    empty = sorted(set(range(len(classes))) - set(labels.tolist()))
    if not empty:
        return ""
    named = ", ".join(classes.names[label] for label in empty[:NAMES_SHOWN])
    more = f" and {len(empty) - NAMES_SHOWN} more" if len(empty) > NAMES_SHOWN else ""
    return f"{train.path}: {len(empty)} of {len(classes)} classes have no box to learn from: {named}{more}."


def repairs_of(split: CocoAnnotations) -> tuple[str, bool]:
    """What had to be repaired in a split, in a sentence, empty if nothing; and whether it is more than rounding."""
    parts = []
    degenerate, clipped = split.summary.degenerate, split.summary.clipped
    negative = int(((split.boxes_xyxy[:, 2:] < split.boxes_xyxy[:, :2]).any(axis=1) & ~split.usable).sum())
    farthest = float(split.overshoot()[split.clipped].max(initial=0.0))
    if degenerate:
        why = f", {negative} of them with a negative width or height" if negative else ""
        parts.append(f"{degenerate} boxes without area inside their image are dropped{why}")
    if clipped:
        parts.append(
            f"{clipped} boxes that stick out, by up to {farthest:.3g} pixels, are clipped to their image for training"
        )
    return (f"{split.path}: {'; '.join(parts)}." if parts else ""), bool(degenerate) or farthest > ROUNDING
