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

from dino_lightning.data.dataset import Draw

BATCHES_IN_A_POOL = 32  # images are sorted by elongation within this many batches at a time


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers of 0 or more; other numbers give another seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


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
    ) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=True, seed=seed % 2**32)
        self.batch_size = batch_size
        self.elongations = None if aspect_ratios is None else np.abs(np.log(np.asarray(aspect_ratios)))
        self.skip = 0  # samples already seen in the epoch that is resumed

    def __iter__(self) -> Iterator[Draw]:
        skip, self.skip = self.skip, 0
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).numpy()  # type: ignore[arg-type]  # has a length
        order = np.resize(order, self.total_size)  # the same number for each process: the first images are repeated
        if self.elongations is not None:
            order = self._by_shape(order, self.elongations, generator)
        for place, index in islice(enumerate(order[self.rank :: self.num_replicas].tolist()), skip, None):
            seed = derive_seed(self.seed, self.epoch, index)
            if self.elongations is None:
                yield index, seed
            else:
                yield index, seed, derive_seed(self.seed, self.epoch, place // self.batch_size, 1) % 2

    def _by_shape(
        self, order: npt.NDArray[np.int64], elongations: npt.NDArray[np.float64], generator: torch.Generator
    ) -> npt.NDArray[np.int64]:
        """The same indices, reordered so that the batches of one step have images of similar shape on all processes."""
        size = self.batch_size * self.num_replicas
        pieces = []
        for start in range(0, len(order), BATCHES_IN_A_POOL * size):
            pool = order[start : start + BATCHES_IN_A_POOL * size]
            whole = len(pool) // size * size  # an incomplete batch stays last, where it may be dropped
            pool, rest = pool[:whole], pool[whole:]
            batches = pool[np.argsort(elongations[pool], kind="stable")].reshape(-1, size)
            pieces += [batches[torch.randperm(len(batches), generator=generator).numpy()].reshape(-1), rest]
        return np.concatenate(pieces)
