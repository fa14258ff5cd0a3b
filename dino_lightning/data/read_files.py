"""The annotation files of a dataset's splits, read: each file once, files of one split joined, parts taken."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dino_lightning.data.annotation_file import AS_COCO, ReadFile, ReadOptions, read_file, read_tables_of
from dino_lightning.data.class_choice import EVERY_CLASS, choose_classes
from dino_lightning.data.coco import Category, CocoAnnotations, ImageTable, Problem
from dino_lightning.data.other_formats.voc import read_voc
from dino_lightning.data.other_formats.yolo import read_yolo
from dino_lightning.data.reading.json_file import Tables
from dino_lightning.data.reading.search import split_of, split_word
from dino_lightning.data.split_files import SPLIT_NAMES, SplitFiles
from dino_lightning.data.splits import unused_files
from dino_lightning.errors import DataError

NAMES_SHOWN = 3


def read_files(
    root: Path | None, files: Mapping[str, SplitFiles], options: ReadOptions = AS_COCO
) -> dict[str, ReadFile]:
    """Read the annotations of all splits.

    Args:
        root: the dataset folder; annotation files in it that no split uses are told, unless None.
        files: the splits by name.
        options: how to read what files of other programs write otherwise.

    Returns:
        For each split what remains without the faulty entries, and the problems.
    """
    read: dict[tuple[Path, Path], ReadFile] = {}
    found = {}
    for name, split in files.items():
        each = [_read(source, options, read) for source in (split, *split.also)]
        found[name] = _chosen(each[0] if len(each) == 1 else _joined(each), options, training=name == "train")
    if root is not None:
        first = next(iter(found))
        found[first] = replace(found[first], problems=(*found[first].problems, *_unused(root, files)))
    return found


def _unused(root: Path, files: Mapping[str, SplitFiles]) -> list[Problem]:
    """Annotation files that no split uses: a warning where one is of a split that was found by itself, else a note."""
    unused = unused_files(root, files)
    searched = {split for split, each in files.items() if not each.named}
    beside = [path for path in unused if split_of(path, root) in searched]
    problems = []
    for kind, paths in (("other-annotations", beside), ("unused-annotations", [p for p in unused if p not in beside])):
        if not paths:
            continue
        shown = ", ".join(path.relative_to(root).as_posix() for path in paths[:NAMES_SHOWN])
        more = f" and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
        used = ", ".join(dict.fromkeys(_shown(split.annotations, root) for split in files.values()))
        verb = "looks like a COCO file and is" if len(paths) == 1 else "look like COCO files and are"
        message = (
            f"{root}: {shown}{more} {verb} not used beside {used}. To train on several files, name them all: "
            '--data.train_annotations "[A.json, B.json]".'
        )
        problems.append(Problem(kind, message))
    return problems


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _chosen(file: ReadFile, options: ReadOptions, *, training: bool) -> ReadFile:
    """The classes and images of a file that the user wants."""
    annotations, problems = file.annotations, [*file.problems]
    if annotations is None:
        return file
    if options.choice != EVERY_CLASS:
        try:
            annotations, sentence = choose_classes(annotations, options.choice, all_needed=training)
        except DataError as error:
            return ReadFile(None, (*problems, Problem("class-unknown", str(error))))
        if sentence:
            problems.append(Problem("classes-chosen", sentence))
    if options.drop_empty and training:
        counts = annotations.learnable_per_image()
        kept = np.flatnonzero(counts).tolist()
        if len(kept) < len(annotations.images) and kept:
            message = (
                f"{annotations.path}: {len(counts) - len(kept)} of {len(counts)} images have no box and are left out."
            )
            problems.append(Problem("empty-dropped", message))
            annotations = annotations.subset(kept)
    return ReadFile(annotations, tuple(problems), file.parts)


def _read(files: SplitFiles, options: ReadOptions, read: dict[tuple[Path, Path], ReadFile]) -> ReadFile:
    if files.format != "coco":
        return _of_other_format(files, options)
    key = files.annotations, files.images
    if key not in read:
        read[key] = read_file(files.annotations, files.images, options)
    return read[key] if files.part is None else _part(read[key], files.part)


def _of_other_format(files: SplitFiles, options: ReadOptions) -> ReadFile:
    """A split of YOLO or Pascal VOC; what was guessed or left out on the way is one note."""
    name = "YOLO" if files.format == "yolo" else "Pascal VOC"
    if options.box_format is not None:
        message = f"{files.annotations}: boxes of {name} have one format; leave out --data.box_format."
        return ReadFile(None, (Problem("box-format", message),))
    try:
        document, notes = read_yolo(files) if files.format == "yolo" else read_voc(files)
    except DataError as error:
        return ReadFile(None, (Problem("file-unreadable", str(error)),))
    tables = Tables(document["images"], document["annotations"], document["categories"])
    # its boxes are made from what the format defines: no guess about them is due
    file = read_tables_of(files.annotations, files.images, tables, replace(options, box_format="xywh"))
    told = " ".join([f"read as {name}.", *notes])
    return replace(file, problems=(Problem("other-format", f"{files.annotations}: {told}"), *file.problems))


def _part(whole: ReadFile, split: str) -> ReadFile:
    """The images of a file whose `split` field names a split; the problems of the file are those of "train"."""
    if whole.annotations is None:
        return whole
    words = {part: split_word(part) for part in set(whole.parts) if part is not None}
    of_images = [None if part is None else words[part] for part in whole.parts]
    kept = [index for index, part in enumerate(of_images) if part == split]
    if split != "train":
        return ReadFile(whole.annotations.subset(kept), ())
    counts = ", ".join(f"{of_images.count(name)} {name}" for name in SPLIT_NAMES if name in of_images)
    message = f"{whole.annotations.path}: the field 'split' of its images is followed: {counts}."
    problems = (*whole.problems, Problem("split-field", message))
    none = of_images.count(None)
    if none:
        message = f"{whole.annotations.path}: {none} images name no split, or an unknown one, and are not used."
        problems = (*problems, Problem("images-of-no-split", message))
    return ReadFile(whole.annotations.subset(kept), problems)


def _joined(files: Sequence[ReadFile]) -> ReadFile:
    """Several files of one split as one: categories by name, images by file, ids of later files made unique."""
    problems = [problem for file in files for problem in file.problems]
    sources = [file.annotations for file in files if file.annotations is not None]
    if len(sources) < len(files) or not sources:
        return ReadFile(None, tuple(problems))
    categories, columns = _common_categories(sources, problems)
    folder = Path(os.path.commonpath([source.images_folder.absolute() for source in sources]))
    ids: list[int] = []
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    index_of_name: dict[str, int] = {}
    owners, renumbered, taken = [], 0, set[int]()
    next_id = 1 + max(int(source.images.ids.max(initial=0)) for source in sources)
    for source in sources:
        prefix = source.images_folder.absolute().relative_to(folder).as_posix()
        rows = []
        for image in source.images:
            name = image.file_name if prefix == "." else f"{prefix}/{image.file_name}"
            if name not in index_of_name or sizes[index_of_name[name]] != image.size:
                index_of_name[name] = len(ids)
                image_id = image.id
                if image_id in taken:
                    image_id, next_id, renumbered = next_id, next_id + 1, renumbered + 1
                taken.add(image_id)
                ids.append(image_id)
                names.append(name)
                sizes.append(image.size)
            rows.append(index_of_name[name])
        owners.append(np.repeat(np.array(rows, dtype=np.int64), np.diff(source.offsets)))
    if renumbered:
        message = (
            f"{sources[0].path}: {renumbered} images of {', '.join(source.path.name for source in sources[1:4])} have "
            "ids that an earlier file uses; they are given new ones."
        )
        problems.append(Problem("id-numbered", message))
    every = np.concatenate(owners)
    order = np.argsort(every, kind="stable")
    counts = np.bincount(every, minlength=len(ids))

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(source, name) for source in sources])[order]

    joined = CocoAnnotations(
        path=sources[0].path,
        images_folder=folder,
        categories=categories,
        images=ImageTable.of(ids, names, sizes),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=column("boxes_xyxy"),
        category_indices=np.concatenate(columns)[order],
        iscrowd=column("iscrowd"),
        area=column("area"),
        usable=column("usable"),
        clipped=column("clipped"),
        annotation_ids=column("annotation_ids"),
    )
    return ReadFile(joined, tuple(problems))


def _common_categories(
    sources: Sequence[CocoAnnotations], problems: list[Problem]
) -> tuple[tuple[Category, ...], list[np.ndarray]]:
    """The categories of several files, by name, and the column of indices of each file."""
    by_name = {category.name: category for category in sources[0].categories}
    taken = {category.id for category in sources[0].categories}
    other = 0
    for source in sources[1:]:
        for category in source.categories:
            known = by_name.get(category.name)
            if known is None:
                free = category.id if category.id not in taken else max(taken) + 1
                by_name[category.name] = replace(category, id=free)
                taken.add(free)
                other += free != category.id
            else:
                other += known.id != category.id
    if other:
        message = f"{sources[0].path}: category ids of further files differ from its own; they are joined by name."
        problems.append(Problem("classes-by-name", message))
    # a first file with two categories of one name keeps both
    kept = sorted({category.id: category for category in (*sources[0].categories, *by_name.values())}.values(), key=_id)
    position = {category.id: index for index, category in enumerate(kept)}
    columns = []
    for number, source in enumerate(sources):
        table = [position[category.id if number == 0 else by_name[category.name].id] for category in source.categories]
        columns.append(np.array(table, dtype=np.int64)[source.category_indices])
    return tuple(kept), columns


def _id(category: Category) -> int:
    return category.id
