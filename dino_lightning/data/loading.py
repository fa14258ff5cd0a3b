"""A loader that saves its position in the epoch and survives the death of its worker processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dino_lightning.data.dataset import Sample
from dino_lightning.data.image_files import available_cores
from dino_lightning.data.sampling import TrainSampler
from dino_lightning.errors import FROM_A_LOADER, DataError
from dino_lightning.interrupts import ctrl_c_left_to_this_process
from dino_lightning.structures import Batch

MAX_WORKERS = 8
TINY_DATASET = 64  # images; starting workers takes longer than reading these
MAX_DEATHS = 3  # of worker processes in one epoch
LOCK_PATIENCE = 5.0  # seconds; a living process holds the lock of PyTorch's end signal for microseconds
NO_GUARD = 97  # exit code of a worker that ran the whole script instead of reading images
CANNOT_START = (
    "The loader processes cannot start: on this system each of them imports your script, and so runs all of it. Put "
    'what starts the training into a function, and call it below the line `if __name__ == "__main__":`; or load images '
    "without processes, by num_workers=0. If that line is there, see the error of the loader process above."
)


class Loader(DataLoader[Any]):
    """A loader whose place in the epoch is saved with the checkpoint (Lightning's protocol of stateful loaders).

    Where a worker process is killed, usually by the system when memory runs out, all of them are restarted. No
    batch is lost: batches follow from indices and seeds, so a new process makes the same ones.

    Raises:
        DataError: more than three worker processes of one epoch were killed, or they cannot start.
    """

    def __init__(self, dataset: Dataset[Any], *, sampler: Any = None, **arguments: Any) -> None:
        super().__init__(dataset, sampler=sampler, **arguments)
        # None in evaluation, and with Lightning's overfit_batches, whose own sampler has no position to save.
        self._order = sampler if isinstance(sampler, TrainSampler) else None
        self._given = 0
        self._first = 0
        self._last_epoch: int | None = None
        self._processes: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its private iterator class
        if self.num_workers > 0 and getattr(multiprocessing.current_process(), "_inheriting", False):
            sys.exit(NO_GUARD)  # this is a worker that imports the script it is for; the first process says so
        self._given, self._first = self._first, 0
        if self._order is not None:
            if self._order.epoch == self._last_epoch:  # the caller did not set the epoch (Lightning does): set it here
                self._order.set_epoch(self._order.epoch + 1)
            self._last_epoch = self._order.epoch
        deaths = 0
        while True:
            try:
                for batch in self._after(self._given):
                    self._given += 1
                    yield batch
                return
            except Exception as error:
                killed = self.num_workers > 0 and _tells_of_a_death(error)
                if killed and self._cannot_start():
                    raise DataError(CANNOT_START) from error
                self._end_processes()
                if not killed:
                    raise
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise DataError(
                        f"Loader processes were killed {deaths} times in one epoch, most likely because memory ran "
                        "out. Lower data.num_workers; where images are very large, use data.cache_dir."
                    ) from error
                warnings.warn(
                    f"A loader process was killed ({error}). All of them are restarted; no batch is lost.",
                    stacklevel=2,
                )

    def _end_processes(self) -> None:
        """End the processes after an error, now: its traceback keeps PyTorch's iterator, and so would keep them.

        Where the garbage collector finds both, it closes the queues first, and PyTorch waits 5 s for each process.
        """
        iterator, self._iterator = self._iterator, None  # None if they do not outlast an epoch
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # as Lightning does at the end of a run

    def _after(self, given: int) -> Iterator[Any]:
        """The batches of the epoch after the first `given`."""
        if self._order is not None:
            self._order.skip = given * (self.batch_size or 1)
        self._processes = ()
        with ctrl_c_left_to_this_process():
            iterator = super().__iter__()
        self._processes = getattr(iterator, "_workers", ())
        outlive_deaths(iterator)
        if self.num_workers > 0:
            _leave_deaths_to_the_loader()
        return iterator if self._order is not None else islice(iterator, given, None)

    def _cannot_start(self) -> bool:
        """Whether processes end while they import the script that starts them, not killed but by an error of it."""
        context = self.multiprocessing_context or multiprocessing
        if context.get_start_method() == "fork":
            return False
        return not self._processes or any((worker.exitcode or 0) > 0 for worker in self._processes)

    def state_dict(self) -> dict[str, int]:
        """The seed, the epoch, and the number of its batches that were given."""
        if self._order is None:
            return {}
        return {"seed": self._order.seed, "epoch": self._order.epoch, "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume after the batches that were given; with the next epoch if the epoch was complete."""
        if self._order is None or not state_dict:
            return
        finished = state_dict["batches"] >= len(self)
        self._order.seed = state_dict["seed"]
        self._order.set_epoch(state_dict["epoch"] + finished)
        self._first = self._given = 0 if finished else state_dict["batches"]


class BatchesOf(Dataset[list[Sample]]):
    """Samples in batches that are settled beforehand: item `i` is the list of those of batch `i`.

    A dataset and not a sampler of batches, so that Lightning shares the batches out among processes as it does images.

    Args:
        samples: the samples.
        batches: the indices of the samples of each batch.
    """

    def __init__(self, samples: Dataset[Sample], batches: Sequence[Sequence[int]]) -> None:
        self.samples, self.batches = samples, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[Sample]:
        return [self.samples[index] for index in self.batches[number]]


def collate_settled(batches: Sequence[list[Sample]]) -> Batch:
    """The batch that `BatchesOf` gave, a list of one for torch."""
    (samples,) = batches
    return collate(samples)


def _tells_of_a_death(error: BaseException) -> bool:
    """Whether the error means that a worker process died; an error of the dataset comes from a living worker."""
    if not isinstance(error, (RuntimeError, OSError, EOFError)):
        return False
    message = str(error)
    if message.startswith("DataLoader worker (pid"):
        return True
    # Its last finished batch may be in shared memory that was never handed over.
    lost_on_the_way = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
    return lost_on_the_way and (FROM_A_LOADER not in message or "in pin memory thread" in message)


class _EndSignal:
    """PyTorch's signal that ends worker processes, which is given up where its lock is never released.

    Every worker takes that lock each time it looks for the signal. One that is killed in that moment keeps it: the
    others wait for it for ever, and so would this process at the end of the epoch or run. They are killed instead.

    Where the garbage collector finds an iterator, such as one that a traceback kept, it closes the queues first. Then
    no worker learns of the end, and PyTorch would wait 5 s for each before it terminates them; here it does not wait.
    """

    def __init__(self, event: Any, workers: Sequence[Any], queues: Sequence[Any]) -> None:
        self.event, self._workers, self._set = event, workers, False
        self._queues = queues

    def set(self) -> None:
        """Tell the workers to end."""
        self._set = True
        lock = self.event._cond
        if lock.acquire(timeout=LOCK_PATIENCE):
            lock.release()
            self.event.set()
        else:
            for worker in self._workers:
                worker.kill()
        closings = [getattr(queue, "_close", None) for queue in self._queues]  # None before anything was sent
        if any(closing is not None and not closing.still_active() for closing in closings):
            for worker in self._workers:
                worker.terminate()

    def is_set(self) -> bool:
        """Whether they were told."""
        return self._set


def outlive_deaths(iterator: Any) -> None:
    """Let PyTorch's iterator of worker processes end although one of them was killed in an unlucky moment.

    Args:
        iterator: of a `DataLoader`; left as it is where it has no processes, or not the signal that PyTorch 2 has.
    """
    event = getattr(iterator, "_workers_done_event", None)
    if event is not None and hasattr(event, "_cond"):
        iterator._workers_done_event = _EndSignal(event, iterator._workers, iterator._index_queues)


def _leave_deaths_to_the_loader() -> None:
    """Remove torch's signal handler, which raises the error of a dead worker wherever the main thread is.

    That may be in the middle of a training step. Without it, the loader notices when it waits for the next batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def default_workers(images: int, processes: int) -> int:
    """Loader processes for one dataset, where `processes` training processes share this machine's cores."""
    if images < TINY_DATASET:
        return 0
    return min(MAX_WORKERS, max(1, available_cores() // processes))


def collate(samples: Sequence[Sample], *, pad_to: tuple[int, int] | None = None, pad_to_multiple: int = 1) -> Batch:
    """Pad samples to one canvas size and stack them into a batch.

    Args:
        samples: what `CocoDetection` gave.
        pad_to: canvas (height, width) in pixels; defaults to the largest height and width of the samples.
        pad_to_multiple: round the canvas up to a multiple of this.

    Raises:
        ValueError: no samples, or one larger than `pad_to`.
    """
    truths = [sample.ground_truth for sample in samples if sample.ground_truth is not None]
    batch = Batch.from_images(
        [sample.image for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        original_sizes=[sample.original_size for sample in samples],
        targets=[(sample.boxes_cxcywh, sample.labels) for sample in samples],
        ground_truth=truths if len(truths) == len(samples) else None,
        pad_to=pad_to,
        pad_to_multiple=pad_to_multiple,
    )
    return replace(batch, notices=tuple(notice for sample in samples for notice in sample.notices))
