"""Checks of a dataset beyond those of the annotation parser; each adds its cases to `Found`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt

from dino_lightning.data.classes import Classes, class_conflicts
from dino_lightning.data.coco import CLIP_TOLERANCE, ROUNDING, CocoAnnotations, ImageEntry
from dino_lightning.data.findings import Case
from dino_lightning.data.image_files import is_image
from dino_lightning.data.sizes import resized_size
from dino_lightning.inspection.image_facts import ImageFacts
from dino_lightning.inspection.near_duplicates import same_images, similar_images
from dino_lightning.inspection.report import SplitHealth, clipped_boxes, learnable_boxes, learnable_boxes_per_image

TINY = 4.0  # pixels at the training size
COVERING = 0.99  # of the image's width and height

Found = dict[tuple[str, str], list[Case]]  # by (kind, split)


@dataclass(frozen=True)
class Limits:
    """The limits of training and evaluation.

    Attributes:
        num_queries: boxes that the model can find in an image.
        max_detections: detections that evaluation keeps of an image.
        max_detections_of_class: detections of one class in an image that COCO's average precision counts.
        image_size: short side of the images in training, in pixels.
        max_size: limit of their long side.
    """

    num_queries: int = 900
    max_detections: int = 300
    max_detections_of_class: int = 100
    image_size: int = 800
    max_size: int = 1333


def check_images(found: Found, split: str, source: CocoAnnotations, facts: Sequence[ImageFacts]) -> None:
    """Check that each listed file exists, can be decoded, and has the size given in the annotations."""
    per_image = learnable_boxes_per_image(source)
    listed: dict[str, int] = {}
    for index, (entry, fact) in enumerate(zip(source.images, facts, strict=True)):

        def add(kind: str, detail: str = "", entry: ImageEntry = entry) -> None:
            found[kind, split].append(Case(detail, entry.id, None, entry.file_name))

        if entry.file_name in listed:
            add("same-file", f"also image {listed[entry.file_name]}")
        listed.setdefault(entry.file_name, entry.id)
        for kind in fact.notes:
            add(kind)
        if fact.missing:
            add("image-missing")
        elif fact.error:
            add("image-undecodable", fact.error)
        elif fact.size != entry.size:
            height, width = fact.size
            detail = f"annotated {entry.size[1]} x {entry.size[0]}, the file has {width} x {height} as displayed"
            swapped = fact.turned and fact.size == entry.size[::-1]
            add("size-swapped" if swapped else "size-differs", detail)
        if fact.damage:
            add("image-damaged", fact.damage)
        if per_image[index] == 0:
            add("no-boxes")


def check_boxes(found: Found, split: str, source: CocoAnnotations, limits: Limits) -> None:
    """Check size, position and number of the boxes, and that none is there twice."""
    owners = np.repeat(np.arange(len(source.images)), np.diff(source.offsets))
    sizes = np.array([image.size for image in source.images], dtype=np.float64)
    inside = clipped_boxes(source)
    extent = inside[:, 2:] - inside[:, :2]  # width, height
    scales = np.array(
        [min(resized_size(image.size, limits.image_size, limits.max_size)) / min(image.size) for image in source.images]
    )
    learnable = learnable_boxes(source)

    def add(kind: str, rows: npt.NDArray[np.bool_], out_by: npt.NDArray[np.float64] | None = None) -> None:
        for row in np.flatnonzero(rows).tolist():
            x1, y1, x2, y2 = source.boxes_xyxy[row].tolist()
            entry = source.images[owners[row]]
            size = f"{entry.size[1]} x {entry.size[0]}"
            detail = f"{x2 - x1:g} x {y2 - y1:g} at {x1:g}, {y1:g} in {size}"
            detail += "" if out_by is None else f", {out_by[row]:.3g} pixels outside"
            found[kind, split].append(Case(detail, entry.id, _id(source, row), entry.file_name))

    add("box-without-area", ~source.usable)
    overshoot = source.overshoot()
    add("box-outside", source.clipped & (overshoot > ROUNDING), overshoot)
    add("box-rounded", source.clipped & (overshoot <= ROUNDING), overshoot)
    add("box-covers-image", learnable & (extent >= COVERING * sizes[owners][:, ::-1] - CLIP_TOLERANCE).all(axis=1))
    add("box-tiny", learnable & (extent.min(axis=1) * scales[owners] < TINY))

    seen: dict[tuple[object, ...], int] = {}
    ids: dict[int, int] = {}
    for row in range(len(owners)):
        entry = source.images[owners[row]]
        annotation_id = _id(source, row)
        key = (owners[row], source.category_indices[row], bool(source.iscrowd[row]), *source.boxes_xyxy[row].tolist())
        if key in seen:
            detail = f"as annotation {_id(source, seen[key])}"
            found["duplicate-box", split].append(Case(detail, entry.id, annotation_id, entry.file_name))
        seen.setdefault(key, row)
        if annotation_id is not None:
            if annotation_id in ids:
                found["duplicate-annotation-id", split].append(Case("", entry.id, annotation_id, entry.file_name))
            ids.setdefault(annotation_id, row)

    keys = owners[learnable] * len(source.categories) + source.category_indices[learnable]
    crowded, counts_of_class = np.unique(keys, return_counts=True)
    most_of_class = np.zeros(len(source.images), np.int64)
    np.maximum.at(most_of_class, crowded // len(source.categories), counts_of_class)
    for index, count in enumerate(np.bincount(owners[learnable], minlength=len(source.images)).tolist()):
        entry, most = source.images[index], int(most_of_class[index])
        if count > limits.num_queries:
            detail = f"{count} boxes, {limits.num_queries} queries"
            found["too-many-boxes", split].append(Case(detail, entry.id, None, entry.file_name))
        if count > limits.max_detections or most > limits.max_detections_of_class:
            detail = (
                f"{count} boxes, {most} of them of one class; evaluation keeps {limits.max_detections}, and average "
                f"precision counts {limits.max_detections_of_class} of a class"
            )
            found["beyond-evaluation", split].append(Case(detail, entry.id, None, entry.file_name))


def check_categories(
    found: Found, split: str, source: CocoAnnotations, classes: Classes | None, counts: Sequence[int]
) -> None:
    """Check that every class has a name of its own and boxes, and is the same class as in training."""
    root = None if classes is None else classes.left_out
    listed = [category for category in source.categories if root is None or category != root]
    names = Counter(category.name for category in listed)
    for category in listed:
        if names[category.name] > 1:
            found["duplicate-category-name", split].append(Case(f"category {category.id} ({category.name})"))
    if classes is None:
        return
    if classes.by_name(source):
        found["classes-by-name", split].append(Case())
    if split == "train" and classes.left_out is not None:
        found["root-category", split].append(Case(f"category {classes.left_out.id} ({classes.left_out.name})"))
    for category_id, name, count in zip(classes.category_ids, classes.names, counts, strict=True):
        if count == 0:
            kind = "category-unused" if split == "train" else "category-missing"
            found[kind, split].append(Case(f"category {category_id} ({name})"))
    found_here = [Case(message.removeprefix(f"{source.path}: ")) for message in class_conflicts(source, classes)]
    if found_here:
        found["classes-differ", split] += found_here


def check_folders(found: Found, splits: Mapping[str, SplitHealth]) -> None:
    """Find image files in the splits' folders that no annotation file lists, not even in a faulty entry."""
    roots = {
        name: Path(os.path.realpath(split.annotations.images_folder))
        for name, split in splits.items()
        if split.annotations is not None  # of a file that cannot be used, nothing is known
    }
    listed = {
        roots[name] / image.file_name
        for name, split in splits.items()
        if split.annotations is not None
        for image in split.annotations.images
    }
    named_in_findings = [
        (split, case.file_name) for (_, split), cases in found.items() for case in cases if case.file_name
    ]
    listed |= {  # "../images/1.png" is refused too
        Path(os.path.normpath(roots[split] / PureWindowsPath(file_name).as_posix()))
        for split, file_name in named_in_findings
        if split in roots
    }
    for name in roots:
        for folder, _, files in os.walk(roots[name]):  # skips folders that cannot be read
            for path in sorted(Path(folder) / file for file in files):
                if is_image(path.name) and path not in listed:
                    listed.add(path)  # once, where splits share a folder
                    found["not-listed", name].append(Case(file_name=path.relative_to(roots[name]).as_posix()))


