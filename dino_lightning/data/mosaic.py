"""Mosaics: four training images in one, which has four times the boxes (YOLOv4, arXiv 2004.10934, section 3.4).

With one-to-one matching an image has as many positives as boxes; mosaics multiply them without any change of the model
("dense one-to-one", DEIM, arXiv 2412.04234, section 3.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino_lightning.data.dataset import Draw, Sample
from dino_lightning.data.sampling import derive_seed
from dino_lightning.data.transforms import resize_pixels

NARROWEST = 0.35  # share of the canvas that the images on one side of the seam have at least


class WithMosaic(Dataset[Sample]):
    """Samples of a dataset, some of them made of four: the one asked for and three at random, each of them whole.

    The canvas has the size of the one asked for, and all four are resized into their quarters. The seed of a draw
    decides all of it; without a seed there is no mosaic.

    Args:
        dataset: gives samples of images that are resized and augmented already, without ground truth.
        probability: of a mosaic, 0 to 1.
    """

    def __init__(self, dataset: Dataset[Sample], probability: float) -> None:
        self.dataset, self.probability = dataset, probability

    def __len__(self) -> int:
        count: int = len(self.dataset)  # type: ignore[arg-type]  # those given have a length
        return count

    def __getitem__(self, index: int | Draw) -> Sample:
        """The sample of that index, alone or in a mosaic."""
        first = self.dataset[index]
        if isinstance(index, int):
            return first
        generator = torch.Generator().manual_seed(derive_seed(index[1], 1))
        if not torch.rand((), generator=generator) < self.probability:
            return first
        others = torch.randint(len(self), (3,), generator=generator).tolist()
        more: list[Any] = [(other, derive_seed(index[1], 2 + place), *index[2:]) for place, other in enumerate(others)]
        seam = NARROWEST + (1 - 2 * NARROWEST) * torch.rand(2, generator=generator)
        return mosaic([first, *(self.dataset[draw] for draw in more)], seam)


def mosaic(samples: list[Sample], seam: Tensor) -> Sample:
    """Four samples in the quarters of the first one's canvas: top left, top right, bottom left, bottom right.

    Args:
        samples: four of them.
        seam: (2,) where the quarters meet, x and y as shares of the canvas.
    """
    height, width = samples[0].image.shape[1:]
    column = min(max(round(float(seam[0]) * width), 1), max(width - 1, 1))
    row = min(max(round(float(seam[1]) * height), 1), max(height - 1, 1))
    canvas = torch.empty_like(samples[0].image)
    boxes = []
    for place, sample in enumerate(samples):
        left, top = (column if place % 2 else 0), (row if place // 2 else 0)
        right, bottom = (width if place % 2 else column), (height if place // 2 else row)
        canvas[:, top:bottom, left:right] = resize_pixels(sample.image, (bottom - top, right - left))
        scale = torch.tensor([(right - left) / width, (bottom - top) / height])
        moved = sample.boxes_cxcywh * scale.repeat(2)
        moved[:, :2] += torch.tensor([left / width, top / height])
        boxes.append(moved)
    return replace(
        samples[0],
        image=canvas,
        boxes_cxcywh=torch.cat(boxes),
        labels=torch.cat([sample.labels for sample in samples]),
        notices=tuple(notice for sample in samples for notice in sample.notices),
    )
