"""The loop of `predict`: views in, batches through the detector, each finished image recorded at once.

Four things happen at a time: processes read and resize images, threads detect, threads draw and write pictures, and the
main thread hands on. On a CPU two batches of small views are detected at once: the cores that one batch leaves idle
between its operations work on the other. Results and their order are those of one batch after another.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dino_lightning.data.image_files import available_cores
from dino_lightning.data.images import read_image
from dino_lightning.data.loading import outlive_deaths
from dino_lightning.detections import Detections, save_page
from dino_lightning.errors import DataError
from dino_lightning.inference.image_list import ListedImage
from dino_lightning.inference.results import Records, failure, record
from dino_lightning.inference.tiling import Window, merge
from dino_lightning.inference.views import Unreadable, View, Views, batches
from dino_lightning.interrupts import ctrl_c_left_to_this_process
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule

OVERLAY_SIDE = 2400  # pixels of the long side of a picture, at the most
BATCHES_AT_ONCE = 2  # on a CPU
PIXELS_AT_ONCE = 1_000_000  # of all views that are detected or wait for it; larger batches are detected alone

Detect = Callable[[Sequence[View]], list[Detections]]


class Found(NamedTuple):
    """The (height, width) of an image, what is in it, and its pixels if they came along for the picture."""

    size: tuple[int, int]
    detections: Detections
    image: Tensor | None


def predict_images(
    module: DINOModule,
    views: Views,
    fabric: Fabric,
    *,
    folder: Path,
    threshold: float,
    batch_size: int,
    num_workers: int,
    overlays: Mapping[str, Path],
) -> None:
    """Detect in images, and note each in this process's file as soon as it is finished.

    Args:
        module: the detector, on the device of `fabric`.
        views: what it is to see.
        fabric: Lightning's device and precision.
        folder: that of the results.
        threshold: lowest score to keep.
        batch_size: views in a batch.
        num_workers: processes that read images.
        overlays: where the picture of each image goes, by name; without one, none is drawn.

    Raises:
        DataError: a process that reads images was killed.
        KeyboardInterrupt: as soon as an image is finished after Ctrl-C, or at once at the second one.
    """
    loader: DataLoader[View | Unreadable] = DataLoader(views, batch_size=None, num_workers=num_workers)
    progress = tqdm(
        desc="Predicting",
        total=len(views.images),
        unit="image",
        disable=not fabric.is_global_zero,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    records = Records(folder=folder, process=fabric.global_rank)
    detect, at_once = partial(_detect, fabric, module, threshold), BATCHES_AT_ONCE if fabric.device.type == "cpu" else 1
    with (
        _Finisher(records, overlays, progress) as finisher,
        _interrupts_between_images() as stop_if_interrupted,
        _threads(at_once) as threads,
    ):
        try:
            with ctrl_c_left_to_this_process():
                stream = iter(loader)  # starts the processes
            outlive_deaths(stream)
            for listed, found in _found(_detected(batches(_own(stream), batch_size), detect, threads, at_once)):
                finisher.add(listed, found)
                stop_if_interrupted()
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise DataError(
                "A process that reads images was killed, most likely because memory ran out; lower --num_workers. "
                "What is finished is kept: the same command without --overwrite resumes."
            ) from error


@contextmanager
def _interrupts_between_images() -> Iterator[Callable[[], None]]:
    """Keep the first Ctrl-C until the given function is called: amid a transfer it would upset the other processes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    seen: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            stop()

    def stop() -> None:
        if seen:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that end with the block, which waits for what they do and cancels what they have not begun."""
    threads = ThreadPoolExecutor(count)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _own(stream: Iterable[View | Unreadable]) -> Iterator[View | Unreadable]:
    """Yields the same, with images for pictures in memory of this process: a container may have little to share."""
    for view in stream:
        if isinstance(view, View) and view.image is not None:
            shared = view.image.is_shared()  # type: ignore[no-untyped-call]  # torch has no types here
            view = replace(view, image=view.image.clone()) if shared else view
        yield view


def _detected(
    groups: Iterable[list[View] | Unreadable], detect: Detect, threads: ThreadPoolExecutor, at_once: int
) -> Iterator[Unreadable | list[tuple[View, Detections]]]:
    """Yields each batch in its turn, with the detections of its views; the next ones are detected meanwhile.

    One batch more than threads waits, so that no thread does, unless there are more than `PIXELS_AT_ONCE`.
    """
    waiting: deque[tuple[list[View], Future[list[Detections]]]] = deque()

    def first() -> list[tuple[View, Detections]]:
        views, found = waiting.popleft()
        return list(zip(views, found.result(), strict=True))

    for group in groups:
        if isinstance(group, Unreadable):
            yield group
            continue
        while waiting and (
            len(waiting) > at_once or _pixels(group) + sum(_pixels(views) for views, _ in waiting) > PIXELS_AT_ONCE
        ):
            yield first()
        waiting.append((group, threads.submit(detect, group)))
    while waiting:
        yield first()


def _pixels(views: Sequence[View]) -> int:
    return sum(view.pixels.shape[1] * view.pixels.shape[2] for view in views)


def _found(
    detected: Iterable[Unreadable | list[tuple[View, Detections]]],
) -> Iterator[tuple[ListedImage, Found | Unreadable]]:
    """Yields each image as soon as all its views have been through the detector."""
    parts: dict[str, list[tuple[Window, Detections]]] = {}
    images: dict[str, Tensor] = {}
    for batch in detected:
        if isinstance(batch, Unreadable):
            yield batch.listed, batch
            continue
        for view, detections in batch:
            name = view.listed.name
            seen = parts.setdefault(name, [])
            seen.append((view.window, detections))
            if view.image is not None:
                images[name] = view.image
            if len(seen) == view.number:
                found = merge(parts.pop(name), view.size)
                yield view.listed, Found(view.size, found, images.pop(name, None))


@torch.no_grad()
def _detect(fabric: Fabric, module: DINOModule, threshold: float, seen: Sequence[View]) -> list[Detections]:
    batch = Batch.from_images(
        [view.pixels for view in seen], original_sizes=[(view.window.height, view.window.width) for view in seen]
    )
    with fabric.autocast():
        found = module.detect_batch(batch.to(fabric.device))
    return [
        detections.cpu().above(threshold).within(size)
        for detections, size in zip(found, batch.original_sizes, strict=True)
    ]


class _Finisher:
    """Draws overlays in threads, and records an image when its overlay is written; the queue is bounded."""

    def __init__(self, records: Records, places: Mapping[str, Path], progress: Any) -> None:
        self._records = records
        self._places = places
        self._progress = progress
        self._cores = available_cores()
        self._threads = ThreadPoolExecutor(self._cores)
        self._waiting: deque[tuple[dict[str, Any], Future[dict[str, Any]] | None]] = deque()

    def __enter__(self) -> _Finisher:
        return self

    def add(self, listed: ListedImage, found: Found | Unreadable) -> None:
        """An image is ready, or given up."""
        drawn = None
        if isinstance(found, Unreadable):
            line = failure(listed, found.reason)
        else:
            place = self._places.get(listed.name)
            picture = None if place is None else place.relative_to(self._records.folder).as_posix()
            line = record(listed, found.size, found.detections, picture)
            if place is not None:
                drawn = self._threads.submit(_draw, listed, found, place, line)
        self._waiting.append((line, drawn))
        self._note(2 * self._cores)

    def _note(self, may_wait: int) -> None:
        while self._waiting:
            line, drawn = self._waiting[0]
            if drawn is not None and not drawn.done() and len(self._waiting) <= may_wait:
                return
            if drawn is not None:
                line = drawn.result()
            self._waiting.popleft()
            self._records.add(line)
            self._progress.update()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, Exception):  # what came before an error is kept; Ctrl-C does not wait
                self._note(0)
        finally:
            self._threads.shutdown(cancel_futures=True)
            self._progress.close()
            self._records.close()


def _draw(listed: ListedImage, found: Found, path: Path, line: dict[str, Any]) -> dict[str, Any]:
    """Draw a picture; gives the image's line, which is another one if the image has to be read again and cannot be."""
    try:
        pixels = read_image(listed.path) if found.image is None else found.image
    except DataError as error:
        return failure(listed, str(error))
    save_page(found.detections.draw(pixels, long_side=OVERLAY_SIDE), path)
    return line
