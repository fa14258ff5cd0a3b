"""Samples of each class: images with its boxes, for a person to see whether they are what the name says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dino_lightning.data.image_files import available_cores
from dino_lightning.inspection.class_shapes import rows_of_each
from dino_lightning.inspection.pictures import Picture, picture_of_class
from dino_lightning.inspection.report import HealthReport, SplitHealth, learnable_boxes

SAMPLES_SHOWN = 12  # of each class
SAMPLE_BYTES = 8_000_000  # of the samples of all classes as base64
MOST_SAMPLES = 600  # of all classes: each is an image to decode


@dataclass
class ClassSamples:
    """The samples of one class.

    Attributes:
        label: of the training classes.
        boxes: to learn from, in all splits.
        images: with such a box, in all splits.
        pictures: at most `SAMPLES_SHOWN`, fewer where there are fewer images or too many classes.
        left_out: how many more there would be if the page could be of any size.
    """

    label: int
    boxes: int
    images: int
    pictures: list[Picture] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class _Place:
    """An image with boxes of a class: its split, its index there, and the rows of these boxes."""

    split: SplitHealth
    index: int
    rows: list[int]


def class_samples(report: HealthReport) -> list[ClassSamples]:
    """Samples of all classes that have a box, those with most boxes first.

    They are drawn at random from all splits, the same ones each time. Every class gets its first one before any class
    gets a second, so that the limits of the page take the last ones of all classes rather than all of the last class.
    """
    places = _places(report)
    samples = [
        ClassSamples(label, sum(len(place.rows) for place in of_class), len(of_class))
        for label, of_class in enumerate(places)
        if of_class
    ]
    samples.sort(key=lambda sample: (-sample.boxes, sample.label))
    chosen = {sample.label: _chosen(places[sample.label]) for sample in samples}
    bytes_left, samples_left = SAMPLE_BYTES, MOST_SAMPLES
    with ThreadPoolExecutor(available_cores()) as pool:
        for number in range(SAMPLES_SHOWN):
            due = [sample for sample in samples if number < len(chosen[sample.label])]
            drawn = due[:samples_left] if bytes_left > 0 else []
            samples_left -= len(drawn)
            pictures = pool.map(_picture, [chosen[sample.label][number] for sample in drawn])
            for sample, picture in zip(drawn, pictures, strict=True):
                if picture is None:
                    continue
                bytes_left -= len(picture.source)
                if bytes_left >= 0:
                    sample.pictures.append(picture)
                else:
                    sample.left_out += 1
            for sample in due[len(drawn) :]:
                sample.left_out += 1
    return samples


def _places(report: HealthReport) -> list[list[_Place]]:
    """For each class the readable images with a box of it, those of training first."""
    if report.classes is None:
        return []
    places: list[list[_Place]] = [[] for _ in range(len(report.classes))]
    for split in report.splits.values():
        source = split.annotations
        if source is None:
            continue
        learnable = np.flatnonzero(learnable_boxes(source))
        owners = np.repeat(np.arange(len(source.images)), np.diff(source.offsets))[learnable]
        for label, rows in enumerate(rows_of_each(report.classes.labels_of(source)[learnable], len(report.classes))):
            images, starts = np.unique(owners[rows], return_index=True)  # the rows are in the order of the images
            parts = np.split(learnable[rows], starts[1:])
            places[label] += [
                _Place(split, index, part.tolist())
                for index, part in zip(images.tolist(), parts, strict=False)
                if not split.facts[index].error
            ]
    return places


def _chosen(places: Sequence[_Place]) -> list[_Place]:
    numbers = np.random.default_rng(0).permutation(len(places))[:SAMPLES_SHOWN]
    return [places[number] for number in sorted(numbers.tolist())]


def _picture(place: _Place) -> Picture | None:
    return picture_of_class(place.split, place.index, place.rows)
