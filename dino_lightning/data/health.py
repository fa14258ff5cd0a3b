"""The health of a dataset: everything counted, every image decoded, all that is wrong by kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dino_lightning.data.classes import Classes, class_conflicts, classes_of
from dino_lightning.data.coco import CLIP_TOLERANCE, CocoAnnotations, read_coco
from dino_lightning.data.findings import KINDS, SEVERITIES, Case, Finding, Severity
from dino_lightning.data.image_facts import ImageFacts, facts_of_all
from dino_lightning.data.lookalikes import same_images, similar_images
from dino_lightning.data.splits import SplitFiles
from dino_lightning.data.transforms import resized_size

TINY = 4.0  # pixels at the training size
COVERING = 0.99  # of the image's width and height
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


@dataclass(frozen=True)
class SplitHealth:
    """One split.

    Attributes:
        name: "train", "val" or "test".
        files: the annotation file and the image folder.
        annotations: what could be read of the annotations, or None.
        facts: one for each image in `annotations`.
        counts: boxes to learn from, by label of the training classes.
    """

    name: str
    files: SplitFiles
    annotations: CocoAnnotations | None
    facts: Sequence[ImageFacts]
    counts: Sequence[int]

    def boxes_per_image(self) -> npt.NDArray[np.int64]:
        """(images,) boxes to learn from in each image."""
        if self.annotations is None:
            return np.zeros(0, np.int64)
        learnable = self.annotations.usable & ~self.annotations.iscrowd
        return np.diff(np.concatenate(([0], np.cumsum(learnable)))[self.annotations.offsets])

    def box_sizes(self) -> npt.NDArray[np.float64]:
        """(boxes, 2) width and height in pixels of the boxes to learn from, as clipped to their images."""
        if self.annotations is None:
            return np.zeros((0, 2))
        source = self.annotations
        rows = source.usable & ~source.iscrowd
        boxes = _clipped(source)[rows]
        return boxes[:, 2:] - boxes[:, :2]

    def image_sizes(self) -> npt.NDArray[np.int64]:
        """(images, 2) height and width in pixels of the images that could be decoded."""
        return np.array([fact.size for fact in self.facts if not fact.error], dtype=np.int64).reshape(-1, 2)


@dataclass
class HealthReport:
    """What `inspect_dataset` found.

    Attributes:
        splits: by name.
        classes: the training classes, or None if the training file cannot be used.
        findings: the worst first.
    """

    splits: dict[str, SplitHealth]
    classes: Classes | None
    findings: list[Finding] = field(default_factory=list)

    def count(self, severity: Severity) -> int:
        """How many cases there are of a severity."""
        return sum(len(finding.cases) for finding in self.findings if finding.severity == severity)


def inspect_dataset(
    files: Mapping[str, SplitFiles],
    *,
    num_queries: int = 900,
    image_size: int = 800,
    max_size: int = 1333,
    progress: bool = True,
) -> HealthReport:
    """Read all annotations, decode all images, and say what is wrong.

    Args:
        files: the splits by name, with "train" among them.
        num_queries: boxes that the model can find in an image.
        image_size: short side of the images in training, in pixels.
        max_size: limit of their long side.
        progress: show a progress bar.
    """
    found: dict[tuple[str, str], list[Case]] = defaultdict(list)
    loaded: dict[str, CocoAnnotations | None] = {}
    for name, split in files.items():
        loaded[name], problems = read_coco(split.annotations, split.images)
        for problem in problems:
            case = Case(problem.message, problem.image_id, problem.annotation_id, problem.file_name)
            found[problem.kind, name].append(case)
    training = loaded.get("train")
    classes = None if training is None else classes_of(training)
    splits: dict[str, SplitHealth] = {}
    for name, split in files.items():
        annotations = loaded[name]
        facts: list[ImageFacts] = []
        counts: list[int] = []
        if annotations is not None:
            paths = [annotations.image_path(index) for index in range(len(annotations.images))]
            facts = facts_of_all(paths, f"{name} images", progress=progress)
            counts = _counts(annotations, classes)
            _judge_images(found, name, annotations, facts)
            _judge_boxes(found, name, annotations, num_queries, image_size, max_size)
            _judge_categories(found, name, annotations, classes, counts)
        splits[name] = SplitHealth(name, split, annotations, facts, counts)
    _judge_folders(found, splits)
    _judge_copies(found, splits)
    if "val" not in files:
        found["no-validation", "train"].append(Case())
    order = list(KINDS)
    findings = [Finding(kind, split, tuple(cases)) for (kind, split), cases in found.items()]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), order.index(finding.kind), finding.split))
    return HealthReport(splits, classes, findings)


Found = dict[tuple[str, str], list[Case]]


def _counts(annotations: CocoAnnotations, classes: Classes | None) -> list[int]:
    """Boxes to learn from for each training class."""
    if classes is None:
        return []
    rows = annotations.usable & ~annotations.iscrowd
    labels = classes.labels_of(annotations)[rows]
    return [int(count) for count in np.bincount(labels[labels >= 0], minlength=len(classes))]


def _judge_images(found: Found, split: str, source: CocoAnnotations, facts: Sequence[ImageFacts]) -> None:
    """Whether each listed file is there, can be decoded, and has the size that the annotations say."""
    per_image = np.diff(np.concatenate(([0], np.cumsum(source.usable & ~source.iscrowd)))[source.offsets])
    listed: dict[str, int] = {}
    for index, (entry, fact) in enumerate(zip(source.images, facts, strict=True)):

        def add(kind: str, detail: str = "", entry: object = entry) -> None:
            found[kind, split].append(Case(detail, entry.id, None, entry.file_name))  # type: ignore[attr-defined]

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
        if per_image[index] == 0:
            add("no-boxes")


def _judge_boxes(
    found: Found, split: str, source: CocoAnnotations, num_queries: int, image_size: int, max_size: int
) -> None:
    """Size, place and number of the boxes."""
    owners = np.repeat(np.arange(len(source.images)), np.diff(source.offsets))
    sizes = np.array([image.size for image in source.images], dtype=np.float64)
    inside = _clipped(source)
    extent = inside[:, 2:] - inside[:, :2]  # width, height
    limits = sizes[owners][:, ::-1]
    scales = np.array(
        [min(resized_size(image.size, image_size, max_size)) / min(image.size) for image in source.images]
    )
    learnable = source.usable & ~source.iscrowd

    def add(kind: str, rows: npt.NDArray[np.bool_]) -> None:
        for row in np.flatnonzero(rows).tolist():
            x1, y1, x2, y2 = source.boxes_xyxy[row].tolist()
            entry = source.images[owners[row]]
            size = f"{entry.size[1]} x {entry.size[0]}"
            detail = f"{x2 - x1:g} x {y2 - y1:g} at {x1:g}, {y1:g} in an image of {size}"
            found[kind, split].append(Case(detail, entry.id, _id(source, row), entry.file_name))

    add("box-without-area", ~source.usable)
    add("box-outside", source.clipped)
    add("box-covers-image", learnable & (extent >= COVERING * limits - CLIP_TOLERANCE).all(axis=1))
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

    for index, count in enumerate(np.bincount(owners[learnable], minlength=len(source.images)).tolist()):
        if count > num_queries:
            entry = source.images[index]
            detail = f"{count} boxes, {num_queries} queries"
            found["too-many-boxes", split].append(Case(detail, entry.id, None, entry.file_name))


def _judge_categories(
    found: Found, split: str, source: CocoAnnotations, classes: Classes | None, counts: Sequence[int]
) -> None:
    names = Counter(category.name for category in source.categories)
    for category in source.categories:
        if names[category.name] > 1:
            found["duplicate-category-name", split].append(Case(f"category {category.id} ({category.name})"))
    if classes is None:
        return
    if split == "train" and classes.left_out is not None:
        found["root-category", split].append(Case(f"category {classes.left_out.id} ({classes.left_out.name})"))
    for category_id, name, count in zip(classes.category_ids, classes.names, counts, strict=True):
        if count == 0:
            kind = "category-unused" if split == "train" else "category-missing"
            found[kind, split].append(Case(f"category {category_id} ({name})"))
    found_here = [Case(message) for message in class_conflicts(source, classes)]
    if found_here:
        found["classes-differ", split] += found_here


def _judge_folders(found: Found, splits: Mapping[str, SplitHealth]) -> None:
    """Image files in the splits' folders that no annotation file lists."""
    listed = {
        split.annotations.image_path(index).absolute()
        for split in splits.values()
        if split.annotations is not None
        for index in range(len(split.annotations.images))
    }
    looked_at: set[Path] = set()
    for name, split in splits.items():
        folder = split.files.images
        if folder.absolute() in looked_at or not folder.is_dir():
            continue
        looked_at.add(folder.absolute())
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.absolute() not in listed and path.is_file():
                listed.add(path.absolute())
                found["not-listed", name].append(Case(file_name=path.relative_to(folder).as_posix()))


def _judge_copies(found: Found, splits: Mapping[str, SplitHealth]) -> None:
    """The same image twice, in one split or in two."""
    places = [(name, index) for name, split in splits.items() for index in range(len(split.facts))]
    facts = [splits[name].facts[index] for name, index in places]

    def add(first: int, second: int, within: str, across: str) -> None:
        (name, index), (other_name, other_index) = places[first], places[second]
        if other_name == "train":  # the case is told of the other split: the training image may stay
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
    for first, second in similar_images(facts):
        add(first, second, "near-duplicate", "leak-near")


def _clipped(source: CocoAnnotations) -> npt.NDArray[np.float64]:
    """(A, 4) the boxes within their images, corners in pixels."""
    owners = np.repeat(np.arange(len(source.images)), np.diff(source.offsets))
    sizes = np.array([image.size for image in source.images], dtype=np.float64)[owners]
    return np.clip(source.boxes_xyxy, 0, sizes[:, [1, 0, 1, 0]])


def _id(source: CocoAnnotations, row: int) -> int | None:
    annotation_id = int(source.annotation_ids[row])
    return None if annotation_id < 0 else annotation_id