def check_copies(found: Found, splits: Mapping[str, SplitHealth]) -> None:
    """Find images that are there twice, within a split or across splits."""
    places = [(name, index) for name, split in splits.items() for index in range(len(split.facts))]
    facts = [splits[name].facts[index] for name, index in places]

    def add(first: int, second: int, within: str, across: str) -> None:
        (name, index), (other_name, other_index) = places[first], places[second]
        if other_name == "train" != name:  # reported for the other split: the training image may stay
            (name, index), (other_name, other_index) = (other_name, other_index), (name, index)
        source, other_source = splits[name].annotations, splits[other_name].annotations
        assert source is not None and other_source is not None
        original, entry = source.images[index], other_source.images[other_index]
        if name == other_name:
            if original.file_name != entry.file_name:
                detail = f"as {original.file_name} (image {original.id})"
                found[within, name].append(Case(detail, entry.id, None, entry.file_name))
        else:
            detail = f"as {original.file_name} (image {original.id} of {name})"
            found[across, other_name].append(Case(detail, entry.id, None, entry.file_name))

    for group in same_images(facts):
        for other in group[1:]:
            add(group[0], other, "duplicate-image", "leak")
    pairs, finished = similar_images(facts)
    for first, second in pairs:
        add(first, second, "near-duplicate", "leak-near")
    if not finished:
        found["near-unfinished", "train"].append(Case())


def _id(source: CocoAnnotations, row: int) -> int | None:
    annotation_id = int(source.annotation_ids[row])
    return None if annotation_id < 0 else annotation_id
