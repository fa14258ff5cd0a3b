"""The order of the training images and the random draws for each: both follow from a seed, so a run can be resumed.

Nothing is drawn from a generator whose state would have to be stored: the order depends on seed and epoch, the
augmentation of an image on seed, epoch and image. A run that is resumed in the middle of an epoch sees exactly the
batches that it would have seen without the stop, whatever the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from dino_lightning.data.coco import CocoAnnotations
from dino_lightning.data.dataset import Draw

BATCHES_IN_A_POOL = 32  # images are sorted by elongation within this many batches at a time


def batches_of_one_size(
    sizes: Sequence[tuple[int, int]], batch_size: int, *, in_order: bool = False
) -> list[list[int]]:
    """Which images make a batch in evaluation: those of one size, so that no padding moves results.

    Args:
        sizes: (height, width) of each image as the detector gets it.
        batch_size: images in a batch at the most.
        in_order: only images that follow each other, so that the order of all stays.

    Returns:
        Indices of the images of each batch, ascending; the batches in the order of their first images.
    """
    unfinished: dict[tuple[int, int], list[int]] = {}
    batches = []
    for index, size in enumerate(sizes):
        if in_order and size not in unfinished:
            unfinished.clear()
        batch = unfinished.setdefault(size, [])
        if not batch:
            batches.append(batch)
        batch.append(index)
        if len(batch) == batch_size:
            del unfinished[size]
    return batches


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers of 0 or more; other numbers give another seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def class_repeat_factors(
    annotations: CocoAnnotations, labels: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.float64]:
    """How often images with each class are to be drawn in an epoch (repeat factor sampling, LVIS, arXiv 1908.03195).

    Args:
        annotations: the training images.
        labels: (A,) of all their rows, 0..K-1.
        threshold: share t of the images below which a class counts as rare.

    Returns:
        (K,) max(1, sqrt(t / f)), where f is the share of images with the class; 1 for a class without boxes.
    """
    _, kinds = _classes_of_images(annotations, labels)
    shares = np.bincount(kinds, minlength=int(labels.max(initial=-1)) + 1) / max(len(annotations.images), 1)
    return np.sqrt(np.maximum(1.0, np.divide(threshold, shares, out=np.ones_like(shares), where=shares > 0)))


def image_repeat_factors(
    annotations: CocoAnnotations, labels: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.float64]:
    """How often each image is to be drawn in an epoch: the largest factor of its classes, 1 without boxes.

    Args:
        annotations: the training images.
        labels: (A,) of all their rows, 0..K-1.
        threshold: see `class_repeat_factors`.

    Returns:
        (images,) of 1 or more.
    """
    images, kinds = _classes_of_images(annotations, labels)
    factors = np.ones(len(annotations.images))
    np.maximum.at(factors, images, class_repeat_factors(annotations, labels, threshold)[kinds])
    return factors


def _classes_of_images(
    annotations: CocoAnnotations, labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every pair of an image and a class of which it has a box to learn from, once."""
    learnable = annotations.usable & ~annotations.iscrowd
    owners = np.repeat(np.arange(len(annotations.images)), np.diff(annotations.offsets))
    pairs = np.unique(np.stack([owners[learnable], labels[learnable]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def draws_of_epoch(factors: npt.NDArray[np.float64], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which samples an epoch draws: each as often as its factor says on average, and all epochs the same number.

    The whole part of a factor is drawn for certain, the rest by systematic sampling: points at equal distances from a
    random first one, along the parts laid end to end in random order.

    Args:
        factors: (N,) expected draws of each sample.
        seed: decides the points.

    Returns:
        (D,) the samples drawn, in ascending order, and (D,) which of its draws each is, from 0; D is the sum of the
        factors, rounded.
    """
    generator = np.random.default_rng(seed)
    counts = np.floor(factors).astype(np.int64)
    total = number_of_draws(factors)
    more = total - int(counts.sum())
    if more > 0:
        order = generator.permutation(len(factors))
        ends = np.cumsum((factors - counts)[order])
        points = (np.arange(more) + generator.random()) * (ends[-1] / more)
        hit = np.minimum(np.searchsorted(ends, points, side="right"), len(factors) - 1)
        np.add.at(counts, order[hit], 1)
    drawn = np.repeat(np.arange(len(factors)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    return drawn, np.arange(total) - firsts


def number_of_draws(factors: npt.NDArray[np.float64]) -> int:
    """How many samples an epoch draws: the sum of the factors, rounded."""
    return round(float(factors.sum()))


def repeats_in_words(
    annotations: CocoAnnotations, labels: npt.NDArray[np.int64], threshold: float, names: Sequence[str]
) -> str:
    """What repeat factor sampling does to a dataset, in one line; arguments as of `image_repeat_factors`."""
    factors = class_repeat_factors(annotations, labels, threshold)
    rarest = int(factors.argmax())
    draws = number_of_draws(image_repeat_factors(annotations, labels, threshold))
    return (
        f"repeat factor sampling: {len(annotations.images):,} images are drawn {draws:,} times an epoch; the rarest "
        f"class ({names[rarest]}) {factors[rarest]:.1f} times"
    )


class TrainSampler(DistributedSampler[Draw]):
    """Shuffled (index, seed) pairs of one process of a run; the order depends on seed and epoch alone.

    With `aspect_ratios`, a batch has images of similar shape, so that it needs little padding: the shuffled images are
    taken 32 batches at a time, sorted by elongation and cut into batches, which are then shuffled. All processes get
    similar shapes in the same step, and the same number of batches. Seeds then come with a third number, the
    orientation of the batch (see `LabelledImage.landscape`).

    Args:
        dataset: what to draw from.
        processes: the number of training processes.
        rank: which of them this is.
        seed: the same on all of them.
        batch_size: images in a batch of one process; matters with `aspect_ratios` only.
        aspect_ratios: width / height of each image, or None for batches at random.
        repeat_factors: how often an epoch draws each sample on average, see `draws_of_epoch`; None: once. Every draw of
            a sample has another seed.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        processes: int = 1,
        rank: int = 0,
        seed: int = 0,
        batch_size: int = 1,
        aspect_ratios: Sequence[float] | None = None,
        repeat_factors: npt.NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=True, seed=seed % 2**32)
        self.batch_size = batch_size
        self.elongations = None if aspect_ratios is None else np.abs(np.log(np.asarray(aspect_ratios)))
        self.skip = 0  # samples already seen in the epoch that is resumed
        self.repeat_factors = repeat_factors
        if repeat_factors is not None:
            self.num_samples = -(-number_of_draws(repeat_factors) // processes)
            self.total_size = self.num_samples * processes

    def __iter__(self) -> Iterator[Draw]:
        skip, self.skip = self.skip, 0
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        if self.repeat_factors is None:
            samples = np.arange(len(self.dataset))  # type: ignore[arg-type]  # has a length
            repeats = np.zeros_like(samples)
        else:
            samples, repeats = draws_of_epoch(self.repeat_factors, derive_seed(self.seed, self.epoch, 1))
        order = torch.randperm(len(samples), generator=generator).numpy()
        order = np.resize(order, self.total_size)  # the same number for each process: the first images are repeated
        if self.elongations is not None:
            order = self._by_shape(order, self.elongations[samples], generator)
        for place, draw in islice(enumerate(order[self.rank :: self.num_replicas].tolist()), skip, None):
            index, repeat = int(samples[draw]), int(repeats[draw])
            seed = derive_seed(self.seed, self.epoch, index, *([1, repeat] if repeat else []))
            if self.elongations is None:
                yield index, seed
            else:
                yield index, seed, derive_seed(self.seed, self.epoch, place // self.batch_size, 1) % 2

    def _by_shape(
        self, order: npt.NDArray[np.int64], elongations: npt.NDArray[np.float64], generator: torch.Generator
    ) -> npt.NDArray[np.int64]:
        """The same draws, reordered so that the batches of one step have images of similar shape on all processes."""
        size = self.batch_size * self.num_replicas
        pieces = []
        for start in range(0, len(order), BATCHES_IN_A_POOL * size):
            pool = order[start : start + BATCHES_IN_A_POOL * size]
            whole = len(pool) // size * size  # an incomplete batch stays last, where it may be dropped
            pool, rest = pool[:whole], pool[whole:]
            batches = pool[np.argsort(elongations[pool], kind="stable")].reshape(-1, size)
            pieces += [batches[torch.randperm(len(batches), generator=generator).numpy()].reshape(-1), rest]
        return np.concatenate(pieces)
