"""The order of the training images and the randomness of each: both follow from a seed, so a run can be gone on with.

Nothing is drawn from a generator whose state would have to be stored: the order depends on seed and epoch, the
augmentation of an image on seed, epoch and image. A run that stopped in the middle of an epoch sees, when it goes on,
exactly the batches that it would have seen, whatever the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from dino_lightning.data.dataset import Sample


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers of 0 or more; other numbers give another seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class TrainSampler(DistributedSampler[tuple[int, int]]):
    """Shuffled (index, seed) pairs of one process of a run; the order depends on seed and epoch alone.

    Args:
        dataset: what to draw from.
        processes: the number of training processes.
        rank: which of them this is.
        seed: the same on all of them.
    """

    def __init__(self, dataset: Dataset[Any], *, processes: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=True, seed=seed % 2**32)
        self.skip = 0  # samples already seen in the epoch that is gone on with

    def __iter__(self) -> Iterator[tuple[int, int]]:
        skip, self.skip = self.skip, 0
        for index in islice(super().__iter__(), skip, None):
            number = int(index)  # type: ignore[call-overload]  # the base class says it gives what we give
            yield number, derive_seed(self.seed, self.epoch, number)


class TrainLoader(DataLoader[Sample]):
    """A loader whose place in the epoch is saved with the checkpoint (Lightning's protocol of stateful loaders)."""

    def __init__(self, dataset: Dataset[Sample], *, sampler: Any, **arguments: Any) -> None:
        super().__init__(dataset, sampler=sampler, **arguments)
        # Lightning's overfit_batches makes the loader anew with a sampler of its own; then there is no place to keep
        self._order = sampler if isinstance(sampler, TrainSampler) else None
        self._given = 0
        self._first = 0
        self._last_epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its private iterator class
        self._given, self._first = self._first, 0
        if self._order is not None:
            if self._order.epoch == self._last_epoch:  # nobody counts the epochs (Lightning does): do it here
                self._order.set_epoch(self._order.epoch + 1)
            self._last_epoch = self._order.epoch
            self._order.skip = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The seed, the epoch, and the batches of it that were given."""
        if self._order is None:
            return {}
        return {"seed": self._order.seed, "epoch": self._order.epoch, "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that were given; after the last one, with the next epoch."""
        if self._order is None or not state_dict:
            return
        finished = state_dict["batches"] >= len(self)
        self._order.seed = state_dict["seed"]
        self._order.set_epoch(state_dict["epoch"] + finished)
        self._first = self._given = 0 if finished else state_dict["batches"]
