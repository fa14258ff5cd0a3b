"""Floor plans drawn while training, beside the images of a dataset: no two alike, and no file of them."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from dino_lightning.boxes import xyxy_to_normalized_cxcywh
from dino_lightning.data.classes import Classes
from dino_lightning.data.dataset import CocoDetection, Draw, Sample
from dino_lightning.data.scan_noise import save_as_jpeg
from dino_lightning.data.transforms import LabelledImage, from_page
from dino_lightning.errors import DataError
from dino_lightning.floor_plans.dataset import Style, draw_plan
from dino_lightning.floor_plans.restyle import restyle

FIRST_SEED = 1 << 40  # the plans that `rooms` writes have smaller seeds: none of them is drawn here
MOST_DRAWN_ROOMS = 24  # on one plan: what memory is planned for
JPEG_QUALITY = (35, 90)


class WithDrawnPlans(Dataset[Sample]):
    """The images of a dataset and after them `count` floor plans, which are other ones in every epoch.

    Seed, epoch and index decide what is drawn (see `TrainSampler`), so a resumed run sees the same plans.

    Args:
        dataset: the images; its transform is applied to the plans, too.
        count: plans in each epoch.
        style: `clean` or `realistic`, see `draw_plan`.

    Raises:
        DataError: no class of the dataset can be that of the rooms.
    """

    def __init__(self, dataset: CocoDetection, *, count: int, style: Style = "realistic") -> None:
        self.dataset, self.count, self.style = dataset, count, style
        self.label = room_label(dataset.classes)

    def __len__(self) -> int:
        return len(self.dataset) + self.count

    def __getitem__(self, index: int | Draw) -> Sample:
        """The sample of an image, or a plan that the seed beside the index decides."""
        number, seed, *landscape = (index, index) if isinstance(index, int) else index
        if number < len(self.dataset):
            return self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._drawn(number, seed, bool(landscape[0]) if landscape else None)

    def _drawn(self, number: int, seed: int, landscape: bool | None) -> Sample:
        page, rooms = draw_plan(FIRST_SEED + seed, style=self.style, wings=True)
        if self.style == "realistic":
            page, rooms = restyle(page, rooms, np.random.default_rng((seed, 1)))
        width, height = page.size
        boxes = np.array([room.bbox_xyxy for room in rooms], dtype=np.float32).reshape(-1, 4)
        boxes_xyxy = torch.from_numpy(boxes.clip(0, [width, height, width, height]).astype(np.float32))
        boxes_xyxy = boxes_xyxy[(boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1)]
        labels = torch.full((len(boxes_xyxy),), self.label, dtype=torch.int64)
        example = LabelledImage(from_page(page), boxes_xyxy, labels, landscape=landscape)
        if self.style == "realistic" and torch.rand(()) < 0.5:
            example = save_as_jpeg(example, JPEG_QUALITY)
        if self.dataset.transform is not None:
            example = self.dataset.transform(example)
        return Sample(
            image=example.image,
            boxes_cxcywh=xyxy_to_normalized_cxcywh(example.boxes_xyxy, example.size),
            labels=example.labels,
            image_id=-1 - number,
            original_size=(height, width),
        )


def room_label(classes: Classes) -> int:
    """The label of the rooms: the only class, or the one with that name.

    Raises:
        DataError: there are several classes, and none is called room.
    """
    names = [name.strip().lower() for name in classes.names]
    if len(names) == 1:
        return 0
    for label, name in enumerate(names):
        if name in ("room", "rooms"):
            return label
    raise DataError(
        f"drawn_plans: drawn floor plans have the class room; the dataset's classes are {', '.join(classes.names)}. "
        "Leave drawn_plans out, or name a class room."
    )
