"""Reading COCO annotation files: checked, and turned into arrays.

Whatever is wrong with a file is said here, in one sentence that names the file and the entry; nothing after
this module has to check annotations again. `read_coco` continues after a faulty entry and collects all problems;
`load_coco` is for training, which must not start on such a file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dino_lightning.data.box_formats import BoxFormat
from dino_lightning.data.class_choice import EVERY_CLASS, ClassChoice
from dino_lightning.data.coco import Category, CocoAnnotations, Problem
from dino_lightning.data.findings import KINDS
from dino_lightning.data.reading.annotation_cache import Entry, cached
from dino_lightning.data.reading.annotation_entries import Context, read_annotations
from dino_lightning.data.reading.image_entries import read_images
from dino_lightning.data.reading.json_file import Entry as RawEntry
from dino_lightning.data.reading.json_file import Tables, kind_of, parsed, read_tables, shown_value
from dino_lightning.data.reading.lossless import Conversions
from dino_lightning.errors import DataError

CrowdRule = Literal["regions", "objects"]
Report = Callable[[Problem], None]


@dataclass(frozen=True)
class ReadOptions:
    """How to read what files of other programs write otherwise than COCO; see the arguments of `CocoDataModule`.

    Attributes:
        crowd: what annotations with `iscrowd` 1 are.
        box_format: what the four numbers of a box are; None for COCO's, of which the file is checked to have them.
        choice: the classes that stay, and those merged; done by `read_files`, as it concerns all splits.
        drop_empty: whether training images without a box are left out; the same.
    """

    crowd: CrowdRule = "regions"
    box_format: BoxFormat | None = None
    choice: ClassChoice = EVERY_CLASS
    drop_empty: bool = False


AS_COCO = ReadOptions()


@dataclass(frozen=True)
class ReadFile:
    """What was read of a file.

    Attributes:
        annotations: what remains without the faulty entries, or None if nothing does.
        problems: what is wrong, and what was converted, dropped or guessed.
        parts: the `split` field of each image, or None.
    """

    annotations: CocoAnnotations | None
    problems: tuple[Problem, ...]
    parts: tuple[str | None, ...] = ()


def load_coco(annotations: Path, images: Path, options: ReadOptions = AS_COCO) -> CocoAnnotations:
    """Read and check a COCO annotation file.

    Args:
        annotations: the JSON file; it may be gzipped, or UTF-16.
        images: the folder its file names are relative to. No image is decoded; headers are read where the file lacks
            sizes.
        options: how to read what files of other programs write otherwise.

    Raises:
        DataError: the file cannot be read, is no JSON, or breaks the format; names the file and the first faulty
            entry, and says how many more there are.
    """
    found, problems = read_coco(annotations, images, options)
    raise_first_error(problems)
    assert found is not None
    return found


def raise_first_error(problems: Sequence[Problem]) -> None:
    """Raise `DataError` with the first of the problems that training must not start with, if there is one."""
    errors = [problem for problem in problems if KINDS[problem.kind].severity == "error"]
    if errors:
        others = len(errors) - 1
        more = f" (And {others} more problem{'' if others == 1 else 's'} in this file.)" if others else ""
        raise DataError(errors[0].message + more)


def read_coco(
    annotations: Path, images: Path, options: ReadOptions = AS_COCO
) -> tuple[CocoAnnotations | None, list[Problem]]:
    """Read a COCO annotation file and collect everything that is wrong with it.

    Args:
        annotations: the JSON file; it may be gzipped, or UTF-16.
        images: the folder its file names are relative to. No image is decoded; headers are read where the file lacks
            sizes.
        options: how to read what files of other programs write otherwise.

    Returns:
        What remains without the faulty entries, or None if nothing does; and the problems.
    """
    found = read_file(annotations, images, options)
    return found.annotations, list(found.problems)


def read_file(annotations: Path, images: Path, options: ReadOptions = AS_COCO) -> ReadFile:
    """As `read_coco`, with the `split` field of each image; a large file without faults is parsed once on a machine."""
    path, folder = Path(annotations), Path(images)

    def parse() -> tuple[Entry | None, ReadFile]:
        try:
            tables = read_tables(path)
        except DataError as error:
            return None, ReadFile(None, (Problem("file-unreadable", str(error)),))
        read = read_tables_of(path, folder, tables, options)
        sound = read.annotations is not None and not read.problems
        return (Entry(read.annotations, read.parts) if sound and read.annotations else None), read

    found: Entry | ReadFile = cached(path, folder, (options.crowd, options.box_format), parse)
    return ReadFile(found.annotations, (), found.parts) if isinstance(found, Entry) else found


def read_tables_of(path: Path, images_folder: Path, tables: Tables, options: ReadOptions = AS_COCO) -> ReadFile:
    """As `read_file`, of lists that are read already; `path` stands for them in messages."""
    problems: list[Problem] = []
    conversions = Conversions()
    categories, index_of_category = _read_categories(path, tables.categories, conversions, problems.append)
    images = read_images(path, images_folder, tables.images, conversions, problems.append)
    if not categories or not len(images.table):
        return ReadFile(None, tuple(problems))
    context = Context(path, images, index_of_category, conversions, problems.append)
    found = read_annotations(context, images_folder, categories, tables, options.box_format)
    if options.crowd == "objects":
        found = replace(found, iscrowd=np.zeros_like(found.iscrowd))
    if sentence := conversions.sentence():
        problems.append(Problem("value-converted", f"{path}: {sentence}"))
    return ReadFile(found, tuple(problems), tuple(images.parts))


def _read_categories(
    path: Path, entries: Sequence[RawEntry], conversions: Conversions, report: Report
) -> tuple[tuple[Category, ...], dict[int | str, int]]:
    """The categories by ascending id, and which of them each id of the file means.

    Entries alike in all but the id are one category, which has the smallest of their ids. Ids that are words are
    numbered in the order of the file, after the highest number.
    """
    if not entries:
        report(Problem("file-unreadable", f"{path}: lists no categories. List every class with an id and a name."))
    listed: dict[int, Category] = {}
    repeated = 0
    number_of: dict[str, int] = {}  # of ids that are words
    following = 1 + max((number for raw in entries if (number := _plain_id(raw)) is not None), default=0)
    for position, raw in enumerate(entries):
        entry = parsed(raw)
        if not isinstance(entry, dict):
            message = f"{path}: entry {position} of 'categories' must be an object, not {kind_of(entry)}."
            report(Problem("entry-malformed", message))
            continue
        value = entry.get("id")
        category_id = conversions.integer(value, "category id")
        if category_id is None and isinstance(value, str) and value.strip():
            category_id = number_of.setdefault(value, following + len(number_of))
        if category_id is None:
            found = "is missing" if "id" not in entry else f"is {shown_value(value)}, {kind_of(value)}"
            message = f"{path}: 'id' of category number {position} {found}; it must be an integer."
            report(Problem("entry-malformed", message))
            continue
        name = entry.get("name")
        category = Category(category_id, name.strip() if isinstance(name, str) else "", _supercategory(entry))
        if listed.get(category_id) == category and category.name:
            repeated += 1
            continue
        if category_id in listed:
            message = f"{path}: category id {category_id} is listed twice. Give each category its own id."
            report(Problem("duplicate-category-id", message))
            continue
        if not category.name:
            message = f"{path}: category {category_id} has no name. Give each category a name."
            report(Problem("entry-malformed", message))
            category = replace(category, name=f"category {category_id}")  # its annotations are still usable
        listed[category_id] = category
    same: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for category_id in sorted(listed):
        same[listed[category_id].name, listed[category_id].supercategory].append(category_id)
    kept = sorted(ids[0] for ids in same.values())
    repeated += len(listed) - len(kept)
    if repeated:
        names = sorted({listed[ids[0]].name for ids in same.values() if len(ids) > 1}) or ["the same id and name"]
        message = (
            f"{path}: {repeated} entries of 'categories' repeat another one ({', '.join(names[:3])}); "
            "they are read as one category, with the smallest id."
        )
        report(Problem("category-repeated", message))
    position_of = {category_id: index for index, category_id in enumerate(kept)}
    index_of: dict[int | str, int] = {category_id: position_of[ids[0]] for ids in same.values() for category_id in ids}
    if number_of:
        index_of |= {word: index_of[number] for word, number in number_of.items() if number in index_of}
        for number in number_of.values():  # what the file does not have is no id of it
            index_of.pop(number, None)
        message = (
            f"{path}: {len(number_of)} category ids are words (first: {shown_value(next(iter(number_of)))}); they are "
            f"numbered from {following} on, in the order of the file."
        )
        report(Problem("id-numbered", message))
    return tuple(listed[category_id] for category_id in kept), index_of


def _plain_id(raw: RawEntry) -> int | None:
    entry = parsed(raw)
    return Conversions().integer(entry.get("id"), "") if isinstance(entry, dict) else None


def _supercategory(entry: dict[str, Any]) -> str:
    value = entry.get("supercategory", "")
    return "" if value is None else str(value)
