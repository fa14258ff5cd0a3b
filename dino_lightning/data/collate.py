"""From samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dino_lightning.data.dataset import Sample
from dino_lightning.structures import Batch


def collate(samples: Sequence[Sample], *, pad_to: tuple[int, int] | None = None, pad_to_multiple: int = 1) -> Batch:
    """Put samples into one batch.

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
