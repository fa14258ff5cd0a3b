"""Images read in loader processes, as the views that the detector is given, and put into batches of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dino_lightning.data.images import read_image
from dino_lightning.data.transforms import LabelledImage, Transform
from dino_lightning.errors import DataError
from dino_lightning.inference.image_list import ListedImage
from dino_lightning.inference.tiling import Window, views

KEPT_PIXELS = 1_000_000  # of an image that comes along for its picture; larger ones are decoded again, to save memory
BATCHES_WAITING = 4  # full ones of so many views may be held back until others of their shape come


@dataclass(frozen=True)
class View:
    """What the detector is given of an image: all of it, or a tile.

    Attributes:
        listed: the image.
        size: (height, width) of the image in pixels.
        window: the part seen, in pixels of the image.
        number: how many views of this image there are.
        pixels: (3, h, w) uint8, RGB, resized for the detector.
        image: (3, H, W) uint8, RGB, all of the image in its own size, for a picture; None in all but the last view of
            an image, and where it is too large to be kept or not asked for.
    """

    listed: ListedImage
    size: tuple[int, int]
    window: Window
    number: int
    pixels: Tensor
    image: Tensor | None = None


@dataclass(frozen=True)
class Unreadable:
    """An image of which there is no view, and why."""

    listed: ListedImage
    reason: str


class Views(IterableDataset[View | Unreadable]):
    """The views of images, one after another; each loader process reads every so-many-th image.

    An image is decoded once, whatever the number of its tiles, and never more than one in each process.

    Args:
        images: the images.
        transform: resizes each view.
        tile: side of the tiles in pixels, or None for whole images only.
        overlap: share of its side that a tile has in common with the next.
        whole_image: look at the whole image as well.
        keep_images: give images of at most `KEPT_PIXELS` along, so that no picture needs them decoded again.
    """

    def __init__(
        self,
        *,
        images: Sequence[ListedImage],
        transform: Transform,
        tile: int | None = None,
        overlap: float = 0.2,
        whole_image: bool = True,
        keep_images: bool = False,
    ) -> None:
        self.images = images
        self.transform = transform
        self.tile = tile
        self.overlap = overlap
        self.whole_image = whole_image
        self.keep_images = keep_images

    def __iter__(self) -> Iterator[View | Unreadable]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(start, len(self.images), step):
            yield from self._views(self.images[index])

    def _views(self, listed: ListedImage) -> Iterator[View | Unreadable]:
        try:
            pixels = read_image(listed.path)
        except DataError as error:
            yield Unreadable(listed, str(error))
            return
        except MemoryError:
            yield Unreadable(listed, f"{listed.path} does not fit into memory; scale it down.")
            return
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        windows = views(size, self.tile, self.overlap, whole=self.whole_image)
        kept = pixels if self.keep_images and size[0] * size[1] <= KEPT_PIXELS else None
        for number, window in enumerate(windows, 1):
            x1, y1, x2, y2 = window.xyxy
            part = LabelledImage(pixels[:, y1:y2, x1:x2], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
            seen = self.transform(part).image.contiguous()
            yield View(listed, size, window, len(windows), seen, kept if number == len(windows) else None)


def batches(stream: Iterable[View | Unreadable], size: int) -> Iterator[list[View] | Unreadable]:
    """Views of one shape, at most `size` at a time: nothing is padded, so that results are those of each view alone.

    Views wait for others of their shape, but not many: once there are `BATCHES_WAITING` times `size` of them, those
    that began to wait first go without.
    """
    waiting: dict[tuple[int, ...], list[View]] = {}
    held = 0
    for view in stream:
        if isinstance(view, Unreadable):
            yield view
            continue
        shape = tuple(view.pixels.shape)
        group = waiting.setdefault(shape, [])
        group.append(view)
        held += 1
        if len(group) < size:
            if held < BATCHES_WAITING * size:
                continue
            shape = next(iter(waiting))
        ready = waiting.pop(shape)
        held -= len(ready)
        yield ready
    yield from waiting.values()
